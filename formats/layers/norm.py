"""Normalisation: which kind, and its tensors."""

from dataclasses import dataclass
from typing import Literal

from ..tensors import TensorSpec, vector


@dataclass(frozen=True)
class NormConfig:
    """Normalisation of the mean and the variance ("layer") or of the mean square ("rms").

    affine  it has weights and, where its kind is "layer", biases
    """

    kind: Literal["layer", "rms"] = "rms"
    epsilon: float = 1e-5
    affine: bool = True

    def tensors(self, name: str, size: int) -> list[TensorSpec]:
        """The weights and biases of a norm over ``size`` values."""
        if not self.affine:
            return []
        bias = [vector(f"{name}.bias", size)] if self.kind == "layer" else []
        return [vector(f"{name}.weight", size), *bias]
