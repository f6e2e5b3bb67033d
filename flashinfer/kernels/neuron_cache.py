"""Which units a token uses, and in which slots they are kept (paper sections 3.1 and 3.3)."""

import numpy as np

from flashinfer.formats.arrays import Float32Array, Float64Array, Int32Array, Int64Array
from flashinfer.kernels import doors
from flashinfer.kernels.doors import checked


@checked(doors.positive)
def positive(scores: Float32Array) -> Int32Array:
    """The neurons whose score is > 0: scores (d_ffn,) -> (n,) ascending."""
    return np.flatnonzero(scores > 0).astype(np.int32)


@checked(doors.route)
def route(
    logits: Float32Array, per_token: int, normalised: bool
) -> tuple[Int32Array, Float32Array]:
    """The experts that each token's router chooses: the ``per_token`` with the largest logits.

    logits (T, experts). Among equal logits the lowest id is chosen; NaN is below all numbers.
    Returns (chosen (T, per_token) ascending, weights (T, per_token)). The weights are a softmax
    over all experts or, where ``normalised``, over those chosen.
    """
    logits = np.where(np.isnan(logits), -np.inf, logits).astype(np.float32)
    likeliest = np.argsort(-logits, axis=1, kind="stable")[:, :per_token]
    chosen = np.sort(likeliest, axis=1).astype(np.int32)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = weights.sum(axis=1, keepdims=True)
    weights = np.take_along_axis(weights, chosen, axis=1)
    return chosen, weights / (weights.sum(axis=1, keepdims=True) if normalised else total)


@checked(doors.place)
def place(
    neurons: Int32Array,
    token: int,
    window: int,
    slot_of: Int32Array,
    neuron_at: Int32Array,
    last_used: Int64Array,
    priority: Float64Array,
    used: int,
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array, int]:
    """Give each of ``neurons`` a slot of a layer's cache (paper section 3.3).

    neurons    (n,) ascending
    token      the number of the current token
    window     tokens whose neurons stay
    slot_of    (d_ffn,): the slot that holds each neuron, or -1
    neuron_at  (capacity,): the neuron in each slot, or -1
    last_used  (capacity,): the token that used each slot last
    priority   (d_ffn,): where slots are short, the neurons of least priority are evicted
    used       slots 0 to used - 1 hold neurons
    The arrays are changed in place. Returns (slots (n,), misses, moved_from, moved_to, used): the
    slot of each neuron; the indices into ``neurons`` that must be read; the slots whose bytes must
    be copied, and the slots to copy them to; the new ``used``.
    Raises ValueError where n exceeds the capacity, or the arrays contradict each other.
    """
    slots = slot_of[neurons]
    misses = np.flatnonzero(slots < 0).astype(np.int32)
    last_used[slots[slots >= 0]] = token

    # The misses may take the slots of neurons that left the window. Where these and the unused
    # slots do not suffice, the neurons of least priority are evicted, too.
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

    # Append: first into the slots that became free, then behind the last slot.
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
