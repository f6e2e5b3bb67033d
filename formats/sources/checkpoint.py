"""Reading a Hugging Face checkpoint directory: its config, tensors and tokenizer.

safetensors, sharded safetensors, ``pytorch_model.bin`` and its shards look alike from outside.
"""

import os
from math import prod
from pathlib import Path
from zipfile import is_zipfile

import numpy as np

from .. import fp8, mxfp4
from ..architectures import architecture
from ..bounded_json import read_json
from ..config import token_ids
from ..errors import FormatError, UserError, reason
from ..files import open_regular
from ..number_formats import SOURCES
from ..safetensors import SafetensorsFile
from .tokenizers.vocabulary import chat_template, special_tokens, tokenizer_json

COLUMN_CHUNK = 256


class Checkpoint:
    """An open checkpoint: ``config`` (a dict) and ``shapes`` {tensor name: shape}.

    shards  where its weights are read from; None: files in the directory
    """

    def __init__(self, directory, shards=None):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            what = "is a file" if self.directory.exists() else "does not exist"
            raise FormatError(
                f"{directory}: {what}; give the directory of a Hugging Face checkpoint, or a "
                "GGUF file"
            )
        self.config_path = self.directory / "config.json"
        self.config = read_json(self.config_path)
        self.shards = _open_shards(self.directory) if shards is None else shards
        self.shapes, self.shard_of = {}, {}
        self.scales = {}  # {FP8 tensor: (the tensor of its scales, rows and columns of a block)}
        try:
            self._find_tensors()
            self._join_fp8()
            self._join_mxfp4()
        except BaseException:
            self.close()
            raise

    def _find_tensors(self):
        for shard in self.shards:
            for name, shape in shard.shapes().items():
                if name in self.shard_of:
                    raise FormatError(f"{self.directory}: tensor {name} stands in two files")
                self.shard_of[name], self.shapes[name] = shard, shape

    def _join_mxfp4(self):
        """Tensors X_blocks and X_scales look like one called X_mxfp4."""
        for name in [n for n in self.shapes if n.endswith("_blocks")]:
            base, shape = name.removesuffix("_blocks"), self.shapes[name]
            if self.shapes.get(f"{base}_scales") != shape[:-1] or shape[-1:] != (16,):
                raise FormatError(f"{self.directory}: tensor {name} has no scales, or is {shape}")
            del self.shapes[name], self.shapes[f"{base}_scales"]
            self.shapes[f"{base}_mxfp4"] = (*shape[:-2], shape[-2] * mxfp4.BLOCK)

    def _join_fp8(self):
        """Scales of FP8 tensors are a part of these."""
        for name in [n for n in self.shapes if self.shard_of[n].dtype(n) == "F8_E4M3"]:
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
    def naming(self):
        """Where to find what: the architecture's module."""
        return architecture(self.config)

    def tokenizer_json(self):
        """The text of ``tokenizer.json``, or one made of the older files, or None."""
        return tokenizer_json(self.directory)

    def chat_template(self):
        """The jinja template of a conversation, or None."""
        return chat_template(self.directory)

    def special_tokens(self):
        """{role: token} of the special tokens that the tokenizer names."""
        return special_tokens(self.directory)

    def shards_of(self, name):
        """The shards that a tensor of ``shapes`` is read from."""
        pair = _mxfp4_pair(name) if name.endswith("_mxfp4") else [name]
        scales = [self.scales[name][0]] if name in self.scales else []
        return [self.shard_of[n] for n in pair + scales]

    def raw_rows(self, name, format, start, stop):
        """Rows as bytes of this NumberFormat, where that saves decoding them: never, here."""
        return None

    def read_rows(self, name, start=0, stop=None):
        """Rows ``start:stop`` of a tensor as float32; see SafetensorsFile."""
        if name.endswith("_mxfp4"):
            blocks, scales = (
                self.shard_of[n].read_bytes(n, start, stop) for n in _mxfp4_pair(name)
            )
            return mxfp4.decode(blocks.reshape(*scales.shape, -1), scales)
        values = self.shard_of[name].read_rows(name, start, stop)
        if name not in self.scales:
            return values
        scales, block = self.scales[name]
        scales = self.shard_of[scales].read_rows(
            scales, start // block[0], -(-(start + len(values)) // block[0])
        )
        return fp8.scaled(values, scales, block, start)

    def read_columns(self, name):
        """Yield a matrix (n, m) transposed, in pieces (<= COLUMN_CHUNK, n) float32.

        Holds the whole tensor in its own number format, and one piece.
        """
        pieces = self.shard_of[name].read_columns(name)
        if name not in self.scales:
            yield from pieces
            return
        scales, (rows, columns) = self.scales[name]
        scales, start = self.shard_of[scales].read_rows(scales).T, 0
        for piece in pieces:  # of which the blocks are transposed, too
            yield fp8.scaled(piece, scales[start // columns :], (columns, rows), start)
            start += len(piece)

    def generation_config(self):
        """What is to be done differently when text is made; {} where nothing is said."""
        path = self.directory / "generation_config.json"
        found = read_json(path) if path.exists() else {}
        try:
            token_ids(found, "eos_token_id")
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        return found

    def close(self):
        for shard in self.shards:
            shard.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _mxfp4_pair(name):
    base = name.removesuffix("mxfp4")
    return [f"{base}blocks", f"{base}scales"]


class SafetensorsShard:
    def __init__(self, path):
        self.file = SafetensorsFile(path)
        self.close, self.read_rows = self.file.close, self.file.read_rows

    def shapes(self):
        return {name: info.shape for name, info in self.file.tensors.items()}

    def dtype(self, name):
        return self.file.tensors[name].dtype

    def read_bytes(self, name, start, stop):
        """Rows of a 3-D or 4-D tensor of bytes, its matrices one after the other (rows, bytes)."""
        info = self.file.tensors[name]
        if info.dtype != "U8":
            raise FormatError(f"{self.file.path}: tensor {name} is {info.dtype}, not U8")
        row = prod(info.shape[2:])
        raw = self.file.read_bytes(info.offset + start * row, (stop - start) * row)
        return raw.reshape(stop - start, row)

    def read_columns(self, name):
        info = self.file.tensors[name]
        if info.dtype not in SOURCES:
            raise FormatError(f"{self.file.path}: tensor {name} is {info.dtype}, not a float")
        format = SOURCES[info.dtype]
        raw = self.file.read_bytes(info.offset, info.nbytes).reshape(info.shape[0], -1)
        for start in range(0, info.shape[1], COLUMN_CHUNK):
            piece = raw[:, format.row_bytes(start) : format.row_bytes(start + COLUMN_CHUNK)]
            yield format.decode(piece).T


class TorchShard:
    """A ``pytorch_model.bin``; torch loads it, weights only, and maps it where it can.

    A mapping ends the process where the file was cut meanwhile, so its size is looked at before
    rows are copied from it.
    """

    def __init__(self, path):
        self.path, self.file = path, open_regular(path)
        self.size = os.fstat(self.file.fileno()).st_size
        try:
            self.tensors = load_torch(path, mapped=True)
        except BaseException:
            self.file.close()
            raise
        import torch

        self.fp8, self.u8, self.strided = torch.float8_e4m3fn, torch.uint8, torch.strided

    def _tensor(self, name):
        if os.fstat(self.file.fileno()).st_size < self.size:
            raise FormatError(f"{self.path}: was cut while it was read")
        return self.tensors[name]

    def shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name):
        return "F8_E4M3" if self.tensors[name].dtype == self.fp8 else str(self.tensors[name].dtype)

    def _floats(self, name):
        tensor = self._tensor(name)
        if not tensor.is_floating_point() or tensor.layout != self.strided or tensor.is_meta:
            raise FormatError(f"{self.path}: tensor {name} is {tensor.dtype}, not a float")
        return tensor

    def read_rows(self, name, start=0, stop=None):
        tensor = self._floats(name)
        tensor = tensor.flatten(0, -2) if tensor.ndim > 2 else tensor
        return np.array(tensor[start:stop].float().numpy())

    def read_bytes(self, name, start, stop):
        tensor = self._tensor(name)
        if tensor.dtype != self.u8:
            raise FormatError(f"{self.path}: tensor {name} is {tensor.dtype}, not bytes")
        return np.array(tensor.flatten(0, 1)[start:stop].flatten(1).numpy())

    def read_columns(self, name):
        for start in range(0, self.tensors[name].shape[1], COLUMN_CHUNK):
            piece = self._floats(name)[:, start : start + COLUMN_CHUNK]
            yield np.array(piece.float().numpy()).T

    def close(self):
        self.tensors = {}
        self.file.close()


KINDS = (  # single file, index of shards, reader; the first that is there is used
    ("model.safetensors", "model.safetensors.index.json", SafetensorsShard),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", TorchShard),
)


def load_torch(path, mapped=False):
    """{name: tensor} of a file that ``torch.save`` wrote, weights only. Raises FormatError, and
    UserError where PyTorch is not installed.

    mapped  map the file where that can be done, instead of reading it
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
        # Files of PyTorch before 1.6 are no zip archives, and cannot be mapped.
        mapped = mapped and is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise FormatError(f"{path}: PyTorch cannot read it: {reason(error)}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise FormatError(f"{path}: not a map of tensors")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _open_shards(directory):
    for single, index, reader in KINDS:
        if (directory / single).exists():
            return [reader(directory / single)]
        if (directory / index).exists():
            return _open_all(directory, shard_names(directory / index), reader)
    names = " or ".join(name for kind in KINDS for name in kind[:2])
    raise FormatError(f"{directory}: no weights here; looked for {names}")


def _open_all(directory, names, reader):
    shards = []
    try:
        for name in names:
            shards.append(reader(directory / name))
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return shards


def shard_names(index):
    """The names of the files that an index of shards lists. Raises FormatError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise FormatError(f"{index}: weight_map is not a map of file names in this directory")
    return sorted(set(weight_map.values()))
