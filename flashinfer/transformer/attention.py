"""Self-attention with a key/value cache: causal, or in both directions (an encoder's)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array, UInt8Array
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.number_formats import FORMATS
from flashinfer.paper.interfaces import Tap
from flashinfer.transformer.kv_cache import (
    ELEMENTS,
    KeyValueCache,
    kept_tokens,
    padded_width,
    pages,
    token_bytes,
)
from flashinfer.transformer.mixer import MemoryWanted, Mixer, Parts
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.positions import RotaryPositions, query_scales
from flashinfer.transformer.text import Rows
from flashinfer.transformer.text_memory import BorrowedMemory
from flashinfer.transformer.weights import Linear


@dataclass
class Attention(Mixer[AttentionConfig]):
    """A layer's attention: project, turn, remember, attend, project.

    q, k, v, o, g   see AttentionConfig.projections; k, v and g may be None
    q_norm, k_norm  over the values of each head or of all heads, or None
    v_norm          over the values of each head, or None
    heads_norm      over the heads' sums of values, before ``o``, or None
    rotary          positions by which queries and keys are turned, or None
    score_bias      (heads, context) float32, added to the scores (alibi), or None
    sinks           (heads,) float32: a learned extra softmax logit each (attention sink), or None
    """

    config: AttentionConfig
    q: Linear
    o: Linear
    k: Linear | None = None
    v: Linear | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    heads_norm: Norm | None = None
    rotary: RotaryPositions | None = None
    score_bias: Float32Array | None = None
    sinks: Float32Array | None = None
    g: Linear | None = None
    tap: Tap | None = field(default=None, init=False)

    @classmethod
    def made(cls, config: AttentionConfig, parts: Parts) -> "Attention":
        """The attention of a layer."""
        linears = {p: parts.linear(f"{p}_proj", config.rounded) for p in config.projections()}
        attention = cls(config, linears["q"], linears["o"], linears.get("k"), linears.get("v"))
        attention.g = linears.get("g")
        norms = {p: parts.norm(config.norm, f"{p}_norm") for p in config.normed}
        attention.q_norm, attention.k_norm = norms.get("q"), norms.get("k")
        if config.v_norm:
            attention.v_norm = Norm(replace(config.norm, affine=False), None, None)
        if config.heads_norm:
            attention.heads_norm = parts.norm(config.norm, "heads_norm")
        attention.rotary = parts.positions.of(config.rotary)
        if config.alibi:
            heads = config.num_attention_heads
            attention.score_bias = parts.positions.alibi_of(heads, config.head_dim)
        attention.sinks = parts.vector("sinks")
        return attention

    @classmethod
    def working_bytes(cls, config: AttentionConfig) -> int:
        """Bytes of a token's queries and outputs, padded, and of a gate of these."""
        parts = 4 if config.output_gate else 2
        return 4 * parts * config.num_attention_heads * padded_width(config.head_dim)

    @classmethod
    def memory_bytes(cls, config: AttentionConfig, wanted: MemoryWanted) -> int:
        """Bytes in DRAM of a text's keys and values."""
        tokens = kept_tokens(config, wanted.context)
        return 2 * pages(tokens * token_bytes(config, wanted.dtype))

    @classmethod
    def seen_bytes(cls, config: AttentionConfig, wanted: MemoryWanted) -> int:
        """Bytes of the keys and values that a token sees, in the middle of the context."""
        seen = wanted.context // 2
        seen = min(seen, config.attention_window or seen)
        return 2 * seen * token_bytes(config, wanted.dtype)

    @classmethod
    def new_memory(
        cls,
        config: AttentionConfig,
        wanted: MemoryWanted,
        memory: UInt8Array,
        scratch: Float32Array,
    ) -> KeyValueCache:
        """A text's keys and values."""
        tokens, heads = kept_tokens(config, wanted.context), config.num_key_value_heads
        halves = memory.reshape(2, -1)[:, : tokens * token_bytes(config, wanted.dtype)]
        keys, values = (
            half.view(ELEMENTS[wanted.dtype]).reshape(heads, tokens, -1) for half in halves
        )
        window, lends = config.attention_window, config.lends
        return KeyValueCache(keys, values, window, wanted.context, lends)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its products with weights, in the order in which they are made."""
        parts = (self.q, self.k, self.v, self.g, self.o)
        return tuple(part for part in parts if part is not None)

    def __call__(self, x: Float32Array, texts: Sequence[Rows]) -> Float32Array:
        """x (T, d_model), the next tokens of some texts, each of which attends to its own ->
        (T, d_model)."""
        n, head_dim = len(x), self.config.head_dim
        of_heads = self._turned(self._projected(x), texts)
        q, k, v = of_heads["q"], of_heads.get("k"), of_heads.get("v")
        q *= np.float32(self.config.attention_scale or head_dim**-0.5)
        width = padded_width(head_dim)
        if head_dim < width:
            padded = np.zeros((*q.shape[:2], width), dtype=np.float32)
            padded[:, :, :head_dim] = q
            q = padded
        parts, largest = [], []  # of out (T, heads, width), nearly always one
        for text in texts:
            for cache, rows, place in self._placed(text, k, v):
                part = kernels.attention(
                    q[rows], cache.keys, cache.values, place, cache.window,
                    self.score_bias, self.config.score_cap or 0.0, self.sinks,
                    self.config.both_ways,
                )  # fmt: skip
                parts.append(part)
                if self.tap:
                    cap = self.config.score_cap
                    largest.append(largest_scores(q[rows], cache, place, self.score_bias, cap))
        out = parts[0] if len(parts) == 1 else np.concatenate(parts)
        heads = np.ascontiguousarray(out[:, :, :head_dim]).reshape(n, -1)
        if self.tap:
            self.tap(scores_max=np.concatenate(largest), heads=heads)
        if self.heads_norm is not None:
            heads = self.heads_norm(heads)
            if self.tap:
                self.tap(heads_norm=heads)
        if self.g is not None:
            gate = self.g(x)
            if self.tap:
                self.tap(g=gate)
            kernels.activate(gate, "sigmoid")
            heads = heads * gate
            if self.tap:
                self.tap(gated=heads)
        y = self.o(heads)
        if self.tap:
            self.tap(o=y)
        return y

    def _projected(self, x: Float32Array) -> dict[str, Float32Array]:
        """x (T, d_model) -> {"q", "k", "v": (T, heads of each, head_dim)}, the last two where they
        are not an earlier layer's."""
        linears = {"q": self.q, "k": self.k, "v": self.v}
        found = {p: linear(x) for p, linear in linears.items() if linear is not None}
        if self.tap:
            self.tap(**found)
        if self.config.v_of_k and self.k is not None:
            found["v"] = found["k"].copy()
        return {p: y.reshape(len(x), -1, self.config.head_dim) for p, y in found.items()}

    def _turned(
        self, heads: dict[str, Float32Array], texts: Sequence[Rows]
    ) -> dict[str, Float32Array]:
        """What ``_projected`` gives, normalised and turned."""
        after = self.config.qk_norm_after_rotary
        heads = heads if after else self._normed(heads)
        turned = {f"{p}_turned": x for p, x in heads.items() if p != "v"}
        if self.rotary is not None:
            turns = self.rotary([(text.start, text.end - text.begin) for text in texts])
            for x in turned.values():
                kernels.rotate(x, *turns)
        if self.config.temperature is not None:
            at = [np.arange(text.start, text.start + text.end - text.begin) for text in texts]
            scales = query_scales(self.config.temperature, np.concatenate(at))
            turned["q_turned"] *= scales.astype(np.float32)[:, None, None]
        if self.tap:
            self.tap(**turned)
        heads = self._normed(heads) if after else heads
        if self.v_norm is not None and "v" in heads:
            heads["v"] = _per_head(heads["v"], self.v_norm)
            if self.tap:
                self.tap(v_norm=heads["v"])
        return heads

    def _normed(self, heads: dict[str, Float32Array]) -> dict[str, Float32Array]:
        """Queries and keys normalised, where there are norms; values as they are."""
        found = dict(heads)
        for p, norm in (("q", self.q_norm), ("k", self.k_norm)):
            if norm is None or p not in found:
                continue
            if self.config.qk_norm == "all":
                x = found[p]
                found[p] = norm(x.reshape(len(x), -1)).reshape(x.shape)
            else:
                found[p] = _per_head(found[p], norm)
        if self.tap:
            self.tap(**{f"{p}_norm": x for p, x in found.items() if p != "v"})
        return found

    def _placed(
        self, text: Rows, k: Float32Array | None, v: Float32Array | None
    ) -> Iterator[tuple[KeyValueCache, slice, int]]:
        """Yield (the text's key/value cache, rows of the pass, where in the cache the first of
        them is), of all its rows, as they find room there; k, v (T, key/value heads, head_dim), or
        None. What is yielded has to be used before the next is asked for."""
        memory, first, stop, start = text
        if isinstance(memory, BorrowedMemory):
            cache = memory.of
            assert isinstance(cache, KeyValueCache)
            yield cache, slice(first, stop), start - cache.first
            return
        cache = memory
        assert isinstance(cache, KeyValueCache) and k is not None and v is not None
        for piece in cache.pieces(start, stop - first):
            rows = slice(first + piece[0], first + piece[1])
            yield cache, rows, cache.remember(k[rows], v[rows], start + piece[0])


def _per_head(x: Float32Array, norm: Norm) -> Float32Array:
    """x (T, heads, head_dim), each head normalised by itself."""
    return norm(x.reshape(-1, x.shape[2])).reshape(x.shape)


def largest_scores(
    q: Float32Array,
    cache: KeyValueCache,
    place: int,
    bias: Float32Array | None = None,
    cap: float | None = None,
) -> Float32Array:
    """q (T, heads, width), scaled, of the tokens at ``place`` of a cache and after -> their largest
    scores before the softmax, of each head (T, heads).

    bias, cap  as ``kernels.attention`` has them
    """
    n, heads, _ = q.shape
    group = heads // len(cache.keys)
    seen = np.arange(place + n) <= place + np.arange(n)[:, None]  # (T, place + T)
    if cache.window is not None:
        seen &= np.arange(place + n) > place + np.arange(n)[:, None] - cache.window
    largest = np.empty((n, heads), dtype=np.float32)
    for head in range(heads):
        raw = cache.keys[head // group, : place + n].view(np.uint8)
        # By kernels, whose sums have one order everywhere, and in float32, as attention is.
        keys = FORMATS["f32"].encode(cache.number_format.decode(raw))
        matrix = kernels.Matrix(keys, cache.width, FORMATS["f32"])
        scores = kernels.linear(np.ascontiguousarray(q[:, head]), matrix)  # (T, place + T)
        if bias is not None:
            scores += bias[head, : place + n]
        if cap is not None:
            kernels.activate(scores, "cap", cap)
        largest[:, head] = np.where(seen, scores, -np.inf).max(axis=1)
    return largest
