"""Running a command in a memory cgroup of an exact size (v1 or v2; needs root)."""

import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class NoCgroups(Exception):
    """Cgroups cannot be made here; the message says why."""


@contextmanager
def memory_cgroup(limit_bytes):
    """A new memory cgroup of this size; yields its folder. Raises NoCgroups."""
    v1 = (ROOT / "memory" / "memory.limit_in_bytes").exists()
    base = ROOT / "memory" if v1 else ROOT
    name = "memory.limit_in_bytes" if v1 else "memory.max"
    try:
        if not v1:
            (ROOT / "cgroup.subtree_control").write_text("+memory")
        folder = Path(tempfile.mkdtemp(prefix="flashinfer-", dir=base))
        (folder / name).write_text(str(limit_bytes))
        if not v1 and (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
    except OSError as error:
        raise NoCgroups(f"memory cgroups cannot be made here: {error}") from None
    try:
        yield folder
    finally:
        folder.rmdir()


def run_limited(command, limit_bytes, **options):
    """subprocess.run(command) in a memory cgroup of ``limit_bytes``. Raises NoCgroups.

    A command that the kernel killed for want of memory has the return code -9.
    """
    with memory_cgroup(limit_bytes) as folder:
        procs = str(folder / "cgroup.procs")

        def enter():
            descriptor = os.open(procs, os.O_WRONLY)
            os.write(descriptor, str(os.getpid()).encode())
            os.close(descriptor)

        return subprocess.run(command, preexec_fn=enter, **options)
