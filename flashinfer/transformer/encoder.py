"""What an encoder makes of the hidden states after the last layer."""

from dataclasses import dataclass

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.weights import Linear


@dataclass
class Pooler:
    """Pools a text: tanh of what a dense layer makes of its first token."""

    dense: Linear

    def __call__(self, h: Float32Array) -> Float32Array:
        """h (T, d_model) -> (d_model,)."""
        pooled = self.dense(h[:1])
        kernels.activate(pooled, "cap", 1.0)  # c tanh(x / c)
        return pooled[0]


@dataclass
class MaskedHead:
    """What comes before the output head of a model of masked tokens."""

    dense: Linear
    activation: str
    norm: Norm

    def __call__(self, h: Float32Array) -> Float32Array:
        """h (T, d_model) -> (T, d_model)."""
        x = np.ascontiguousarray(self.dense(h))
        kernels.activate(x, self.activation)
        return self.norm(x)
