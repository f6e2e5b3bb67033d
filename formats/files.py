"""Opening files safely: only regular files are read, and output appears whole or not at all.

Every file is untrusted. One that is opened by name may be a pipe that nobody writes to, a device
without an end, or far larger than it should be; none of these may hold the program up.
"""

import errno
import fcntl
import io
import os
import re
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from .errors import FormatError, UserError

MOST_TEXT = 256 << 20  # bytes of a text that is read whole; the largest tokenizers have some 40 MB
SUFFIX = ".part"
# What a kill may leave, of a write to ``name``: see _temporary_name.
TEMPORARY = re.compile(r"flashinfer-\d+-[0-9a-f]{8}" + re.escape(SUFFIX))
DESCRIPTORS = "/proc/self/fd"  # through which a file without a name gets one
NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


# ---------------------------------------------------------------------- reading


def open_regular(path):
    """A regular file, open for unbuffered reading. Never waits.

    Raises FormatError where there is none, it cannot be opened, or it is a directory, a device, a
    pipe or a socket.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a zero byte
        raise FormatError(f"{path}: is not a file's name") from None
    except OSError as error:
        reason = "is not a regular file" if error.errno == errno.ENXIO else error.strerror
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


def read_bytes(path, most=MOST_TEXT):
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


def read_at(file, offset, length, path):
    """``length`` bytes from ``offset`` of an open file, as a uint8 array.

    Raises FormatError, naming ``path``, offset and length, where the file ends before.
    """
    buffer = np.empty(length, dtype=np.uint8)
    read_into(file, offset, buffer, path)
    return buffer


def read_into(file, offset, buffer, path):
    """Fill a buffer of bytes from ``offset`` of an open file. Raises FormatError as ``read_at``."""
    view, done, length = memoryview(buffer), 0, len(buffer)
    while done < length:
        try:
            count, reason = os.preadv(file.fileno(), [view[done:]], offset + done), "it is cut off"
        except OSError as error:
            count, reason = 0, error.strerror
        if count == 0:
            raise FormatError(f"{path}: reading {length} bytes at {offset}: {reason}")
        done += count


def read_text(path, most=MOST_TEXT):
    """All of a UTF-8 text. Raises FormatError as ``read_bytes``, and where it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is not UTF-8 text") from None


def opened_text(path):
    """A UTF-8 text, open to be read piece by piece; opening and ``read`` raise FormatError as
    ``read_text`` does."""
    return _Text(path)


class _Text(io.TextIOWrapper):
    def __init__(self, path):
        super().__init__(io.BufferedReader(open_regular(path)), encoding="utf-8")
        self.path = path

    def read(self, size=-1):
        try:
            return super().read(size)
        except UnicodeDecodeError:
            raise FormatError(f"{self.path}: is not UTF-8 text") from None
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read: {error.strerror}") from None


def same_file(a, b):
    """Whether two paths lead to one file, by whatever links."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------------- writing


@contextmanager
def replacing(path, size=0):
    """A binary file that takes the place of ``path`` only when the block ends well, flushed.

    size  bytes that will be written; too little room is found before the block begins
    Where the file system can, the file has no name until then, so that even a kill leaves nothing;
    else, what a killed process left of the same target is removed. What ``path`` leads to by
    symbolic links is replaced, with its mode and, where that may be, its owner. Raises UserError.
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
                    # A link cannot replace a file, a rename can.
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


def refuse_target(path, size=0):
    """Raise UserError where ``replacing(path, size)`` would fail at once.

    Asked before long work, of which nothing shall be lost in the end.
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


def refuse_loss(target, sources):
    """Raise UserError where writing ``target`` would replace one of ``sources``, by whatever links.

    sources  paths; of a directory, all files in it count but bundles (``.flash``)
    """
    for source in sources:
        files = [source]
        if os.path.isdir(source):
            files = [file for file in Path(source).iterdir() if file.suffix != ".flash"]
        if any(same_file(target, file) for file in files):
            raise UserError(f"{target}: is what is read, or a part of it ({source}); name another")


@contextmanager
def scratch_directory(parent, name):
    """A new directory in ``parent`` for files on the way to ``name``, removed with them at the end.

    What a killed process left of the same name is removed first. Raises OSError.
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


def _place(path):
    """(folder, name) of what is to be written, symbolic links followed. Raises UserError."""
    try:
        target = Path(os.path.realpath(path))
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        mode = None
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


def _new_file(folder, name):
    """(descriptor of a new locked file, its path or None where it has no name). Raises OSError."""
    _remove_stale(folder, name)
    descriptor, temporary = _nameless(folder), None
    if descriptor is None:
        temporary = _temporary_name(folder, name)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except BaseException:  # an interrupt may come when the file is there already
            with suppress(OSError):
                os.unlink(temporary)
            raise
    _lock(descriptor)
    return descriptor, temporary


def _nameless(folder):
    """Descriptor of a new file without a name, or None where it could not be made or named."""
    if not os.path.isdir(DESCRIPTORS):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in NO_NAMELESS or not folder.is_dir():
            raise OSError(error.errno, error.strerror) from None
        return None


def _temporary_name(folder, name):
    """A name beside ``name`` that no other process uses."""
    return folder / f"{_prefix(name)}flashinfer-{os.getpid()}-{os.urandom(4).hex()}{SUFFIX}"


def _prefix(name):
    """What temporary names of ``name`` begin with; names have at most 255 bytes."""
    return f".{os.fsdecode(os.fsencode(name)[:160])}."


def _remove_stale(folder, name):
    """Remove what killed processes left of writes to ``name``: what no living one has locked."""
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


def _lock(descriptor):
    """Say that a living process uses a file; the lock goes with the process, whatever ends it."""
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _keep_attributes(descriptor, target):
    """Give a new file the mode and owner of the one that it replaces, or the usual ones."""
    try:
        there = os.stat(target)
    except FileNotFoundError:
        return
    with suppress(PermissionError):
        os.fchown(descriptor, there.st_uid, there.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(there.st_mode) & 0o777)


def _link(descriptor, name):
    """Give an open file without a name one."""
    folder = os.open(DESCRIPTORS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # With a directory given, Python calls linkat, which follows the link to the file.
        os.link(str(descriptor), name, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _flush_directory(folder):
    """Bring a new name to the disk, too, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse_full(folder, size):
    free = os.statvfs(folder)
    if size > free.f_bavail * free.f_frsize:
        raise OSError(errno.ENOSPC, "the disk is full")


def _failed(path, error, size):
    """The UserError of an OSError on the way to ``path``."""
    if error.errno == errno.ENOSPC:
        needed = f"; {size / 1e6:,.0f} MB are needed" if size else ""
        return UserError(f"{path}: the disk is full{needed}")
    return UserError(f"{path}: cannot be written: {error.strerror}")
