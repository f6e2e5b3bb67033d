"""Activation functions in float64."""

import math
from collections.abc import Callable

import numpy as np

from flashinfer.formats.arrays import Float64Array


def activation(name: str, threshold: float) -> Callable[[Float64Array], Float64Array]:
    """An activation function in float64, by the name that FFNConfig has for it."""
    return {
        "relu": lambda x: np.where(x > threshold, x, 0.0),
        "relu2": lambda x: np.where(x > threshold, x, 0.0) ** 2,
        "silu": lambda x: x * sigmoid(x),
        "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: (
            x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
        "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    }[name]


def sigmoid(x: Float64Array) -> Float64Array:
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


_erf = np.vectorize(math.erf, otypes=[np.float64])
