"""Which units a token uses, and where they are kept (paper sections 3.1 and 3.3)."""

import numpy as np

from flashinfer.kernels import doors
from flashinfer.kernels.doors import checked


@checked(doors.positive)
def positive(scores):
    """The neurons whose score is > 0: scores (d_ffn,) float32 -> (n,) int32 ascending."""
    return np.flatnonzero(scores > 0).astype(np.int32)


@checked(doors.route)
def route(logits, per_token, normalised):
    """What each token's router chooses: the ``per_token`` experts of the largest logits.

    logits (T, experts) float32. Of equal ones the lowest id is chosen; a NaN is below all others.
    Returns (chosen (T, per_token) int32 ascending, weights (T, per_token) float32): a softmax over
    all experts or, where ``normalised``, over those chosen.
    """
    logits = np.where(np.isnan(logits), -np.inf, logits).astype(np.float32)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :per_token]
    chosen = np.sort(chosen, axis=1).astype(np.int32)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = weights.sum(axis=1, keepdims=True)
    weights = np.take_along_axis(weights, chosen, axis=1)
    return chosen, weights / (weights.sum(axis=1, keepdims=True) if normalised else total)


@checked(doors.place)
def place(neurons, token, window, slot_of, neuron_at, last_used, priority, used):
    """Give each of ``neurons`` a slot of a layer's cache: the paper's section 3.3.

    neurons    (n,) int32 ascending; token: number of the current one; window: in tokens
    slot_of    (d_ffn,) int32: the slot that holds each neuron, or -1
    neuron_at  (capacity,) int32: the neuron in each slot, or -1
    last_used  (capacity,) int64: the token that used each slot last
    priority   (d_ffn,) float64: where slots are short, the neurons with the least are evicted
    used       slots 0 to used - 1 hold neurons
    The arrays are changed in place. Returns (slots (n,), misses, moved_from, moved_to, used): the
    slot of each neuron; the indices into ``neurons`` that must be read; the slots whose bytes must
    be copied, and where to; the new ``used``.
    Raises ValueError where n exceeds the capacity, or the arrays contradict each other.
    """
    slots = slot_of[neurons]
    misses = np.flatnonzero(slots < 0).astype(np.int32)
    last_used[slots[slots >= 0]] = token

    # Slots that the misses may take: those that left the window, then, where these and the unused
    # slots do not suffice, those of the least priority.
    kept = last_used[:used] > token - window
    free = np.flatnonzero(~kept).astype(np.int32)
    short = len(misses) - (len(neuron_at) - used) - len(free)
    if short > 0:
        kept[slots[slots >= 0]] = False
        candidates = np.flatnonzero(kept)
        least = np.argpartition(priority[neuron_at[candidates]], short - 1)[:short]
        free = np.sort(np.concatenate([free, candidates[least].astype(np.int32)]))
    slot_of[neuron_at[free]] = -1
    neuron_at[free] = -1

    # Append: first into the slots that became free, then behind the last one.
    taken = free[: len(misses)]
    rows = np.concatenate([taken, used + np.arange(len(misses) - len(taken), dtype=np.int32)])
    used += len(rows) - len(taken)
    slot_of[neurons[misses]] = rows
    neuron_at[rows] = neurons[misses]
    last_used[rows] = token

    # Delete: the last slots move into those that are still free, and the matrix shrinks.
    left = free[len(misses) :]
    used -= len(left)
    moved_to = left[left < used]
    tail = np.arange(used + len(left) - 1, used - 1, -1, dtype=np.int32)
    moved_from = tail[neuron_at[tail] >= 0]
    neuron_at[moved_to] = neuron_at[moved_from]
    last_used[moved_to] = last_used[moved_from]
    slot_of[neuron_at[moved_to]] = moved_to
    neuron_at[moved_from] = -1
    return slot_of[neurons], misses, moved_from, moved_to, used
