"""The transformer: embed -> layers -> logits. The first file to read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array, Int64Array
from flashinfer.formats.config import ModelConfig
from flashinfer.paper.feedforward import nothing
from flashinfer.paper.interfaces import Tap
from flashinfer.paper.selection import Tokens
from flashinfer.transformer.altup import HiddenStates
from flashinfer.transformer.encoder import MaskedHead, Pooler
from flashinfer.transformer.layer import Layer
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.per_layer_input import Given
from flashinfer.transformer.text import Part, rows_of
from flashinfer.transformer.values import TraceTap
from flashinfer.transformer.weights import Weights


@dataclass
class Decoder:
    """What turns tokens into logits: the layers, and what comes before and after them.

    embed_tokens, embed_positions  a row for each token id, and for each position, or None
    embed_per_layer                a row of each token that layers read parts of, or None
    states                         of a token, where it has several hidden states, or None
    embed_type, embed_norm         (d_model,) to add to each embedding, and a norm behind; or None
    project_in, project_out        to the layers' width and back, where embeddings are narrower
    head, head_bias                from hidden states to logits; an encoder may have no head
    masked_head, pooler            of an encoder, or None: see transformer/encoder.py
    tap     is told intermediate values, see transformer/values.py; None: nobody
    """

    config: ModelConfig
    layers: list[Layer]
    embed_tokens: Weights
    embed_positions: Weights | None
    project_in: Weights | None
    project_out: Weights | None
    final_norm: Norm | None
    head: Weights | None
    head_bias: Float32Array | None
    embed_per_layer: Weights | None = None
    states: HiddenStates | None = None
    embed_type: Float32Array | None = None
    embed_norm: Norm | None = None
    masked_head: MaskedHead | None = None
    pooler: Pooler | None = None
    tap: Tap | None = field(default=None, init=False)

    def __call__(
        self, parts: Sequence[Part], tokens: Tokens, progress: Callable[[float], None]
    ) -> Float32Array:
        """The next tokens of some texts, T in all -> hidden states after the last layer
        (T, d_model).

        tokens    their numbers, by which the neuron caches count
        progress  is called with the share of the layers that is done
        """
        positions = [text.position + np.arange(len(ids)) for text, ids in parts]
        ids = np.concatenate([part.ids for part in parts])  # (T,)
        h = self.embed(ids, np.concatenate(positions))  # (T, d_model)
        if self.tap:
            self.tap(embedded=h)
        given = self.given(ids, h)
        h = h if self.states is None else self.states.begin(h)
        for number, layer in enumerate(self.layers):
            ffn = layer.feed_forward
            reads = ffn.choose_early(h, tokens)
            if reads:
                self._prefetch(number + 1, h, tokens.first)
            h, x, residual = layer.attend(h, rows_of(parts, number))
            prefetch = partial(self._prefetch, number + 1, h, tokens.first)
            y = ffn(x, tokens, residual, meanwhile=nothing if reads else prefetch)
            h = layer.add(h, y, given)
            progress((number + 1) / len(self.layers))
        return h if self.states is None else self.states.end(h)

    def embed(self, ids: Int64Array, positions: Int64Array) -> Float32Array:
        """ids (T,) at these positions (T,) -> (T, d_model)."""
        h = self.embed_tokens.rows(ids)  # (T, embedding_size)
        if self.config.embedding_scale != 1:
            h = h * np.float32(self.config.embedding_scale)
        if self.project_in is not None:
            h = self.project_in.linear(h)
        if self.embed_positions is not None:
            h = h + self.embed_positions.rows(self._position_rows(ids, positions))
        if self.embed_type is not None:
            h = h + self.embed_type
        return h if self.embed_norm is None else self.embed_norm(h)

    def given(self, ids: Int64Array, embedded: Float32Array) -> Given | None:
        """What ids (T,), embedded as (T, d_model), give each layer; None: nothing."""
        if self.embed_per_layer is None:
            return None
        rows = np.where(ids < self.config.per_layer_rows, ids, 0)
        return Given(embedded, self.embed_per_layer.rows(rows))

    def _position_rows(self, ids: Int64Array, positions: Int64Array) -> Int64Array:
        """The rows of ``embed_positions`` of ids (T,) at these positions (T,), which are those of a
        whole text where there is a padding that they do not count."""
        padding = self.config.position_padding
        if padding is None or not (ids == padding).any():
            return positions + self.config.position_offset
        kept = ids != padding
        return np.where(kept, np.cumsum(kept) - 1 + self.config.position_offset, padding)

    def _prefetch(self, number: int, h: Float32Array, token: int) -> None:
        """Guess from h, the layer before it unfinished, what a layer's FFN will use for a token,
        and begin to read it; for several tokens nothing is guessed."""
        if len(h) > 1 or number == len(self.layers):
            return
        layer = self.layers[number]
        ffn, (x, residual) = layer.feed_forward, layer.early_input(h)
        ffn.prefetch.begin(ffn, x, token, residual)

    def logits(self, h: Float32Array) -> Float32Array:
        """h (T, d_model) -> (T, vocab_size)."""
        if self.final_norm is not None:
            h = self.final_norm(h)
            if self.tap:
                self.tap(final_norm=h)
        if self.project_out is not None:
            h = self.project_out.linear(h)
            if self.tap:
                self.tap(projected=h)
        if self.masked_head is not None:
            h = self.masked_head(h)
        if self.head is None:
            raise ValueError("the model has no output head")
        logits = self.head.linear(h, self.head_bias)
        if self.tap:
            self.tap(head=logits)
        if self.config.logit_scale != 1:
            logits *= np.float32(self.config.logit_scale)
        if self.config.logit_cap is not None:
            kernels.activate(logits, "cap", self.config.logit_cap)
        if self.tap:
            self.tap(logits=logits)
        return logits

    def settle(self, kept: int) -> None:
        """Of the last pass's tokens, some of which were drafts, the first ``kept`` belong to the
        text: see FeedForward."""
        for layer in self.layers:
            layer.feed_forward.settle(kept)

    def abandon(self) -> None:
        """After a failure, once no read is in flight: forget what may not have been read."""
        for layer in self.layers:
            layer.feed_forward.abandon()

    def set_tap(self, tap: TraceTap | None, first: int = 0) -> None:
        """Tell ``tap`` what is computed from now on, of tokens from ``first`` on; None: nobody."""
        self.tap = None if tap is None else partial(tap, None, first)
        for number, layer in enumerate(self.layers):
            layer.set_tap(None if tap is None else partial(tap, number, first))
