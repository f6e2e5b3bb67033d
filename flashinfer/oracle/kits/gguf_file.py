"""Writing small GGUF files, version 3, little-endian; formats/sources/gguf.py reads them."""

from collections.abc import Mapping, Sequence

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
    infos, data = [], bytearray()
    for name in sorted(tensors):
        values = tensors[name]
        vector = values.ndim == 1 or name.endswith(".bias")
        kind = "f32" if vector or any(part in name for part in exact) else format
        infos.append(
            _string(name)
            + _number(len(values.shape))
            + b"".join(_number(size, 8) for size in reversed(values.shape))
            + _number(TYPE_CODES[kind])
            + _number(len(data), 8)
        )
        data += FORMATS[kind].encode(values).tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    head = b"GGUF" + _number(VERSION) + _number(len(infos), 8) + _number(len(metadata), 8)
    for key, value in metadata.items():
        kind_of_value, raw = _value(value)
        head += _string(key) + _number(kind_of_value) + raw
    head += b"".join(infos)
    return head + bytes(-len(head) % ALIGNMENT) + bytes(data)


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
