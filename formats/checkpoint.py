"""Reading a Hugging Face checkpoint directory: its config, tensors and tokenizer.

safetensors, sharded safetensors, ``pytorch_model.bin`` and its shards look alike from outside.
"""

import os
from math import prod
from pathlib import Path

import numpy as np

from . import mxfp4
from .architectures import architecture
from .errors import FormatError, UserError
from .files import open_regular
from .number_formats import BY_SAFETENSORS
from .safetensors import SafetensorsFile
from .vocabulary import chat_template, read_json, tokenizer_json

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
        self.shapes = {}
        self.shard_of = {}
        for shard in self.shards:
            for name, shape in shard.shapes().items():
                if name in self.shard_of:
                    raise FormatError(f"{directory}: tensor {name} stands in two files")
                self.shard_of[name], self.shapes[name] = shard, shape
        self._join_mxfp4()

    def _join_mxfp4(self):
        """Tensors X_blocks and X_scales look like one called X_mxfp4."""
        for name in [n for n in self.shapes if n.endswith("_blocks")]:
            base, shape = name.removesuffix("_blocks"), self.shapes[name]
            if self.shapes.get(f"{base}_scales") != shape[:-1] or shape[-1:] != (16,):
                raise FormatError(f"{self.directory}: tensor {name} has no scales, or is {shape}")
            del self.shapes[name], self.shapes[f"{base}_scales"]
            self.shapes[f"{base}_mxfp4"] = (*shape[:-2], shape[-2] * mxfp4.BLOCK)

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

    def shards_of(self, name):
        """The shards that a tensor of ``shapes`` is read from."""
        pair = _mxfp4_pair(name) if name.endswith("_mxfp4") else [name]
        return [self.shard_of[n] for n in pair]

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
        return self.shard_of[name].read_rows(name, start, stop)

    def read_columns(self, name):
        """Yield a matrix (n, m) transposed, in pieces (<= COLUMN_CHUNK, n) float32.

        Holds the whole tensor in its own number format, and one piece.
        """
        yield from self.shard_of[name].read_columns(name)

    def generation_config(self):
        path = self.directory / "generation_config.json"
        return read_json(path) if path.exists() else {}

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
        if info.dtype not in BY_SAFETENSORS:
            raise FormatError(f"{self.file.path}: tensor {name} is {info.dtype}, not a float")
        format = BY_SAFETENSORS[info.dtype]
        raw = self.file.read_bytes(info.offset, info.nbytes).reshape(info.shape[0], -1)
        for start in range(0, info.shape[1], COLUMN_CHUNK):
            piece = raw[:, format.row_bytes(start) : format.row_bytes(start + COLUMN_CHUNK)]
            yield format.decode(piece).T


class TorchShard:
    """A ``pytorch_model.bin``; torch loads it, weights only, mapped and not read.

    A mapping ends the process where the file was cut meanwhile, so its size is looked at before
    rows are copied from it.
    """

    def __init__(self, path):
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{path}: reading it needs PyTorch: pip install torch, or save the "
                "checkpoint as safetensors"
            ) from None
        self.path, self.file = path, open_regular(path)
        self.size = os.fstat(self.file.fileno()).st_size
        try:
            self.tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            self.file.close()
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise FormatError(f"{path}: PyTorch cannot read it: {reason}") from None
        if not isinstance(self.tensors, dict) or not all(
            isinstance(t, torch.Tensor) for t in self.tensors.values()
        ):
            self.file.close()
            raise FormatError(f"{path}: not a map of tensors")

    def _tensor(self, name):
        if os.fstat(self.file.fileno()).st_size < self.size:
            raise FormatError(f"{self.path}: was cut while it was read")
        return self.tensors[name]

    def shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read_rows(self, name, start=0, stop=None):
        tensor = self._tensor(name)
        tensor = tensor.flatten(0, -2) if tensor.ndim > 2 else tensor
        return np.array(tensor[start:stop].float().numpy())

    def read_bytes(self, name, start, stop):
        return np.array(self._tensor(name).flatten(0, 1)[start:stop].flatten(1).numpy())

    def read_columns(self, name):
        for start in range(0, self.tensors[name].shape[1], COLUMN_CHUNK):
            piece = self._tensor(name)[:, start : start + COLUMN_CHUNK]
            yield np.array(piece.float().numpy()).T

    def close(self):
        self.tensors = {}
        self.file.close()


KINDS = (  # single file, index of shards, reader; the first that is there is used
    ("model.safetensors", "model.safetensors.index.json", SafetensorsShard),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", TorchShard),
)


def _open_shards(directory):
    for single, index, reader in KINDS:
        if (directory / index).exists():
            return [reader(directory / name) for name in shard_names(directory / index)]
        if (directory / single).exists():
            return [reader(directory / single)]
    names = " or ".join(name for kind in KINDS for name in kind[:2])
    raise FormatError(f"{directory}: no weights here; looked for {names}")


def shard_names(index):
    """The names of the files that an index of shards lists. Raises FormatError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise FormatError(f"{index}: weight_map is not a map of file names in this directory")
    return sorted(set(weight_map.values()))
