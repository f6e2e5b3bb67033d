"""Running a command in cgroups of an exact memory size and disk speed (v1 or v2; needs root)."""

import os
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class NoCgroups(Exception):
    """Cgroups cannot be made here; the message says why."""


@dataclass(frozen=True)
class Disk:
    """A disk held to ``bytes_per_second`` and ``reads_per_second`` (None: as fast as it is)."""

    name: str
    bytes_per_second: int | None = None
    reads_per_second: int | None = None

    def least_seconds(self, unthrottled, nbytes, reads):
        """What so many reads of so many bytes take at least, which take ``unthrottled`` seconds
        where the disk is as it is; the kernel holds bytes and reads to their limits at once."""
        by_bytes = nbytes / self.bytes_per_second if self.bytes_per_second else 0.0
        by_reads = reads / self.reads_per_second if self.reads_per_second else 0.0
        return max(unthrottled, by_bytes, by_reads)


def block_device(path):
    """ "major:minor" of the whole disk that holds ``path``."""
    number = os.stat(path).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    entry = Path("/sys/dev/block") / name
    if (entry / "partition").exists():
        name = (entry.resolve().parent / "dev").read_text().strip()
    return name


def _settings(memory, disk, device):
    """{folder to make a cgroup in: {file: text}} for cgroups v1 or v2."""
    if (ROOT / "memory" / "memory.limit_in_bytes").exists():
        settings = {ROOT / "memory": {"memory.limit_in_bytes": str(memory)}}
        throttle = {
            f"blkio.throttle.read_{kind}_device": f"{device} {limit}"
            for kind, limit in (("bps", disk.bytes_per_second), ("iops", disk.reads_per_second))
            if limit
        }
        return {**settings, ROOT / "blkio": throttle} if throttle else settings
    files = {"memory.max": str(memory), "memory.swap.max": "0"}
    if disk.bytes_per_second or disk.reads_per_second:
        bps, iops = disk.bytes_per_second or "max", disk.reads_per_second or "max"
        files["io.max"] = f"{device} rbps={bps} riops={iops}"
    return {ROOT: files}


@contextmanager
def cgroups(memory, disk=None, path="."):
    """New cgroups of ``memory`` bytes and with the disk that holds ``path`` held to ``disk``.

    Yields their folders. Raises NoCgroups.
    """
    folders = []
    try:
        try:
            for base, files in _settings(memory, disk or Disk(""), block_device(path)).items():
                if base == ROOT:
                    (ROOT / "cgroup.subtree_control").write_text("+memory +io")
                folders.append(Path(tempfile.mkdtemp(prefix="flashinfer-", dir=base)))
                for name, text in files.items():
                    if name != "memory.swap.max" or (folders[-1] / name).exists():
                        (folders[-1] / name).write_text(text)
        except OSError as error:
            raise NoCgroups(f"cgroups cannot be made here: {error}") from None
        yield folders
    finally:
        for folder in folders:
            folder.rmdir()


def run_limited(command, memory, disk=None, path=".", **options):
    """subprocess.run(command) in such cgroups. Raises NoCgroups.

    A command that the kernel killed for want of memory has the return code -9.
    """
    with cgroups(memory, disk, path) as folders:

        def enter():
            for folder in folders:
                descriptor = os.open(folder / "cgroup.procs", os.O_WRONLY)
                os.write(descriptor, str(os.getpid()).encode())
                os.close(descriptor)

        return subprocess.run(command, preexec_fn=enter, **options)
