"""A path beside attention, of a small rank (LAuReL)."""

from dataclasses import dataclass, field

from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.paper.interfaces import Stream, Tap
from flashinfer.transformer.mixer import Parts
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.weights import Linear


@dataclass
class Laurel:
    """x + norm(right(left x)), of what attention reads (Menghani et al. 2024)."""

    left: Linear
    right: Linear
    norm: Norm
    tap: Tap | None = field(default=None, init=False)

    @classmethod
    def made(cls, norm: NormConfig, parts: Parts) -> "Laurel":
        """That of a layer."""
        left, right = (parts.linear(f"laurel.{name}") for name in ("left", "right"))
        return cls(left, right, parts.norm(norm, "laurel.norm"))

    def __call__(self, x: Float32Array) -> Float32Array:
        """x (T, d_model) -> (T, d_model)."""
        left = self.left(x)
        right = self.right(left)
        normed = self.norm(right)
        if self.tap:
            self.tap(laurel_left=left, laurel_right=right, laurel_norm=normed)
        return x + normed

    def streams(self) -> tuple[Stream, ...]:
        """Which of its matrices are streamed at every token, in this order."""
        return (*self.left.streams(), *self.right.streams())
