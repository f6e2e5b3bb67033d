"""What reading units that are missing at random comes to, by the engine's own way to read them."""

import math
from functools import lru_cache

import numpy as np

from flashinfer.paper.flash import STAGING_BYTES, reads_of
from flashinfer.paper.pieces import Pieces

SAMPLES = 4  # of sets of units, drawn with the same seeds in every process


def expected_reads(
    missing: float, among: float, pieces: Pieces, gap_bytes: int
) -> tuple[float, float]:
    """(bytes, requests) expected where ``missing`` of ``among`` units, any of them, are read at
    once; both may be fractions."""
    among, pieces = max(1, round(among)), pieces.anywhere()
    few = min(math.floor(missing), among)
    more = min(few + 1, among)
    some = np.array(_sampled(few, among, pieces, gap_bytes))
    if missing == few or more == few:
        return tuple(some.tolist())
    others = np.array(_sampled(more, among, pieces, gap_bytes))
    return tuple((some + (missing - few) * (others - some)).tolist())


@lru_cache(maxsize=4096)
def _sampled(n: int, among: float, pieces: Pieces, gap_bytes: int) -> tuple[float, float]:
    """The mean (bytes, requests) of samples of n units."""
    if not n:
        return 0.0, 0.0
    found = []
    for seed in range(SAMPLES):
        units = np.sort(np.random.default_rng(seed).choice(among, n, replace=False))
        offsets, lengths, _ = pieces.spans(units)
        # Slots are given as they come free: no two that are read together lie side by side.
        slots = 2 * np.arange(n)[:, None] * pieces.slot_bytes + pieces.rooms
        offsets, lengths, slots = (a.T.ravel() for a in (offsets, lengths, slots))
        straight, staged, _ = reads_of(offsets, lengths, slots, gap_bytes, STAGING_BYTES)
        every = np.concatenate([straight[1], staged[1]])
        found.append((every.sum(), len(every)))
    return tuple(np.mean(found, axis=0).tolist())
