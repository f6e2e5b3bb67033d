"""Mixers other than attention in float64, with the noise of each."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from flashinfer.formats.arrays import Float64Array
from flashinfer.formats.layers.mamba2 import Mamba2Config
from flashinfer.oracle import known
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.known import Known

Function = Callable[[Float64Array], Float64Array]  # element by element


def convolved(x: Known, conv: Float64Array, bias: Float64Array | None, how: Arithmetic) -> Known:
    """A text from its first token on, each channel with its own last values: x (T, channels), conv
    (channels, kernel), bias (channels,) or None -> (T, channels)."""
    n, kernel = len(x.value), conv.shape[1]
    value, size, noise = (np.zeros_like(x.value) for _ in range(3))
    for k in range(kernel):
        back = min(kernel - 1 - k, n)  # tokens before the one that is computed
        part = x.value[: n - back] * conv[:, k]
        value[back:] += part
        size[back:] += np.abs(part)
        noise[back:] += (x.spread[: n - back] * conv[:, k]) ** 2
    if bias is not None:
        value, size = value + bias, size + np.abs(bias)
    rounding = (how.unit * np.sqrt(kernel) + how.step) * size
    return Known(value, np.sqrt(noise + rounding**2))


def short_conv(x: Known, conv: Float64Array, bias: Float64Array | None, how: Arithmetic) -> Known:
    """What a short convolution's out projection reads, of what its in projection gives: x (T, 3
    d_model) -> (T, d_model)."""
    width = len(conv)
    b, c, v = split(x, (width, 2 * width))
    return known.times(c, convolved(known.times(b, v, how), conv, bias, how), how)


def scanned(
    projected: Known,
    config: Mamba2Config,
    conv: tuple[Float64Array, Float64Array | None],
    heads: tuple[Float64Array, Float64Array, Float64Array],
    active: Function,
    how: Arithmetic,
) -> Known:
    """What a Mamba-2 reads from its state, of what its in projection gives: projected (T, z |
    channels | heads) -> y (T, width).

    conv    weights and biases; heads: dt_bias, decay and skip, (heads,) each
    active  the activation of what is convolved
    Engines keep the state and what goes into it in float32, whatever values are stored in.
    """
    exact = replace(how, values="f32")
    ends = (config.width, config.width + config.channels)
    _, inputs, dt = split(projected, ends)
    inputs = known.apply(convolved(inputs, *conv, how), active, how)
    v, keys, queries = split(inputs, (config.width, (config.width + config.channels) // 2))
    of_groups = (len(dt.value), config.groups, config.state_size)
    each = config.heads // config.groups
    keys, queries = (
        Known(*(np.repeat(part.reshape(of_groups), each, axis=1) for part in (x.value, x.spread)))
        for x in (keys, queries)
    )
    v = v.reshape(len(dt.value), config.heads, config.head_dim)
    bias, decay, skip = heads
    rate = known.apply(
        known.add(dt, Known(np.broadcast_to(bias, dt.value.shape)), exact),
        lambda x: np.logaddexp(x, 0),
        exact,
    )
    rounding = 2 * how.step * (np.abs(rate.value) + np.abs(dt.value))
    rate = Known(np.clip(rate.value, *config.steps), np.hypot(rate.spread, rounding))
    kept = known.apply(known.times(rate, Known(decay), exact), np.exp, exact)
    brought = known.times(v, rate.reshape(*rate.value.shape, 1), exact)
    y = _recurrence(queries, keys, brought, kept, how)
    y = known.add(y, known.times(v, Known(skip[:, None]), exact), how)
    return y.reshape(len(dt.value), config.width)


def gated_norm(
    y: Known,
    projected: Known,
    config: Mamba2Config,
    weight: Float64Array,
    active: Function,
    how: Arithmetic,
) -> Known:
    """What a Mamba-2's out projection reads: y (T, width), gated by z, normalised by group."""
    exact = replace(how, values="f32")
    z, _ = split(projected, (config.width,))
    gated = known.times(y, known.apply(z, active, exact), exact)
    gated = gated.reshape(len(y.value), config.groups, config.width // config.groups)
    normed = known.norm(gated, config.norm, weight.reshape(gated.value.shape[1:]), None, how)
    return normed.reshape(len(y.value), config.width)


def _recurrence(q: Known, k: Known, u: Known, decay: Known, how: Arithmetic) -> Known:
    """S = decay S + k u^T; y = S^T q, of each head: q, k (T, H, n), u (T, H, w), decay (T, H) ->
    (T, H, w)."""
    _, heads, n = q.value.shape
    state = np.zeros((heads, n, u.value.shape[2]))
    y, noise, variance = np.zeros_like(u.value), np.zeros_like(u.value), np.zeros_like(state)
    for t in range(len(q.value)):
        kept, spread = (x[t][:, None, None] for x in (decay.value, decay.spread))
        keys, queries = k.value[t][:, :, None], q.value[t][:, :, None]
        brought = keys * u.value[t][:, None]
        variance = variance * kept**2 + (state * spread) ** 2
        variance += (keys * u.spread[t][:, None]) ** 2
        variance += (k.spread[t][:, :, None] * u.value[t][:, None]) ** 2
        variance += (how.unit * (np.abs(state * kept) + np.abs(brought))) ** 2
        state = state * kept + brought
        y[t] = (queries * state).sum(axis=1)
        size = np.abs(queries * state).sum(axis=1)
        of_queries = (q.spread[t][:, :, None] * state) ** 2
        noise[t] = np.sqrt((queries**2 * variance + of_queries).sum(axis=1))
        noise[t] += how.unit * np.sqrt(n) * size
    return known.stored(Known(y, noise), how)


def split(x: Known, ends: tuple[int, ...]) -> list[Known]:
    """The parts of x (T, n) that end before these columns, and the last."""
    parts = zip(*(np.split(part, ends, axis=1) for part in (x.value, x.spread)), strict=True)
    return [Known(value, noise) for value, noise in parts]
