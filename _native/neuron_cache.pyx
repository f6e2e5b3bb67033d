# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Which neurons are used, and where they are kept; see flashinfer/kernels.py."""

import numpy as np

from libc.stdint cimport int32_t, int64_t


def positive(const float[::1] scores):
    """The indices of what is > 0, int32; see flashinfer/kernels.py."""
    cdef Py_ssize_t i, n = 0
    found = np.empty(scores.shape[0], dtype=np.int32)
    cdef int32_t[::1] view = found
    for i in range(scores.shape[0]):
        view[n] = <int32_t>i  # overwritten by the next, where it is not > 0
        n += scores[i] > 0
    return found[:n].copy()


def place(const int32_t[::1] neurons, int64_t token, int64_t window,
          int32_t[::1] slot_of, int32_t[::1] neuron_at, int64_t[::1] last_used,
          double[::1] priority, int64_t used):
    """Give each of ``neurons`` a row; return (slots, misses, moved_from, moved_to, used)."""
    cdef Py_ssize_t n = neurons.shape[0], i, missing = 0, next_free = 0, moves = 0
    cdef int64_t capacity = neuron_at.shape[0], row, last
    if n > capacity:
        raise ValueError(f"{n} neurons do not fit the cache's {capacity} rows")
    slots = np.empty(n, dtype=np.int32)
    misses = np.empty(n, dtype=np.int32)
    cdef int32_t[::1] slot_view = slots, miss_view = misses
    for i in range(n):
        row = slot_of[neurons[i]]
        slot_view[i] = <int32_t>row
        if row < 0:
            miss_view[missing] = <int32_t>i
            missing += 1
        else:
            last_used[row] = token

    # Rows that the misses may take: those that left the window, then, where these and the unused
    # rows do not suffice, those of the least priority.
    kept = np.asarray(last_used[:used]) > token - window
    free = np.flatnonzero(~kept).astype(np.int32)
    cdef int64_t short = missing - (capacity - used) - free.shape[0]
    if short > 0:
        kept[slots[slots >= 0]] = False
        candidates = np.flatnonzero(kept)
        worth = np.asarray(priority)[np.asarray(neuron_at)[candidates]]
        least = np.argpartition(worth, short - 1)[:short]
        free = np.sort(np.concatenate([free, candidates[least].astype(np.int32)]))
    cdef const int32_t[::1] free_view = free
    cdef Py_ssize_t n_free = free.shape[0]
    for i in range(n_free):
        slot_of[neuron_at[free_view[i]]] = -1
        neuron_at[free_view[i]] = -1

    # Append: first into the rows that became free, then behind the last one.
    for i in range(missing):
        if next_free < n_free:
            row = free_view[next_free]
            next_free += 1
        else:
            row = used
            used += 1
            if row >= capacity:
                raise ValueError("the cache's books are wrong")
        slot_of[neurons[miss_view[i]]] = <int32_t>row
        neuron_at[row] = neurons[miss_view[i]]
        last_used[row] = token
        slot_view[miss_view[i]] = <int32_t>row

    # Delete: the last rows move into the rows that are still free, and the matrix shrinks.
    moved_from = np.empty(n_free - next_free, dtype=np.int32)
    moved_to = np.empty(n_free - next_free, dtype=np.int32)
    cdef int32_t[::1] from_view = moved_from, to_view = moved_to
    last = n_free
    while next_free < last:
        used -= 1
        if neuron_at[used] < 0:  # the last row is itself free
            last -= 1
            continue
        row = free_view[next_free]
        next_free += 1
        neuron_at[row] = neuron_at[used]
        last_used[row] = last_used[used]
        slot_of[neuron_at[row]] = <int32_t>row
        from_view[moves], to_view[moves] = <int32_t>used, <int32_t>row
        moves += 1
        neuron_at[used] = -1
    for i in range(n):
        slot_view[i] = slot_of[neurons[i]]
    return slots, misses[:missing], moved_from[:moves], moved_to[:moves], used
