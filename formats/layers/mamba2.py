"""Mamba-2 (Dao and Gu 2024): a state that decays, in the place of keys and values."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import FormatError
from ..tensors import ATTENTION, SMALL, TensorSpec, vector
from .ffn import ACTIVATIONS
from .mixer import MixerConfig, check_widths
from .norm import NormConfig
from .short_conv import check_kernel


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """out(norm(y silu(z))), where in(x) = [z | c | dt] and activation(conv(c)) = [v | B | C]; the
    convolution is one of each channel with its own last values. Of each head, with
    dt = softplus(dt + dt_bias) within ``steps``,
        S = exp(dt decay) S + B (dt v)^T;  y = S^T C + skip v

    heads, head_dim  of z, v and y
    groups           of B and C, each of which heads / groups neighbouring heads share; the norm is
                     one of the heads of each group
    state_size       of B and C
    kernel           tokens that the convolution sees, itself included
    activation       of what is convolved
    steps            (least, most) of dt; None: no most
    norm             over y silu(z)
    conv_bias        the convolution has biases; proj_bias: both products have
    """

    name: ClassVar[str] = "Mamba-2"
    heads: int
    head_dim: int
    groups: int
    state_size: int
    kernel: int
    norm: NormConfig
    activation: str = "silu"
    steps: tuple[float, float | None] = (0.0, None)
    conv_bias: bool = True
    proj_bias: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise FormatError(
                f"config: {self.heads} heads of Mamba-2 are no multiple of its {self.groups} groups"
            )
        if self.activation not in ACTIVATIONS:
            raise FormatError(
                f"config: activation {self.activation!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )
        check_widths(hidden_size=self.hidden_size, Mamba_2_projection=self.projected)
        check_widths(Mamba_2_state=self.state_size * self.head_dim)
        check_kernel(self.kernel)

    @property
    def width(self) -> int:
        """Numbers of z, v and y."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Numbers that are convolved: v, B and C."""
        return self.width + 2 * self.groups * self.state_size

    @property
    def projected(self) -> int:
        """Numbers that the in projection gives."""
        return self.width + self.channels + self.heads

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""
        d = self.hidden_size
        sizes = {"in_proj": (self.projected, d), "out_proj": (d, self.width)}
        specs = [TensorSpec(f"{name}.conv.weight", (self.channels, self.kernel), SMALL, exact=True)]
        if self.conv_bias:
            specs.append(vector(f"{name}.conv.bias", self.channels))
        specs += [vector(f"{name}.{part}", self.heads) for part in ("dt_bias", "decay", "skip")]
        specs += self.norm.tensors(f"{name}.mixed_norm", self.width)
        if self.proj_bias:
            specs += [vector(f"{name}.{p}.bias", shape[0]) for p, shape in sizes.items()]
        specs += [TensorSpec(f"{name}.{p}.weight", shape, ATTENTION) for p, shape in sizes.items()]
        return specs
