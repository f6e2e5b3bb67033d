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
    values   (T, experts): what experts are chosen by, with its noise
    worth    (T, groups): what groups are chosen by, with its noise
    """

    config: RouterConfig
    experts: Int64Array
    weights: Known
    values: Known
    worth: Known


def choose(
    config: RouterConfig,
    logits: Known,
    choice_bias: Float64Array | None,
    chosen: Int64Array | None = None,
    expert_scales: Float64Array | None = None,
) -> Choice:
    """logits (T, experts) -> the Choice.

    chosen  (T, k): the experts that the weights are wanted of; None: those of the largest values
    expert_scales  (experts,): what weights are multiplied with at last, or None
    """
    scores = _scores(config, logits)
    biased = scores.value + (0.0 if choice_bias is None else choice_bias)
    values = Known(biased, scores.spread + FEW * F32 * np.abs(biased))
    worth = _worth(config, values)
    best = np.argsort(-worth.value, axis=1, kind="stable")[:, : config.groups_kept]
    experts = np.array([_best(config, *row) for row in zip(biased, best, strict=True)])
    if chosen is not None:
        experts = np.sort(chosen, axis=1).astype(np.int64)
    sparse = config.scoring == "sparsemixer"
    weights = _sparse(config, logits, experts) if sparse else _weights(config, scores, experts)
    if expert_scales is not None:
        factors = expert_scales[experts]
        noise = weights.spread * np.abs(factors) + F32 * np.abs(weights.value * factors)
        weights = Known(weights.value * factors, noise)
    return Choice(config, experts, weights, values, worth)


def margins(choice: Choice, chosen: Int64Array) -> Float64Array:
    """How far below those that should have been chosen the worst of ``chosen`` (T, k) is, in units
    of the noise of the two (T,); 0 where the choice is right. Groups are judged first, and then the
    experts within the groups that were chosen."""
    config, found = choice.config, np.zeros(len(chosen))
    size = config.experts // config.groups
    for row, theirs in enumerate(chosen):
        best = np.argsort(-choice.worth.value[row], kind="stable")[: config.groups_kept]
        groups = np.unique(theirs // size)
        found[row] = _margin(_at(choice.worth, row), best, groups, fewer=True)
        others = best[~np.isin(best, groups)][: max(0, config.groups_kept - len(groups))]
        kept = np.concatenate([groups, others])
        ours = _best(config, choice.values.value[row], kept)
        found[row] = max(found[row], _margin(_at(choice.values, row), ours, theirs))
    return found


def _at(x: Known, row: int) -> Known:
    return Known(x.value[row], x.spread[row])


def _margin(of: Known, ours: Int64Array, theirs: Int64Array, fewer: bool = False) -> float:
    """How far the worst of ``theirs`` is below the best of ``ours`` that they lack, in units of
    noise; infinite where they are too few, unless there may be ``fewer``."""
    strange, missing = np.setdiff1d(theirs, ours), np.setdiff1d(ours, theirs)
    if not strange.size:
        return np.inf if missing.size and not fewer else 0.0
    if not missing.size:
        return np.inf
    worst = strange[of.value[strange].argmin()]
    best = missing[of.value[missing].argmax()]
    unit = np.hypot(of.spread[worst], of.spread[best])
    return float((of.value[best] - of.value[worst]) / max(unit, 1e-300))


def _best(config: RouterConfig, values: Float64Array, groups: Int64Array) -> Int64Array:
    """The experts of the largest values (experts,) in these groups, ascending."""
    size = config.experts // config.groups
    kept = np.where(np.isin(np.arange(config.experts) // size, groups), values, -np.inf)
    return np.sort(np.argsort(-kept, kind="stable")[: config.experts_per_token])


def _worth(config: RouterConfig, values: Known) -> Known:
    """What groups are chosen by (T, groups): their best expert, or their best two together."""
    shape = (len(values.value), config.groups, -1)
    counted = 2 if config.group_by == "top2" and config.groups < config.experts else 1
    order = np.argsort(values.value.reshape(shape), axis=2)[:, :, -counted:]
    best, noise = (
        np.take_along_axis(part.reshape(shape), order, axis=2)
        for part in (values.value, values.spread)
    )
    return Known(best.sum(axis=2), np.sqrt((noise**2).sum(axis=2)))


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


def _sparse(config: RouterConfig, logits: Known, experts: Int64Array) -> Known:
    """The weights of SparseMixer: of each expert its share of a softmax over those near it that no
    larger logit chose."""
    x, rows = logits.value, np.arange(len(experts))
    left, share, noise = np.ones(x.shape, dtype=bool), np.zeros(x.shape), np.zeros(x.shape)
    order = np.argsort(-np.take_along_axis(x, experts, axis=1), axis=1, kind="stable")
    for expert in np.take_along_axis(experts, order, axis=1).T:
        own = x[rows, expert][:, None]
        spread = np.hypot(logits.spread, logits.spread[rows, expert][:, None])
        size = np.maximum(np.maximum(np.abs(x), own), 1e-300)
        below = own - x - 2 * config.jitter * size  # at most 0 where an expert is near
        # One at the edge may count, or not.
        edge = np.abs(below) <= FEW * (spread + F32 * size)
        terms = np.where(left, np.exp(np.minimum(x - own, 0)), 0.0)
        weight = 1 / (terms * (below <= 0)).sum(axis=1)
        off = ((terms * (below <= 0) * spread) ** 2 + (terms * edge) ** 2).sum(axis=1)
        share[rows, expert], noise[rows, expert] = weight, weight**2 * np.sqrt(off)
        left[rows, expert] = False
    weights = np.take_along_axis(share, experts, axis=1)
    return Known(weights, np.take_along_axis(noise, experts, axis=1) + FEW * F32 * weights)


def _weights(config: RouterConfig, scores: Known, experts: Int64Array) -> Known:
    weights = np.take_along_axis(scores.value, experts, axis=1)
    noise = np.take_along_axis(scores.spread, experts, axis=1)
    if config.normalised:
        total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-20)
        of_total = np.sqrt((noise**2).sum(axis=1, keepdims=True)) / total
        weights, noise = weights / total, np.hypot(noise / total, weights / total * of_total)
    weights, noise = weights * config.scale, noise * abs(config.scale)
    return Known(weights, noise + FEW * F32 * np.abs(weights))
