"""A mixture's router and experts in float64."""

from typing import NamedTuple

import numpy as np

from flashinfer.formats.arrays import Float64Array, Int64Array
from flashinfer.formats.layers.ffn import RouterConfig
from flashinfer.oracle.known import F32, Known

FEW = 16  # units in the last place that scores may be off by beside the logits' noise


class Choice(NamedTuple):
    """What a router chooses.

    experts  (T, k) ascending; weights: Known (T, k)
    values   (T, experts): what experts are chosen by, -inf where they cannot be, with its noise
    """

    experts: Int64Array
    weights: Known
    values: Known


def choose(
    config: RouterConfig,
    logits: Known,
    choice_bias: Float64Array | None,
    chosen: Int64Array | None = None,
) -> Choice:
    """logits (T, experts) -> the Choice.

    chosen  (T, k): the experts that the weights are wanted of; None: those of the largest values
    """
    scores = _scores(config, logits)
    biased = scores.value + (0.0 if choice_bias is None else choice_bias)
    noise = scores.spread + FEW * F32 * np.abs(biased)
    if config.groups_kept < config.groups:
        biased = np.where(_kept(config, biased), biased, -np.inf)
    best = np.argsort(-biased, axis=1, kind="stable")[:, : config.experts_per_token]
    experts = np.sort(best if chosen is None else chosen, axis=1).astype(np.int64)
    return Choice(experts, _weights(config, scores, experts), Known(biased, noise))


def margins(choice: Choice, chosen: Int64Array) -> Float64Array:
    """How far below those that should have been chosen the worst of ``chosen`` (T, k) is, in units
    of the noise of the two values (T,); 0 where the choice is right."""
    values, noise = choice.values.value, choice.values.spread
    found = np.zeros(len(chosen))
    for row, theirs in enumerate(chosen):
        strange = np.setdiff1d(theirs, choice.experts[row])
        missing = np.setdiff1d(choice.experts[row], theirs)
        if strange.size and missing.size:
            worst = strange[values[row, strange].argmin()]
            best = missing[values[row, missing].argmax()]
            unit = np.hypot(noise[row, worst], noise[row, best])
            found[row] = (values[row, best] - values[row, worst]) / max(unit, 1e-300)
        elif strange.size or missing.size:
            found[row] = np.inf  # too few, or one twice
    return found


def _scores(config: RouterConfig, logits: Known) -> Known:
    x, u = logits.value, F32
    if config.scoring == "sigmoid":
        s = 1 / (1 + np.exp(-x))
        return Known(s, s * (1 - s) * logits.spread + FEW * u * s)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    own = np.hypot(logits.spread, FEW * u + u * np.abs(x - x.max(axis=1, keepdims=True)))
    shared = np.sqrt(((p * own) ** 2).sum(axis=1, keepdims=True))
    return Known(p, p * np.hypot(own, shared))


def _weights(config: RouterConfig, scores: Known, experts: Int64Array) -> Known:
    weights = np.take_along_axis(scores.value, experts, axis=1)
    noise = np.take_along_axis(scores.spread, experts, axis=1)
    if config.normalised:
        total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-20)
        of_total = np.sqrt((noise**2).sum(axis=1, keepdims=True)) / total
        weights, noise = weights / total, np.hypot(noise / total, weights / total * of_total)
    weights, noise = weights * config.scale, noise * abs(config.scale)
    return Known(weights, noise + FEW * F32 * np.abs(weights))


def _kept(config: RouterConfig, values: Float64Array) -> Float64Array:
    """Whether an expert's group is one of the best (T, experts) bool."""
    n = len(values)
    groups = np.sort(values.reshape(n, config.groups, -1), axis=2)
    worth = groups[:, :, -2 if config.group_by == "top2" else -1 :].sum(axis=2)
    best = np.argsort(-worth, axis=1, kind="stable")[:, : config.groups_kept]
    kept = np.zeros((n, config.groups), dtype=bool)
    np.put_along_axis(kept, best, True, axis=1)
    return np.repeat(kept, config.experts // config.groups, axis=1)
