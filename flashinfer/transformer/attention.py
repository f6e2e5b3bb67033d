"""Causal self-attention with a key/value cache."""

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.config import ModelConfig
from flashinfer.paper.interfaces import Stream
from flashinfer.transformer.kv_cache import KeyValueCache
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.positions import RotaryPositions
from flashinfer.transformer.weights import Weights


class Attention:
    """A layer's attention: project, turn, remember, attend, project.

    config         ModelConfig
    q, k, v, o     weights.Resident or weights.Streamed, see layout.projection_shapes
    biases         {"q": (rows,) float32, ...} or None for each
    norms          {"q": a norm over each head's values, "k": ...} or None for each
    cache          KeyValueCache
    rotary         positions.RotaryPositions, or None
    score_bias     (heads, context) float32, added to the scores (alibi), or None
    sinks          (heads,) float32: a learned extra softmax logit each (attention sink), or None
    """

    def __init__(
        self,
        config: ModelConfig,
        q: Weights,
        k: Weights,
        v: Weights,
        o: Weights,
        biases: dict[str, Float32Array | None],
        norms: dict[str, Norm | None],
        cache: KeyValueCache,
        rotary: RotaryPositions | None,
        score_bias: Float32Array | None,
        sinks: Float32Array | None,
    ) -> None:
        self.config, self.q, self.k, self.v, self.o = config, q, k, v, o
        self.biases, self.norms, self.cache = biases, norms, cache
        self.rotary, self.score_bias, self.sinks = rotary, score_bias, sinks

    def __call__(self, x: Float32Array, start: int) -> Float32Array:
        """x (T, d_model), the tokens at positions start.. -> (T, d_model)."""
        n, head_dim = len(x), self.config.head_dim
        q, k = self._heads("q", x), self._heads("k", x)
        v = self.v.linear(x, self.biases["v"]).reshape(n, -1, head_dim)
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
                self.score_bias, self.config.score_cap, self.sinks,
            )  # fmt: skip
            parts.append(part)
        out = parts[0] if len(parts) == 1 else np.concatenate(parts)
        heads = np.ascontiguousarray(out[:, :, :head_dim])
        return self.o.linear(heads.reshape(n, -1), self.biases["o"])

    def streams(self) -> tuple[Stream, ...]:
        """Which of its matrices are streamed at every token, in this order."""
        return tuple(s for part in (self.q, self.k, self.v, self.o) for s in part.streams())

    def _heads(self, part: str, x: Float32Array) -> Float32Array:
        """Queries or keys, normalised where the model does so: (T, heads, head_dim)."""
        projection, norm = getattr(self, part), self.norms[part]
        y = projection.linear(x, self.biases[part])
        if norm is not None:
            size = y.shape[1] if self.config.qk_norm_whole else self.config.head_dim
            y = norm(y.reshape(-1, size))
        return y.reshape(len(x), -1, self.config.head_dim)
