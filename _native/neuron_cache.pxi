# Which units are used, and where they are kept; see flashinfer/kernels/.

cdef extern from "route.h" nogil:
    ctypedef struct routing:
        int64_t experts, per_token, groups, groups_kept
        int normalised, sigmoid, by_max
        const float *choice_bias
        float scale

    ctypedef struct routing_scratch:
        float *values
        float *group_scores
        int32_t *kept

    bint chosen_by_logits(const routing *r)
    void route_token(const routing *r, const float *logits, const routing_scratch *scratch,
                     int32_t *chosen, float *weights)


def positive(scores):
    """The indices of what is > 0, int32."""
    try:
        return _positive(scores)
    except REFUSALS:
        explained("positive", scores)
        raise


cdef _positive(scores_array):
    cdef const float[::1] scores = floats(scores_array)
    cdef Py_ssize_t i, n = 0
    found = np.empty(scores.shape[0], dtype=np.int32)
    cdef int32_t[::1] view = found
    for i in range(scores.shape[0]):
        view[n] = <int32_t>i  # overwritten by the next, where it is not > 0
        n += scores[i] > 0
    return found[:n].copy()


def route(logits, per_token, normalised, scoring="softmax", choice_bias=None, groups=1,
          groups_kept=1, scale=1.0, group_by="top2"):
    """What each token's router chooses: (chosen (T, per_token) int32, weights float32)."""
    try:
        return _route(logits, per_token, normalised, scoring, choice_bias, groups, groups_kept,
                      scale, group_by)
    except REFUSALS:
        explained("route", logits, per_token, normalised, scoring, choice_bias, groups,
                  groups_kept, scale, group_by)
        raise


cdef bint is_second(value, str first, str second) except -1:
    """Which of two words it is: 0 or 1."""
    if not isinstance(value, str) or (value != first and value != second):
        raise Refused()
    return value == second


cdef _route(logits_array, per_token, normalised, scoring, choice_bias, groups, groups_kept, scale,
            group_by):
    cdef const float[:, ::1] logits = floats_2d(logits_array)
    cdef const float[::1] bias
    cdef int64_t t, n = logits.shape[0]
    cdef routing r
    cdef bint divided = normalised
    r.experts = logits.shape[1]
    r.per_token = whole(per_token, 1, r.experts)
    r.normalised = divided
    r.sigmoid = is_second(scoring, "softmax", "sigmoid")
    r.by_max = is_second(group_by, "top2", "max")
    r.groups = whole(groups, 1, r.experts)
    r.groups_kept = whole(groups_kept, 1, r.groups)
    if r.experts % r.groups or r.per_token > r.groups_kept * (r.experts // r.groups):
        raise Refused()
    r.scale = number(scale, -LARGEST)
    r.choice_bias = NULL
    if choice_bias is not None:
        bias = floats(choice_bias)
        if bias.shape[0] != r.experts:
            raise Refused()
        r.choice_bias = &bias[0]
    chosen = np.empty((n, r.per_token), dtype=np.int32)
    weights = np.empty((n, r.per_token), dtype=np.float32)
    cdef int32_t[:, ::1] chosen_view = chosen
    cdef float[:, ::1] weight_view = weights
    cdef routing_scratch scratch
    cdef float[::1] values
    cdef int32_t[::1] kept
    if not chosen_by_logits(&r):
        values = np.empty(r.experts + r.groups, dtype=np.float32)
        kept = np.empty(r.groups_kept, dtype=np.int32)
        scratch = routing_scratch(&values[0], &values[r.experts], &kept[0])
    with nogil:
        for t in range(n):
            route_token(&r, &logits[t, 0], &scratch, &chosen_view[t, 0], &weight_view[t, 0])
    return chosen, weights


def place(neurons, token, window, slot_of, neuron_at, last_used, priority, used):
    """Give each of ``neurons`` a slot; return (slots, misses, moved_from, moved_to, used)."""
    try:
        return _place(neurons, token, window, slot_of, neuron_at, last_used, priority, used)
    except REFUSALS:
        explained("place", neurons, token, window, slot_of, neuron_at, last_used, priority, used)
        raise


cdef int check_slots(const int32_t[::1] neurons, const int32_t[::1] slot_of,
                     const int32_t[::1] neuron_at, int64_t used) except -1:
    """Check that neurons are ascending ids in slots that hold them, and used slots hold ids."""
    cdef Py_ssize_t i
    cdef int64_t n, slot, last = -1, d_ffn = slot_of.shape[0]
    cdef bint outside = False
    for i in range(used):
        outside |= neuron_at[i] < 0 or neuron_at[i] >= d_ffn
    if outside:
        raise Refused()
    for i in range(neurons.shape[0]):
        n = neurons[i]
        if not last < n < d_ffn:
            raise Refused()
        slot = slot_of[n]
        if slot >= used or (slot >= 0 and neuron_at[slot] != n):
            raise Refused()
        last = n
    return 0


cdef _place(neurons_array, token_given, window_given, slot_of_array, neuron_at_array,
            last_used_array, priority_array, used_given):
    cdef const int32_t[::1] neurons = int32s(neurons_array)
    check_array(slot_of_array, INT32, 1)
    check_array(neuron_at_array, INT32, 1)
    check_array(last_used_array, INT64, 1)
    check_array(priority_array, FLOAT64, 1)
    cdef int32_t[::1] slot_of = slot_of_array, neuron_at = neuron_at_array
    cdef int64_t[::1] last_used = last_used_array
    cdef const double[::1] priority = priority_array
    cdef int64_t capacity = neuron_at.shape[0], row, last
    cdef int64_t token = whole(token_given, 0, MOST)
    cdef int64_t window = 0 if window_given is None else whole(window_given, 1, MOST)
    cdef int64_t used = whole(used_given, 0, capacity)
    cdef Py_ssize_t n = neurons.shape[0], i, missing = 0, next_free = 0, moves = 0
    if n > capacity or last_used.shape[0] != capacity or priority.shape[0] != slot_of.shape[0]:
        raise Refused()
    check_slots(neurons, slot_of, neuron_at, used)
    cdef Extent[5] arrays
    arrays[0] = extent(&slot_of[0], slot_of.shape[0] * sizeof(int32_t))
    arrays[1] = extent(&neuron_at[0], capacity * sizeof(int32_t))
    arrays[2] = extent(&last_used[0], capacity * sizeof(int64_t))
    arrays[3] = extent(&neurons[0], n * sizeof(int32_t))
    arrays[4] = extent(&priority[0], priority.shape[0] * sizeof(double))
    check_apart(arrays, 3, 5)
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

    # Slots that the misses may take: those that left the window, then, where these and the unused
    # slots do not suffice, those of the least priority.
    kept = last_used_array[:used] > token - window if window else np.ones(used, dtype=bool)
    free = np.flatnonzero(~kept).astype(np.int32)
    cdef int64_t short = missing - (capacity - used) - free.shape[0]
    if short > 0:
        kept[slots[slots >= 0]] = False
        candidates = np.flatnonzero(kept)
        worth = priority_array[neuron_at_array[candidates]]
        least = np.argpartition(worth, short - 1)[:short]
        free = np.sort(np.concatenate([free, candidates[least].astype(np.int32)]))
    cdef const int32_t[::1] free_view = free
    cdef Py_ssize_t n_free = free.shape[0]
    for i in range(n_free):
        slot_of[neuron_at[free_view[i]]] = -1
        neuron_at[free_view[i]] = -1

    # Append: first into the slots that became free, then behind the last one.
    for i in range(missing):
        if next_free < n_free:
            row = free_view[next_free]
            next_free += 1
        else:
            row = used
            used += 1
        slot_of[neurons[miss_view[i]]] = <int32_t>row
        neuron_at[row] = neurons[miss_view[i]]
        last_used[row] = token
        slot_view[miss_view[i]] = <int32_t>row

    # Delete: the last slots move into those that are still free, and the matrix shrinks.
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
