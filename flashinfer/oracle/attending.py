"""Attention in float64: scores, softmax and the sum of the values, each with its noise."""

from typing import NamedTuple

import numpy as np

from flashinfer.formats.arrays import BoolArray, Float64Array
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.known import F32, OF_FUNCTION, STEPS, Known, capped, round_to, stored
from flashinfer.oracle.known import scale as scale_by
from flashinfer.transformer.positions import alibi_table

TOGETHER = 512  # tokens whose scores are in memory together


class Attended(NamedTuple):
    """What attention gives: the largest score of each head (T, heads), and the heads' sums of
    values (T, heads * head_dim)."""

    scores_max: Known
    heads: Known


def attend(
    config: AttentionConfig,
    q: Known,
    k: Known,
    v: Known,
    sinks: Float64Array | None,
    how: Arithmetic,
) -> Attended:
    """q (T, heads, head_dim), k and v (T, key/value heads, head_dim), turned and not scaled."""
    n, n_heads, head_dim = q.value.shape
    group, scale = n_heads // k.value.shape[1], config.attention_scale or head_dim**-0.5
    if how.scaled_queries:
        q, scale = scale_by(q, scale, how), 1.0
    q, k, v = round_to(q, how.queries), round_to(k, how.keys), round_to(v, how.cached_values)
    bias = alibi_table(n_heads, head_dim, n).astype(np.float64) if config.alibi else None
    largest, largest_noise = np.empty((n, n_heads)), np.empty((n, n_heads))
    out, out_noise = np.empty((n, n_heads, head_dim)), np.empty((n, n_heads, head_dim))
    for head in range(n_heads):
        one_k, one_v = _of_head(k, head // group), _of_head(v, head // group)
        sink = None if sinks is None else float(sinks[head])
        for first in range(0, n, TOGETHER):
            rows = slice(first, min(first + TOGETHER, n))
            scores = stored(_scores(_rows(_of_head(q, head), rows), one_k, scale, how), how)
            if bias is not None:
                off = how.unit * np.abs(bias[head, :n])
                scores = Known(scores.value + bias[head, :n], scores.spread + off)
            if config.score_cap is not None:
                scores = capped(scores, config.score_cap, how)
            seen = visible(rows, n, config.attention_window)
            masked = np.where(seen, scores.value, -np.inf)
            largest[rows, head] = masked.max(axis=1)
            largest_noise[rows, head] = np.where(seen, scores.spread, 0).max(axis=1)
            y = _weighted(_softmax(masked, scores.spread, sink, how), one_v, how)
            out[rows, head], out_noise[rows, head] = y.value, y.spread
    heads = stored(Known(out.reshape(n, -1), out_noise.reshape(n, -1)), how)
    return Attended(Known(largest, largest_noise), heads)


def visible(rows: slice, n: int, window: int | None) -> BoolArray:
    """Which of n tokens those of ``rows`` see: (rows, n)."""
    behind = np.arange(n)[rows, None] - np.arange(n)
    return (behind >= 0) & (behind < (n if window is None else window))


def _of_head(x: Known, head: int) -> Known:
    return Known(x.value[:, head], None if x.noise is None else x.noise[:, head])


def _rows(x: Known, rows: slice) -> Known:
    return Known(x.value[rows], None if x.noise is None else x.noise[rows])


def _scores(q: Known, k: Known, scale: float, how: Arithmetic) -> Known:
    """q (rows, head_dim), k (T, head_dim) -> (rows, T)."""
    products, n = q.value @ k.value.T, q.value.shape[1]
    noise = how.unit * (np.sqrt(n) + STEPS) * (np.abs(q.value) @ np.abs(k.value).T)
    noise = noise**2 + q.spread**2 @ (k.value**2).T + q.value**2 @ (k.spread**2).T
    return Known(products * scale, np.sqrt(noise) * abs(scale))


def _softmax(
    masked: Float64Array, noise: Float64Array, sink: float | None, how: Arithmetic
) -> Known:
    """masked (rows, T): scores, -inf where a token is not seen; sink: one more logit -> the same
    shape."""
    top = masked.max(axis=1, keepdims=True)
    top = top if sink is None else np.maximum(top, sink)
    e = np.exp(masked - top)
    total = e.sum(axis=1, keepdims=True) + (0 if sink is None else np.exp(sink - top))
    p = e / total
    n = masked.shape[1]
    # Scores come to exp less the largest one: of a large difference float32 keeps fewer digits.
    own = F32 * (OF_FUNCTION + np.sqrt(n) / 4 + np.where(p > 0, top - masked, 0))
    spread = np.where(p > 0, noise, 0)
    shared = np.sqrt(((p * spread) ** 2).sum(axis=1, keepdims=True))
    return round_to(Known(p, p * np.sqrt(own**2 + spread**2 + shared**2)), how.probabilities)


def _weighted(p: Known, v: Known, how: Arithmetic) -> Known:
    """p (rows, T), v (T, head_dim) -> (rows, head_dim)."""
    n = p.value.shape[1]
    noise = how.unit * np.sqrt(n) * (p.value @ np.abs(v.value))
    noise = noise**2 + p.value**2 @ v.spread**2
    # Too large and too small shares nearly cancel: what counts is how far a value is from the mean.
    y = p.value @ v.value
    noise = noise + p.spread**2 @ v.value**2
    return Known(y, np.sqrt(noise))
