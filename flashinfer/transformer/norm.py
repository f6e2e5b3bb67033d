"""Normalisation, before a block or after it."""

from dataclasses import dataclass

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array


@dataclass
class Norm:
    """Normalisation of the mean and the variance ("layer") or of the mean square ("rms").

    weight and bias (n,) float32, or None
    """

    kind: str
    epsilon: float
    weight: np.ndarray | None
    bias: np.ndarray | None

    def __call__(self, x: Float32Array) -> Float32Array:
        """x (T, n) -> (T, n)."""
        if self.kind == "rms":
            return kernels.rms_norm(x, self.weight, self.epsilon)
        return kernels.layer_norm(x, self.weight, self.bias, self.epsilon)
