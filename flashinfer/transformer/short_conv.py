"""A short convolution between two gates, in the place of attention (LFM2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.short_conv import ShortConvConfig
from flashinfer.paper.interfaces import Tap
from flashinfer.transformer.mixer import Parts, RecurrentMixer
from flashinfer.transformer.state import RecurrentState, StateSizes
from flashinfer.transformer.text import Rows
from flashinfer.transformer.weights import Linear


@dataclass
class ShortConv(RecurrentMixer[ShortConvConfig]):
    """A layer's short convolution: project, gate, convolve, gate, project.

    in_proj, out_proj  see ShortConvConfig
    conv, conv_bias    (d_model, kernel) and (d_model,) float32; or None
    """

    config: ShortConvConfig
    in_proj: Linear
    out_proj: Linear
    conv: Float32Array
    conv_bias: Float32Array | None = None
    tap: Tap | None = field(default=None, init=False)

    @classmethod
    def made(cls, config: ShortConvConfig, parts: Parts) -> "ShortConv":
        """The short convolution of a layer."""
        in_proj, out_proj = parts.linear("in_proj"), parts.linear("out_proj")
        return cls(config, in_proj, out_proj, parts.table("conv.weight"), parts.vector("conv.bias"))

    @classmethod
    def sizes(cls, config: ShortConvConfig) -> StateSizes:
        """No state but the inputs of the last tokens."""
        return StateSizes(0, config.hidden_size, config.kernel - 1)

    @classmethod
    def working_bytes(cls, config: ShortConvConfig) -> int:
        """Bytes of a token's b, c and v, of what is convolved, and of the sums on the way."""
        return 4 * 8 * config.hidden_size

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its products with weights, in the order in which they are made."""
        return self.in_proj, self.out_proj

    def __call__(self, x: Float32Array, texts: Sequence[Rows]) -> Float32Array:
        """x (T, d_model), the next tokens of some texts -> (T, d_model)."""
        projected = self.in_proj(x)  # (T, 3 d_model)
        b, c, v = np.split(projected, 3, axis=1)  # (T, d_model) each
        gated = b * v
        convolved = np.empty_like(gated)
        for memory, begin, end, start in texts:
            assert isinstance(memory, RecurrentState)
            convolved[begin:end] = memory.advance(gated[begin:end], start, self._convolve)
        convolved *= c
        y = self.out_proj(convolved)
        if self.tap:
            self.tap(in_proj=projected, mixed=convolved, o=y)
        return y

    def _convolve(self, window: Float32Array, state: Float32Array) -> Float32Array:
        return causal_convolution(window, self.conv, self.conv_bias)


def causal_convolution(
    window: Float32Array, conv: Float32Array, bias: Float32Array | None
) -> Float32Array:
    """Each channel with its own last values: window (kernel - 1 + n, channels), conv (channels,
    kernel), bias (channels,) or None -> (n, channels) float32.

    Products are added one after the other, from the oldest token on, so that a token's bits do not
    depend on how many there are.
    """
    kernel = conv.shape[1]
    n = len(window) - kernel + 1
    y = window[:n] * conv[:, 0]
    for k in range(1, kernel):
        y += window[k : k + n] * conv[:, k]
    return y if bias is None else y + bias
