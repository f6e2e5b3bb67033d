"""What a machine and its flash can do: measured by ``flashinfer probe``, or a board's estimate."""

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats import bounded_json
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.files import read_bytes, refuse_target, replacing
from flashinfer.formats.number_formats import FORMATS, Matrices
from flashinfer.formats.numbers import is_number, is_whole

MOST_GAP = 256 << 10
# What a profile's file may hold: seconds and speeds of any machine there can be.
LEAST, MOST = 1e-12, 1e15
MOST_BLOCK, MOST_SIZES, MOST_THREADS, MOST_FILE = 1 << 40, 256, 1024, 1 << 20
SIZE = re.compile("[0-9]{1,13}")
TABLES = ("alone", "reads", "streams", "submit")
SPEEDS = ("linear", "sparse", "many")
NUMBERS = ("dram", "layer", "cached", "wake")
MANY = 16  # tokens, of the products that share their weights
UNKNOWN_MANY = 4.0  # how many times as long these take, where a profile does not say
WORTH_JOINING = 1.7  # a read of two rows and their gap may take so many times that of one row


@dataclass(frozen=True)
class Profile:
    """Seconds, bytes and bytes per second.

    name        of the machine and its flash; note: how the figures were found
    threads     that computed
    alone       {bytes of a read: seconds that one takes with no other in flight}
    reads       {bytes of a read: bytes/s of such reads, many in flight}
    streams     {bytes of a tile: bytes/s of a stream in such tiles, each read while the one before
                is multiplied}
    dram        bytes/s of a plain sum over memory
    linear, sparse  {number format: bytes/s of weights} of the products with one token
    many        {number format: how many times as long a product takes with MANY tokens}
    layer       what a layer costs a token besides reads and products, where it stays in DRAM
    cached      and where it has a neuron cache
    wake        what the first product takes longer where its threads sleep, as they do after a wait
    submit      {bytes of a read: what one takes of the CPU's time, to be begun and at its end}
    most_bytes, most_reads  a second, where the flash is held to them; 0: it is not
    unmeasured  number formats whose figures are those of the one nearest in size
    """

    name: str
    note: str
    threads: int
    alone: dict[int, float]
    reads: dict[int, float]
    streams: dict[int, float]
    dram: float
    linear: dict[str, float]
    sparse: dict[str, float]
    layer: float
    cached: float
    wake: float
    submit: dict[int, float]
    many: dict[str, float]
    most_bytes: float = 0.0
    most_reads: float = 0.0
    unmeasured: tuple[str, ...] = ()

    def as_json(self) -> JsonObject:
        """What a file has of it: no figures of formats that were not measured."""
        raw = asdict(self)
        for name in raw.pop("unmeasured"):
            for kind in SPEEDS:
                raw[kind].pop(name, None)
        return raw

    def read_seconds(self, nbytes: float) -> float:
        """What one read of this size takes of the flash's time, when many are in flight."""
        return _at(nbytes, {size: size / speed for size, speed in self.reads.items()})

    def batch_seconds(self, requests: float, nbytes: float) -> float:
        """What reads of ``nbytes`` together, begun at once, take until the last one is there.

        The first takes what one alone does, each of the others what it takes of the flash's time.
        """
        size = nbytes / requests
        first = min(1.0, requests) * _at(size, self.alone)  # on average, there may be none
        return first + max(0.0, requests - 1) * self.read_seconds(size)

    def submit_seconds(self, nbytes: float) -> float:
        """What one read of this size takes of the CPU's time."""
        sizes, times = zip(*sorted(self.submit.items()), strict=True)
        return float(np.interp(nbytes, sizes, times))

    def times_of_one(self, format: str, tokens: float) -> float:
        """How many times as long a product with so many tokens takes as with one."""
        return 1 + (self.many[format] - 1) * (tokens - 1) / (MANY - 1)

    def linear_seconds(self, tensor: StoredTensor, tokens: float = 1) -> float:
        """What products with all rows of a tensor take, with so many tokens."""
        return sum(
            nbytes / self.linear[format] * self.times_of_one(format, tokens)
            for format, nbytes in bytes_by_format(tensor).items()
        )

    def sparse_seconds(self, tensor: StoredTensor, tokens: float = 1) -> float:
        """The same, where some rows are multiplied, wherever they lie; a unit's matrices, which are
        always used whole, are multiplied as all rows are."""
        if isinstance(tensor.format, Matrices):
            return self.linear_seconds(tensor, tokens)
        format = tensor.format.name
        return tensor.nbytes / self.sparse[format] * self.times_of_one(format, tokens)

    def stream_speed(self, tile_bytes: float) -> float:
        """Bytes/s of a stream in tiles of this size."""
        times = {size: size / speed for size, speed in self.streams.items()}
        return tile_bytes / _at(tile_bytes, times)

    def gap_bytes(self, row_bytes: int) -> int:
        """The widest gap between two rows for which one read takes clearly less than two."""
        worth, gap = WORTH_JOINING * self._held_seconds(row_bytes), 0
        while gap < MOST_GAP and self._held_seconds(2 * row_bytes + gap + 4096) <= worth:
            gap += 4096
        return gap

    def _held_seconds(self, nbytes: float) -> float:
        """As ``read_seconds``, or what one read of so many takes by what the flash is held to."""
        return max(self.read_seconds(nbytes), self.allowed_after(1, nbytes))

    def allowed_after(self, requests: float, nbytes: float) -> float:
        """Seconds after which so much may have been read, by what the flash is held to."""
        by_bytes = nbytes / self.most_bytes if self.most_bytes else 0.0
        return max(by_bytes, requests / self.most_reads if self.most_reads else 0.0)

    def held(self, bytes_per_second: float, reads_per_second: float = 0.0) -> "Profile":
        """The same machine with its flash held to these limits, as a cgroup's throttle does."""
        return replace(self, most_bytes=bytes_per_second or 0.0, most_reads=reads_per_second or 0.0)


def bytes_by_format(tensor: StoredTensor) -> dict[str, int]:
    """{number format: bytes of it} of a tensor: of matrices there may be several."""
    if not isinstance(tensor.format, Matrices):
        return {tensor.format.name: tensor.nbytes}
    found: dict[str, int] = {}
    for part in tensor.format.parts.values():
        found[part.format.name] = found.get(part.format.name, 0) + tensor.rows * part.nbytes
    return found


def _at(nbytes: float, seconds: dict[int, float]) -> float:
    """Between the sizes of {bytes: seconds}; beyond the largest, as fast as that."""
    sizes, times = zip(*sorted(seconds.items()), strict=True)
    if nbytes >= sizes[-1]:
        return times[-1] * nbytes / sizes[-1]
    return float(np.interp(nbytes, sizes, times))


def prepare(path: Path) -> None:
    """Make the directory of a profile to be written. Raises UserError where it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    refuse_target(path)


def save(profile: Profile, path: Path) -> None:
    """Write a profile as JSON, whole or not at all. Raises UserError where that fails."""
    prepare(path)
    with replacing(path) as file:
        file.write((json.dumps(profile.as_json(), indent=2) + "\n").encode())


def load(path: Path | str) -> Profile:
    """Read a profile. Raises FormatError where the file is none."""
    text = read_bytes(path, MOST_FILE)
    try:
        raw: Any = bounded_json.parse(text, path, finite=True)
        tables: dict[str, Any] = {name: _table(raw[name]) for name in TABLES}
        raw.setdefault("many", dict.fromkeys(FORMATS, UNKNOWN_MANY))
        speeds: dict[str, Any] = {name: _speeds(raw[name]) for name in SPEEDS}
        texts: dict[str, Any] = {name: raw[name] for name in ("name", "note")}
        numbers: dict[str, Any] = {name: raw[name] for name in NUMBERS}
        limits: dict[str, Any] = {name: raw.get(name, 0.0) for name in ("most_bytes", "most_reads")}
        threads: Any = raw["threads"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{path}: is not a profile; flashinfer probe makes one") from None
    found = [*numbers.values(), *(limit for limit in limits.values() if limit != 0)]
    for table in (*tables.values(), *speeds.values()):
        found += table.values()
    sizes = [size for table in tables.values() for size in table]
    if not (
        all(is_number(value, LEAST, MOST) for value in found)
        and all(is_number(size, 1, MOST_BLOCK) for size in sizes)
        and all(tables.values())
        and all(isinstance(text, str) for text in texts.values())
        and is_whole(threads, 1, MOST_THREADS)
    ):
        raise FormatError(f"{path}: is not a profile; flashinfer probe makes one")
    lacking = [name for name in FORMATS if not all(name in raw[kind] for kind in speeds)]
    return Profile(
        threads=threads, unmeasured=tuple(lacking), **texts, **numbers, **limits, **tables, **speeds
    )


def _speeds(entries: dict[str, Any]) -> dict[str, float]:
    """{number format: figure}. A format that was not measured has the figure of the one that is
    nearest in size. Raises ValueError where none was measured."""
    size = {name: format.block_bytes / format.block for name, format in FORMATS.items()}
    known = [name for name in FORMATS if name in entries]

    def nearest(name: str) -> str:
        return min(known, key=lambda other: abs(size[other] - size[name]))

    return {name: entries[name if name in entries else nearest(name)] for name in FORMATS}


def _table(entries: dict[str, Any]) -> dict[int, float]:
    """{bytes: figure} of JSON's {"bytes": figure}. Raises ValueError."""
    if len(entries) > MOST_SIZES or not all(SIZE.fullmatch(size) for size in entries):
        raise ValueError
    return {int(size): value for size, value in entries.items()}


def cache_path(path: Path | str) -> Path:
    """Where the profile of the device that holds ``path`` is kept. Raises UserError, OSError."""
    device = os.stat(path).st_dev
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UserError("there is no home directory to keep a profile in; name a file") from None
    return Path(base) / "flashinfer" / f"device-{os.major(device)}-{os.minor(device)}.json"


def measured(path: Path | str) -> Profile | None:
    """The profile that ``flashinfer probe`` left for the device that holds ``path``, or None."""
    try:
        return load(cache_path(path))
    except (UserError, OSError):
        return None


def boards() -> dict[str, Path]:
    """{name: path} of the estimated profiles that come with the package."""
    folder = Path(str(files("flashinfer.plan") / "boards"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find(device: Profile | Path | str | None, path: Path | str) -> Profile | None:
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
