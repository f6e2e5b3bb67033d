"""How many threads to compute with."""

import os
import sys
from pathlib import Path

MOST_PER_CPU = 4  # more do nothing but wait, and each has a stack
CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")


def threads_to_use(wanted: int | None = None) -> int:
    """``wanted`` threads, or ``default_threads``; of more than a few for each CPU, which is said,
    these few."""
    if wanted is None:
        return default_threads()
    cpus = len(usable_cpus())
    if wanted > MOST_PER_CPU * cpus:
        print(
            f"flashinfer: {wanted} threads are more than {cpus} CPUs can use; "
            f"{MOST_PER_CPU * cpus} are started",
            file=sys.stderr,
        )
    return min(wanted, MOST_PER_CPU * cpus)


def usable_cpus() -> set[int]:
    """The CPUs that this process may use, by its affinity: their numbers."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:
        return set(range(os.cpu_count() or 1))


def default_threads() -> int:
    """The physical cores that this process may use: by its affinity, and by its cgroup's share.

    Two hardware threads of one core share its arithmetic and its memory bandwidth, which limit the
    products.
    """
    cores = physical_cores(usable_cpus())
    quota = cgroup_quota()
    return max(1, min(cores, quota) if quota else cores)


def physical_cores(cpus: set[int], folder: Path = CPUS) -> int:
    """How many cores these CPUs, as the kernel counts them, are threads of."""
    cores: set[str | int] = set()
    for cpu in cpus:
        try:
            cores.add((folder / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
        except OSError:
            cores.add(cpu)
    return len(cores)


def cgroup_quota(folder: Path = CGROUPS) -> int | None:
    """Whole cores of the CPU quota, v1 or v2, or None where there is none."""
    for name, read in (
        ("cpu.max", lambda text: text.split()),
        ("cpu/cpu.cfs_quota_us", lambda text: [text, "100000"]),
    ):
        try:
            quota, period = read((folder / name).read_text())[:2]
        except (OSError, ValueError):
            continue
        if quota.strip().isdigit() and int(quota):
            return max(1, int(quota) // int(period))
    return None
