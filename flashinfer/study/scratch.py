"""Logits in a temporary file: those of a whole text are more than a memory budget holds."""

import os
import tempfile
from typing import Any

import numpy as np

from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.errors import UserError

FOLDER = "/var/tmp"  # where no TMPDIR is named; /tmp lies in DRAM on many systems


class ScratchLogits:
    """Rows of logits (T, vocab_size) float32 in a file without a name, gone when it is closed.

    The file lies in the directory that the environment variable TMPDIR names, or in FOLDER. Raises
    UserError where it cannot be made there, or the disk has not room for all rows.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.folder, self.row_bytes = os.environ.get("TMPDIR") or FOLDER, 4 * shape[1]
        self.vocab_size, needed = shape[1], shape[0] * self.row_bytes
        try:
            free = os.statvfs(self.folder)
            if needed > free.f_bavail * free.f_frsize:
                raise UserError(
                    f"{self.folder}: has no room for {needed / 1e6:,.0f} MB of logits; evaluate "
                    "fewer --tokens, or let TMPDIR name another directory"
                )
            self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from None

    def write(self, first: int, logits: Float32Array) -> None:
        """Keep the rows ``logits`` (n, vocab_size) from row ``first`` on."""
        view, at = np.ascontiguousarray(logits).data.cast("B"), first * self.row_bytes
        try:
            while view:
                count = os.pwrite(self.file.fileno(), view, at)
                view, at = view[count:], at + count
        except OSError as error:
            raise self._failed(error) from None

    def rows(self, first: int, n: int) -> Float32Array:
        """The rows first:first + n, (n, vocab_size)."""
        raw = os.pread(self.file.fileno(), n * self.row_bytes, first * self.row_bytes)
        return np.frombuffer(raw, dtype=np.float32).reshape(n, self.vocab_size)

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: no temporary file can be written: {error.strerror}")

    def __enter__(self) -> "ScratchLogits":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.file.close()
