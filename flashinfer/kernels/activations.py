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


# {name: the activation of x, float32, with ``threshold``, a float32}. A new one is an entry here
# and a row in _native/formats.h.
ACTIVATIONS: dict[str, Callable[[Float32Array, np.float32], Float32Array]] = {
    "relu": _relu,
    "relu2": lambda x, threshold: np.square(_relu(x, threshold)),
    "silu": lambda x, threshold: x * sigmoid(x),
    "gelu": lambda x, threshold: x * (np.float32(0.5) * (1 + _erf(x * np.float32(0.5**0.5)))),
    "gelu_tanh": _gelu_tanh,
    "cap": lambda x, cap: cap * (2 * sigmoid(x * (np.float32(2) / cap)) - 1),
    "quick_gelu": lambda x, threshold: x * sigmoid(np.float32(1.702) * x),
    "sigmoid": lambda x, threshold: sigmoid(x),
}
