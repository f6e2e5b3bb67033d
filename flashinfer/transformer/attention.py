"""Causal self-attention with a key/value cache."""

from dataclasses import dataclass

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.paper.interfaces import Stream
from flashinfer.transformer.kv_cache import KeyValueCache, padded_width
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.positions import RotaryPositions
from flashinfer.transformer.weights import Linear


def working_bytes(config: AttentionConfig) -> int:
    """Bytes that a token takes on its way through a layer's attention, beside its keys and
    values: queries and outputs, padded."""
    return 8 * config.num_attention_heads * padded_width(config.head_dim)


@dataclass
class Attention:
    """A layer's attention: project, turn, remember, attend, project.

    q, k, v, o      see AttentionConfig.projections
    q_norm, k_norm  over the values of each head or of all heads, or None
    rotary          positions by which queries and keys are turned, or None
    score_bias      (heads, context) float32, added to the scores (alibi), or None
    sinks           (heads,) float32: a learned extra softmax logit each (attention sink), or None
    """

    config: AttentionConfig
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    cache: KeyValueCache
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary: RotaryPositions | None = None
    score_bias: Float32Array | None = None
    sinks: Float32Array | None = None

    def __call__(self, x: Float32Array, start: int) -> Float32Array:
        """x (T, d_model), the tokens at positions start.. -> (T, d_model)."""
        n, head_dim = len(x), self.config.head_dim
        q = self._heads(self.q(x), self.q_norm)  # (T, heads, head_dim)
        k = self._heads(self.k(x), self.k_norm)  # (T, key/value heads, head_dim)
        v = self._heads(self.v(x))  # (T, key/value heads, head_dim)
        if self.rotary is not None:
            turns = self.rotary(start, n)
            kernels.rotate(q, *turns)
            kernels.rotate(k, *turns)
        q *= np.float32(self.config.attention_scale or head_dim**-0.5)
        width = self.cache.keys.shape[2]
        if head_dim < width:
            padded = np.zeros((*q.shape[:2], width), dtype=np.float32)
            padded[:, :, :head_dim] = q
            q = padded
        parts = []  # of out (T, heads, width), nearly always one
        for begin, end in self.cache.pieces(start, n):
            place = self.cache.remember(k[begin:end], v[begin:end], start + begin)
            part = kernels.attention(
                q[begin:end], self.cache.keys, self.cache.values, place, self.cache.window,
                self.score_bias, self.config.score_cap or 0.0, self.sinks,
            )  # fmt: skip
            parts.append(part)
        out = parts[0] if len(parts) == 1 else np.concatenate(parts)
        heads = np.ascontiguousarray(out[:, :, :head_dim])
        return self.o(heads.reshape(n, -1))

    def streams(self) -> tuple[Stream, ...]:
        """Which of its matrices are streamed at every token, in this order."""
        return tuple(s for part in (self.q, self.k, self.v, self.o) for s in part.streams())

    def _heads(self, y: Float32Array, norm: Norm | None = None) -> Float32Array:
        """y (T, heads * head_dim), normalised where there is a norm -> (T, heads, head_dim)."""
        n, head_dim = len(y), self.config.head_dim
        if norm is not None:
            y = norm(y.reshape(-1, y.shape[1] if self.config.qk_norm == "all" else head_dim))
        return y.reshape(n, -1, head_dim)
