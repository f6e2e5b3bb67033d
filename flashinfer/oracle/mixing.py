"""Mixers other than attention in float64, with the noise of each."""

import numpy as np

from flashinfer.formats.arrays import Float64Array
from flashinfer.oracle import known
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.known import Known


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
    values, noises = (np.split(part, 3, axis=1) for part in (x.value, x.spread))
    b, c, v = (Known(value, noise) for value, noise in zip(values, noises, strict=True))
    return known.times(c, convolved(known.times(b, v, how), conv, bias, how), how)
