"""Normalisation, before a block or after it."""

from dataclasses import dataclass

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.norm import NormConfig


@dataclass
class Norm:
    """A norm with its weights and biases, (n,) float32 each, or None."""

    config: NormConfig
    weight: Float32Array | None
    bias: Float32Array | None

    def __call__(self, x: Float32Array) -> Float32Array:
        """x (T, n) -> (T, n)."""
        if self.config.kind == "rms":
            return kernels.rms_norm(x, self.weight, self.config.epsilon)
        return kernels.layer_norm(x, self.weight, self.bias, self.config.epsilon)
