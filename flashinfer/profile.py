"""What a machine and its flash can do: measured by ``flashinfer probe``, or a board's estimate."""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path

import numpy as np

from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.number_formats import FORMATS

MOST_GAP = 256 << 10
WORTH_JOINING = 1.7  # a read of two rows and their gap may take so many times that of one row


@dataclass(frozen=True)
class Profile:
    """Seconds, bytes and bytes per second.

    name        of the machine and its flash; note: how the figures were found
    threads     that computed
    latency     of one small read by itself
    reads       {bytes of a read: bytes/s of such reads, many in flight}
    sequential  bytes/s of a stream in pieces of a MiB
    dram        bytes/s of a plain sum over memory
    linear, sparse  {number format: bytes/s of weights} of the products with one token
    layer       what a layer costs a token besides reads and products, where it stays in DRAM
    cached      and where it has a neuron cache; submit: what the CPU spends on one read
    """

    name: str
    note: str
    threads: int
    latency: float
    reads: dict
    sequential: float
    dram: float
    linear: dict
    sparse: dict
    layer: float
    cached: float
    submit: float

    def read_seconds(self, nbytes):
        """What one read of this size takes of the flash's time, when many are in flight."""
        sizes, speeds = zip(*sorted(self.reads.items()), strict=True)
        times = [size / speed for size, speed in zip(sizes, speeds, strict=True)]
        if nbytes >= sizes[-1]:
            return times[-1] * nbytes / sizes[-1]
        return float(np.interp(nbytes, sizes, times))

    def gap_bytes(self, row_bytes):
        """The widest gap between two rows for which one read takes clearly less than two."""
        worth, gap = WORTH_JOINING * self.read_seconds(row_bytes), 0
        while gap < MOST_GAP and self.read_seconds(2 * row_bytes + gap + 4096) <= worth:
            gap += 4096
        return gap

    def held(self, bytes_per_second, reads_per_second=math.inf):
        """The same machine with its flash held to these limits."""
        limit = bytes_per_second or math.inf
        reads = {
            size: min(speed, limit, size * (reads_per_second or math.inf))
            for size, speed in self.reads.items()
        }
        return Profile(
            **{**asdict(self), "reads": reads, "sequential": min(self.sequential, limit)}
        )


def save(profile, path):
    """Write a profile as JSON. Raises UserError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(asdict(profile), indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def load(path):
    """Read a profile. Raises FormatError where the file is none."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        raw["reads"] = {int(size): speed for size, speed in raw["reads"].items()}
        found = Profile(**{field.name: raw[field.name] for field in fields(Profile)})
        speeds = [found.latency, found.sequential, found.dram, found.threads]
        speeds += [found.layer, found.cached, found.submit]
        speeds += [*found.reads, *found.reads.values()]
        speeds += [table[name] for table in (found.linear, found.sparse) for name in FORMATS]
        if not found.reads or not all(0 < speed < math.inf for speed in speeds):
            raise ValueError
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{path}: is not a profile; flashinfer probe makes one") from None
    return found


def cache_path(path):
    """Where the profile of the device that holds ``path`` is kept."""
    device = os.stat(path).st_dev
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flashinfer" / f"device-{os.major(device)}-{os.minor(device)}.json"


def measured(path):
    """The profile that ``flashinfer probe`` left for the device that holds ``path``, or None."""
    try:
        return load(cache_path(path))
    except (FormatError, OSError, RuntimeError):  # the last: no home directory
        return None


def boards():
    """{name: path} of the estimated profiles that come with the package."""
    folder = Path(str(files("flashinfer") / "boards"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find(device, path):
    """The Profile that ``device`` names: a board or a file; None: the one measured for ``path``.

    Returns None where nothing was measured. Raises UserError where there is no such board or file.
    """
    if device is None or isinstance(device, Profile):
        return device or measured(path)
    known = boards()
    if str(device) in known:
        return load(known[str(device)])
    if os.path.exists(device):
        return load(device)
    raise UserError(f"device {str(device)!r} is no file and not one of {', '.join(known)}")
