"""What a layer's trace, the units that token after token used, says of caches."""

import math

import numpy as np

from flashinfer.formats.bundle.reader import CAPACITIES, WINDOWS
from flashinfer.paper.neuron_cache import Priority
from flashinfer.paper.router import SURE
from flashinfer.paper.selection import Selection


def miss_curve(trace, neurons, policy="frecency"):
    """Neurons to read per token, for a cache of each of CAPACITIES of the layer's rows.

    trace yields a Selection of each token; its first half only warms the cache up. A cache holds
    what the last token used, and of the others those of most priority. As that does not depend
    on the cache, a smaller one holds a part of what a larger one holds, and one pass gives all
    sizes (Mattson's stack, 1970).
    """
    priority, ranks, last = Priority(neurons, policy), [], np.empty(0, dtype=np.int32)
    for token, selection in enumerate(trace):
        worth = priority.values.copy()
        worth[last] = np.inf
        own = worth[selection.units]
        rank = neurons - np.sort(worth).searchsorted(own, side="right")  # worth more
        rank[np.isposinf(own)] = len(last) - 1  # there where all of them are
        rank[own == 0] = neurons - 1  # never used: it is there only if the whole layer is
        ranks.append(rank)
        priority.note(selection, token)
        last = selection.units
    counted = ranks[len(ranks) // 2 :]
    ranks = np.sort(np.concatenate(counted)) if counted else np.empty(0, dtype=np.int64)
    rows = np.array(CAPACITIES) * neurons
    hits = ranks.searchsorted(rows, side="left")
    return ((len(ranks) - hits) / max(1, len(counted))).tolist()


def window_counts(uses):
    """Units that windows of 1, 2, ... tokens need at each token: (T, WINDOWS).

    uses  yields (units used (units,) bool, whether a text begins there)
    """
    age, counts = WINDOWS, []
    for used, begins in uses:
        age = np.where(used, 0, WINDOWS if begins else age + 1)
        counts.append([np.count_nonzero(age < k) for k in range(1, WINDOWS + 1)])
    return np.array(counts)


def record_of_uses(uses):
    """What calibration says of a layer whose units a text used so: uses (T, units) bool."""
    counts = window_counts((row, False) for row in uses)[WINDOWS:]
    trace = (Selection.of_scores(row[None]) for row in uses)
    return {
        "predicted": float(uses.mean()),
        "missed": 0.0,
        "window_rows": counts.mean(axis=0).tolist(),
        "window_rows_most": counts.max(axis=0).tolist(),
        "misses": miss_curve(trace, uses.shape[1]),
    }


def routing_record(uses):
    """The same of a mixture's layer, whose router never errs, and how often each expert is used."""
    found = record_of_uses(uses)
    return {"active": found["predicted"], "rank": 0, **found, "uses": uses.mean(axis=0).tolist()}


def guessed(uses, early):
    """What a calibration says of guesses: uses (T, experts) bool; early: the scores of the router
    when it was asked one layer early, or None."""
    if early is None:
        return {"guessed": 0.0, "surest": 0.0}
    per_token = int(uses[0].sum())
    sure = math.ceil(SURE * per_token)
    right = {
        n: float((uses & largest(early, n)).sum() / (n * len(uses))) for n in (per_token, sure)
    }
    return {"guessed": right[per_token], "surest": right[sure]}


def largest(scores, n):
    """Which are among the n largest of each row: bool, as scores."""
    least = np.partition(scores, -n, axis=1)[:, -n, None]
    return scores >= least
