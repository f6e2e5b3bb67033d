"""Reading any safetensors file, a checkpoint or a bundle, without trusting anything in it.

The format (huggingface/safetensors, README, "Format"): 8 bytes little-endian header length N;
N bytes of JSON mapping names to dtype, shape and data_offsets, with an optional
``__metadata__`` of strings; then the data, without holes or overlaps.
"""

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from . import bounded_json
from .arrays import Float32Array, UInt8Array
from .errors import FormatError, shown
from .files import open_regular, read_at, read_into
from .number_formats import SOURCES
from .numbers import is_whole

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
NO_CRC = "0" * 8  # stands in a header for its own CRC-32 while that is computed
CHECKSUMS = "flashinfer.checksums"  # of the metadata: {tensor: its CRC-32}, as JSON
CHUNK_BYTES = 8 << 20  # read at a time
HEADER_CRC = '"flashinfer.header_crc32":"%s"'
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``offset`` and ``nbytes`` are bytes, from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file: ``tensors`` {name: TensorInfo}, ``metadata`` {str: str}.

    most  bytes of memory that parsing the header may take
    Raises FormatError, naming the file, if the header is not sound or the data does not fit.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: Path | str, most: int = bounded_json.MOST) -> None:
        self.path = Path(path)
        self.file = open_regular(self.path)
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            header = self._read_header(most)
            self.metadata, self.tensors = parse_header(
                header, self.size - 8 - len(header), 8 + len(header), self.path, most
            )
        except BaseException:
            self.file.close()
            raise
        self.header_bytes = len(header)

    def _read_header(self, most: int) -> bytearray:
        if self.size < 8:
            raise FormatError(f"{self.path}: not a safetensors file: only {self.size} bytes long")
        length = int.from_bytes(bytes(self.read_bytes(0, 8)), "little")
        if length > self.size - 8 or length > MAX_HEADER_BYTES:
            raise FormatError(
                f"{self.path}: not a safetensors file, or cut off: its header would be "
                f"{length} bytes, the file has {self.size}"
            )
        if length > most // 2:  # the header's bytes and its decoded text are in memory together
            raise FormatError(
                f"{self.path}: its header has {length >> 20:,} MiB, too much to be parsed in "
                f"{most >> 20:,} MiB of memory"
            )
        header = bytearray(length)  # a buffer to read into that can also be decoded as it is
        read_into(self.file, 8, memoryview(header), self.path)
        return header

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read_bytes(self, offset: int, length: int) -> UInt8Array:
        """``length`` bytes from ``offset`` of the file."""
        return read_at(self.file, offset, length, self.path)

    def check_header(self) -> None:
        """Raise FormatError where the header is not what its own CRC-32 was made of."""
        header = bytes(self.read_bytes(8, self.header_bytes))
        stored = self.metadata.get("flashinfer.header_crc32", "")
        if not re.fullmatch("[0-9a-f]{8}", stored):
            raise FormatError(f"{self.path}: the header has no checksum")
        blank = header.replace((HEADER_CRC % stored).encode(), (HEADER_CRC % NO_CRC).encode(), 1)
        if f"{zlib.crc32(blank):08x}" != stored:
            raise FormatError(f"{self.path}: the header does not match its checksum")

    def chunks(self, offset: int, nbytes: int) -> Iterator[UInt8Array]:
        """``nbytes`` bytes from ``offset`` of the file, CHUNK_BYTES at a time."""
        for start in range(0, nbytes, CHUNK_BYTES):
            yield self.read_bytes(offset + start, min(CHUNK_BYTES, nbytes - start))

    def check_tensor(self, name: str) -> None:
        """Raise FormatError where a tensor is not what its CRC-32 in the metadata was made of."""
        info, found = self.tensors[name], 0
        stored = bounded_json.parse(self.metadata.get(CHECKSUMS, "{}"), self.path)
        for chunk in self.chunks(info.offset, info.nbytes):
            found = zlib.crc32(chunk.data, found)
        if not isinstance(stored, dict) or stored.get(name) != f"{found:08x}":
            raise FormatError(f"{self.path}: tensor {shown(name)} does not match its checksum")

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32Array:
        """Rows ``start:stop`` of a tensor, (rows, columns) float32.

        A vector's rows are its elements. A tensor of more than two dimensions is read as its
        matrices below each other.
        """
        info = self.tensors[name]
        if info.dtype not in SOURCES:
            known = ", ".join(SOURCES)
            raise FormatError(
                f"{self.path}: tensor {shown(name)} is {info.dtype}; known are {known}"
            )
        format = SOURCES[info.dtype]
        rows = prod(info.shape[:-1]) if len(info.shape) > 1 else prod(info.shape)
        stop = rows if stop is None else min(stop, rows)
        row_bytes = info.nbytes // rows if rows else 0
        raw = self.read_bytes(info.offset + start * row_bytes, (stop - start) * row_bytes)
        return format.decode(raw).reshape((stop - start, *info.shape[1:][-1:]))


def parse_header(
    header: bytes | bytearray,
    data_bytes: int,
    data_start: int,
    path: Path | str,
    most: int = bounded_json.MOST,
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Check a header against the data's size; return (metadata, {name: TensorInfo}).

    data_bytes  bytes of data that the file has, beginning at offset ``data_start``
    Raises FormatError, naming ``path``.
    """
    entries = bounded_json.parse(header, f"{path}: the header", most, unique=True)
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ is not a map of strings")
    tensors = {
        name: _tensor_info(name, entry, data_bytes, data_start, path)
        for name, entry in entries.items()
    }
    end = 0
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        begin = info.offset - data_start
        if begin != end:
            what = "overlaps the one before it" if begin < end else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {shown(info.name)} {what}")
        end += info.nbytes
    if end != data_bytes:
        raise FormatError(f"{path}: the tensors have {end} bytes, the file {data_bytes}: cut off?")
    return metadata, tensors


def _tensor_info(
    name: str, entry: Any, data_bytes: int, data_start: int, path: Path | str
) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FormatError(f"{where} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FormatError(f"{where} has the unknown dtype {shown(dtype)}")
    if not _naturals(shape) or len(shape) > 8:
        raise FormatError(f"{where} has no sound shape")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        raise FormatError(f"{where} lies outside the file")
    nbytes = offsets[1] - offsets[0]
    if prod(shape) * ITEM_BYTES[dtype] != nbytes:
        raise FormatError(f"{where}: {dtype} of shape {shown(shape)} does not take {nbytes} bytes")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(is_whole(v, 0) for v in values)
