"""One layer: a mixer of tokens and a feed-forward network, and the norms and sums around them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.layer import LayerConfig
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.interfaces import Stream, Tap
from flashinfer.transformer.altup import AltUp
from flashinfer.transformer.laurel import Laurel
from flashinfer.transformer.mixer import Mixer
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.per_layer_input import Given, PerLayerInput
from flashinfer.transformer.text import Rows


@dataclass
class Layer:
    """A layer. Its two blocks read what their norms give, or (post-norm) their norms read the sums.

    mixer     of its tokens: attention, or what stands in its place
    attention_norm  None: the blocks read the hidden state as it is
    ffn_norm  None: the FFN reads what attention reads, or the hidden state as it is
    attention_after_norm, ffn_after_norm  of a block's output, before it is added, or None
    laurel        a path beside attention, or None
    altup         what is done where a token has several hidden states, or None
    per_layer     the block behind the FFN, or None
    output_scale  (1,): what the layer's output is multiplied with, or None
    """

    config: LayerConfig
    mixer: Mixer[Any]
    feed_forward: FeedForward
    attention_norm: Norm | None = None
    ffn_norm: Norm | None = None
    attention_after_norm: Norm | None = None
    ffn_after_norm: Norm | None = None
    laurel: Laurel | None = None
    altup: AltUp | None = None
    per_layer: PerLayerInput | None = None
    output_scale: Float32Array | None = None
    tap: Tap | None = field(default=None, init=False)

    def attend(
        self, h: Float32Array, texts: Sequence[Rows]
    ) -> tuple[Float32Array, Float32Array, Float32Array]:
        """h (T, d_model), the next tokens of some texts -> (h after attention, the FFN's input,
        that before its norm), each (T, d_model). Of several hidden states h is (T, n, d_model), and
        after attention (T, n + 1, d_model): those predicted, and the active one."""
        if self.altup is None:
            return self._attend(h, texts)
        predicted = self.altup.predicted(h)
        active = np.ascontiguousarray(predicted[:, self.altup.config.active])
        after, x, residual = self._attend(active, texts)
        return np.concatenate([predicted, after[:, None]], axis=1), x, residual

    def _attend(
        self, h: Float32Array, texts: Sequence[Rows]
    ) -> tuple[Float32Array, Float32Array, Float32Array]:
        """The same of one hidden state."""
        if not self.config.norm_before:
            h = self.attention_norm(h + self.mixer(h, texts))
            if self.tap:
                self.tap(attention_norm=h)
            return h, h, h
        x = h if self.attention_norm is None else self.attention_norm(h)
        if self.tap:
            self.tap(attention_norm=x)
        y = self.mixer(x, texts)
        if self.attention_after_norm:
            y = self.attention_after_norm(y)
            if self.tap:
                self.tap(attention_after_norm=y)
        after = h + self._scaled(y)
        if self.laurel is not None:
            after = (after + self.laurel(x)) * np.float32(math.sqrt(0.5))
        residual = h if self.config.parallel else after
        if self.config.bare_input:
            x = residual
        elif self.ffn_norm is not None:
            x = self.ffn_norm(residual)
        if self.tap:
            self.tap(attended=after, ffn_norm=x)
        return after, x, residual

    def early_input(self, h: Float32Array) -> tuple[Float32Array, Float32Array]:
        """What the FFN would read, after its norm and before, if the layers still to come before it
        added nothing to h, as another layer's ``attend`` gives it."""
        h = h if self.altup is None else np.ascontiguousarray(h[:, -1])
        norm = self.ffn_norm or self.attention_norm
        return (norm(h) if norm is not None and self.config.norm_before else h), h

    def add(self, h: Float32Array, y: Float32Array, given: Given | None = None) -> Float32Array:
        """h after attention and y, the FFN's output -> the layer's output, each (T, d_model); of
        several hidden states h is as ``attend`` gives it, and the output (T, n, d_model).

        given  by the tokens, where layers have a block for that
        """
        if self.altup is not None:
            return self._add_to_states(self.altup, h, y, given)
        if self.config.ffn.neurons:
            h = self._add_ffn(h, y)
        if self.per_layer is not None and given is not None:
            if self.tap:
                self.tap(ffn_added=h)
            h = h + self.per_layer(h, given)
        if self.output_scale is not None:
            if self.tap:
                self.tap(unscaled=h)
            h = h * self.output_scale
        if self.tap:
            self.tap(output=h)
        return h

    def _add_to_states(
        self, altup: AltUp, h: Float32Array, y: Float32Array, given: Given | None
    ) -> Float32Array:
        """``add`` of several hidden states."""
        active = self._add_ffn(np.ascontiguousarray(h[:, -1]), y)
        if self.tap:
            self.tap(computed=active)
        h = altup.corrected(h[:, :-1], active)
        if self.per_layer is not None and given is not None:
            read = altup.read(h)
            if self.tap:
                self.tap(ffn_added=read)
            h[:, 1:] += self.per_layer(read, given)[:, None]
        if self.tap:
            self.tap(output=h)
        return h

    def _add_ffn(self, h: Float32Array, y: Float32Array) -> Float32Array:
        """h after attention and y, the FFN's output -> h after both, each (T, d_model)."""
        if self.tap:
            self.tap(ffn=y)
        if self.ffn_after_norm:
            y = self.ffn_after_norm(y)
            if self.tap:
                self.tap(ffn_after_norm=y)
        return h + self._scaled(y) if self.config.norm_before else self.ffn_norm(h + y)

    def _scaled(self, y: Float32Array) -> Float32Array:
        """What a block adds to the hidden state."""
        scale = self.config.residual_scale
        return y if scale == 1 else y * np.float32(scale)

    def set_tap(self, tap: Tap | None) -> None:
        """Tell ``tap`` the layer's intermediate values from now on; None: nobody."""
        self.tap = self.mixer.tap = tap
        self.feed_forward.set_tap(tap)
        for part in (self.laurel, self.altup):
            if part is not None:
                part.tap = tap
        if self.per_layer is not None:
            self.per_layer.tap = tap

    def streams(self) -> tuple[Stream, ...]:
        """What is streamed at every token, in this order: each has a ``tensor``, and ``following``
        for the one that is streamed next."""
        beside = () if self.laurel is None else self.laurel.streams()
        behind = () if self.per_layer is None else self.per_layer.streams()
        return (*self.mixer.streams(), *beside, *self.feed_forward.streams(), *behind)
