"""Writing small safetensors files, whose bytes follow from their tensors alone."""

import json
from collections.abc import Container, Mapping

import numpy as np

from flashinfer.formats.arrays import AnyArray

DTYPES = {
    np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.uint8): "U8",
    np.dtype(np.int32): "I32", np.dtype(np.int64): "I64",
}  # fmt: skip


def safetensors_bytes(
    tensors: Mapping[str, AnyArray],
    metadata: Mapping[str, str] | None = None,
    fp8: Container[str] = (),
) -> bytes:
    """The bytes of a safetensors file of these tensors, in the order of their names.

    fp8  tensors of bytes that are numbers in FP8 (e4m3)
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data: list[bytes] = []
    at = 0
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name])
        raw = values.astype(values.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": "F8_E4M3" if name in fp8 else DTYPES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [at, at + len(raw)],
        }
        data.append(raw)
        at += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data)
