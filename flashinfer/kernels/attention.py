"""Causal attention over the key/value cache."""

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float32Array
from flashinfer.formats.number_formats.blocks import Q8_0
from flashinfer.kernels import doors
from flashinfer.kernels.doors import checked
from flashinfer.kernels.sparse_matmul import activate

BLOCKS = Q8_0()


def widened(cache: AnyArray) -> Float32Array:
    """Keys or values as attention takes them: (G, n, w) float32, of a cache in any format."""
    return BLOCKS.decode(cache) if cache.dtype == np.uint8 else cache.astype(np.float32)


@checked(doors.attention)
def attention(
    q: Float32Array,
    keys: AnyArray,
    values: AnyArray,
    start: int,
    window: int | None = None,
    bias: Float32Array | None = None,
    cap: float = 0.0,
    sinks: Float32Array | None = None,
    both: bool = False,
) -> Float32Array:
    """Causal attention of the tokens from position ``start`` on over the key/value cache.

    q       (T, H, w), already scaled
    keys, values  (G, context, w) float32 or float16, or (G, context, w / 32 * 34) uint8, which are
            blocks of q8_0; filled up to position start + T. Each of the G heads is shared by H / G
            neighbouring heads of q
    window  the last tokens that each token sees, itself included; None: all
    cap     scores become cap tanh(score / cap), of LEAST_CAP to MOST_CAP; 0: they stay
    bias    (H, context), added to the scores of each position
    sinks   (H,): a learned extra softmax logit of each head (attention sink)
    both    each token sees those after it, too: attention in both directions, without a window
    Returns (T, H, w). Tokens are computed one by one, so that T does not change a bit.
    """
    tokens, heads, width = q.shape
    out = np.empty(q.shape, dtype=np.float32)
    groups = q.reshape(tokens, len(keys), heads // len(keys), width)
    for t in range(tokens):
        n = start + (tokens if both else t + 1)
        first = 0 if window is None else max(0, n - window)
        scores = np.einsum("ghw,gpw->ghp", groups[t], widened(keys[:, first:n]))
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
        weighted = np.einsum("ghp,gpw->ghw", scores, widened(values[:, first:n]))
        out[t] = (weighted / total).reshape(heads, width)
    return out


@checked(doors.remember)
def remember(cache: AnyArray, x: Float32Array, start: int) -> None:
    """Write the keys or values of the tokens from position ``start`` on into their cache.

    cache  (G, context, at least w) float32 or float16, or uint8: blocks of q8_0, of which the last
           one that x reaches is filled up with zeros
    x      (T, G, w)
    """
    there = cache[:, start : start + x.shape[0]]
    if cache.dtype != np.uint8:
        there[:, :, : x.shape[2]] = x.transpose(1, 0, 2)
        return
    padded = np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % BLOCKS.block)))
    scales, quants = BLOCKS.rounded(padded.transpose(1, 0, 2))  # (G, T, blocks, 1 and 32)
    raw = np.concatenate([scales.astype("<f2").view(np.uint8), quants.view(np.uint8)], axis=-1)
    groups, tokens, blocks, block_bytes = raw.shape
    there[:, :, : blocks * block_bytes] = raw.reshape(groups, tokens, blocks * block_bytes)


@checked(doors.rotate)
def rotate(x: Float32Array, cos: Float32Array, sin: Float32Array) -> None:
    """Rotate the pairs (i, i + m) of the first 2 m values of each head, in place.

    x (T, H, w); cos, sin (T, m), of rotary positions
    """
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[:, :, :half].copy(), x[:, :, half : 2 * half].copy()
    x[:, :, :half] = first * cos - second * sin
    x[:, :, half : 2 * half] = second * cos + first * sin
