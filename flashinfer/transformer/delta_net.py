"""A gated delta net (Yang et al. 2024), in the place of attention."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.delta_net import DeltaNetConfig
from flashinfer.paper.interfaces import Tap
from flashinfer.transformer.mixer import Parts, RecurrentMixer
from flashinfer.transformer.short_conv import causal_convolution
from flashinfer.transformer.state import RecurrentState, StateSizes, steps_and_decays
from flashinfer.transformer.text import Rows
from flashinfer.transformer.weights import Linear

LENGTH = 1e-6  # added to the square of a query's length, and of a key's


@dataclass
class DeltaNet(RecurrentMixer[DeltaNetConfig]):
    """A layer's gated delta net: project, convolve, write to the state and read from it, gate.

    in_proj, z_proj, a_proj, b_proj, out_proj  see DeltaNetConfig
    conv            (channels, kernel) float32
    decay, dt_bias  (value heads,) float32; gated: (value_dim,), the weights of the last norm
    """

    config: DeltaNetConfig
    in_proj: Linear
    z_proj: Linear
    a_proj: Linear
    b_proj: Linear
    out_proj: Linear
    conv: Float32Array
    decay: Float32Array
    dt_bias: Float32Array
    gated: Float32Array
    tap: Tap | None = field(default=None, init=False)

    @classmethod
    def made(cls, config: DeltaNetConfig, parts: Parts) -> "DeltaNet":
        """The gated delta net of a layer."""
        vectors = (parts.vector(name) for name in ("decay", "dt_bias", "gated.weight"))
        in_proj, z, a, b, out_proj = (parts.linear(f"{p}_proj") for p in config.projections())
        return cls(config, in_proj, z, a, b, out_proj, parts.table("conv.weight"), *vectors)

    @classmethod
    def sizes(cls, config: DeltaNetConfig) -> StateSizes:
        """A matrix of each head; inputs are what is convolved, a and b."""
        numbers = config.value_heads * config.key_dim * config.value_dim
        return StateSizes(numbers, config.channels + 2 * config.value_heads, config.kernel - 1)

    @classmethod
    def working_bytes(cls, config: DeltaNetConfig) -> int:
        """Bytes of a token's projections, of what is convolved, and of what heads give."""
        return 4 * (8 * config.channels + 6 * config.value_heads * config.value_dim)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its products with weights, in the order in which they are made."""
        return self.in_proj, self.z_proj, self.a_proj, self.b_proj, self.out_proj

    def __call__(self, x: Float32Array, texts: Sequence[Rows]) -> Float32Array:
        """x (T, d_model), the next tokens of some texts -> (T, d_model)."""
        config, n = self.config, len(x)
        qkv, z, a, b = self.in_proj(x), self.z_proj(x), self.a_proj(x), self.b_proj(x)
        if self.tap:
            self.tap(in_proj=qkv, z=z, a=a, b=b)
        inputs = np.concatenate([qkv, a, b], axis=1)
        read = np.empty((n, config.value_heads * config.value_dim), dtype=np.float32)
        for memory, begin, end, start in texts:
            assert isinstance(memory, RecurrentState)
            read[begin:end] = memory.advance(inputs[begin:end], start, self._step)
        normed = kernels.rms_norm(read.reshape(-1, config.value_dim), self.gated, config.epsilon)
        gate = z.copy()
        kernels.activate(gate, "silu")
        mixed = normed.reshape(n, -1) * gate
        y = self.out_proj(mixed)
        if self.tap:
            self.tap(read=read, mixed=mixed, o=y)
        return y

    def _step(self, window: Float32Array, state: Float32Array) -> Float32Array:
        """Inputs of n tokens and of those before them -> what heads read, (n, width of values)."""
        config = self.config
        heads, keys, n = config.value_heads, config.key_heads, len(window) - config.kernel + 1
        qkv, ab = np.split(window, [config.channels], axis=1)
        mixed = causal_convolution(qkv, self.conv, None)  # (n, channels)
        kernels.activate(mixed, config.activation)
        q, k, v = np.split(mixed, [keys * config.key_dim, 2 * keys * config.key_dim], axis=1)
        a, b = np.split(ab[-n:], 2, axis=1)  # (n, value heads) each
        rate = np.ascontiguousarray(b)
        kernels.activate(rate, "sigmoid")
        _, decays = steps_and_decays(a, self.dt_bias, self.decay)
        q, k = self._unit(q, config.key_dim**-0.5), self._unit(k)  # (n, key heads, key_dim)
        if config.tiled:
            q, k = (np.tile(part, (1, heads // keys, 1)) for part in (q, k))
        read = kernels.linear_attention(
            q, k, np.ascontiguousarray(v).reshape(n, heads, config.value_dim),
            decays, rate,
            state.reshape(heads, config.key_dim, config.value_dim), True,
        )  # fmt: skip
        return read.reshape(n, -1)

    def _unit(self, x: Float32Array, length: float = 1.0) -> Float32Array:
        """x (n, heads * key_dim), each head brought to this length -> (n, heads, key_dim)."""
        size = self.config.key_dim
        rows = np.ascontiguousarray(x).reshape(-1, size)
        unit = kernels.rms_norm(rows, None, LENGTH / size) * np.float32(length * size**-0.5)
        return unit.reshape(len(x), -1, size)
