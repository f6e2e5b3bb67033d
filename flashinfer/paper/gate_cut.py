"""The gates of an FFN of which only the largest count (Gemma 3n's Gaussian top-k)."""

import numpy as np

from flashinfer.formats.arrays import Float32Array, Float64Array

TOGETHER = 8192  # numbers of each token that are summed at a time


def ordered_sums(a: Float32Array) -> Float64Array:
    """a (n, T) -> (T,) float64: of each column the sum in ascending order, one number after the
    other, so that it has the same bits however many columns there are."""
    found = np.zeros(a.shape[1])
    step = max(1, TOGETHER // max(1, a.shape[1]))
    for first in range(0, len(a), step):
        rows = a[first : first + step].astype(np.float64)  # (<= step, T)
        rows[0] += found
        found = np.add.accumulate(rows, axis=0)[-1]  # not ``sum``, which adds in pairs
    return found


def cut_gates(gates: Float32Array, deviations: float) -> None:
    """gates (neurons, T), all of a layer's, become max(0, gate - cut) in place, where a token's cut
    is so many standard deviations above the mean of its gates."""
    n = len(gates)
    mean = ordered_sums(gates) / n
    centred = gates - mean.astype(np.float32)
    spread = np.sqrt(ordered_sums(centred * centred) / n)
    gates -= (mean + spread * deviations).astype(np.float32)
    np.maximum(gates, 0, out=gates)
