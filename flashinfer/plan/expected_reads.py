"""What reading units that are missing at random comes to, by the engine's own way to read them."""

import math
from functools import lru_cache

import numpy as np

from flashinfer.paper.flash import STAGING_BYTES, reads_of, row_spans

SAMPLES = 4  # of sets of units, drawn with the same seeds in every process


def expected_reads(
    missing: float, among: float, unit_bytes: int, gap_bytes: int, alignment: int
) -> tuple[float, float]:
    """(bytes, requests) expected where ``missing`` of ``among`` units, any of them, are read at
    once; both may be fractions."""
    among = max(1, round(among))
    few = min(math.floor(missing), among)
    more = min(few + 1, among)
    some = np.array(_sampled(few, among, unit_bytes, gap_bytes, alignment))
    if missing == few or more == few:
        return tuple(some.tolist())
    others = np.array(_sampled(more, among, unit_bytes, gap_bytes, alignment))
    return tuple((some + (missing - few) * (others - some)).tolist())


@lru_cache(maxsize=4096)
def _sampled(
    n: int, among: float, unit_bytes: int, gap_bytes: int, alignment: int
) -> tuple[float, float]:
    """The mean (bytes, requests) of samples of n units."""
    if not n:
        return 0.0, 0.0
    found = []
    for seed in range(SAMPLES):
        units = np.sort(np.random.default_rng(seed).choice(among, n, replace=False))
        offsets, lengths, _ = row_spans(0, unit_bytes, units, alignment)
        # Slots are given as they come free: no two that are read together lie side by side.
        slots = 2 * np.arange(n) * int(lengths.max())
        straight, staged, _ = reads_of(offsets, lengths, slots, gap_bytes, STAGING_BYTES)
        every = np.concatenate([straight[1], staged[1]])
        found.append((every.sum(), len(every)))
    return tuple(np.mean(found, axis=0).tolist())
