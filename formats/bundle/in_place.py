"""Weights that stay in a model's GGUF files: the bundle beside these files is their companion.

A companion holds what cannot be taken from the files byte by byte: vectors, matrices whose rows are
in another order there, the tokenizer, and what calibration found. ``flashinfer.in_place`` of its
metadata names the files, and says for each other tensor where its bytes lie in them.
"""

import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..bounded_json import JsonObject
from ..errors import FormatError, UserError, shown
from ..files import open_regular, read_at, same_file
from ..numbers import is_whole

KEY = "flashinfer.in_place"  # of the bundle's metadata
# The address of a byte is its offset, and FILE_BYTES for each file before its own. The bundle is
# the first of the files, so that the address of a byte of its own is the byte's offset.
FILE_BYTES = 1 << 44
MOST_FILES = 4096
HEAD_BYTES = 64 << 10  # of a file that its fingerprint is made of: these first bytes,
SAMPLES, SAMPLE_BYTES = 64, 4096  # and so many pieces, evenly spread over the others


class Run(NamedTuple):
    """A matrix of each of a layer's units, or a matrix alone: ``address`` is where the first one
    begins, and the next one begins ``stride`` bytes after it."""

    address: int
    stride: int


@dataclass(frozen=True)
class SourceFile:
    """A file that weights stay in: its name, in the companion's folder; its size in bytes; and the
    ``fingerprint`` of what it held when the companion was made."""

    name: str
    size: int
    fingerprint: str


class Placed(NamedTuple):
    """A tensor in the files: the name of its number format, and its Runs, one for each matrix."""

    format: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class InPlace:
    """What stays in other files: these, and {tensor: Placed}."""

    files: tuple[SourceFile, ...] = ()
    tensors: Mapping[str, Placed] = field(default_factory=dict)

    def as_json(self) -> JsonObject:
        return {
            "files": [[file.name, file.size, file.fingerprint] for file in self.files],
            "tensors": {
                name: [placed.format, *(list(run) for run in placed.runs)]
                for name, placed in self.tensors.items()
            },
        }

    def refuse_beyond(self, run: Run, count: int, nbytes: int) -> None:
        """Raise FormatError where not all of ``count`` matrices of ``nbytes`` lie in their file."""
        number, offset = divmod(run.address, FILE_BYTES)
        size = self.files[number - 1].size
        if run.stride < nbytes or offset + (count - 1) * run.stride + nbytes > size:
            raise FormatError(
                f"{count} x {nbytes} bytes at {offset} lie beyond {self.files[number - 1].name}"
            )


def in_place_from_json(value: JsonObject) -> InPlace:
    """The InPlace that ``as_json`` gave; {} gives one without files. Raises FormatError."""
    if not value:
        return InPlace()
    files, tensors = value.get("files"), value.get("tensors")
    if not isinstance(files, list) or not 1 <= len(files) <= MOST_FILES:
        raise FormatError("flashinfer.in_place names no files")
    if not isinstance(tensors, dict):
        raise FormatError("flashinfer.in_place has no tensors")
    found = tuple(_source_file(file) for file in files)
    if len({file.name for file in found}) < len(found):
        raise FormatError("flashinfer.in_place names a file twice")
    return InPlace(
        found,
        {name: _placed(name, entry, len(files)) for name, entry in tensors.items()},
    )


def _source_file(value: Any) -> SourceFile:
    name, size, found = value if isinstance(value, list) and len(value) == 3 else (None, 0, None)
    if isinstance(name, str) and isinstance(found, str) and is_whole(size, 1, FILE_BYTES):
        # No path: a file from elsewhere names none but its neighbours.
        plain = name not in ("", ".", "..") and not {"/", "\0"} & set(name)
        if plain and re.fullmatch("[0-9a-f]{64}", found):
            return SourceFile(name, size, found)
    raise FormatError(f"flashinfer.in_place has {shown(value)}, which is no file")


def _placed(name: str, value: Any, n_files: int) -> Placed:
    format, *runs = value if isinstance(value, list) and len(value) > 1 else (None,)
    sound = all(
        isinstance(run, list)
        and len(run) == 2
        and is_whole(run[0], FILE_BYTES, (n_files + 1) * FILE_BYTES - 1)
        and is_whole(run[1], 1, FILE_BYTES)
        for run in runs
    )
    if isinstance(format, str) and sound:
        return Placed(format, tuple(Run(*run) for run in runs))
    raise FormatError(f"flashinfer.in_place does not say where {shown(name)} lies")


def source_file(path: Path) -> SourceFile:
    """The SourceFile of a file that is there now. Raises FormatError."""
    with open_regular(path) as file:
        return _described(file, path)


def _described(file: io.FileIO, path: Path) -> SourceFile:
    """The fingerprint is the SHA-256 of the file's size, of its head, and of pieces of the rest."""
    size = os.fstat(file.fileno()).st_size
    found = hashlib.sha256(size.to_bytes(8, "little"))
    head = min(size, HEAD_BYTES)
    found.update(read_at(file, 0, head, path).data)
    last = size - SAMPLE_BYTES
    for number in range(1, SAMPLES + 1) if last > head else ():
        at = head + number * (last - head) // SAMPLES
        found.update(read_at(file, at, SAMPLE_BYTES, path).data)
    return SourceFile(path.name, size, found.hexdigest())


def refuse_apart(companion: Path | str, source: Path) -> None:
    """Raise UserError where a bundle that has weights in ``source`` would not lie beside it."""
    if not same_file(Path(companion).parent, source.parent):
        raise UserError(
            f"{companion}: a bundle that has weights in {source.name} lies beside it, in "
            f"{source.parent}"
        )


def opened_sources(companion: Path, in_place: InPlace) -> list[io.FileIO]:
    """The files beside a companion that it names, open for reading. Raises FormatError where one is
    missing, or is not what it was."""
    opened: list[io.FileIO] = []
    try:
        for expected in in_place.files:
            path = companion.with_name(expected.name)
            try:
                opened.append(open_regular(path))
            except FormatError as error:
                raise FormatError(f"{error}; {companion} has weights there") from None
            if _described(opened[-1], path) != expected:
                raise FormatError(
                    f"{path}: is another file than {companion} has weights in; remove that one "
                    "and make it again: flashinfer convert --in-place"
                )
    except BaseException:
        for file in opened:
            file.close()
        raise
    return opened
