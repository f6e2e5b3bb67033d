"""Mamba-2 (Dao and Gu 2024), in the place of attention."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.mamba2 import Mamba2Config
from flashinfer.paper.interfaces import Tap
from flashinfer.transformer.mixer import Parts, RecurrentMixer
from flashinfer.transformer.short_conv import causal_convolution
from flashinfer.transformer.state import RecurrentState, StateSizes, steps_and_decays
from flashinfer.transformer.text import Rows
from flashinfer.transformer.weights import Linear


@dataclass
class Mamba2(RecurrentMixer[Mamba2Config]):
    """A layer's Mamba-2: project, convolve, put into the state and read it, gate, norm, project.

    in_proj, out_proj  see Mamba2Config
    conv, conv_bias    (channels, kernel) and (channels,) float32; or None
    dt_bias, decay, skip  (heads,) float32
    mixed_norm         (width,) float32: weights of the norm
    """

    config: Mamba2Config
    in_proj: Linear
    out_proj: Linear
    conv: Float32Array
    conv_bias: Float32Array | None
    dt_bias: Float32Array
    decay: Float32Array
    skip: Float32Array
    mixed_norm: Float32Array
    tap: Tap | None = field(default=None, init=False)

    @classmethod
    def made(cls, config: Mamba2Config, parts: Parts) -> "Mamba2":
        """The Mamba-2 of a layer."""
        return cls(
            config, parts.linear("in_proj"), parts.linear("out_proj"),
            parts.table("conv.weight"), parts.vector("conv.bias"), parts.vector("dt_bias"),
            parts.vector("decay"), parts.vector("skip"), parts.vector("mixed_norm.weight"),
        )  # fmt: skip

    @classmethod
    def sizes(cls, config: Mamba2Config) -> StateSizes:
        """The state of all heads; the inputs are what is convolved, and dt."""
        numbers = config.heads * config.state_size * config.head_dim
        return StateSizes(numbers, config.channels + config.heads, config.kernel - 1)

    @classmethod
    def working_bytes(cls, config: Mamba2Config) -> int:
        """Bytes of a token's projection, of what is convolved and the sums on the way, of dt and
        its functions in float64, and of y, gated and normalised."""
        inputs = config.projected + config.channels + config.heads
        return 4 * (inputs + 4 * config.channels + 6 * config.width + 24 * config.heads)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its products with weights, in the order in which they are made."""
        return self.in_proj, self.out_proj

    def __call__(self, x: Float32Array, texts: Sequence[Rows]) -> Float32Array:
        """x (T, d_model), the next tokens of some texts -> (T, d_model)."""
        width = self.config.width
        projected = self.in_proj(x)  # (T, z | channels | heads)
        scanned = np.empty((len(x), width), np.float32)
        for memory, begin, end, start in texts:
            assert isinstance(memory, RecurrentState)
            inputs = projected[begin:end, width:]
            scanned[begin:end] = memory.advance(inputs, start, self._scan)
        mixed = self._normed(scanned, projected[:, :width].copy())
        y = self.out_proj(mixed)
        if self.tap:
            self.tap(in_proj=projected, scanned=scanned, mixed=mixed, o=y)
        return y

    def _scan(self, window: Float32Array, state: Float32Array) -> Float32Array:
        """window (kernel - 1 + n, channels + heads) and a state, which changes -> (n, width)."""
        config = self.config
        mixed = causal_convolution(window[:, : config.channels], self.conv, self.conv_bias)
        kernels.activate(mixed, config.activation)
        n, bounds = len(mixed), (config.width, (config.width + config.channels) // 2)
        v, keys, queries = (np.ascontiguousarray(p) for p in np.split(mixed, bounds, axis=1))
        v = v.reshape(n, config.heads, config.head_dim)
        dt = window[config.kernel - 1 :, config.channels :]
        steps, decays = steps_and_decays(dt, self.dt_bias, self.decay, config.steps)
        y = kernels.linear_attention(
            queries.reshape(n, config.groups, config.state_size),
            keys.reshape(n, config.groups, config.state_size),
            v, decays, steps,
            state.reshape(config.heads, config.state_size, config.head_dim),
        )  # fmt: skip
        v *= self.skip[:, None]
        y += v
        return y.reshape(n, config.width)

    def _normed(self, scanned: Float32Array, gate: Float32Array) -> Float32Array:
        """y and z, (T, width) each, the latter of which changes -> (T, width)."""
        config = self.config
        kernels.activate(gate, "silu")
        gate *= scanned
        groups = gate.reshape(-1, config.width // config.groups)
        mixed = kernels.rms_norm(groups, None, config.norm.epsilon).reshape(gate.shape)
        mixed *= self.mixed_norm
        return mixed
