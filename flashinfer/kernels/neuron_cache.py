"""Which units a token uses, and in which slots they are kept (paper sections 3.1 and 3.3)."""

from typing import Literal

import numpy as np

from flashinfer.formats.arrays import BoolArray, Float32Array, Float64Array, Int32Array, Int64Array
from flashinfer.kernels import doors
from flashinfer.kernels.activations import sigmoid
from flashinfer.kernels.doors import checked

# What an expert whose logit is NaN is chosen by, and the least that any other is chosen by. Sums of
# two keep the order: two numbers, then a number and a NaN, then two NaN. (Also in _native/route.h.)
VALUE_OF_NAN, LEAST_VALUE = np.float32(-2e38), np.float32(-1e38)


@checked(doors.positive)
def positive(scores: Float32Array) -> Int32Array:
    """The neurons whose score is > 0: scores (d_ffn,) -> (n,) ascending."""
    return np.flatnonzero(scores > 0).astype(np.int32)


@checked(doors.route)
def route(
    logits: Float32Array,
    per_token: int,
    normalised: bool,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    choice_bias: Float32Array | None = None,
    groups: int = 1,
    groups_kept: int = 1,
    scale: float = 1.0,
    group_by: Literal["top2", "max"] = "top2",
) -> tuple[Int32Array, Float32Array]:
    """The experts that each token's router chooses, and their weights.

    logits       (T, experts)
    per_token    how many experts are chosen: those of the largest scores
    normalised   the weights of those chosen are divided by their sum
    scoring      an expert's score is its share of a softmax over all, or the logit's sigmoid
    choice_bias  (experts,), added to the scores to choose by, and not to the weights; or None
    groups       into which experts lie side by side, equally many in each
    groups_kept  of them, those of the highest scores, experts are chosen from
    scale        multiplies the weights
    group_by     a group's score is the sum of its two largest scores to choose by, or the largest
    Returns (chosen (T, per_token) ascending, weights (T, per_token) float32): the scores of the
    chosen experts, normalised and scaled.
    Among equals the lowest id is chosen. A logit of NaN has the score of -inf, and its expert is
    below all others, whatever its bias; those whose bias is NaN come next.
    """
    is_nan = np.isnan(logits)
    logits = np.where(is_nan, -np.inf, logits).astype(np.float32)
    if scoring == "sigmoid":
        scores, total = sigmoid(logits), np.float32(1)
    else:  # the numerators of the softmax, and its denominator
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        total = scores.sum(axis=1, keepdims=True)
    if scoring == "softmax" and choice_bias is None and groups_kept == groups:
        values = logits  # in the order of the softmax, and do not round to equal ones as it may
    else:
        biased = scores / total + (0 if choice_bias is None else choice_bias)
        values = np.where(is_nan, VALUE_OF_NAN, np.fmax(biased, LEAST_VALUE))
    if groups_kept < groups:
        kept = _in_best_groups(values, groups, groups_kept, group_by)
        values = np.where(kept, values, np.float32(-np.inf))
    likeliest = np.argsort(-values, axis=1, kind="stable")[:, :per_token]
    chosen = np.sort(likeliest, axis=1).astype(np.int32)
    weights = np.take_along_axis(scores, chosen, axis=1)
    divisor = weights.sum(axis=1, keepdims=True) if normalised else total
    if normalised and scoring == "sigmoid":
        divisor = divisor + np.float32(1e-20)  # as in transformers
    elif normalised:  # as in transformers: at least 1e-12 of the softmax
        divisor = np.maximum(divisor, np.float32(1e-12) * total)
    return chosen, weights / divisor * np.float32(scale)


def _in_best_groups(
    values: Float32Array, groups: int, groups_kept: int, group_by: str
) -> BoolArray:
    """values (T, experts) to choose by -> whether an expert's group is kept (T, experts)."""
    tokens, experts = values.shape
    size = experts // int(groups)
    ascending = np.sort(values.reshape(tokens, groups, size), axis=2)
    scores = ascending[:, :, -2 if group_by == "top2" else -1 :].sum(axis=2)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :groups_kept]
    kept = np.zeros((tokens, groups), dtype=bool)
    np.put_along_axis(kept, best, True, axis=1)
    return np.repeat(kept, size, axis=1)


@checked(doors.place)
def place(
    neurons: Int32Array,
    token: int,
    window: int | None,
    slot_of: Int32Array,
    neuron_at: Int32Array,
    last_used: Int64Array,
    priority: Float64Array,
    used: int,
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array, int]:
    """Give each of ``neurons`` a slot of a layer's cache (paper section 3.3).

    neurons    (n,) ascending
    token      the number of the current token
    window     tokens whose neurons stay; None: none leaves before its slot is needed
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
    kept = np.ones(used, dtype=bool)
    if window is not None:
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
