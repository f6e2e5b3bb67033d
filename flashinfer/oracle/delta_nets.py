"""Gated delta nets in float64, with their noise."""

from collections.abc import Mapping

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float64Array
from flashinfer.formats.layers.delta_net import DeltaNetConfig
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.oracle import known
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.functions import activation, sigmoid
from flashinfer.oracle.known import F32, OF_FUNCTION, Known
from flashinfer.oracle.mixing import convolved, split
from flashinfer.transformer.delta_net import LENGTH


def delta_net(
    config: DeltaNetConfig,
    weights: Mapping[str, Float64Array],
    qkv: Known,
    a: Known,
    b: Known,
    how: Arithmetic,
) -> Known:
    """What the heads of a gated delta net read from their states, of a text from its first token:
    qkv (T, channels), a and b (T, value heads) -> (T, width of values).

    weights  {"conv.weight", "decay", "dt_bias"}
    """
    n, heads, each = len(qkv.value), config.value_heads, config.value_heads // config.key_heads
    mixed = convolved(qkv, weights["conv.weight"], None, how)
    mixed = known.apply(mixed, activation(config.activation, 0.0), how)
    size = config.key_heads * config.key_dim
    q, k, v = split(mixed, (size, 2 * size))
    # Which head of keys each head of values shares.
    shared = np.arange(heads) % config.key_heads if config.tiled else np.arange(heads) // each
    q, k = (_unit(x.reshape(n, config.key_heads, config.key_dim), shared, how) for x in (q, k))
    v = v.reshape(n, heads, config.value_dim)
    rate = known.apply(b, sigmoid, how)
    softplus = np.logaddexp(0, a.value + weights["dt_bias"])
    decay = np.exp(weights["decay"] * softplus)
    # A change of a changes softplus by less, and that is multiplied with -log(decay) / softplus.
    off = np.abs(weights["decay"]) * np.hypot(a.spread, OF_FUNCTION * F32 * (1 + softplus))
    scale = config.key_dim**-0.5
    state = np.zeros((heads, config.key_dim, config.value_dim))
    noise, y, spread = np.zeros_like(state), np.empty_like(v.value), np.empty_like(v.value)
    for t in range(n):
        # Squares of noise, as independent errors add.
        noise = decay[t, :, None, None] ** 2 * (noise + (state * off[t, :, None, None]) ** 2)
        state = decay[t, :, None, None] * state
        key, of_key = k.value[t], k.spread[t]  # (heads, key_dim)
        seen = np.einsum("hk,hkv->hv", key, state)
        of_seen = np.einsum("hk,hkv->hv", key**2, noise + (how.unit * state) ** 2 * config.key_dim)
        of_seen += np.einsum("hk,hkv->hv", of_key**2, state**2)
        u = rate.value[t, :, None] * (v.value[t] - seen)
        of_u = rate.value[t, :, None] ** 2 * (v.spread[t] ** 2 + of_seen)
        of_u += rate.spread[t, :, None] ** 2 * (v.value[t] - seen) ** 2 + (how.unit * u) ** 2
        state = state + key[:, :, None] * u[:, None]
        noise = noise + key[:, :, None] ** 2 * of_u[:, None] + (how.unit * state) ** 2
        noise = noise + of_key[:, :, None] ** 2 * u[:, None] ** 2
        query, of_query = q.value[t] * scale, q.spread[t] * scale
        y[t] = np.einsum("hk,hkv->hv", query, state)
        spread[t] = np.einsum(
            "hk,hkv->hv", query**2, noise + (how.unit * state) ** 2 * config.key_dim
        )
        spread[t] += np.einsum("hk,hkv->hv", of_query**2, state**2)
    return known.stored(Known(y.reshape(n, -1), np.sqrt(spread).reshape(n, -1)), how)


def gated(
    config: DeltaNetConfig, weight: Float64Array, read: Known, z: Known, how: Arithmetic
) -> Known:
    """What heads read (T, width of values), normalised and times silu(z)."""
    n = len(read.value)
    norm = NormConfig("rms", config.epsilon)
    normed = known.norm(read.reshape(n, -1, config.value_dim), norm, weight, None, how)
    return known.times(normed.reshape(n, -1), known.apply(z, activation("silu", 0.0), how), how)


def _unit(x: Known, shared: AnyArray, how: Arithmetic) -> Known:
    """Heads (T, key heads, key_dim) of a length of 1, for each head of values that it shares."""
    size = x.value.shape[-1]
    unit = known.norm(x, NormConfig("rms", LENGTH / size), None, None, how)
    value, spread = ((part * size**-0.5)[:, shared] for part in (unit.value, unit.spread))
    return Known(value, spread)
