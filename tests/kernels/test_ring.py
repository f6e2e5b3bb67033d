"""io_uring that stops working: an error that names it, never a wait without an end."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from flashinfer.formats.errors import FormatError, UserError
from flashinfer.paper.flash import STAGINGS, Flash, aligned_bytes

PROGRAM = """
import ctypes, errno, os, struct, sys
import numpy as np
from flashinfer.paper.flash import Flash, aligned_bytes
from flashinfer.formats.errors import FormatError

def close_ring():
    for name in os.listdir("/proc/self/fd"):
        try:
            if "io_uring" in os.readlink(f"/proc/self/fd/{name}"):
                os.close(int(name))
        except OSError:
            pass

def refuse_enter(number):
    '''A seccomp filter: io_uring_enter fails with this errno from here on.'''
    step = lambda code, jt, jf, k: struct.pack("HBBI", code, jt, jf, k)
    program = b"".join([
        step(0x20, 0, 0, 0),                      # load the number of the system call
        step(0x15, 0, 1, 426),                    # io_uring_enter?
        step(0x06, 0, 0, 0x00050000 | number),    # fail
        step(0x06, 0, 0, 0x7FFF0000),             # allow
    ])
    memory = ctypes.create_string_buffer(program)
    pointer = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.create_string_buffer(pointer)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, argument, 0, 0):
        sys.exit("no seccomp here")

path, how, when = sys.argv[1:]
flash = Flash(path, "io_uring")
memory = aligned_bytes(1 << 20)
blocks = np.arange(0, 1 << 20, 4096, dtype=np.int64)
fail = close_ring if how == "close" else lambda: refuse_enter(getattr(errno, how))

def read():
    submitted = flash.submit_range(0, 1 << 20, memory)
    if when == "in flight":
        fail()
    flash.wait(submitted)

if when == "before":
    fail()
for _ in range(2):
    try:
        read()
        print("read", bytes(memory) == open(path, "rb").read())
    except FormatError as error:
        print(error)
    memory[:] = 0
flash.close()
print("closed")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.flash"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    try:
        Flash(path, "io_uring").close()
    except UserError as error:
        pytest.skip(str(error))
    return path


@pytest.mark.parametrize("when", ["before", "in flight"])
@pytest.mark.parametrize("how", ["close", "EPERM", "EBADF", "EINTR", "EAGAIN", "ENOMEM"])
def test_a_ring_that_fails_is_given_up(file, how, when):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, file, how, when], capture_output=True, text=True, timeout=60
    )
    if "no seccomp here" in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stderr
    *reads, last = run.stdout.splitlines()
    # What the kernel had taken over may still be finished, and is then right.
    assert last == "closed" and len(reads) == 2
    assert reads[0] == "read True" or "io_uring fails" in reads[0]
    assert when == "in flight" or "io_uring fails" in reads[0]
    assert "io_uring fails" in reads[1] and "--io threads does without" in reads[1]
    assert os.strerror(getattr(errno, "EBADF" if how == "close" else how)) in reads[1]


@pytest.mark.parametrize("io", ["auto", "threads", "buffered"])
@pytest.mark.parametrize("size", [40_000, 65_536 + 100, 65_536])
def test_a_merged_read_that_ends_early_is_named_and_not_used(tmp_path, io, size):
    """Neighbours that are read as one, of which the file's end cuts one in the middle."""
    path = tmp_path / "x.flash"
    path.write_bytes(b"\x11" * size)
    flash = Flash(path, io, gap_bytes=4096)
    memory = aligned_bytes(1 << 20)
    offsets = np.arange(0, 81_920, 8192, dtype=np.int64)
    lengths, places = np.full(10, 4096), offsets[::-1].copy()  # not side by side: staged
    flash.staging[-1][:] = 0x77  # what an earlier read left there
    with pytest.raises(FormatError, match=r"x\.flash: reading 77824 bytes at 0: the file ends"):
        flash.wait(flash.submit(offsets, lengths, memory, places))
    assert not memory.any() and len(flash.staging) == STAGINGS
    flash.close()
