# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Causal attention over the key/value cache; see flashinfer/kernels.py."""

import numpy as np

from libc.stdint cimport int64_t, uint8_t


cdef extern from "kernels.h" nogil:
    ctypedef struct attention_task:
        const float *q
        const uint8_t *keys
        const uint8_t *values
        int64_t n_tokens, n_heads, n_groups, width, context, start, window
        int format
        const float *bias
        float cap
        const float *sinks
        float *out

    int run_attention(const attention_task *task, int threads)
    void remember_rows(const float *x, int64_t n_tokens, int64_t n_groups, int64_t width,
                       uint8_t *cache, int64_t context, int64_t row, int64_t start, int format)
    void rotate_row(float *x, const float *cos, const float *sin, int64_t half)


cdef int n_threads = 1


def set_threads(int threads):
    """Use this many threads from now on."""
    global n_threads
    n_threads = threads


def remember(cache, const float[:, :, ::1] x, int64_t start):
    """cache (G, context, >= w) f32 or f16 [:, start : start + T, :w] = x (T, G, w)."""
    if cache.dtype not in (np.float32, np.float16):
        raise ValueError(f"the cache is {cache.dtype}")
    if cache.shape[0] != x.shape[1] or cache.shape[2] < x.shape[2] or not 0 <= start <= cache.shape[1] - x.shape[0]:
        raise ValueError(f"x is {x.shape[0], x.shape[1], x.shape[2]} from {start} on, the cache {cache.shape}")
    cdef uint8_t[:, :, ::1] view = cache.view(np.uint8)
    cdef int64_t row = cache.shape[2]
    cdef int format = 0 if cache.dtype == np.float32 else 1
    if x.shape[0] and x.shape[1] and x.shape[2]:
        with nogil:
            remember_rows(&x[0, 0, 0], x.shape[0], x.shape[1], x.shape[2], &view[0, 0, 0],
                          view.shape[1], row, start, format)


def attention(const float[:, :, ::1] q, keys, values, int64_t start, int64_t window=0, bias=None,
              float cap=0.0, sinks=None):
    """q (T, H, w) scaled; keys, values (G, context, w) f32 or f16 -> (T, H, w) float32."""
    cdef const float[:, ::1] bias_view
    cdef const float[::1] sink_view
    cdef attention_task task
    cdef int failed
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(f"keys are {keys.shape} {keys.dtype}, values {values.shape} {values.dtype}")
    if keys.dtype not in (np.float32, np.float16) or q.shape[2] % 32:
        raise ValueError(f"keys are {keys.dtype}, heads {q.shape[2]} wide")
    if keys.shape[0] == 0 or q.shape[1] % keys.shape[0] or keys.shape[2] != q.shape[2] or not 0 <= start <= keys.shape[1] - q.shape[0]:
        raise ValueError(f"q is {q.shape[0], q.shape[1], q.shape[2]} from {start} on, keys {keys.shape}")
    cdef const uint8_t[:, :, ::1] key_bytes = keys.view(np.uint8)
    cdef const uint8_t[:, :, ::1] value_bytes = values.view(np.uint8)
    out = np.empty((q.shape[0], q.shape[1], q.shape[2]), dtype=np.float32)
    cdef float[:, :, ::1] out_view = out
    if out.size == 0:
        return out
    task.q, task.keys, task.values = &q[0, 0, 0], &key_bytes[0, 0, 0], &value_bytes[0, 0, 0]
    task.n_tokens, task.n_heads, task.width = q.shape[0], q.shape[1], q.shape[2]
    task.context, task.start, task.out = keys.shape[1], start, &out_view[0, 0, 0]
    task.cap = cap
    task.n_groups, task.window, task.bias = keys.shape[0], max(0, window), NULL
    if bias is not None:
        bias_view = bias
        if bias_view.shape[0] != q.shape[1] or bias_view.shape[1] != keys.shape[1]:
            raise ValueError(f"bias is {bias.shape}, not ({q.shape[1]}, {keys.shape[1]})")
        task.bias = &bias_view[0, 0]
    task.sinks = NULL
    if sinks is not None:
        sink_view = sinks
        if sink_view.shape[0] != q.shape[1]:
            raise ValueError(f"there are {sink_view.shape[0]} sinks for {q.shape[1]} heads")
        task.sinks = &sink_view[0]
    task.format = 0 if keys.dtype == np.float32 else 1
    with nogil:
        failed = run_attention(&task, n_threads)
    if failed:
        raise MemoryError("no memory for attention scores")
    return out


def rotate(float[:, :, ::1] x, const float[:, ::1] cos, const float[:, ::1] sin):
    """Turn pairs of the first values of each head of x (T, H, w) in place; see flashinfer/kernels.py."""
    cdef Py_ssize_t t, h, half = cos.shape[1]
    if cos.shape[0] != x.shape[0] or sin.shape[0] != x.shape[0] or sin.shape[1] != half:
        raise ValueError(f"x has {x.shape[0]} tokens, cos {cos.shape[0]}, sin {sin.shape[0]}")
    if 2 * half > x.shape[2]:
        raise ValueError(f"{2 * half} of {x.shape[2]} values cannot be turned")
    if half and x.shape[1]:
        with nogil:
            for t in range(x.shape[0]):
                for h in range(x.shape[1]):
                    rotate_row(&x[t, h, 0], &cos[t, 0], &sin[t, 0], half)
