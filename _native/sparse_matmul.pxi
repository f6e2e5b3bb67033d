# Products with rows of weights in the file's own number format; see flashinfer/kernels/.
#
# The loops are in kernels.h; here shapes are checked once and the GIL is released.

cdef extern from "kernels.h" nogil:
    ctypedef struct up_task:
        const uint8_t *memory
        const int64_t *rows
        int64_t row_bytes, n_rows, d, n_tokens
        int format
        const float *x
        const float *bias
        const float *largest
        const int32_t *indptr
        const int32_t *tokens
        float *out
        int64_t out_row, out_token

    ctypedef struct down_task:
        const uint8_t *memory
        const int64_t *rows
        int64_t n_rows, d, n_tokens
        int format
        const float *a
        const int32_t *indptr
        const int32_t *tokens
        float *y

    ctypedef struct number_format:
        const char *name
        int64_t block, bytes

    const number_format *number_formats
    const char *const *activation_names
    int N_FORMATS, N_ACTIVATIONS

    ctypedef struct vector_unit_t "vector_unit":
        const char *name

    int64_t bytes_of_row(int format, int64_t d)
    int run_products(up_task *task, int64_t products, int rounded, int threads)
    int run_down(const down_task *task, int64_t products, int threads)
    const vector_unit_t *best_unit()
    void layer_norm_row(const float *x, const float *weight, const float *bias, float epsilon,
                        int64_t n, float *y)
    void rms_norm_row(const float *x, const float *weight, float epsilon, int64_t n, float *y)
    void run_activate(float *x, int64_t n, int kind, float threshold, int threads)


cdef dict FORMAT_CODES = {number_formats[i].name.decode(): i for i in range(N_FORMATS)}
cdef dict ACTIVATION_CODES = {activation_names[i].decode(): i for i in range(N_ACTIVATIONS)}
cdef int n_threads = 1


def tables():
    """({number format: (values in a block, its bytes)}, the activations' names), of formats.h."""
    formats = {
        name: (number_formats[code].block, number_formats[code].bytes)
        for name, code in FORMAT_CODES.items()
    }
    return formats, tuple(ACTIVATION_CODES)


cdef int code_of(format) except -1:
    """What kernels.h calls a NumberFormat."""
    code = FORMAT_CODES.get(format.name)
    if code is None:
        raise Refused()
    return code


def set_threads(threads):
    """Use this many threads from now on."""
    global n_threads
    try:
        n_threads = <int>whole(threads, 1, MOST_THREADS)
    except REFUSALS:
        explained("set_threads", threads)
        raise


def vector_unit():
    """The name of the vector unit in use."""
    return best_unit().name.decode()


cdef int check_length(const float[::1] vector, int64_t length) except -1:
    if vector is not None and vector.shape[0] != length:
        raise Refused()
    return 0


cdef const float *start(const float[::1] vector) noexcept:
    """Where a vector begins; NULL where it is None or empty."""
    if vector is None or vector.shape[0] == 0:
        return NULL
    return &vector[0]


# ---------------------------------------------------------------- products


def linear(x, weight, bias=None, rounded=False):
    """x (T, d) float32, weight Matrix (n, d), bias (n,) -> (T, n) float32."""
    try:
        return _linear(x, weight, bias, rounded)
    except REFUSALS:
        explained("linear", x, weight, bias, rounded)
        raise


cdef _linear(x_array, weight, bias, rounded):
    cdef const float[:, ::1] x = floats_2d(x_array)
    check_array(weight.data, UINT8, 2)
    cdef const uint8_t[:, ::1] data = weight.data
    cdef const float[::1] bias_view = maybe_floats(bias)
    cdef up_task task
    cdef int format = code_of(weight.format), failed
    cdef int64_t n = data.shape[0], d = x.shape[1]
    if weight.columns != d or data.shape[1] != bytes_of_row(format, d):
        raise Refused()
    cdef bint round_x = switch(rounded)
    check_length(bias_view, n)
    out = np.empty((x.shape[0], n), dtype=np.float32)
    cdef float[:, ::1] out_view = out
    if x.shape[0] == 0 or n == 0:
        return out
    task.memory, task.rows, task.row_bytes, task.n_rows = &data[0, 0], NULL, data.shape[1], n
    task.d, task.n_tokens, task.format = d, x.shape[0], format
    task.x, task.bias, task.indptr, task.tokens = &x[0, 0], start(bias_view), NULL, NULL
    task.out, task.out_row, task.out_token, task.largest = &out_view[0, 0], 1, n, NULL
    with nogil:
        failed = run_products(&task, n * task.n_tokens, round_x, n_threads)
    if failed:
        raise MemoryError("no memory for the activations")
    return out


cdef int64_t check_rows(const uint8_t[::1] memory, const int64_t[::1] rows, int format, int64_t d,
                        const int32_t[::1] indptr, const int32_t[::1] tokens,
                        int64_t n_tokens) except -1:
    """Check that every row lies in memory and every token exists; return the products' count."""
    cdef int64_t i, k, n = rows.shape[0], row_bytes = bytes_of_row(format, d)
    if row_bytes < 0 or (indptr is None) != (tokens is None):
        raise Refused()
    for i in range(n):
        if not fits(rows[i], row_bytes, memory.shape[0]):
            raise Refused()
    if indptr is None:
        return n * n_tokens
    if indptr.shape[0] != n + 1 or indptr[0] != 0 or indptr[n] != tokens.shape[0]:
        raise Refused()
    for i in range(n):  # before any of them is used as an index
        if indptr[i + 1] < indptr[i]:
            raise Refused()
    for i in range(n):
        for k in range(indptr[i], indptr[i + 1]):
            if not 0 <= tokens[k] < n_tokens or (k > indptr[i] and tokens[k] <= tokens[k - 1]):
                raise Refused()
    return tokens.shape[0]


def sparse_up(memory, rows, format, x, bias=None, indptr=None, tokens=None, rounded=False):
    """Row i of weights . x[t] + bias[i] -> (n, T), or with indptr one value a (row, token) pair."""
    try:
        return _sparse_up(memory, rows, format, x, bias, indptr, tokens, rounded)
    except REFUSALS:
        explained("sparse_up", memory, rows, format, x, bias, indptr, tokens, rounded)
        raise


cdef _sparse_up(memory_array, rows_array, format, x_array, bias, indptr, tokens, rounded):
    cdef const uint8_t[::1] memory = bytes_1d(memory_array)
    cdef const int64_t[::1] rows = int64s(rows_array)
    cdef const float[:, ::1] x = floats_2d(x_array)
    cdef const float[::1] bias_view = maybe_floats(bias)
    cdef const int32_t[::1] starts = maybe_int32s(indptr)
    cdef const int32_t[::1] token_view = maybe_int32s(tokens)
    cdef up_task task
    cdef int code = code_of(format), failed
    cdef int64_t products = check_rows(memory, rows, code, x.shape[1], starts, token_view, x.shape[0])
    cdef bint round_x = switch(rounded)
    check_length(bias_view, rows.shape[0])
    out = np.empty(products, dtype=np.float32)
    cdef float[::1] out_view = out
    if products:
        task.memory, task.rows, task.row_bytes, task.n_rows = &memory[0], &rows[0], 0, rows.shape[0]
        task.d, task.n_tokens, task.format = x.shape[1], x.shape[0], code
        task.x, task.bias, task.indptr, task.tokens = &x[0, 0], start(bias_view), NULL, NULL
        task.out, task.out_row, task.out_token, task.largest = &out_view[0], x.shape[0], 1, NULL
        if starts is not None:
            task.indptr, task.tokens = &starts[0], &token_view[0]
        with nogil:
            failed = run_products(&task, products, round_x, n_threads)
        if failed:
            raise MemoryError("no memory for the activations")
    return out if indptr is not None else out.reshape(rows.shape[0], x.shape[0])


def sparse_down(memory, rows, format, a, y, indptr=None, tokens=None):
    """y[t] += a[i, t] * row i, i ascending, in place; a as sparse_up returns it."""
    try:
        _sparse_down(memory, rows, format, a, y, indptr, tokens)
    except REFUSALS:
        explained("sparse_down", memory, rows, format, a, y, indptr, tokens)
        raise


cdef _sparse_down(memory_array, rows_array, format, a, y_array, indptr, tokens):
    cdef const uint8_t[::1] memory = bytes_1d(memory_array)
    cdef const int64_t[::1] rows = int64s(rows_array)
    check_array(y_array, FLOAT32, 2)
    cdef float[:, ::1] y = y_array
    cdef const int32_t[::1] starts = maybe_int32s(indptr)
    cdef const int32_t[::1] token_view = maybe_int32s(tokens)
    cdef const float[:, ::1] table
    cdef down_task task
    cdef int code = code_of(format), failed
    cdef int64_t products = check_rows(memory, rows, code, y.shape[1], starts, token_view, y.shape[0])
    if indptr is None:
        table = floats_2d(a)
        if table.shape[0] != rows.shape[0] or table.shape[1] != y.shape[0]:
            raise Refused()
    cdef const float[::1] values = floats(a if indptr is not None else a.reshape(-1))
    if values.shape[0] != products:
        raise Refused()
    cdef Extent[6] arrays
    arrays[0] = extent(&y[0, 0], y.shape[0] * y.shape[1] * sizeof(float))
    arrays[1] = extent(&memory[0], memory.shape[0])
    arrays[2] = extent(&rows[0], rows.shape[0] * sizeof(int64_t))
    arrays[3] = extent(&values[0], values.shape[0] * sizeof(float))
    if starts is not None:
        arrays[4] = extent(&starts[0], starts.shape[0] * sizeof(int32_t))
        arrays[5] = extent(&token_view[0], token_view.shape[0] * sizeof(int32_t))
    check_apart(arrays, 1, 4 if starts is None else 6)
    if products == 0 or y.shape[1] == 0:
        return
    task.memory, task.rows, task.n_rows = &memory[0], &rows[0], rows.shape[0]
    task.d, task.n_tokens, task.format = y.shape[1], y.shape[0], code
    task.a, task.y, task.indptr, task.tokens = &values[0], &y[0, 0], NULL, NULL
    if starts is not None:
        task.indptr, task.tokens = &starts[0], &token_view[0]
    with nogil:
        failed = run_down(&task, products, n_threads)
    if failed:
        raise MemoryError("no memory for the factors")


# ---------------------------------------------------------------- norms and activations


def layer_norm(x, weight, bias, epsilon):
    """x (T, d) -> normalised (T, d) float32."""
    try:
        return _layer_norm(x, weight, bias, epsilon)
    except REFUSALS:
        explained("layer_norm", x, weight, bias, epsilon)
        raise


cdef _layer_norm(x_array, weight, bias, epsilon_given):
    cdef const float[:, ::1] x = floats_2d(x_array)
    cdef const float[::1] w = maybe_floats(weight)
    cdef const float[::1] b = maybe_floats(bias)
    cdef float epsilon = number(epsilon_given, 0.0)
    cdef Py_ssize_t t, n = x.shape[0], d = x.shape[1]
    if (w is None) != (b is None):
        raise Refused()
    check_length(w, d)
    check_length(b, d)
    out = np.empty((n, d), dtype=np.float32)
    cdef float[:, ::1] y = out
    cdef const float *weights = start(w)
    cdef const float *biases = start(b)
    if n and d:
        with nogil:
            for t in range(n):
                layer_norm_row(&x[t, 0], weights, biases, epsilon, d, &y[t, 0])
    return out


def rms_norm(x, weight, epsilon):
    """x (T, d) -> normalised (T, d) float32."""
    try:
        return _rms_norm(x, weight, epsilon)
    except REFUSALS:
        explained("rms_norm", x, weight, epsilon)
        raise


cdef _rms_norm(x_array, weight, epsilon_given):
    cdef const float[:, ::1] x = floats_2d(x_array)
    cdef const float[::1] w = maybe_floats(weight)
    cdef float epsilon = number(epsilon_given, 0.0)
    cdef Py_ssize_t t, n = x.shape[0], d = x.shape[1]
    check_length(w, d)
    out = np.empty((n, d), dtype=np.float32)
    cdef float[:, ::1] y = out
    cdef const float *weights = start(w)
    if n and d:
        with nogil:
            for t in range(n):
                rms_norm_row(&x[t, 0], weights, epsilon, d, &y[t, 0])
    return out


def activate(x, kind, threshold=0.0):
    """An activation of x, float32 and contiguous, in place."""
    try:
        _activate(x, kind, threshold)
    except REFUSALS:
        explained("activate", x, kind, threshold)
        raise


cdef _activate(x, kind, threshold_given):
    if not isinstance(kind, str) or kind not in ACTIVATION_CODES:
        raise Refused()
    cdef float threshold = number(threshold_given, -LARGEST)
    cdef int code = ACTIVATION_CODES[kind]
    if kind == "cap":
        capped(threshold_given)
    check_array(x, FLOAT32, x.ndim)
    if not x.flags.c_contiguous:
        raise Refused()
    cdef float[::1] values = x.reshape(-1)
    if values.shape[0]:
        with nogil:
            run_activate(&values[0], values.shape[0], code, threshold, n_threads)
