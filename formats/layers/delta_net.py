"""A gated delta net (Yang et al. 2024), in the place of attention: linear attention whose state is
corrected by each token."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import FormatError
from ..tensors import ATTENTION, SMALL, TensorSpec, vector
from .mixer import MixerConfig, check_widths
from .short_conv import check_kernel


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(MixerConfig):
    """in(x) = [q | k | v], of which each channel is convolved with its own last values, and passes
    ``activation``. Queries and keys have a length of 1. Of each head the state S (key_dim,
    value_dim) becomes decay S, and then S + k (rate (v - S^T k))^T; S^T q, normalised and times
    silu(z(x)), goes to out(...).

    decay is exp(decay softplus(a(x) + dt_bias)) with a learned ``decay`` below 0, rate is
    sigmoid(b(x)), of each head.

    key_heads, value_heads  of which value_heads / key_heads, side by side, share a query and a key
    tiled                   every key_heads-th head of values shares a query and a key instead
    key_dim, value_dim      values of a head of either kind
    kernel                  tokens that the convolution sees, itself included
    epsilon                 of the norm of what heads give
    """

    name: ClassVar[str] = "a gated delta net"
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    epsilon: float
    tiled: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        check_widths(
            hidden_size=self.hidden_size,
            width_of_keys=self.key_heads * self.key_dim,
            width_of_values=self.value_heads * self.value_dim,
        )
        check_kernel(self.kernel)
        if self.value_heads % self.key_heads:
            raise FormatError(
                f"config: {self.value_heads} heads of values cannot share {self.key_heads} heads "
                "of keys"
            )

    @property
    def channels(self) -> int:
        """Values that are convolved: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def projections(self) -> dict[str, tuple[int, int]]:
        """{"in", "z", "a", "b", "out": (rows, columns)}."""
        d, width = self.hidden_size, self.value_heads * self.value_dim
        heads = (self.value_heads, d)
        return {
            "in": (self.channels, d), "z": (width, d), "a": heads, "b": heads, "out": (d, width),
        }  # fmt: skip

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""
        conv = (self.channels, self.kernel)
        return [
            TensorSpec(f"{name}.conv.weight", conv, SMALL, exact=True),
            vector(f"{name}.decay", self.value_heads),
            vector(f"{name}.dt_bias", self.value_heads),
            vector(f"{name}.gated.weight", self.value_dim),
            *(
                TensorSpec(f"{name}.{p}_proj.weight", shape, ATTENTION)
                for p, shape in self.projections().items()
            ),
        ]
