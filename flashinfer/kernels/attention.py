"""Causal attention over the key/value cache."""

import numpy as np

from flashinfer.kernels import doors
from flashinfer.kernels.doors import checked
from flashinfer.kernels.sparse_matmul import activate


@checked(doors.attention)
def attention(q, keys, values, start, window=0, bias=None, cap=0.0, sinks=None):
    """Causal attention of tokens start.. over the key/value cache.

    q       (T, H, w) float32, scaled; keys, values (G, context, w) f32 or f16, filled up to
            start + T. Each of the G is shared by H / G neighbouring heads of q.
    window  tokens that each sees, itself included; 0: all
    cap     scores become cap tanh(score / cap), config.LEAST_CAP to MOST_CAP; 0: not
    bias    (H, context) float32, added to the scores of each position, or None
    sinks   (H,) float32: a learned extra softmax logit of each head (attention sink), or None
    Returns (T, H, w) float32. Token by token, so that T does not change a bit.
    """
    tokens, heads, width = q.shape
    out = np.empty(q.shape, dtype=np.float32)
    groups = q.reshape(tokens, len(keys), heads // len(keys), width)
    for t in range(tokens):
        n = start + t + 1
        first = max(0, n - window) if window else 0
        scores = np.einsum("ghw,gpw->ghp", groups[t], keys[:, first:n].astype(np.float32))
        if cap:
            activate(scores, "cap", cap)
        if bias is not None:
            scores += bias[:, first:n].reshape(*scores.shape)
        largest = scores.max(axis=2, keepdims=True)
        if sinks is not None:
            sink = sinks.reshape(*largest.shape)
            largest = np.maximum(largest, sink)
        scores = np.exp(scores - largest)
        total = scores.sum(axis=2, keepdims=True)
        if sinks is not None:
            total += np.exp(sink - largest)
        weighted = np.einsum("ghp,gpw->ghw", scores, values[:, first:n].astype(np.float32))
        out[t] = (weighted / total).reshape(heads, width)
    return out


@checked(doors.remember)
def remember(cache, x, start):
    """Keys or values x (T, G, w) float32 of the tokens start.. into their cache, f32 or f16.

    cache  (G, context, w or, padded, more)
    """
    cache[:, start : start + x.shape[0], : x.shape[2]] = x.transpose(1, 0, 2)


@checked(doors.rotate)
def rotate(x, cos, sin):
    """Turn pairs (i, i + m) of the first 2 m values of each head, in place (rotary positions).

    x (T, H, w) float32; cos, sin (T, m) float32.
    """
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[:, :, :half].copy(), x[:, :, half : 2 * half].copy()
    x[:, :, :half] = first * cos - second * sin
    x[:, :, half : 2 * half] = second * cos + first * sin
