"""A short convolution between two gates, in the place of attention (LFM2)."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import FormatError
from ..tensors import ATTENTION, SMALL, TensorSpec, vector
from .mixer import MixerConfig, check_widths

MOST_KERNEL = 64  # tokens; those of published models have 3 or 4


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(MixerConfig):
    """out(c * conv(b * v)), where in(x) = [b | c | v], each as wide as the hidden state, and the
    convolution is one of each channel with its own last values.

    kernel     tokens that the convolution sees, itself included
    conv_bias  the convolution and both products have biases
    """

    name: ClassVar[str] = "a short convolution"
    kernel: int
    conv_bias: bool = False

    def __post_init__(self) -> None:
        check_widths(hidden_size=self.hidden_size)
        check_kernel(self.kernel)

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""
        d, sizes = self.hidden_size, {"in_proj": 3 * self.hidden_size, "out_proj": self.hidden_size}
        specs = [TensorSpec(f"{name}.conv.weight", (d, self.kernel), SMALL, exact=True)]
        if self.conv_bias:
            specs.append(vector(f"{name}.conv.bias", d))
            specs += [vector(f"{name}.{p}.bias", rows) for p, rows in sizes.items()]
        specs += [
            TensorSpec(f"{name}.{p}.weight", (rows, d), ATTENTION) for p, rows in sizes.items()
        ]
        return specs


def check_kernel(kernel: int) -> None:
    """Raises FormatError where a convolution sees more tokens than that of any model."""
    if not 1 < kernel <= MOST_KERNEL:
        raise FormatError(f"config: a convolution over {kernel} tokens is not that of a model")
