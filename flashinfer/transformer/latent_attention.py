"""Latent attention (DeepSeek V2): heads share one small row of each token in the place of keys and
values.

A head's key is [k_b latent | k_rope], so that its score is latent . (k_b^T q_nope) + k_rope .
q_rope: queries take k_b in, and what is kept of a token is [latent | k_rope] alone. The sum of
values is v_b times the sum of latents. So it is attention whose heads share one key, which is the
value, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array, UInt8Array
from flashinfer.formats.layers.latent_attention import LatentAttentionConfig
from flashinfer.paper.interfaces import Tap
from flashinfer.transformer.attention import largest_scores
from flashinfer.transformer.kv_cache import (
    ELEMENTS,
    LatentCache,
    padded_width,
    pages,
    token_bytes,
)
from flashinfer.transformer.mixer import MemoryWanted, Mixer, Parts
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.positions import RotaryPositions, yarn_scale
from flashinfer.transformer.text import Rows
from flashinfer.transformer.weights import FEW, Linear, LinearOfHeads

HEADS_TOGETHER = 6  # heads for which the kernel decodes a row once: kernels.h, DOWN_TOKENS
INDICES = 8  # of 4 bytes, for each row and token of heads that are computed together


@dataclass
class LatentAttention(Mixer[LatentAttentionConfig]):
    """A layer's latent attention: project, turn, remember, attend, project.

    q         the last product that makes queries; q_a, q_a_norm: what comes before, or None
    kv_a      makes latents, and the part of keys that is turned; kv_a_norm: over latents
    k_b, v_b  of each head, see LatentAttentionConfig; k_b is transposed, (kv_lora_rank,
              qk_nope_head_dim) of each head
    """

    config: LatentAttentionConfig
    q: Linear
    q_a: Linear | None
    q_a_norm: Norm | None
    kv_a: Linear
    kv_a_norm: Norm
    k_b: LinearOfHeads
    v_b: LinearOfHeads
    o: Linear
    rotary: RotaryPositions
    tap: Tap | None = field(default=None, init=False)

    @classmethod
    def made(cls, config: LatentAttentionConfig, parts: Parts) -> "LatentAttention":
        """The latent attention of a layer."""
        q_a = q_a_norm = None
        if config.q_lora_rank is not None:
            q_a, q_a_norm = parts.linear("q_a_proj"), parts.norm(config.latent_norm, "q_a_norm")
        rotary = parts.positions.of(config.rotary)
        assert rotary is not None
        return cls(
            config,
            parts.linear("q_proj" if q_a is None else "q_b_proj"),
            q_a,
            q_a_norm,
            parts.linear("kv_a_proj"),
            parts.norm(config.latent_norm, "kv_a_norm"),
            parts.linear_of_heads("k_b_proj", config.kv_lora_rank),
            parts.linear_of_heads("v_b_proj", config.v_head_dim),
            parts.linear("o_proj"),
            rotary,
        )

    @classmethod
    def working_bytes(cls, config: LatentAttentionConfig) -> int:
        """Bytes of a token's queries, as they are and padded with k_b in them, of its latents, of
        what attention gives, and of the indices of heads' rows (``LinearOfHeads``)."""
        of_head = config.qk_head_dim + 2 * padded_width(config.cached_dim)
        of_head += config.kv_lora_rank + config.qk_rope_head_dim + config.v_head_dim
        of_head += INDICES * max(config.kv_lora_rank, config.v_head_dim)
        shared = 2 * (config.q_lora_rank or 0) + 3 * config.cached_dim
        return 4 * (config.num_attention_heads * of_head + shared)

    @classmethod
    def memory_bytes(cls, config: LatentAttentionConfig, wanted: MemoryWanted) -> int:
        """Bytes in DRAM of a text's rows."""
        return pages(wanted.context * token_bytes(config.over_latents, wanted.dtype))

    @classmethod
    def seen_bytes(cls, config: LatentAttentionConfig, wanted: MemoryWanted) -> int:
        """Bytes of rows that are read for a token in the middle of the context: as keys and as
        values, once for each HEADS_TOGETHER heads."""
        rows = wanted.context // 2 * token_bytes(config.over_latents, wanted.dtype)
        return 2 * rows * -(-config.num_attention_heads // HEADS_TOGETHER)

    @classmethod
    def new_memory(
        cls,
        config: LatentAttentionConfig,
        wanted: MemoryWanted,
        memory: UInt8Array,
        scratch: Float32Array,
    ) -> LatentCache:
        """A text's rows."""
        used = memory[: wanted.context * token_bytes(config.over_latents, wanted.dtype)]
        rows = used.view(ELEMENTS[wanted.dtype]).reshape(1, wanted.context, -1)
        return LatentCache(rows, wanted.context)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its products with weights, in the order in which they are made."""
        queries = (self.q,) if self.q_a is None else (self.q_a, self.q)
        return *queries, self.kv_a, self.k_b, self.v_b, self.o

    def __call__(self, x: Float32Array, texts: Sequence[Rows]) -> Float32Array:
        """x (T, d_model), the next tokens of some texts, each of which attends to its own ->
        (T, d_model)."""
        turns = self.rotary([(text.start, text.end - text.begin) for text in texts])
        q = self._queries(x, turns)  # (T, heads, padded width)
        rows = self._rows(x, turns)  # (T, 1, kv_lora_rank + qk_rope_head_dim)
        sums, largest = np.empty_like(q), []
        for cache, first, stop, start in texts:
            assert isinstance(cache, LatentCache)
            place = cache.remember_rows(rows[first:stop], start)
            sums[first:stop] = attend(q[first:stop], cache, place)
            if self.tap:
                largest.append(largest_scores(q[first:stop], cache, place))
        heads = self.v_b(sums[:, :, : self.config.kv_lora_rank])  # (T, heads, v_head_dim)
        y = self.o(heads.reshape(len(x), -1))
        if self.tap:
            self.tap(scores_max=np.concatenate(largest), heads=heads.reshape(len(x), -1), o=y)
        return y

    def _queries(self, x: Float32Array, turns: tuple[Float32Array, Float32Array]) -> Float32Array:
        """What meets the rows of tokens: x (T, d_model) -> [k_b^T q_nope | q_rope | 0], scaled,
        (T, heads, padded width)."""
        config, n = self.config, len(x)
        rank, nope = config.kv_lora_rank, config.qk_nope_head_dim
        if self.q_a is not None and self.q_a_norm is not None:
            x = self.q_a(x)
            normed = self.q_a_norm(x)
            if self.tap:
                self.tap(q_a=x, q_a_norm=normed)
            x = normed
        projected = self.q(x)
        q = projected.reshape(n, config.num_attention_heads, config.qk_head_dim)
        q_rope = np.ascontiguousarray(q[:, :, nope:])
        kernels.rotate(q_rope, *turns)
        if self.tap:
            self.tap(q=projected, q_turned=q_rope)
        shape = (n, config.num_attention_heads, padded_width(config.cached_dim))
        padded = np.zeros(shape, dtype=np.float32)
        padded[:, :, :rank] = self.k_b(q[:, :, :nope])
        padded[:, :, rank : config.cached_dim] = q_rope
        padded *= np.float32(score_scale(config))
        return padded

    def _rows(self, x: Float32Array, turns: tuple[Float32Array, Float32Array]) -> Float32Array:
        """What is kept of tokens: x (T, d_model) -> [latent | k_rope] (T, 1, width)."""
        rank = self.config.kv_lora_rank
        kv = self.kv_a(x)
        latents = self.kv_a_norm(np.ascontiguousarray(kv[:, :rank]))
        k_rope = np.ascontiguousarray(kv[:, None, rank:])
        kernels.rotate(k_rope, *turns)
        if self.tap:
            self.tap(kv_a=kv, kv_a_norm=latents, k_turned=k_rope)
        return np.concatenate([latents[:, None], k_rope], axis=2)


def attend(q: Float32Array, cache: LatentCache, place: int) -> Float32Array:
    """q (T, heads, width), scaled, of the tokens at ``place`` of a cache and after -> the heads'
    sums of rows, of the same shape.

    Where the tokens are few, the kernel is given each token's heads as if they were tokens that all
    see the same rows. It computes several tokens at a time, so that a row is decoded once for
    several heads. The bits are the same.
    """
    n, heads, _ = q.shape
    if n > FEW or place + 1 < heads:
        return kernels.attention(q, cache.keys, cache.values, place)
    out = np.empty_like(q)
    for token in range(n):
        start = place + token + 1 - heads
        out[token] = kernels.attention(
            q[token, :, None], cache.keys, cache.values, start, both=True
        )[:, 0]
    return out


def score_scale(config: LatentAttentionConfig) -> float:
    """What scores are multiplied with."""
    return config.qk_head_dim**-0.5 * yarn_scale(config.yarn_weight, config.yarn_factor) ** 2
