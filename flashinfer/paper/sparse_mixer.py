"""SparseMixer (Liu et al. 2024), the router of Phi-3.5-MoE, as it is without training."""

import numpy as np

from flashinfer.formats.arrays import Float32Array, Int32Array
from flashinfer.kernels.fixed_math import exp


def sparse_mix(
    logits: Float32Array, per_token: int, jitter: float
) -> tuple[Int32Array, Float32Array]:
    """The experts that each token's router chooses, one after the other, and their weights.

    logits     (T, experts) float32
    per_token  how many experts are chosen: those of the largest logits, of equal ones the lowest
    jitter     the weight of an expert is its share of a softmax over those experts, chosen later or
               never, whose logits are less by at most 2 jitter of themselves or of its own,
               whichever is larger
    Returns (chosen (T, per_token) ascending, weights (T, per_token) float32). A logit of NaN counts
    as -inf. The sums have one order everywhere.
    """
    tokens = np.arange(len(logits))
    s = np.where(np.isnan(logits), -np.inf, logits).astype(np.float32)
    left = np.ones(s.shape, dtype=bool)  # those not chosen so far
    chosen = np.empty((len(s), per_token), dtype=np.int32)
    weights = np.empty((len(s), per_token), dtype=np.float32)
    with np.errstate(all="ignore"):  # of infinite logits
        for i in range(per_token):
            best = np.where(left, s, -np.inf).argmax(axis=1)
            largest = s[tokens, best][:, None]
            ratio = (largest - s) / np.maximum(np.abs(s), largest)
            near = left & ~(ratio > np.float32(2 * jitter))
            terms = np.where(near, exp((s - largest).astype(np.float64)), 0.0)
            chosen[:, i], weights[:, i] = best, 1 / np.cumsum(terms, axis=1)[:, -1]
            left[tokens, best] = False
    order = chosen.argsort(axis=1, kind="stable")
    return np.take_along_axis(chosen, order, 1), np.take_along_axis(weights, order, 1)
