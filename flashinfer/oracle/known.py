"""The operations of a transformer in float64, each with the noise that an honest engine may add.

The noise of a result is a standard deviation, or above it. Of a sum of n products it is u sqrt(n)
times the largest that partial sums become: those in the products' order, from either end, and the
root of the sum of squares, which is what sums in other orders become. It follows the probabilistic
bounds of Higham and Mary (2019, "A new approach to probabilistic rounding error analysis"), with
partial sums in place of the sum of magnitudes; u is the standard deviation of one rounding. Noise
of the inputs adds to it as independent errors do.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flashinfer.formats.arrays import Float64Array
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.oracle.arithmetic import (
    DEVIATION,
    SMALLEST,
    UNIT,
    Arithmetic,
    after_rounding,
    rounded,
)

PARTS = 32  # of a sum, at whose ends partial sums are looked at
STEPS = 4  # roundings of a short computation, such as a division after a root
F32 = UNIT["f32"] * DEVIATION
LEAST = 1e-5  # the largest magnitude that a token of smaller ones is rounded by
OF_FUNCTION = 4  # units in the last place that exp, tanh and their like are off by


class Known(NamedTuple):
    """A value and its noise, of the same shape, float64; None: it is exact."""

    value: Float64Array
    noise: Float64Array | None = None

    @property
    def spread(self) -> Float64Array:
        """The noise as an array."""
        return np.zeros_like(self.value) if self.noise is None else self.noise

    def reshape(self, *shape: int) -> "Known":
        """The same in another shape."""
        noise = None if self.noise is None else self.noise.reshape(*shape)
        return Known(self.value.reshape(*shape), noise)


def round_to(x: Known, format: str) -> Known:
    """x in a number format; what noise may round to the next number is noise of that step."""
    if format == "f32":
        return x
    return Known(rounded(x.value, format), after_rounding(x.value, x.spread, format))


def stored(x: Known, arithmetic: Arithmetic) -> Known:
    """x as a module gives it: rounded to what values are stored in."""
    format = arithmetic.values
    if format == "f32":
        return Known(x.value, np.hypot(x.spread, F32 * np.abs(x.value)))
    near = rounded(x.value, format)
    # An engine may round once more or less on the way, such as before a bias is added.
    noise = np.hypot(x.spread, UNIT[format] * np.abs(x.value))
    return Known(near, noise + SMALLEST[format])


def round_tokens(x: Known) -> Known:
    """x (T, n) rounded to 8 bits, with one scale for each token (as ``kernels.linear``); noise
    that may round an element to the next number is noise of that step."""
    largest = np.maximum(np.abs(x.value).max(axis=-1, keepdims=True, initial=0), LEAST)
    step, noise = largest / 127, np.hypot(x.spread, F32 * np.abs(x.value))
    value, low, high = (np.rint((x.value + n * noise) / step) * step for n in (0, -4, 4))
    of_step = np.where(low < high, np.maximum(noise, step), 0)
    of_scale = np.abs(value) * (noise.max(axis=-1, keepdims=True, initial=0) / largest + F32)
    return Known(value, np.hypot(of_step, of_scale))


def linear(
    x: Known,
    weight: Float64Array,
    bias: Float64Array | None,
    format: str,
    how: Arithmetic,
    rounded: bool = False,
) -> Known:
    """x (T, n), weight (m, n) in the number format ``format`` -> (T, m); rounded: of
    ``round_tokens(x)``."""
    x = round_tokens(x) if rounded else round_to(x, how.products.get(format, "f32"))
    y, partial = _product(x.value, weight)
    size = partial + np.sqrt(x.value**2 @ (weight**2).T)
    noise = how.unit * np.sqrt(weight.shape[1]) * size
    if x.noise is not None:
        noise = np.hypot(noise, np.sqrt(x.noise**2 @ (weight**2).T))
    if bias is not None:
        noise = np.hypot(noise, how.step * np.abs(y))
        y = y + bias
        noise = np.hypot(noise, how.unit * (np.abs(y) + np.abs(bias)))
    return stored(Known(y, noise), how)


def _product(x: Float64Array, weight: Float64Array) -> tuple[Float64Array, Float64Array]:
    """x weight^T, and how large its partial sums become, from the front or from the back."""
    edges = np.linspace(0, weight.shape[1], min(PARTS, weight.shape[1]) + 1).astype(int)
    parts = [x[:, a:b] @ weight[:, a:b].T for a, b in itertools.pairwise(edges)]
    y = np.sum(parts, axis=0)
    partial, largest = np.zeros_like(y), np.abs(y)
    for part in parts:
        partial = partial + part
        largest = np.maximum(largest, np.maximum(np.abs(partial), np.abs(y - partial)))
    return y, largest


def _off_in_order(x: Float64Array) -> Float64Array:
    """How far off float32 sums of x (..., n), all positive, are when they go from one element to
    the next, of the sums themselves (..., 1): the worse of both directions."""
    exact = x.sum(axis=-1, keepdims=True)
    sums = [
        np.cumsum(side, axis=-1, dtype=np.float32)[..., -1:].astype(np.float64)
        for side in (x, x[..., ::-1])
    ]
    off = np.maximum(*(np.abs(found - exact) for found in sums))
    return off / np.maximum(exact, SMALLEST["f32"])


def norm(
    x: Known,
    config: NormConfig,
    weight: Float64Array | None,
    bias: Float64Array | None,
    how: Arithmetic,
) -> Known:
    """x (..., n) -> (..., n)."""
    n, u = x.value.shape[-1], F32  # engines take norms in float32, whatever else they do
    gain = np.ones(n) if weight is None else weight
    shift = np.zeros(n) if bias is None else bias
    mean = x.value.mean(axis=-1, keepdims=True) if config.kind == "layer" else 0.0
    centred = x.value - mean
    square = (centred**2).mean(axis=-1, keepdims=True) + config.epsilon
    y = centred / np.sqrt(square) * gain
    # A sum of squares is off by u sqrt(n) / 4 of itself, and its root by half of that; or by more
    # where one element after the other is added, and large ones swallow what follows.
    in_order = _off_in_order(centred**2) / 2
    noise = np.abs(y) * (u * (np.sqrt(n) / 8 + STEPS) + in_order + how.step)
    if config.kind == "layer":
        of_mean = np.sqrt(n) / 4 * np.abs(x.value).mean(axis=-1, keepdims=True)
        noise = noise + u * (np.abs(x.value) + of_mean) / np.sqrt(square) * np.abs(gain)
    if x.noise is not None:
        root = np.sqrt((centred**2 * x.noise**2).sum(axis=-1, keepdims=True)) / (n * square)
        noise = np.hypot(noise, np.abs(y) * root)
        noise = np.hypot(noise, x.noise / np.sqrt(square) * np.abs(gain))
    y = y + shift
    return stored(Known(y, noise + u * np.abs(y)), how)


def rotate(
    x: Known, frequencies: Float64Array, positions: Float64Array, scale: float, how: Arithmetic
) -> Known:
    """x (T, heads, head_dim), its first values turned in pairs (i, i + n) -> the same shape.

    frequencies  (n,) radians a position; scale: what cos and sin are multiplied with
    """
    n, u = len(frequencies), F32
    angles = positions[:, None, None] * frequencies  # (T, 1, n)
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    first, second = x.value[..., :n], x.value[..., n : 2 * n]
    y, noise = x.value.copy(), x.spread.copy()
    y[..., :n], y[..., n : 2 * n] = first * cos - second * sin, second * cos + first * sin
    # Engines find angles in float32, some of them by multiplying one frequency after the other.
    off = u * angles * (STEPS + np.arange(n))
    for part, (a, b) in ((slice(0, n), (first, second)), (slice(n, 2 * n), (second, first))):
        # Where values are kept in 16 bits, cos and sin and each product are, too.
        own = (STEPS * u + 2 * how.step) * (np.abs(a * cos) + np.abs(b * sin))
        turned = off * (np.abs(a * sin) + np.abs(b * cos))
        noise[..., part] = np.hypot(own, turned)
    if x.noise is not None:
        one, two = x.noise[..., :n], x.noise[..., n : 2 * n]
        both = np.hypot(one * cos, two * sin), np.hypot(two * cos, one * sin)
        noise[..., :n] = np.hypot(noise[..., :n], both[0])
        noise[..., n : 2 * n] = np.hypot(noise[..., n : 2 * n], both[1])
    return stored(Known(y, noise), how)


def add(x: Known, y: Known, how: Arithmetic, scale: float = 1.0) -> Known:
    """x + scale y."""
    return total([x, Known(scale * y.value, scale * y.spread)], how)


def total(parts: Sequence[Known], how: Arithmetic) -> Known:
    """The sum of values of one shape, in whatever order."""
    sizes = sum(np.abs(part.value) for part in parts)
    rounding = how.unit * sizes + (how.step * sizes if len(parts) > 2 else 0)
    noise = np.sqrt(rounding**2 + sum(part.spread**2 for part in parts))
    return stored(Known(np.sum([part.value for part in parts], axis=0), noise), how)


def scale(x: Known, factor: float, how: Arithmetic) -> Known:
    """x times a number, which engines round to float32, too, and may divide by instead."""
    y = x.value * factor
    return stored(Known(y, np.hypot(x.spread * factor, 2 * how.unit * np.abs(y))), how)


def capped(x: Known, cap: float, how: Arithmetic) -> Known:
    """c tanh(x / c), of which each step may be rounded to what values are stored in."""
    y = apply(x, lambda v: cap * np.tanh(v / cap), how)
    if not how.step:
        return y
    steps = 2 * how.step * np.abs(y.value) + 2 * cap * SMALLEST[how.values]
    return Known(y.value, np.hypot(y.spread, steps))


def times(x: Known, y: Known, how: Arithmetic) -> Known:
    """x y, element by element."""
    product = x.value * y.value
    noise = np.hypot(x.spread * y.value, y.spread * x.value)
    return stored(Known(product, np.hypot(noise, how.unit * np.abs(product))), how)


def apply(
    x: Known,
    function: Callable[[Float64Array], Float64Array],
    how: Arithmetic,
    tabulated: bool = False,
) -> Known:
    """function(x), element by element.

    tabulated  some engines look it up in a table of ``how.activations``
    """
    if tabulated and how.activations != "f32":
        x = round_to(x, how.activations)
    y = function(x.value)
    noise = OF_FUNCTION * F32 * (np.abs(y) + np.abs(x.value))
    if tabulated:  # or computed step by step in values' precision
        noise = noise + 2 * how.step * np.abs(x.value)
    if x.noise is not None:
        up, down = function(x.value + x.noise), function(x.value - x.noise)
        noise = np.hypot(noise, np.maximum(np.abs(up - y), np.abs(down - y)))
    if tabulated and how.activations != "f32":
        noise = np.hypot(noise, UNIT[how.activations] * np.abs(y) + SMALLEST[how.activations])
    return stored(Known(y, noise), how)
