"""How many threads to compute with."""

import os
from pathlib import Path


def default_threads():
    """The cores that this process may use: its affinity, and its cgroup's share of CPU time."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cores, quota) if quota else cores)


def _cgroup_quota(root=Path("/sys/fs/cgroup")):
    """Whole cores of the CPU quota, v1 or v2, or None where there is none."""
    for name, read in (
        ("cpu.max", lambda text: text.split()),
        ("cpu/cpu.cfs_quota_us", lambda text: [text, "100000"]),
    ):
        try:
            quota, period = read((root / name).read_text())[:2]
        except (OSError, ValueError):
            continue
        if quota.strip().isdigit() and int(quota):
            return max(1, int(quota) // int(period))
    return None
