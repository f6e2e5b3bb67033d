"""What a layer's trace, the units that each token of a text used, tells about caches."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from flashinfer.formats.arrays import BoolArray, Float32Array, Int64Array
from flashinfer.formats.bundle.calibration import CAPACITIES, WINDOWS, LayerCalibration
from flashinfer.paper.neuron_cache import Policy, Priority
from flashinfer.paper.selection import Selection


def miss_curve(
    trace: Iterable[Selection], units: int, policy: Policy = "frecency", passing: bool = False
) -> tuple[float, ...]:
    """Units to read per token, for caches that hold each of the CAPACITIES of a layer.

    trace   the Selection of each token; the first half of the text only warms the cache up
    units   of the layer
    policy  one of neuron_cache.POLICIES
    passing units need no slot to be computed, so that of a token's units a cache may hold some
    A cache holds the units that the last token used, and of the others those of highest priority.
    Since priorities do not depend on the cache, a smaller cache holds a part of what a larger one
    holds, and one pass gives the figures of all sizes (Mattson's stack, 1970).
    """
    priority, ranks, last = Priority(units, policy), [], np.empty(0, dtype=np.int32)
    for token, selection in enumerate(trace):
        worth = priority.values.copy()
        worth[last] = np.inf
        own = worth[selection.units]
        rank = units - np.sort(worth).searchsorted(own, side="right")  # the units worth more
        held = np.isposinf(own)
        rank[held] = len(last) - 1  # the last token's units are cached together
        if passing and held.any():
            within = np.empty(units, dtype=np.int64)
            within[last[np.argsort(-priority.worth()[last], kind="stable")]] = np.arange(len(last))
            rank[held] = within[selection.units[held]]
        rank[own == 0] = units - 1  # a unit never used is cached only if the whole layer is
        ranks.append(rank)
        priority.note(selection, token)
        last = selection.units
    counted = ranks[len(ranks) // 2 :]
    ascending = np.sort(np.concatenate(counted)) if counted else np.empty(0, dtype=np.int64)
    hits = ascending.searchsorted(np.array(CAPACITIES) * units, side="left")
    return tuple(((len(ascending) - hits) / max(1, len(counted))).tolist())


def window_counts(uses: Iterable[tuple[BoolArray, bool]]) -> Int64Array:
    """Units that windows of 1, 2, ... tokens need at each token, (T, WINDOWS).

    uses  yields for each token (the units used (units,), whether a text begins with this token)
    """
    age: Int64Array = np.array(WINDOWS)  # of each unit: tokens since its last use
    counts = []
    for used, begins in uses:
        age = np.where(used, 0, WINDOWS if begins else age + 1)
        counts.append([np.count_nonzero(age < k) for k in range(1, WINDOWS + 1)])
    return np.array(counts)


def record_of_uses(
    uses: BoolArray, active: float, rank: int, weights: Float32Array | None = None
) -> LayerCalibration:
    """The calibration of a layer from the units that each token used: uses (T, units).

    active   share of the units that are active
    rank     of the predictor that named the units, of which it missed none
    weights  (T, units) that a router gave them, where it is a mixture's experts that were used
    """
    counts = window_counts((row, False) for row in uses)[WINDOWS:]
    trace = [Selection.of_scores(row[None]) for row in uses]
    if weights is not None:
        for selection, row in zip(trace, weights, strict=True):
            selection.weights = row[selection.units]
    return LayerCalibration(
        active=active,
        predicted=float(uses.mean()),
        missed=0.0,
        rank=rank,
        window_rows=tuple(counts.mean(axis=0).tolist()),
        window_rows_most=tuple(counts.max(axis=0).tolist()),
        misses=miss_curve(trace, uses.shape[1], passing=weights is not None),
    )


def routing_record(
    uses: BoolArray,
    weights: Float32Array,
    named: BoolArray | None = None,
    surest: BoolArray | None = None,
) -> LayerCalibration:
    """The calibration of a mixture's layer, whose router never errs.

    uses, weights  (T, experts): the experts that each token used, and how much they counted
    named, surest  (T, experts): those that the router named when it was asked one layer early, all
                   of them and the surest share; None: it was not asked
    """
    return replace(
        record_of_uses(uses, active=float(uses.mean()), rank=0, weights=weights),
        uses=tuple(uses.mean(axis=0).tolist()),
        guessed=0.0 if named is None else float((uses & named).sum() / named.sum()),
        surest=0.0 if surest is None else float((uses & surest).sum() / surest.sum()),
    )
