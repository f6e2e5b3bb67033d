"""Memory in bytes: what a user writes, what this process holds, and what its machine allows it."""

import mmap
import re
from pathlib import Path

from flashinfer.formats.errors import UserError

MIB = 1 << 20
LEAST_HEADER = 16 * MIB  # enough for any but huge models, so that it is the plan that refuses
MOST_BYTES = (1 << 63) - 1
SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: object) -> int:
    """Bytes of "600M", "1.5G", "2GiB" or 629145600; K, M, G are powers of 1024, as cgroups'."""
    nbytes = 0
    if isinstance(text, int) and not isinstance(text, bool):
        nbytes = text
    elif match := SIZE.fullmatch(str(text)):
        nbytes = int(float(match[1]) * UNITS[match[2].upper()])
    if not 1 <= nbytes <= MOST_BYTES:
        raise UserError(f"memory {str(text)[:40]!r} is not a size such as 600M or 1.5G")
    return nbytes


def header_room(budget: int | str | None = None) -> int:
    """Bytes that parsing a bundle's header may take, of a budget or of what the machine has."""
    budget = default_budget() if budget is None else parse_size(budget)
    return max(LEAST_HEADER, budget - rss())


def format_size(nbytes: int) -> str:
    return f"{nbytes / MIB:,.1f} MiB" if nbytes < 10 * MIB else f"{nbytes / MIB:,.0f} MiB"


def default_budget() -> int:
    """The memory cgroup's limit or what the system has available, less a margin of 5 %."""
    available = _meminfo("MemAvailable")
    now = held()[1] + sum(held(pid)[1] for pid in list(helpers))
    limits = [available + now] if available else []
    limits += _cgroup_limits()
    if not limits:
        raise UserError("cannot tell how much memory there is; give --memory")
    return int(min(limits) * 0.95)


# Bytes set aside for each process that works for this one, by its id: see worker.Worker.
helpers: dict[int, int] = {}


def rss() -> int:
    """Bytes of DRAM that this process and its helpers hold now, with what is set aside for them."""
    own = held()[1] or peak_rss()
    return own + sum(max(held(pid)[1], aside) for pid, aside in list(helpers.items()))


def held(pid: int | str = "self") -> tuple[int, int]:
    """(bytes of address space, of DRAM) that a process has now; 0 where no system tells."""
    try:
        pages_held = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0, 0
    space, dram = (int(n) * mmap.PAGESIZE for n in pages_held[:2])
    return space, dram


def peak_rss() -> int:
    """The most bytes of DRAM that this process ever held."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if match := re.search(r"VmHWM:\s+(\d+) kB", status):
        return int(match[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _meminfo(key: str) -> int | None:
    try:
        match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _cgroup_limits(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """The limits of the memory cgroups, v1 or v2, that this process is in, and of their parents."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            bases, name = {root, root / "unified"}, "memory.max"
        elif "memory" in controllers.split(","):
            bases, name = {root / "memory", root / controllers}, "memory.limit_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            for base in bases:
                try:
                    text = (base / folder / name).read_text().strip()
                except OSError:
                    continue
                if text.isdigit() and int(text) < 1 << 60:
                    limits.append(int(text))
    return limits
