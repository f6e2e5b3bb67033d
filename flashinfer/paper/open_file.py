"""A file opened so that its reads go past the page cache, where that works."""

import errno
import mmap
import os
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from flashinfer import kernels
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.kernels.arguments import MOST

Engine = Literal["auto", "io_uring", "threads", "buffered"]
IO: tuple[Engine, ...] = get_args(Engine)
IO_THREADS = 32  # reads in flight (the paper's figure, section 3.2)
ALIGNMENTS = (512, 1024, 2048, 4096)  # that direct reads may want


class OpenFile:
    """A file, open for reading.

    io         as ``Flash`` takes it
    name       of the file, in messages
    end        how many bytes there should be, where that need not be whole blocks: a read of the
               last ones asks for more, and is complete with these; None: no read asks for more
    alignment  bytes that offsets, lengths and addresses of reads must be multiples of; 1: they go
               through the page cache
    """

    def __init__(
        self, path: Path | str, io: Engine, name: Path | str, end: int | None = None
    ) -> None:
        self.name, self.end = name, MOST if end is None else end
        self.fd, self.alignment = self._open(path, io)

    def _open(self, path: Path | str, io: Engine) -> tuple[int, int]:
        """(descriptor, alignment), with O_DIRECT where that is wanted and works."""
        if io != "buffered" and hasattr(os, "O_DIRECT"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise FormatError(f"{self.name}: {error.strerror}") from None
            else:
                for alignment in ALIGNMENTS:
                    if self._reads(fd, alignment):
                        return fd, alignment
                os.close(fd)
        if io in ("io_uring", "threads"):
            raise FormatError(f"{self.name}: its file system has no O_DIRECT; use --io buffered")
        if io == "auto":
            print(
                f"flashinfer: {self.name}: no O_DIRECT on this file system, reading through the "
                "page cache",
                file=sys.stderr,
            )
        try:
            return os.open(path, os.O_RDONLY), 1
        except OSError as error:
            raise FormatError(f"{self.name}: {error.strerror}") from None

    @staticmethod
    def _reads(fd: int, alignment: int) -> bool:
        """Whether direct reads of this alignment work, found by trying."""
        size = os.fstat(fd).st_size
        begin = alignment if size >= 2 * alignment else 0
        with memoryview(mmap.mmap(-1, 2 * 4096)) as page:
            try:
                count = os.preadv(fd, [page[alignment : 2 * alignment]], begin)
            except OSError:
                return False
        return count == min(alignment, size)

    def close(self) -> None:
        """Call it when no read is in flight."""
        os.close(self.fd)


def reader_of(io: Engine, direct: bool) -> tuple[Engine, Any]:
    """(the way to read that is taken, its kernels.Reader), for direct reads or those through the
    page cache, of which io_uring would make threads of its own. Raises UserError."""
    if not direct:
        return "buffered", kernels.Reader(IO_THREADS)
    if io != "threads":
        try:
            return "io_uring", kernels.Reader(0)
        except OSError as error:
            if io == "io_uring":
                raise UserError(f"no io_uring here: {error.strerror}; use --io threads") from None
    return "threads", kernels.Reader(IO_THREADS)
