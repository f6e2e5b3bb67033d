"""Writing small GGUF files, version 3, little-endian; formats/sources/gguf.py reads them."""

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.number_formats import FORMATS
from flashinfer.formats.sources.gguf import ALIGNMENT, ARRAY, BOOL, STRING, TYPES

VERSION = 3
UINT32, INT32, FLOAT32 = 4, 5, 6
TYPE_CODES = {kind.name.lower(): code for code, kind in TYPES.items()}
Metadata = Mapping[str, bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]]


def gguf_bytes(
    metadata: Metadata, tensors: Mapping[str, AnyArray], format: str, exact: Sequence[str] = ()
) -> bytes:
    """The bytes of a GGUF file, its tensors in the order of their names.

    tensors  {name: float32}; weights that are matrices, and those of experts, are written in the
             number format ``format``; vectors, biases, and tensors whose names contain one of
             ``exact``, as f32
    """
    formats = {
        name: "f32" if is_exact(name, tensors[name].shape, exact) else format
        for name in sorted(tensors)
    }
    shapes = {name: (tensors[name].shape, kind) for name, kind in formats.items()}
    data = bytearray()
    for name, kind in formats.items():
        data += FORMATS[kind].encode(tensors[name]).tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    return gguf_header(metadata, shapes) + bytes(data)


def is_exact(name: str, shape: Sequence[int], exact: Sequence[str]) -> bool:
    """Whether a tensor is f32 in any file: vectors, biases, and names that contain one of these."""
    return len(shape) == 1 or name.endswith(".bias") or any(part in name for part in exact)


def gguf_header(metadata: Metadata, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> bytes:
    """All of a GGUF file that comes before its tensors, which follow in this order, each on the
    next multiple of ALIGNMENT; tensors: {name: (shape, number format)}."""
    infos, offset = [], 0
    for name, (shape, kind) in tensors.items():
        infos.append(
            _string(name)
            + _number(len(shape))
            + b"".join(_number(size, 8) for size in reversed(shape))
            + _number(TYPE_CODES[kind.lower()])
            + _number(offset, 8)
        )
        nbytes = prod(shape[:-1]) * FORMATS[kind].row_bytes(shape[-1])
        offset += nbytes + -nbytes % ALIGNMENT
    head = b"GGUF" + _number(VERSION) + _number(len(infos), 8) + _number(len(metadata), 8)
    for key, value in metadata.items():
        kind_of_value, raw = _value(value)
        head += _string(key) + _number(kind_of_value) + raw
    head += b"".join(infos)
    return head + bytes(-len(head) % ALIGNMENT)


def _value(value: object) -> tuple[int, bytes]:
    """(the type's code, the bytes) of a metadata value."""
    if isinstance(value, bool):
        return BOOL, bytes([value])
    if isinstance(value, int):
        return UINT32, _number(value)
    if isinstance(value, float):
        return FLOAT32, np.array(value, dtype="<f4").tobytes()
    if isinstance(value, str):
        return STRING, _string(value)
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"no GGUF type for {type(value).__name__}")
    kinds, parts = zip(*map(_value, value), strict=True)
    kind = INT32 if kinds[0] == UINT32 else kinds[0]
    return ARRAY, _number(kind) + _number(len(value), 8) + b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return _number(len(raw), 8) + raw


def _number(value: int, n: int = 4) -> bytes:
    return value.to_bytes(n, "little")
