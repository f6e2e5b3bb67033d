"""Writing a flat bundle, a piece at a time; nothing half-written ever has the target's name."""

import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from ..arrays import AnyArray, Int64Array, UInt8Array
from ..bounded_json import MOST, JsonObject, parsed_bytes
from ..errors import UserError
from ..files import replacing
from ..number_formats import NumberFormat
from ..progress import Progress, no_progress
from ..safetensors import CHECKSUMS, HEADER_CRC, MAX_HEADER_BYTES, NO_CRC
from .calibration import Calibration
from .in_place import KEY as IN_PLACE
from .in_place import InPlace, Run
from .layout import places_name
from .reader import VERSION, Bundle
from .stored import PAGE, StoredTensor

ROWS_BYTES = 1 << 20  # of rows that lie apart, read and written at a time


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: ``chunks()`` yields its bytes in order.

    lies  where its source has these very bytes, of a GGUF file: a Run for each of its matrices, or
          one; addresses as in_place.py has them, counted from the source's first file on
    """

    name: str
    dtype: str  # the safetensors name
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[UInt8Array | bytes]]
    format: str = ""  # the number format's name where safetensors has none
    lies: tuple[Run, ...] | None = None


def new_tensor(
    name: str,
    format: NumberFormat,
    shape: tuple[int, ...],
    chunks: Callable[[], Iterable[AnyArray]],
) -> NewTensor:
    """A NewTensor of weights.

    chunks  yields whole rows: float32 values, or uint8 bytes that are in ``format`` already
    """

    def all_encoded() -> Iterator[UInt8Array]:
        try:
            for values in chunks():
                yield encoded(values, format)
        except UserError as error:
            raise type(error)(f"tensor {name}: {error}") from None

    nbytes = prod(shape[:-1]) * format.row_bytes(shape[-1])
    if format.safetensors != "U8":
        return NewTensor(name, format.safetensors, shape, nbytes, all_encoded)
    shape = (*shape[:-1], format.row_bytes(shape[-1]))
    return NewTensor(name, format.safetensors, shape, nbytes, all_encoded, format.name)


def encoded(values: AnyArray, format: NumberFormat) -> UInt8Array:
    """The bytes of rows of float32; rows of uint8 are bytes of ``format`` already."""
    return values if values.dtype == np.uint8 else format.encode(values)


def byte_tensor(name: str, data: bytes) -> NewTensor:
    """A NewTensor of plain bytes, such as a tokenizer's file."""
    return NewTensor(name, "U8", (len(data),), len(data), lambda: [data])


def stored_tensors(
    bundle: Bundle, names: Callable[[str], bool] = lambda name: True
) -> list[NewTensor]:
    """The tensors of an open bundle for which ``names(name)``, in file order, to be copied."""
    infos = sorted(bundle.file.tensors.values(), key=lambda info: info.offset)

    return [
        NewTensor(
            info.name,
            info.dtype,
            info.shape,
            info.nbytes,
            partial(bundle.file.chunks, info.offset, info.nbytes),
            bundle.formats.get(info.name, ""),
        )
        for info in infos
        if not info.name.startswith("_pad.") and names(info.name)
    ]


def laid_out(
    bundle: Bundle, tensors: Iterable[NewTensor], places: Mapping[int, AnyArray] | None
) -> list[NewTensor]:
    """Tensors of an open bundle, some of which are its layers' neurons, in another layout.

    places  {layer: (neurons,), where each neuron is to lie, a permutation} of those that have
            neurons; None: neurons lie by their numbers
    """
    if places is None and not bundle.has_layout:
        return list(tensors)
    layers = {bundle.bundles(i).name: i for i in range(len(bundle.config.layers))}
    new = []
    for tensor in tensors:
        if tensor.name in layers:
            stored = bundle.bundles(layers[tensor.name])
            order = np.arange(stored.rows)
            if places is not None:
                order = np.argsort(places[layers[tensor.name]])
            tensor = replace(tensor, chunks=partial(_rows, bundle, stored, order))
        new.append(tensor)
    return [*(_places_tensor(*of_layer) for of_layer in (places or {}).items()), *new]


def _places_tensor(layer: int, places: AnyArray) -> NewTensor:
    data = np.ascontiguousarray(places, dtype="<i4")
    return NewTensor(
        places_name(layer), "I32", data.shape, data.nbytes, lambda: [data.view(np.uint8)]
    )


def _rows(bundle: Bundle, stored: StoredTensor, rows: Int64Array) -> Iterator[UInt8Array]:
    """The bytes of these rows of a tensor, some at a time."""
    step = max(1, ROWS_BYTES // stored.row_bytes)
    for first in range(0, len(rows), step):
        at = stored.place(rows[first : first + step])
        ends = np.flatnonzero(np.diff(at, append=-1) != 1) + 1  # of rows that lie side by side
        runs = zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
        yield np.concatenate([
            bundle.file.read_bytes(
                stored.offset + int(at[begin]) * stored.row_bytes, (end - begin) * stored.row_bytes
            )
            for begin, end in runs
        ])  # fmt: skip


def write_bundle(
    path: Path | str,
    tensors: Iterable[NewTensor],
    hf_config: JsonObject,
    source: JsonObject,
    calibration: Calibration | None = None,
    progress: Progress = no_progress,
    order: Iterable[str] = (),
    outline: bool = False,
    in_place: InPlace | None = None,
) -> int:
    """Write a bundle to ``path``; return its size in bytes.

    tensors   in file order
    progress  is told the bytes written, as "write"
    order     names of tensors in the order in which they are to be made; those not named come
              last, in file order
    outline   write no weights: where they would lie the file has a hole, which takes no room; it
              can be planned, and its weights are zeros without checksums
    in_place  what lies in files beside ``path``, and is not written
    Nothing stands under ``path`` before everything is written and flushed. Raises UserError where
    the disk is full or cannot be written.
    """
    tensors = list(_padded(tensors))
    elsewhere = {} if in_place is None or not in_place.files else in_place.as_json()
    metadata = {
        "format": "flashinfer",
        "flashinfer.version": VERSION,
        "flashinfer.config": json.dumps(hf_config),
        "flashinfer.formats": json.dumps({t.name: t.format for t in tensors if t.format}),
        "flashinfer.source": json.dumps(source),
        "flashinfer.calibration": json.dumps(
            None if calibration is None else calibration.as_json()
        ),
        **({IN_PLACE: json.dumps(elsewhere)} if elsewhere else {}),
    }
    return write_tensors(path, tensors, metadata, progress, order, outline)


def write_tensors(
    path: Path | str,
    tensors: list[NewTensor],
    metadata: dict[str, str],
    progress: Progress = no_progress,
    order: Iterable[str] = (),
    outline: bool = False,
) -> int:
    """Write a safetensors file whose data begins on a page boundary, with a CRC-32 of each tensor
    and of the header in its metadata; arguments and errors are those of ``write_bundle``."""
    header = _header(tensors, metadata, {t.name: NO_CRC for t in tensors}, None)
    if len(header) > MAX_HEADER_BYTES or parsed_bytes(header) > MOST:
        raise UserError(f"{path}: a header of {len(header):,} bytes is more than can be read again")
    length = -(8 + len(header)) % PAGE + len(header)
    *begins, total = itertools.accumulate((t.nbytes for t in tensors), initial=8 + length)
    if outline:
        blank = {t.name: NO_CRC for t in tensors}
        with replacing(path) as file:
            file.write(length.to_bytes(8, "little") + _header(tensors, metadata, blank, length))
            file.truncate(total)
        return total
    turn = {name: i for i, name in enumerate(order)}
    in_turn = sorted(
        zip(tensors, begins, strict=True), key=lambda pair: turn.get(pair[0].name, len(turn))
    )
    with replacing(path, total) as file:
        checksums, done = {}, 8 + length
        for tensor, begin in in_turn:
            crc, written = 0, 0
            file.seek(begin)
            for chunk in tensor.chunks():
                view = chunk.data if isinstance(chunk, np.ndarray) else memoryview(chunk)
                view = view.cast("B")
                crc = zlib.crc32(view, crc)
                file.write(view)
                written += len(view)
                progress("write", done + written, total)
            done += written
            if written != tensor.nbytes:
                raise AssertionError(f"{tensor.name}: {written} bytes, not {tensor.nbytes}")
            checksums[tensor.name] = f"{crc:08x}"
        checksums = {t.name: checksums[t.name] for t in tensors}
        header = _header(tensors, metadata, checksums, length)
        file.seek(0)
        file.write(length.to_bytes(8, "little") + header)
    return total


def _padded(tensors: Iterable[NewTensor]) -> Iterator[NewTensor]:
    """``tensors``, with a ``_pad.N`` after each that does not end on a page boundary."""
    for number, tensor in enumerate(tensors):
        yield tensor
        gap = -tensor.nbytes % PAGE
        if gap:
            yield byte_tensor(f"_pad.{number}", bytes(gap))


def _header(
    tensors: list[NewTensor],
    metadata: dict[str, str],
    checksums: dict[str, str],
    length: int | None,
) -> bytes:
    """The JSON header, padded to ``length`` bytes; None: the shortest, without its CRC-32.

    The header's own CRC-32 is that of the header with NO_CRC in its place.
    """
    entries: JsonObject = {
        "__metadata__": {
            **metadata,
            CHECKSUMS: json.dumps(checksums),
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
