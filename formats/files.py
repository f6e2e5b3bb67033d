"""Opening files safely: only regular files are read, and output appears whole or not at all.

Every file is untrusted. A name may lead to a pipe that nobody writes to, to a device without an
end, or to a file that is far too large; none of these may block the program.
"""

import errno
import fcntl
import io
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from .arrays import UInt8Array
from .errors import FormatError, UserError

MOST_TEXT = 256 << 20  # bytes of a text that is read whole; the largest tokenizers have some 40 MB
SUFFIX = ".part"
# What _temporary_name puts behind the target's name. A killed process may leave such files.
TEMPORARY = re.compile(r"flashinfer-\d+-[0-9a-f]{8}" + re.escape(SUFFIX))
DESCRIPTORS = "/proc/self/fd"  # linking an entry of it gives a name to a file without one
# What opening a file without a name (O_TMPFILE) fails with where the file system has none.
NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


# ---------------------------------------------------------------------- reading


def open_regular(path: Path | str) -> io.FileIO:
    """A regular file, open for unbuffered reading. Opening never waits.

    Raises FormatError where the file does not exist or cannot be opened, and where it is a
    directory, a device, a pipe or a socket.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # the name holds a zero byte
        raise FormatError(f"{path}: is not a file's name") from None
    except OSError as error:
        socket = error.errno == errno.ENXIO
        reason = "is not a regular file" if socket else error.strerror
        raise FormatError(f"{path}: {reason}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise FormatError(f"{path}: is a directory, not a file")
        if not stat.S_ISREG(mode):
            raise FormatError(f"{path}: is not a regular file")
        return io.FileIO(descriptor, "r")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path | str, most: int = MOST_TEXT) -> bytes:
    """All bytes of a regular file. Raises FormatError, also where it has more than ``most``."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise FormatError(f"{path}: has {size:,} bytes, more than the {most:,} it may have")
            with io.BufferedReader(file) as buffered:
                return buffered.read(size)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}") from None


def read_at(file: io.FileIO, offset: int, length: int, path: Path | str) -> UInt8Array:
    """``length`` bytes from ``offset`` of an open file.

    Raises FormatError, naming ``path``, offset and length, where the file ends before.
    """
    buffer = np.empty(length, dtype=np.uint8)
    read_into(file, offset, buffer.data, path)
    return buffer


def read_into(file: io.FileIO, offset: int, buffer: memoryview, path: Path | str) -> None:
    """Fill ``buffer`` from ``offset`` of an open file. Raises FormatError as ``read_at`` does."""
    done, length = 0, len(buffer)
    while done < length:
        try:
            count, reason = (
                os.preadv(file.fileno(), [buffer[done:]], offset + done),
                "it is cut off",
            )
        except OSError as error:
            count, reason = 0, str(error.strerror)
        if count == 0:
            raise FormatError(f"{path}: reading {length} bytes at {offset}: {reason}")
        done += count


def read_text(path: Path | str, most: int = MOST_TEXT) -> str:
    """All of a UTF-8 text. Raises FormatError as ``read_bytes`` does, and where it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is not UTF-8 text") from None


def opened_text(path: Path | str) -> TextIO:
    """A UTF-8 text, open for reading piece by piece.

    Opening and ``read`` raise FormatError as ``read_text`` does.
    """
    return _Text(path)


class _Text(io.TextIOWrapper):
    def __init__(self, path: Path | str) -> None:
        super().__init__(io.BufferedReader(open_regular(path)), encoding="utf-8")
        self.path = path

    def read(self, size: int | None = -1, /) -> str:
        try:
            return super().read(size)
        except UnicodeDecodeError:
            raise FormatError(f"{self.path}: is not UTF-8 text") from None
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read: {error.strerror}") from None


def same_file(a: Path | str, b: Path | str) -> bool:
    """Whether two paths lead to the same file, through any links."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------------- writing


@contextmanager
def replacing(path: Path | str, size: int = 0) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path``, flushed, when the block ends without error.

    size  bytes that will be written; a disk without that much room is refused at once
    Where the file system supports it, the file has no name until the block ends, so that a killed
    process leaves nothing behind. Elsewhere a temporary file may stay, and the next write to the
    same target removes it. Symbolic links are followed, and the file they lead to is replaced. Its
    mode is kept, and its owner where permissions allow. Raises UserError.
    """
    folder, name = _place(path)
    try:
        descriptor, temporary = _new_file(folder, name)
        try:
            with open(descriptor, "wb") as file:
                _refuse_full(folder, size)
                yield file
                file.flush()
                _keep_attributes(file.fileno(), folder / name)
                os.fsync(file.fileno())
                if temporary is None:
                    # A link cannot replace an existing file; a rename can.
                    temporary = _temporary_name(folder, name)
                    _link(file.fileno(), temporary)
                os.replace(temporary, folder / name)
                temporary = None
            _flush_directory(folder)
        finally:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)
    except OSError as error:
        raise _failed(path, error, size) from None


def refuse_target(path: Path | str, size: int = 0) -> None:
    """Raise UserError where ``replacing(path, size)`` would fail at once.

    Long work calls this first, so that its result is not lost at the end.
    """
    folder, name = _place(path)
    try:
        descriptor, temporary = _new_file(folder, name)
        os.close(descriptor)
        if temporary is not None:
            os.unlink(temporary)
        _refuse_full(folder, size)
    except OSError as error:
        raise _failed(path, error, size) from None


def refuse_loss(target: Path | str, sources: Iterable[Path | str]) -> None:
    """Raise UserError where writing ``target`` would replace one of ``sources``, through any links.

    sources  paths; a directory stands for all files in it except bundles (``.flash``)
    """
    for source in sources:
        files: list[Path | str] = [source]
        if os.path.isdir(source):
            files = [file for file in Path(source).iterdir() if file.suffix != ".flash"]
        if any(same_file(target, file) for file in files):
            raise UserError(f"{target}: is what is read, or a part of it ({source}); name another")


@contextmanager
def scratch_directory(parent: Path | str, name: str) -> Iterator[Path]:
    """A new directory in ``parent`` for temporary files; it is removed when the block ends.

    name  the file that these temporary files are needed for; directories that killed processes left
          behind for the same name are removed first
    Raises OSError.
    """
    parent = Path(parent)
    _remove_stale(parent, name)
    folder = _temporary_name(parent, name)
    try:
        os.mkdir(folder, 0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(descriptor)
            yield folder
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def nameless_file(folder: Path, size: int) -> int:
    """The descriptor of a new file in ``folder``, to read and write, whose ``size`` bytes have
    their room on the disk. It has no name: it is gone when it is closed, whatever ends the process.
    Raises UserError.
    """
    try:
        descriptor, temporary = _new_file(folder, "scratch")
        try:
            if temporary is not None:
                os.unlink(temporary)
            _refuse_full(folder, size)
            os.posix_fallocate(descriptor, 0, size)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise _failed(folder, error, size) from None
    return descriptor


def _place(path: Path | str) -> tuple[Path, str]:
    """(folder, name) of the file to write, with symbolic links followed. Raises UserError."""
    mode = None
    try:
        target = Path(os.path.realpath(path))
        with suppress(FileNotFoundError):
            mode = os.stat(target).st_mode
    except ValueError:
        raise UserError(f"{path}: is not a file's name") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    if str(path).endswith("/") or (mode is not None and stat.S_ISDIR(mode)):
        raise UserError(f"{path}: is a directory; name a file to write")
    if mode is not None and not stat.S_ISREG(mode):
        raise UserError(f"{path}: is not a regular file; name a file to write")
    if mode is not None and not os.access(target, os.W_OK):
        raise UserError(f"{path}: cannot be written: it is read-only")
    return target.parent, target.name


def _new_file(folder: Path, name: str) -> tuple[int, Path | None]:
    """(descriptor of a new locked file, its path or None where it has no name). Raises OSError."""
    _remove_stale(folder, name)
    descriptor, temporary = _nameless(folder), None
    if descriptor is None:
        temporary = _temporary_name(folder, name)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except BaseException:  # Ctrl-C may arrive when the file already exists
            with suppress(OSError):
                os.unlink(temporary)
            raise
    _lock(descriptor)
    return descriptor, temporary


def _nameless(folder: Path) -> int | None:
    """The descriptor of a new file without a name; None where that is not supported here."""
    if not os.path.isdir(DESCRIPTORS):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in NO_NAMELESS or not folder.is_dir():
            raise OSError(error.errno, error.strerror) from None
        return None


def _temporary_name(folder: Path, name: str) -> Path:
    """A path beside ``name`` that no other process uses."""
    return folder / f"{_prefix(name)}flashinfer-{os.getpid()}-{os.urandom(4).hex()}{SUFFIX}"


def _prefix(name: str) -> str:
    """What temporary names for ``name`` begin with, short enough for a name of 255 bytes."""
    return f".{os.fsdecode(os.fsencode(name)[:160])}."


def _remove_stale(folder: Path, name: str) -> None:
    """Remove the temporary files for ``name`` that no living process has locked."""
    prefix = _prefix(name)
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for found in names:
        if not (found.startswith(prefix) and TEMPORARY.fullmatch(found[len(prefix) :])):
            continue
        with suppress(OSError):
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(folder / found, flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(folder / found, ignore_errors=True)
                else:
                    os.unlink(folder / found)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Mark a file as in use. The lock ends with the process, whatever ends that."""
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _keep_attributes(descriptor: int, target: Path) -> None:
    """Give a new file the mode and owner of the file that it replaces, if there is one."""
    try:
        there = os.stat(target)
    except FileNotFoundError:
        return
    with suppress(PermissionError):
        os.fchown(descriptor, there.st_uid, there.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(there.st_mode) & 0o777)


def _link(descriptor: int, name: Path) -> None:
    """Give a name to an open file that has none."""
    folder = os.open(DESCRIPTORS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Given a directory, Python calls linkat, which follows the link in /proc to the file.
        os.link(str(descriptor), name, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _flush_directory(folder: Path) -> None:
    """Write a new directory entry to the disk, where the file system supports that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse_full(folder: Path, size: int) -> None:
    """Raise OSError where the disk has not ``size`` bytes left."""
    free = os.statvfs(folder)
    if size > free.f_bavail * free.f_frsize:
        raise OSError(errno.ENOSPC, "the disk is full")


def _failed(path: Path | str, error: OSError, size: int) -> UserError:
    """The UserError for an OSError from writing ``size`` bytes to ``path``."""
    if error.errno == errno.ENOSPC:
        needed = f"; {size / 1e6:,.0f} MB are needed" if size else ""
        return UserError(f"{path}: the disk is full{needed}")
    return UserError(f"{path}: cannot be written: {error.strerror}")
