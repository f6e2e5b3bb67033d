"""Reading a Hugging Face checkpoint directory: its config, tensors and tokenizer.

safetensors, sharded safetensors, ``pytorch_model.bin`` and its shards look alike from outside.
"""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from .. import bitnet, fp8, mxfp4
from ..architectures import ARCHITECTURES, architecture
from ..architectures.wrappers import HEAD, Wrapper, text_config, wrapper_of
from ..arrays import Float32Array
from ..bounded_json import JsonObject, read_json
from ..errors import FormatError
from ..fields import token_ids
from ..number_formats import FORMATS, NumberFormat
from .shards import Shard, open_shards
from .ternary_matrix import TernaryMatrix, in_a_layer
from .tokenizers.vocabulary import chat_template, special_tokens, tokenizer_json


class Checkpoint:
    """An open checkpoint.

    shards  where its weights are read from; None: files in the directory
    """

    config: JsonObject  # as Hugging Face wrote it, and an architecture's OPTIONAL
    shapes: dict[str, tuple[int, ...]]  # of the tensors
    scales: dict[str, tuple[str, tuple[int, int]]]  # {FP8 tensor: (its scales, their block)}
    ternary: dict[str, TernaryMatrix]  # of a BitNet's linear layers, and some of their biases
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
        self.shards = open_shards(self.directory) if shards is None else shards
        self.shard_of: dict[str, Shard] = {}
        self.stored: dict[str, str] = {}
        self.not_text = 0
        self.shapes, self.scales, self.ternary = {}, {}, {}
        try:
            self._find_tensors()
            self._state_optional()
            self._join_fp8()
            self._join_mxfp4()
            self._join_bitnet()
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

    def _join_bitnet(self) -> None:
        """Let a BitNet's matrices look like those of their weights, and their scales like a part of
        them."""
        try:
            stored = bitnet.of_config(self.config)
        except FormatError as error:
            raise FormatError(f"{self.config_path}: {error}") from None
        if stored is None:
            return
        for name in [n for n, s in self.shapes.items() if len(s) == 2 and in_a_layer(n)]:
            scale = None if stored.online else f"{name}{bitnet.SCALE}"
            if scale is not None and prod(self.shapes.pop(scale, (0,))) != 1:
                raise FormatError(f"{self.directory}: tensor {name} has no {scale} of one number")
            its_scale = None if scale is None else self._place(scale)
            self.ternary[name] = TernaryMatrix(stored, self._place(name), its_scale)
            self.shapes[name] = self.ternary[name].shape
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias in self.shapes and stored.scales_biases:
                self.ternary[bias] = TernaryMatrix(stored, self._place(bias), its_scale)

    def _place(self, name: str) -> tuple[Shard, str]:
        """(the shard that has a tensor, its name there)."""
        return self.shard_of[name], self.stored[name]

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
        if name in self.ternary:
            return bitnet.format_of(self.shapes[name])
        return FORMATS["f16"]

    def shards_of(self, name: str) -> list[Shard]:
        """The shards that a tensor of ``shapes`` is read from."""
        if name in self.ternary:
            return self.ternary[name].shards
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
        if name in self.ternary:
            return self.ternary[name].read_rows(start, stop)
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
        if name in self.ternary:
            yield from self.ternary[name].read_columns()
            return
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
