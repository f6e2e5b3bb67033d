"""Traces of small checkpoints, and ways to spoil them."""

import json
from types import SimpleNamespace

import numpy as np

from conftest import DATA
from flashinfer import Model
from flashinfer.formats.convert import convert
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.oracle.trace import trace

IDS = [5, 17, 60, 8, 9, 33]


def traced(name, folder, ids=IDS, **options):
    """Our own trace of a checkpoint: its model, bundle, path and (metadata, arrays)."""
    bundle, path = folder / f"{name}.flash", folder / f"{name}.safetensors"
    convert(DATA / name, bundle, "f32")
    with Model.open(bundle, neurons="dense", context=len(ids)) as model:
        trace(model, ids, path, **options)
    metadata, arrays = contents(path)
    return SimpleNamespace(
        model=DATA / name, bundle=bundle, path=path, metadata=metadata, arrays=arrays
    )


NUMPY = {"F32": np.float32, "I32": np.int32, "U8": np.uint8, "F64": np.float64, "I64": np.int64}
NAMES = {np.dtype(dtype): name for name, dtype in NUMPY.items()} | {np.dtype(bool): "BOOL"}


def contents(path):
    """(metadata, {name: array}) of a trace."""
    with SafetensorsFile(path) as file:
        arrays = {
            name: file.read_bytes(info.offset, info.nbytes)
            .view(NUMPY[info.dtype])
            .reshape(info.shape)
            for name, info in file.tensors.items()
        }
        return file.metadata, arrays


def write(path, metadata, arrays):
    """A safetensors file of any arrays and any metadata."""
    header, data = {"__metadata__": metadata}, b""
    for name, array in arrays.items():
        begin, data = len(data), data + np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    return write_raw(path, json.dumps(header).encode(), data)


def write_raw(path, header, data=b""):
    """A file with this header, sound or not."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path
