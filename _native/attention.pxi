# Causal attention over the key/value cache, and linear attention; see flashinfer/kernels/.

cdef extern from "kernels.h" nogil:
    int F32, F16, Q8_0

    ctypedef struct attention_task:
        const float *q
        const uint8_t *keys
        const uint8_t *values
        int64_t n_tokens, n_heads, n_groups, width, context, start, window
        int format, both
        const float *bias
        float cap
        const float *sinks
        float *out

    int run_attention(const attention_task *task, int threads)
    void remember_rows(const float *x, int64_t n_tokens, int64_t n_groups, int64_t width,
                       uint8_t *cache, int64_t context, int64_t row_bytes, int64_t start,
                       int format)
    ctypedef struct linear_attention_task:
        const float *q
        const float *k
        const float *v
        const float *decay
        const float *rate
        float *state
        int64_t n_tokens, n_heads, n_groups, n, width
        int delta
        float *y

    void run_linear_attention(const linear_attention_task *task, int threads)
    void rotate_row(float *x, const float *cos, const float *sin, int64_t half)


cdef int format_of(array) except -1:
    """The number format of a key/value cache; bytes are blocks of q8_0."""
    if not isinstance(array, ndarray) or array.dtype not in (FLOAT32, FLOAT16, UINT8):
        raise Refused()
    check_array(array, array.dtype, 3)
    if array.dtype == UINT8:
        if array.shape[2] % 34:
            raise Refused()
        return Q8_0
    return F32 if array.dtype == FLOAT32 else F16


cdef int64_t width_of(array, int format) except -1:
    """Values of a row of a key/value cache."""
    return array.shape[2] // 34 * 32 if format == Q8_0 else array.shape[2]


def remember(cache, x, start):
    """cache (G, context, >= w) f32, f16 or q8_0 [:, start : start + T, :w] = x (T, G, w)."""
    try:
        _remember(cache, x, start)
    except REFUSALS:
        explained("remember", cache, x, start)
        raise


cdef _remember(cache, x_array, start):
    cdef int format = format_of(cache)
    cdef const float[:, :, ::1] x = floats_3d(x_array)
    cdef uint8_t[:, :, ::1] view
    cdef Extent[2] arrays
    cdef int64_t row_bytes = cache.shape[2] * cache.itemsize, context = cache.shape[1]
    if cache.shape[0] != x.shape[1] or width_of(cache, format) < x.shape[2]:
        raise Refused()
    cdef int64_t first = whole(start, 0, context - x.shape[0])
    if not cache.flags.writeable or not cache.flags.c_contiguous:
        raise Refused()
    if x.shape[0] and x.shape[1] and x.shape[2]:
        view = cache.view(UINT8)
        arrays[0] = extent(&view[0, 0, 0], cache.nbytes)
        arrays[1] = extent(&x[0, 0, 0], x_array.nbytes)
        check_apart(arrays, 1, 2)
        with nogil:
            remember_rows(&x[0, 0, 0], x.shape[0], x.shape[1], x.shape[2], &view[0, 0, 0],
                          context, row_bytes, first, format)


def attention(q, keys, values, start, window=None, bias=None, cap=0.0, sinks=None, both=False):
    """q (T, H, w) scaled; keys, values (G, context, w) f32, f16 or q8_0 -> (T, H, w) float32."""
    try:
        return _attention(q, keys, values, start, window, bias, cap, sinks, both)
    except REFUSALS:
        explained("attention", q, keys, values, start, window, bias, cap, sinks, both)
        raise


cdef _attention(q_array, keys, values, start, window, bias, cap, sinks, both):
    cdef const float[:, :, ::1] q = floats_3d(q_array)
    cdef const float[:, ::1] bias_view
    cdef const float[::1] sink_view
    cdef const uint8_t[:, :, ::1] key_bytes, value_bytes
    cdef attention_task task
    cdef int failed
    task.format = format_of(keys)
    if format_of(values) != task.format or keys.shape != values.shape:
        raise Refused()
    if not keys.flags.c_contiguous or not values.flags.c_contiguous:
        raise Refused()
    task.n_tokens, task.n_heads, task.width = q.shape[0], q.shape[1], q.shape[2]
    task.n_groups, task.context = keys.shape[0], keys.shape[1]
    if not task.n_groups or task.n_heads % task.n_groups or task.width % 32:
        raise Refused()
    if width_of(keys, task.format) != task.width:
        raise Refused()
    task.start = whole(start, 0, task.context - task.n_tokens)
    task.window = 0 if window is None else whole(window, 1, MOST)
    task.cap = number(cap, 0.0)
    if cap != 0:
        task.cap = capped(cap)
    if both is not False and (both is not True or window is not None):
        raise Refused()
    task.both = both is True
    task.bias = task.sinks = NULL
    if bias is not None:
        bias_view = floats_2d(bias)
        if bias_view.shape[0] != task.n_heads or bias_view.shape[1] != task.context:
            raise Refused()
    if sinks is not None:
        sink_view = floats(sinks)
        if sink_view.shape[0] != task.n_heads:
            raise Refused()
    out = np.empty((q.shape[0], q.shape[1], q.shape[2]), dtype=np.float32)
    cdef float[:, :, ::1] out_view = out
    if out.size == 0:
        return out
    if bias is not None:
        task.bias = &bias_view[0, 0]
    if sinks is not None:
        task.sinks = &sink_view[0]
    key_bytes, value_bytes = keys.view(UINT8), values.view(UINT8)
    task.q, task.keys, task.values = &q[0, 0, 0], &key_bytes[0, 0, 0], &value_bytes[0, 0, 0]
    task.out = &out_view[0, 0, 0]
    with nogil:
        failed = run_attention(&task, n_threads)
    if failed:
        raise MemoryError("no memory for attention scores")
    return out


def rotate(x, cos, sin):
    """Turn pairs of the first values of each head of x (T, H, w) in place."""
    try:
        _rotate(x, cos, sin)
    except REFUSALS:
        explained("rotate", x, cos, sin)
        raise


cdef _rotate(x_array, cos_array, sin_array):
    check_array(x_array, FLOAT32, 3)
    cdef float[:, :, ::1] x = x_array
    cdef const float[:, ::1] cos = floats_2d(cos_array)
    cdef const float[:, ::1] sin = floats_2d(sin_array)
    cdef Py_ssize_t t, h, half = cos.shape[1]
    if cos.shape[0] != x.shape[0] or sin.shape[0] != x.shape[0] or sin.shape[1] != half:
        raise Refused()
    if 2 * half > x.shape[2]:
        raise Refused()
    cdef Extent[3] arrays
    arrays[0] = extent(&x[0, 0, 0], x_array.nbytes)
    arrays[1] = extent(&cos[0, 0], cos_array.nbytes)
    arrays[2] = extent(&sin[0, 0], sin_array.nbytes)
    check_apart(arrays, 1, 3)
    if half and x.shape[1]:
        with nogil:
            for t in range(x.shape[0]):
                for h in range(x.shape[1]):
                    rotate_row(&x[t, h, 0], &cos[t, 0], &sin[t, 0], half)


def linear_attention(q, k, v, decay, rate, state, delta=False):
    """q, k (T, G, n), v (T, H, w), decay, rate (T, H) -> (T, H, w); changes state (H, n, w)."""
    try:
        return _linear_attention(q, k, v, decay, rate, state, delta)
    except REFUSALS:
        explained("linear_attention", q, k, v, decay, rate, state, delta)
        raise


cdef _linear_attention(q_array, k_array, v_array, decay_array, rate_array, state_array, delta):
    cdef const float[:, :, ::1] q = floats_3d(q_array)
    cdef const float[:, :, ::1] k = floats_3d(k_array)
    cdef const float[:, :, ::1] v = floats_3d(v_array)
    cdef const float[:, ::1] decay = floats_2d(decay_array)
    cdef const float[:, ::1] rate = floats_2d(rate_array)
    check_array(state_array, FLOAT32, 3)
    cdef float[:, :, ::1] state = state_array
    cdef linear_attention_task task
    task.n_tokens, task.n_groups, task.n = q.shape[0], q.shape[1], q.shape[2]
    task.n_heads, task.width = v.shape[1], v.shape[2]
    if k_array.shape != q_array.shape or v.shape[0] != task.n_tokens:
        raise Refused()
    if not task.n_groups or task.n_heads % task.n_groups:
        raise Refused()
    if decay.shape[0] != task.n_tokens or decay.shape[1] != task.n_heads:
        raise Refused()
    if rate_array.shape != decay_array.shape:
        raise Refused()
    if state_array.shape != (task.n_heads, task.n, task.width):
        raise Refused()
    task.delta = switch(delta)
    y = np.zeros((v.shape[0], v.shape[1], v.shape[2]), dtype=np.float32)
    cdef float[:, :, ::1] y_view = y
    if y.size == 0 or state_array.size == 0:
        return y
    cdef Extent[6] arrays
    arrays[0] = extent(&state[0, 0, 0], state_array.nbytes)
    arrays[1] = extent(&q[0, 0, 0], q_array.nbytes)
    arrays[2] = extent(&k[0, 0, 0], k_array.nbytes)
    arrays[3] = extent(&v[0, 0, 0], v_array.nbytes)
    arrays[4] = extent(&decay[0, 0], decay_array.nbytes)
    arrays[5] = extent(&rate[0, 0], rate_array.nbytes)
    check_apart(arrays, 1, 6)
    task.q, task.k, task.v = &q[0, 0, 0], &k[0, 0, 0], &v[0, 0, 0]
    task.decay, task.rate, task.state = &decay[0, 0], &rate[0, 0], &state[0, 0, 0]
    task.y = &y_view[0, 0, 0]
    with nogil:
        run_linear_attention(&task, n_threads)
    return y
