# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Products with rows of weights in the file's own number format; see flashinfer/kernels.py.

The loops are in kernels.h; here shapes are checked once and the GIL is released.
"""

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint8_t


cdef extern from "kernels.h" nogil:
    ctypedef struct up_task:
        const uint8_t *memory
        const int64_t *rows
        int64_t row_bytes, n_rows, d, n_tokens
        int format
        const float *x
        const float *bias
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

    ctypedef struct vector_unit_t "vector_unit":
        const char *name

    int run_up(up_task *task, int64_t products, int threads)
    int run_down(const down_task *task, int64_t products, int threads)
    const vector_unit_t *best_unit()
    void layer_norm_row(const float *x, const float *weight, const float *bias, float epsilon,
                        int64_t n, float *y)
    void rms_norm_row(const float *x, const float *weight, float epsilon, int64_t n, float *y)
    void run_activate(float *x, int64_t n, int kind, float threshold, int threads)


cdef int n_threads = 1


def set_threads(int threads):
    """Use this many threads from now on."""
    global n_threads
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    n_threads = threads


def vector_unit():
    """The name of the vector unit in use."""
    return best_unit().name.decode()


def linear(const float[:, ::1] x, weight, bias=None):
    """x (T, d) float32, weight Matrix (n, d), bias (n,) -> (T, n) float32."""
    cdef const uint8_t[:, ::1] data = weight.data
    cdef const float[::1] bias_view
    cdef up_task task
    cdef int failed
    if x.shape[1] != weight.columns:
        raise ValueError(f"x is {x.shape[0], x.shape[1]}, weight ({data.shape[0]}, {weight.columns})")
    out = np.empty((x.shape[0], data.shape[0]), dtype=np.float32)
    cdef float[:, ::1] out_view = out
    if x.shape[0] == 0 or data.shape[0] == 0:
        return out
    task.memory, task.rows, task.row_bytes, task.n_rows = &data[0, 0], NULL, data.shape[1], data.shape[0]
    task.d, task.n_tokens, task.format = x.shape[1], x.shape[0], weight.format.code
    task.x, task.bias, task.indptr, task.tokens = &x[0, 0], NULL, NULL, NULL
    task.out, task.out_row, task.out_token = &out_view[0, 0], 1, data.shape[0]
    if bias is not None:
        bias_view = bias
        if bias_view.shape[0] != data.shape[0]:
            raise ValueError(f"bias is ({bias_view.shape[0]},), weight has {data.shape[0]} rows")
        task.bias = &bias_view[0]
    with nogil:
        failed = run_up(&task, task.n_rows * task.n_tokens, n_threads)
    if failed:
        raise MemoryError("no memory for the activations")
    return out


cdef int64_t check(const uint8_t[::1] memory, const int64_t[::1] rows, int64_t row_bytes,
                   indptr, tokens, int64_t n_tokens) except -1:
    """Check that every row lies in memory and every token exists; return the products' count."""
    cdef Py_ssize_t i
    cdef const int32_t[::1] starts, token_view
    for i in range(rows.shape[0]):
        if rows[i] < 0 or rows[i] + row_bytes > memory.shape[0]:
            raise ValueError(f"row {i} at byte {rows[i]} is outside the {memory.shape[0]} bytes")
    if indptr is None:
        return rows.shape[0] * n_tokens
    starts, token_view = indptr, tokens
    if starts.shape[0] != rows.shape[0] + 1 or starts[0] != 0 or starts[rows.shape[0]] != token_view.shape[0]:
        raise ValueError(f"indptr does not fit {rows.shape[0]} rows and {token_view.shape[0]} tokens")
    for i in range(rows.shape[0]):
        if starts[i + 1] < starts[i]:
            raise ValueError("indptr is not ascending")
    for i in range(token_view.shape[0]):
        if not 0 <= token_view[i] < n_tokens:
            raise ValueError(f"token {token_view[i]} is not one of {n_tokens}")
    return token_view.shape[0]


def sparse_up(const uint8_t[::1] memory, const int64_t[::1] rows, format,
              const float[:, ::1] x, bias=None, indptr=None, tokens=None):
    """Row i of weights . x[t] + bias[i] -> (n, T), or with indptr one value a (row, token) pair."""
    cdef const float[::1] bias_view
    cdef const int32_t[::1] starts, token_view
    cdef up_task task
    cdef int failed
    cdef int64_t products = check(memory, rows, format.row_bytes(x.shape[1]), indptr, tokens, x.shape[0])
    out = np.empty(products, dtype=np.float32)
    cdef float[::1] out_view = out
    if products:
        task.memory, task.rows, task.row_bytes, task.n_rows = &memory[0], &rows[0], 0, rows.shape[0]
        task.d, task.n_tokens, task.format = x.shape[1], x.shape[0], format.code
        task.x, task.bias, task.indptr, task.tokens = &x[0, 0], NULL, NULL, NULL
        task.out, task.out_row, task.out_token = &out_view[0], x.shape[0], 1
        if bias is not None:
            bias_view = bias
            if bias_view.shape[0] != rows.shape[0]:
                raise ValueError(f"bias is ({bias_view.shape[0]},), there are {rows.shape[0]} rows")
            task.bias = &bias_view[0]
        if indptr is not None:
            starts, token_view = indptr, tokens
            task.indptr, task.tokens = &starts[0], &token_view[0]
        with nogil:
            failed = run_up(&task, products, n_threads)
        if failed:
            raise MemoryError("no memory for the activations")
    return out if indptr is not None else out.reshape(rows.shape[0], x.shape[0])


def sparse_down(const uint8_t[::1] memory, const int64_t[::1] rows, format,
                a, float[:, ::1] y, indptr=None, tokens=None):
    """y[t] += a[i, t] * row i, i ascending, in place; a as sparse_up returns it."""
    cdef const int32_t[::1] starts, token_view
    cdef const float[::1] values = a.reshape(-1)
    cdef down_task task
    cdef int failed
    cdef int64_t products = check(memory, rows, format.row_bytes(y.shape[1]), indptr, tokens, y.shape[0])
    if values.shape[0] != products:
        raise ValueError(f"a has {values.shape[0]} values, not {products}")
    if products == 0:
        return
    task.memory, task.rows, task.n_rows = &memory[0], &rows[0], rows.shape[0]
    task.d, task.n_tokens, task.format = y.shape[1], y.shape[0], format.code
    task.a, task.y, task.indptr, task.tokens = &values[0], &y[0, 0], NULL, NULL
    if indptr is not None:
        starts, token_view = indptr, tokens
        task.indptr, task.tokens = &starts[0], &token_view[0]
    with nogil:
        failed = run_down(&task, products, n_threads)
    if failed:
        raise MemoryError("no memory for the factors")


def layer_norm(const float[:, ::1] x, const float[::1] weight, const float[::1] bias, float epsilon):
    """x (T, d) -> normalised (T, d) float32; see flashinfer/kernels.py."""
    cdef Py_ssize_t t, n = x.shape[0], d = x.shape[1]
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must both be given, or neither")
    if weight is not None and (weight.shape[0] != d or bias.shape[0] != d):
        raise ValueError(f"weight and bias must have {d} values")
    cdef const float *w = NULL if weight is None or not d else &weight[0]
    cdef const float *b = NULL if bias is None or not d else &bias[0]
    out = np.empty((n, d), dtype=np.float32)
    cdef float[:, ::1] y = out
    if n and d:
        with nogil:
            for t in range(n):
                layer_norm_row(&x[t, 0], w, b, epsilon, d, &y[t, 0])
    return out


def rms_norm(const float[:, ::1] x, const float[::1] weight, float epsilon):
    """x (T, d) -> normalised (T, d) float32; see flashinfer/kernels.py."""
    cdef Py_ssize_t t, n = x.shape[0], d = x.shape[1]
    if weight is not None and weight.shape[0] != d:
        raise ValueError(f"weight must have {d} values")
    cdef const float *w = NULL if weight is None or not d else &weight[0]
    out = np.empty((n, d), dtype=np.float32)
    cdef float[:, ::1] y = out
    if n and d:
        with nogil:
            for t in range(n):
                rms_norm_row(&x[t, 0], w, epsilon, d, &y[t, 0])
    return out


KINDS = {"relu": 0, "relu2": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "cap": 5, "quick_gelu": 6}


def activate(x, kind, float threshold=0.0):
    """An activation of x, float32 and contiguous, in place; see flashinfer/kernels.py."""
    if not x.flags.c_contiguous:
        raise ValueError("x is not contiguous")
    cdef float[::1] values = x.reshape(-1)
    cdef int code = KINDS[kind]
    if values.shape[0]:
        with nogil:
            run_activate(&values[0], values.shape[0], code, threshold, n_threads)
