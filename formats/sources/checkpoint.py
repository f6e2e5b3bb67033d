"""Reading a Hugging Face checkpoint directory: its config, tensors and tokenizer.

safetensors, sharded safetensors, ``pytorch_model.bin`` and its shards look alike from outside.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol
from zipfile import is_zipfile

import numpy as np

from .. import fp8, mxfp4
from ..architectures import ARCHITECTURES, architecture
from ..architectures.wrappers import HEAD, Wrapper, text_config, wrapper_of
from ..arrays import Float32Array, UInt8Array
from ..bounded_json import JsonObject, read_json
from ..errors import FormatError, UserError, reason
from ..fields import token_ids
from ..files import open_regular
from ..number_formats import FORMATS, SOURCES, NumberFormat
from ..safetensors import SafetensorsFile
from .tokenizers.vocabulary import chat_template, special_tokens, tokenizer_json

COLUMN_CHUNK = 256  # columns of a matrix that are transposed at a time


class Shard(Protocol):
    """A file of a checkpoint's weights."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{tensor: its shape}."""

    def dtype(self, name: str) -> str:
        """A tensor's dtype. FP8 is "F8_E4M3" in every kind of shard."""

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32Array:
        """Rows ``start:stop`` of a tensor as float32; see SafetensorsFile."""

    def read_bytes(self, name: str, start: int, stop: int) -> UInt8Array:
        """Rows of a 3-D or 4-D tensor of bytes, (rows, bytes): its matrices below each other."""

    def read_columns(self, name: str) -> Iterator[Float32Array]:
        """Yield a matrix (n, m) transposed, in pieces (<= COLUMN_CHUNK, n) float32."""

    def close(self) -> None: ...


class Checkpoint:
    """An open checkpoint.

    shards  where its weights are read from; None: files in the directory
    """

    config: JsonObject  # as Hugging Face wrote it, and an architecture's OPTIONAL
    shapes: dict[str, tuple[int, ...]]  # of the tensors
    scales: dict[str, tuple[str, tuple[int, int]]]  # {FP8 tensor: (its scales, their block)}
    # Of a model of text and images ``config`` and ``shapes`` are those of its text part.
    wrapper: Wrapper | None  # which it is
    model_type: object  # as config.json has it
    stored: dict[str, str]  # {tensor: its name in its shard}
    not_text: int  # how many tensors of other parts there are

    def __init__(self, directory: Path | str, shards: Sequence[Shard] | None = None) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            what = "is a file" if self.directory.exists() else "does not exist"
            raise FormatError(
                f"{directory}: {what}; give the directory of a Hugging Face checkpoint, or a "
                "GGUF file"
            )
        self.config_path = self.directory / "config.json"
        found = read_json(self.config_path)
        self.wrapper, self.model_type = wrapper_of(found), found.get("model_type")
        try:
            self.config = text_config(found)
        except FormatError as error:
            raise FormatError(f"{self.config_path}: {error}") from None
        self.shards = _open_shards(self.directory) if shards is None else shards
        self.shard_of: dict[str, Shard] = {}
        self.stored: dict[str, str] = {}
        self.not_text = 0
        self.shapes, self.scales = {}, {}
        try:
            self._find_tensors()
            self._state_optional()
            self._join_fp8()
            self._join_mxfp4()
        except BaseException:
            self.close()
            raise

    def _find_tensors(self) -> None:
        for shard in self.shards:
            for stored, shape in shard.shapes().items():
                name = self.wrapper.text_name(stored) if self.wrapper else stored
                if name is None:
                    self.not_text += 1
                    continue
                if name in self.shard_of:
                    raise FormatError(f"{self.directory}: tensor {name} stands in two files")
                self.shard_of[name], self.shapes[name] = shard, shape
                self.stored[name] = stored
        if self.wrapper:
            self.config["tie_word_embeddings"] = HEAD not in self.shapes

    def _state_optional(self) -> None:
        """Let the config say which parts the checkpoint has of those that are left to it."""
        model_type = self.config.get("model_type")
        module = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
        for field, name in getattr(module, "OPTIONAL", {}).items():
            self.config[field] = not self.shapes.keys().isdisjoint((name, name.partition(".")[2]))

    def _join_mxfp4(self) -> None:
        """Let the tensors X_blocks and X_scales look like one tensor X_mxfp4."""
        for name in [n for n in self.shapes if n.endswith("_blocks")]:
            base, shape = name.removesuffix("_blocks"), self.shapes[name]
            if self.shapes.get(f"{base}_scales") != shape[:-1] or shape[-1:] != (16,):
                raise FormatError(f"{self.directory}: tensor {name} has no scales, or is {shape}")
            del self.shapes[name], self.shapes[f"{base}_scales"]
            self.shapes[f"{base}_mxfp4"] = (*shape[:-2], shape[-2] * mxfp4.BLOCK)

    def _dtype(self, name: str) -> str:
        return self.shard_of[name].dtype(self.stored[name])

    def _join_fp8(self) -> None:
        """Let the scales of FP8 tensors look like a part of these tensors."""
        for name in [n for n in self.shapes if self._dtype(n) == "F8_E4M3"]:
            scales, shape = f"{name}{fp8.SCALE}", self.shapes[name]
            try:
                block = fp8.block_shape(self.config)
            except FormatError as error:
                raise FormatError(f"{self.config_path}: {error}") from None
            found = fp8.block_of(shape, self.shapes.pop(scales, ()), block)
            if found is None:
                raise FormatError(
                    f"{self.directory}: FP8 tensor {name} {shape} has no {scales} for whole blocks "
                    f"of {block}"
                )
            self.scales[name] = scales, found

    @property
    def naming(self) -> Any:
        """The architecture's module, which says where to find which tensor."""
        return architecture(self.config)

    def tokenizer_json(self) -> str | None:
        """The text of ``tokenizer.json``, or one made of the older files, or None."""
        return tokenizer_json(self.directory)

    def chat_template(self) -> str | None:
        """The jinja template of a conversation, or None."""
        return chat_template(self.directory)

    def special_tokens(self) -> dict[str, str]:
        """{role: token} of the special tokens that the tokenizer names."""
        return special_tokens(self.directory)

    def format_of(self, name: str) -> NumberFormat:
        """The NumberFormat that a tensor is converted to where the user names none."""
        return FORMATS["f16"]

    def shards_of(self, name: str) -> list[Shard]:
        """The shards that a tensor of ``shapes`` is read from."""
        pair = _mxfp4_pair(name) if name.endswith("_mxfp4") else [name]
        scales = [self.scales[name][0]] if name in self.scales else []
        return [self.shard_of[n] for n in pair + scales]

    def raw_rows(self, name: str, format: NumberFormat, start: int, stop: int) -> None:
        """Nothing: rows of a checkpoint are always decoded, see GgufCheckpoint."""

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32Array:
        """Rows ``start:stop`` of a tensor as float32; see SafetensorsFile."""
        if name.endswith("_mxfp4"):
            stop = prod(self.shapes[name][:-1]) if stop is None else stop
            blocks, scales = (
                self.shard_of[n].read_bytes(self.stored[n], start, stop) for n in _mxfp4_pair(name)
            )
            return mxfp4.decode(blocks.reshape(*scales.shape, -1), scales)
        values = self.shard_of[name].read_rows(self.stored[name], start, stop)
        if name not in self.scales:
            return values
        of_scales, block = self.scales[name]
        factors = self.shard_of[of_scales].read_rows(
            self.stored[of_scales], start // block[0], -(-(start + len(values)) // block[0])
        )
        return fp8.scaled(values, factors, block, start)

    def read_columns(self, name: str) -> Iterator[Float32Array]:
        """Yield a matrix (n, m) transposed, in pieces (<= COLUMN_CHUNK, n) float32.

        Memory: the whole tensor in its own number format, and one piece.
        """
        pieces = self.shard_of[name].read_columns(self.stored[name])
        if name not in self.scales:
            yield from pieces
            return
        of_scales, (rows, columns) = self.scales[name]
        factors, start = self.shard_of[of_scales].read_rows(self.stored[of_scales]).T, 0
        for piece in pieces:  # the blocks of a transposed piece are transposed, too
            yield fp8.scaled(piece, factors[start // columns :], (columns, rows), start)
            start += len(piece)

    def generation_config(self) -> JsonObject:
        """The config of text generation, which may differ from ``config``; {} without one."""
        path = self.directory / "generation_config.json"
        found = read_json(path) if path.exists() else {}
        try:
            token_ids(found, "eos_token_id")
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        return found

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _mxfp4_pair(name: str) -> list[str]:
    base = name.removesuffix("mxfp4")
    return [f"{base}blocks", f"{base}scales"]


class SafetensorsShard:
    """A Shard of safetensors."""

    def __init__(self, path: Path | str) -> None:
        self.file = SafetensorsFile(path)
        self.close, self.read_rows = self.file.close, self.file.read_rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.file.tensors.items()}

    def dtype(self, name: str) -> str:
        return self.file.tensors[name].dtype

    def read_bytes(self, name: str, start: int, stop: int) -> UInt8Array:
        info = self.file.tensors[name]
        if info.dtype != "U8":
            raise FormatError(f"{self.file.path}: tensor {name} is {info.dtype}, not U8")
        row = prod(info.shape[2:])
        raw = self.file.read_bytes(info.offset + start * row, (stop - start) * row)
        return raw.reshape(stop - start, row)

    def read_columns(self, name: str) -> Iterator[Float32Array]:
        info = self.file.tensors[name]
        if info.dtype not in SOURCES:
            raise FormatError(f"{self.file.path}: tensor {name} is {info.dtype}, not a float")
        format = SOURCES[info.dtype]
        raw = self.file.read_bytes(info.offset, info.nbytes).reshape(info.shape[0], -1)
        for start in range(0, info.shape[1], COLUMN_CHUNK):
            piece = raw[:, format.row_bytes(start) : format.row_bytes(start + COLUMN_CHUNK)]
            yield format.decode(piece).T


class TorchShard:
    """A Shard that ``torch.save`` wrote, such as ``pytorch_model.bin``.

    torch loads it, weights only, and maps the file where it can. Reading a mapping of a file that
    was cut in the meantime would end the process, so the file's size is checked before rows are
    copied from it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self.file = path, open_regular(path)
        self.size = os.fstat(self.file.fileno()).st_size
        try:
            self.tensors = load_torch(path, mapped=True)
        except BaseException:
            self.file.close()
            raise
        import torch

        self.fp8, self.u8, self.strided = torch.float8_e4m3fn, torch.uint8, torch.strided

    def _tensor(self, name: str) -> Any:
        if os.fstat(self.file.fileno()).st_size < self.size:
            raise FormatError(f"{self.path}: was cut while it was read")
        return self.tensors[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return "F8_E4M3" if self.tensors[name].dtype == self.fp8 else str(self.tensors[name].dtype)

    def _floats(self, name: str) -> Any:
        tensor = self._tensor(name)
        if not tensor.is_floating_point() or tensor.layout != self.strided or tensor.is_meta:
            raise FormatError(f"{self.path}: tensor {name} is {tensor.dtype}, not a float")
        return tensor

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32Array:
        tensor = self._floats(name)
        tensor = tensor.flatten(0, -2) if tensor.ndim > 2 else tensor
        return np.array(tensor[start:stop].float().numpy())

    def read_bytes(self, name: str, start: int, stop: int) -> UInt8Array:
        tensor = self._tensor(name)
        if tensor.dtype != self.u8:
            raise FormatError(f"{self.path}: tensor {name} is {tensor.dtype}, not bytes")
        return np.array(tensor.flatten(0, 1)[start:stop].flatten(1).numpy())

    def read_columns(self, name: str) -> Iterator[Float32Array]:
        for start in range(0, self.tensors[name].shape[1], COLUMN_CHUNK):
            piece = self._floats(name)[:, start : start + COLUMN_CHUNK]
            yield np.array(piece.float().numpy()).T

    def close(self) -> None:
        self.tensors = {}
        self.file.close()


OpenShard = Callable[[Path], Shard]
# A single file, the index of its shards, and what opens either; the first that exists is used.
KINDS: tuple[tuple[str, str, OpenShard], ...] = (
    ("model.safetensors", "model.safetensors.index.json", SafetensorsShard),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", TorchShard),
)


def load_torch(path: Path | str, mapped: bool = False) -> dict[str, Any]:
    """{name: torch.Tensor} of a file that ``torch.save`` wrote, weights only.

    mapped  map the file instead of reading it, where that is possible
    Raises FormatError, and UserError where PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading it needs PyTorch: pip install torch, or save the checkpoint as "
            "safetensors"
        ) from None
    open_regular(path).close()
    try:
        # Files of PyTorch before 1.6 are not zip archives, and cannot be mapped.
        mapped = mapped and is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch raises exceptions of many classes for a damaged file
        raise FormatError(f"{path}: PyTorch cannot read it: {reason(error)}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise FormatError(f"{path}: not a map of tensors")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _open_shards(directory: Path) -> Sequence[Shard]:
    for single, index, open_shard in KINDS:
        if (directory / single).exists():
            return [open_shard(directory / single)]
        if (directory / index).exists():
            return _open_all(directory, shard_names(directory / index), open_shard)
    names = " or ".join(name for kind in KINDS for name in kind[:2])
    raise FormatError(f"{directory}: no weights here; looked for {names}")


def _open_all(directory: Path, names: list[str], open_shard: OpenShard) -> Sequence[Shard]:
    shards: list[Shard] = []
    try:
        for name in names:
            shards.append(open_shard(directory / name))
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return shards


def shard_names(index: Path) -> list[str]:
    """The names of the files that an index of shards lists. Raises FormatError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise FormatError(f"{index}: weight_map is not a map of file names in this directory")
    return sorted(set(weight_map.values()))
