"""Writing a flat bundle, a piece at a time; nothing half-written ever has the target's name."""

import itertools
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import numpy as np

from ..bounded_json import MOST, parsed_bytes
from ..errors import UserError
from ..files import replacing
from ..safetensors import MAX_HEADER_BYTES
from .reader import CHUNK_BYTES, HEADER_CRC, NO_CRC, PAGE, VERSION


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: ``chunks()`` yields its bytes in order, as uint8 arrays or bytes."""

    name: str
    dtype: str  # the safetensors name
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable]
    format: str = ""  # the number format's name where safetensors has none


def new_tensor(name, format, shape, chunks):
    """A NewTensor of weights; ``chunks()`` yields whole rows: float32, or bytes of ``format``."""

    def all_encoded():
        try:
            for values in chunks():
                yield encoded(values, format)
        except UserError as error:
            raise type(error)(f"tensor {name}: {error}") from None

    nbytes = prod(shape[:-1]) * format.row_bytes(shape[-1])
    if format.block == 1:
        return NewTensor(name, format.safetensors, shape, nbytes, all_encoded)
    shape = (*shape[:-1], format.row_bytes(shape[-1]))
    return NewTensor(name, format.safetensors, shape, nbytes, all_encoded, format.name)


def encoded(values, format):
    """Rows of float32, or of bytes that are in this NumberFormat already, as bytes."""
    return values if values.dtype == np.uint8 else format.encode(values)


def byte_tensor(name, data):
    return NewTensor(name, "U8", (len(data),), len(data), lambda: [data])


def stored_tensors(bundle, names=None):
    """The tensors of an open bundle, in file order, as NewTensors that copy them."""
    infos = sorted(bundle.file.tensors.values(), key=lambda info: info.offset)

    def copier(info):
        def chunks():
            for start in range(0, info.nbytes, CHUNK_BYTES):
                length = min(CHUNK_BYTES, info.nbytes - start)
                yield bundle.file.read_bytes(info.offset + start, length)

        return chunks

    return [
        NewTensor(
            info.name,
            info.dtype,
            info.shape,
            info.nbytes,
            copier(info),
            bundle.formats.get(info.name, ""),
        )
        for info in infos
        if not info.name.startswith("_pad.") and (names is None or names(info.name))
    ]


def write_bundle(
    path, tensors, hf_config, source, calibration=None, progress=lambda nbytes: None, order=None
):
    """Write a bundle of ``tensors`` (NewTensors, in file order) to ``path``; return its size.

    order  the names of tensors in the order in which they are to be made; None: as in the file
    Nothing stands under ``path`` before all is written and flushed. ``progress`` is told the
    bytes as they are written. Raises UserError where the disk is full or cannot be written.
    """
    tensors = list(_padded(tensors))
    metadata = {
        "format": "flashinfer",
        "flashinfer.version": VERSION,
        "flashinfer.config": json.dumps(hf_config),
        "flashinfer.formats": json.dumps({t.name: t.format for t in tensors if t.format}),
        "flashinfer.source": json.dumps(source),
        "flashinfer.calibration": json.dumps(calibration),
    }
    header = _header(tensors, metadata, {t.name: NO_CRC for t in tensors}, None)
    if len(header) > MAX_HEADER_BYTES or parsed_bytes(header) > MOST:
        raise UserError(f"{path}: a header of {len(header):,} bytes is more than can be read again")
    length = -(8 + len(header)) % PAGE + len(header)
    *begins, total = itertools.accumulate((t.nbytes for t in tensors), initial=8 + length)
    turn = {name: i for i, name in enumerate(order or ())}
    in_turn = sorted(
        zip(tensors, begins, strict=True), key=lambda pair: turn.get(pair[0].name, len(turn))
    )
    with replacing(path, total) as file:
        checksums = {}
        for tensor, begin in in_turn:
            crc, written = 0, 0
            file.seek(begin)
            for chunk in tensor.chunks():
                view = memoryview(chunk).cast("B")
                crc = zlib.crc32(view, crc)
                file.write(view)
                written += len(view)
                progress(len(view))
            if written != tensor.nbytes:
                raise AssertionError(f"{tensor.name}: {written} bytes, not {tensor.nbytes}")
            checksums[tensor.name] = f"{crc:08x}"
        checksums = {t.name: checksums[t.name] for t in tensors}
        header = _header(tensors, metadata, checksums, length)
        file.seek(0)
        file.write(length.to_bytes(8, "little") + header)
    return total


def _padded(tensors):
    """``tensors`` with a ``_pad.N`` after each that does not end on a page."""
    for number, tensor in enumerate(tensors):
        yield tensor
        gap = -tensor.nbytes % PAGE
        if gap:
            yield byte_tensor(f"_pad.{number}", bytes(gap))


def _header(tensors, metadata, checksums, length):
    """The JSON header, padded to ``length``; its own CRC-32 is taken with that CRC at zero."""
    entries = {
        "__metadata__": {
            **metadata,
            "flashinfer.checksums": json.dumps(checksums),
            "flashinfer.header_crc32": NO_CRC,
        }
    }
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    if length is None:
        return header
    header = header.ljust(length)
    blank, crc = HEADER_CRC % NO_CRC, HEADER_CRC % f"{zlib.crc32(header):08x}"
    return header.replace(blank.encode(), crc.encode(), 1)
