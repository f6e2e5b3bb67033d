"""Reading GGUF files: the header, checked at every step, and rows of tensors.

Counts, lengths and offsets that a file states are checked against the file's size, and the memory
that they ask for against a bound, before anything is allocated. Rows are read, not mapped: if the
file is cut in the meantime, a read gives an error where a mapping would end the process. See
github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format.
"""

import io
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Float32Array, UInt8Array
from ..bounded_json import JsonObject
from ..bundle.in_place import FILE_BYTES
from ..errors import FormatError, UserError, shown
from ..files import open_regular, read_at
from ..number_formats import FORMATS, NumberFormat

MAGICS = (b"GGUF", b"PWRI")  # the second is PowerInfer's
VERSIONS, ALIGNMENT, MOST_DIMENSIONS = (2, 3), 32, 4
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9
MOST_PARSED = 256 << 20  # bytes of memory for the header; half a million merges take 40 MB
# Python's overhead for a text, besides its characters; for a metadata value; for a tensor.
TEXT_BYTES, VALUE_BYTES, TENSOR_BYTES = 64, 256, 800


@dataclass(frozen=True)
class TensorType:
    """A GGML type: ``block`` values in ``block_bytes``."""

    name: str
    block: int
    block_bytes: int

    @property
    def format(self) -> NumberFormat | None:
        """The bundle's number format with the same bytes, or None."""
        return BY_TYPE.get(self.name)


BY_TYPE = {name.upper(): format for name, format in FORMATS.items()}
TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies; ``shape`` has NumPy's order: the length of a row comes last."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block * self.type.block_bytes


class _Described(NamedTuple):
    """What the header says of a tensor; ``offset`` counts from the first tensor."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int


def is_gguf(path: Path | str) -> bool:
    """Whether a file is GGUF, by its name or its first bytes."""
    if not Path(path).is_file():
        return False
    with open_regular(path) as file:
        return Path(path).suffix == ".gguf" or file.read(4) in MAGICS


class GgufFile:
    """An open GGUF file. Raises FormatError where the file is not sound."""

    metadata: JsonObject  # arrays of numbers are NumPy arrays, arrays of strings are lists
    tensors: dict[str, GgufTensor]

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.file = open_regular(path)
        try:
            self.size = os.fstat(self.file.fileno()).st_size
            if self.size < 24:
                raise FormatError(f"{path}: is too short for a GGUF file")
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        self.at, self.room = 0, MOST_PARSED  # the offset; bytes that the header may still take
        self.header = io.BufferedReader(self.file, 1 << 16)
        if self._take(4) not in MAGICS:
            raise FormatError(f"{self.path}: is not a GGUF file")
        version = self._scalar("<u4")
        if version not in VERSIONS:
            raise FormatError(f"{self.path}: has GGUF version {version}; supported are 2 and 3")
        n_tensors, n_values = self._count(24, "tensors"), self._count(12, "metadata")
        self._charge(n_values * VALUE_BYTES + n_tensors * TENSOR_BYTES)
        self.metadata = {}
        for _ in range(n_values):
            key = self._string("a metadata key")
            if key in self.metadata:
                raise FormatError(f"{self.path}: metadata {shown(key)} occurs twice")
            self.metadata[key] = self._value(self._scalar("<u4"), key)
        described = [self._tensor_info() for _ in range(n_tensors)]
        self.header.detach()  # the file stays open for reading rows
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise FormatError(f"{self.path}: general.alignment is not a power of two")
        begin = -(-self.at // alignment) * alignment
        self.tensors = {}
        for name, shape, kind, offset in described:
            tensor = GgufTensor(name, shape, kind, begin + offset)
            nbytes = prod(shape[:-1]) * tensor.row_bytes
            if offset % alignment or tensor.offset + nbytes > self.size:
                raise FormatError(
                    f"{self.path}: tensor {shown(name)} lies outside the file; is it cut?"
                )
            if name in self.tensors:
                raise FormatError(f"{self.path}: tensor {shown(name)} occurs twice")
            self.tensors[name] = tensor

    def _take(self, n: int) -> bytes:
        """The next ``n`` bytes of the header."""
        try:
            taken = self.header.read(n) if n <= self.size - self.at else b""
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read: {error.strerror}") from None
        if len(taken) < n:
            raise FormatError(f"{self.path}: its header ends in the middle; is it cut?")
        self.at += n
        return taken

    def _charge(self, nbytes: int) -> None:
        """Count the memory of a part of the header before it is allocated."""
        self.room -= nbytes
        if self.room < 0:
            raise FormatError(
                f"{self.path}: its header would take more than {MOST_PARSED >> 20} MiB of memory"
            )

    def _scalar(self, dtype: str) -> Any:
        return np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype=dtype)[0].item()

    def _count(self, least_bytes: int, what: str) -> int:
        """A count of items of which each takes at least ``least_bytes`` of the file."""
        count: int = self._scalar("<u8")
        if count > (self.size - self.at) // least_bytes:
            raise FormatError(f"{self.path}: {count} {what} do not fit the file; is it cut?")
        return count

    def _string(self, what: str) -> str:
        length = self._count(1, f"bytes of {what}")
        # A character may take four bytes in Python, beside its byte of the file.
        self._charge(TEXT_BYTES + 5 * length)
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.path}: {what} is not UTF-8") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            value = self._scalar(SCALARS[kind])
            return bool(value) if kind == BOOL else value
        if kind == STRING:
            return self._string(shown(key))
        inner = self._scalar("<u4") if kind == ARRAY else None
        if inner in SCALARS:
            dtype = np.dtype(SCALARS[inner])
            count = self._count(dtype.itemsize, f"values of {shown(key)}")
            self._charge(count * dtype.itemsize)
            return np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype)
        if inner == STRING:
            count = self._count(8, f"strings of {shown(key)}")
            self._charge(count * TEXT_BYTES)
            return [self._string(shown(key)) for _ in range(count)]
        raise FormatError(f"{self.path}: metadata {shown(key)} has the unknown type {kind}")

    def _tensor_info(self) -> _Described:
        name = self._string("a tensor's name")
        n = self._scalar("<u4")
        if not 1 <= n <= MOST_DIMENSIONS:
            raise FormatError(f"{self.path}: tensor {shown(name)} has {n} dimensions")
        shape = tuple(self._scalar("<u8") for _ in range(n))[::-1]
        code, offset = self._scalar("<u4"), self._scalar("<u8")
        if code not in TYPES:
            raise FormatError(
                f"{self.path}: tensor {shown(name)} has type {code}; supported: "
                f"{', '.join(kind.name for kind in TYPES.values())}"
            )
        kind = TYPES[code]
        if min(shape) < 1 or shape[-1] % kind.block:
            raise FormatError(f"{self.path}: tensor {shown(name)} cannot be {shape} of {kind.name}")
        return _Described(name, shape, kind, offset)

    @property
    def files(self) -> "list[GgufFile]":
        """The files that the tensors are in."""
        return [self]

    def address(self, name: str) -> int:
        """Where a tensor begins, as bundle/in_place.py counts: the file's number is 1."""
        return FILE_BYTES + self.tensors[name].offset

    def raw_rows(self, name: str, start: int = 0, stop: int | None = None) -> UInt8Array:
        """Rows ``start:stop`` as they lie in the file: (rows, row_bytes) uint8."""
        tensor = self.tensors[name]
        rows = prod(tensor.shape[:-1])
        stop = rows if stop is None else min(stop, rows)
        offset = tensor.offset + start * tensor.row_bytes
        data = read_at(self.file, offset, (stop - start) * tensor.row_bytes, self.path)
        return data.reshape(stop - start, tensor.row_bytes)

    def decode(self, kind: TensorType, raw: UInt8Array) -> Float32Array:
        """raw (rows, bytes) of a TensorType -> float32 (rows, columns).

        Raises UserError where the type needs the gguf package and that is not installed.
        """
        if kind.format is not None:
            return kind.format.decode(raw)
        try:
            from gguf import GGMLQuantizationType, quants
        except ImportError:
            raise UserError(
                f"{self.path}: {kind.name} needs the gguf package: "
                "pip install 'llm-in-a-flash[gguf]'"
            ) from None
        return quants.dequantize(np.ascontiguousarray(raw), GGMLQuantizationType[kind.name])

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
