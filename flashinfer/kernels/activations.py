"""The activations in plain NumPy, by the names that the compiled kernels know them by, too."""

from collections.abc import Callable

import numpy as np

from flashinfer.formats.arrays import Float32Array


def sigmoid(x: Float32Array) -> Float32Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _erf(x: Float32Array) -> Float32Array:
    """Within 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    size = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * size)
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    p = np.zeros_like(t)
    for term in terms:
        p = (p + np.float32(term)) * t
    return np.copysign(1 - p * np.exp(-size * size), x)


def _relu(x: Float32Array, threshold: np.float32) -> Float32Array:
    return np.where(x > threshold, x, np.float32(0))


def _gelu_tanh(x: Float32Array, threshold: np.float32) -> Float32Array:
    return x * sigmoid(np.float32(1.5957691216) * (x + np.float32(0.044715) * x * x * x))


def _cap(x: Float32Array, cap: np.float32) -> Float32Array:
    """cap tanh(x / cap); near 0 by the series, whose error is that of x, and not that of cap."""
    square = np.square(np.clip(x / cap, -1, 1))
    third, fifth, seventh = np.float32(1 / 3), np.float32(2 / 15), np.float32(17 / 315)
    series = x * (1 - square * (third - square * (fifth - square * seventh)))
    far = cap * (2 * sigmoid(x * (np.float32(2) / cap)) - 1)
    return np.where(square < np.float32(0.125**2), series, far)


# {name: the activation of x, float32, with ``threshold``, a float32}. A new one is an entry here
# and a row in _native/formats.h.
ACTIVATIONS: dict[str, Callable[[Float32Array, np.float32], Float32Array]] = {
    "relu": _relu,
    "relu2": lambda x, threshold: np.square(_relu(x, threshold)),
    "silu": lambda x, threshold: x * sigmoid(x),
    "gelu": lambda x, threshold: x * (np.float32(0.5) * (1 + _erf(x * np.float32(0.5**0.5)))),
    "gelu_tanh": _gelu_tanh,
    "cap": _cap,
    "quick_gelu": lambda x, threshold: x * sigmoid(np.float32(1.702) * x),
    "sigmoid": lambda x, threshold: sigmoid(x),
}
