"""The files of a checkpoint's weights: safetensors and PyTorch's own look alike from outside."""

import os
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol
from zipfile import is_zipfile

import numpy as np

from ..arrays import Float32Array, UInt8Array
from ..bounded_json import read_json
from ..errors import FormatError, UserError, reason
from ..files import open_regular
from ..number_formats import SOURCES
from ..safetensors import SafetensorsFile

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
        """Rows of a tensor of bytes, (rows, bytes): its matrices below each other."""

    def read_columns(self, name: str) -> Iterator[Float32Array]:
        """Yield a matrix (n, m) transposed, in pieces (<= COLUMN_CHUNK, n) float32."""

    def close(self) -> None: ...


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
        row = prod(info.shape[1 if len(info.shape) == 2 else 2 :])
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
        tensor = tensor if tensor.ndim == 2 else tensor.flatten(0, 1)
        return np.array(tensor[start:stop].flatten(1).numpy())

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


def open_shards(directory: Path) -> Sequence[Shard]:
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
