"""A layer's block for what a token gives this layer alone, beside the hidden state (Gemma 3n)."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.per_layer_input import PerLayerInputConfig
from flashinfer.paper.interfaces import Stream, Tap
from flashinfer.transformer.mixer import Parts
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.weights import Linear


class Given(NamedTuple):
    """What the tokens of a pass give all layers: their embeddings (T, d_model), and their rows of
    ``embed_tokens_per_layer`` (T, numbers of all layers)."""

    embedded: Float32Array
    rows: Float32Array


@dataclass
class PerLayerInput:
    """norm(proj(activation(gate h) * e)), where e is the token's own: see the config.

    context, gate, proj  see PerLayerInputConfig.shapes
    context_norm         of what ``context`` makes of the embedding; after_norm: of the output
    """

    config: PerLayerInputConfig
    context: Linear
    gate: Linear
    proj: Linear
    context_norm: Norm
    after_norm: Norm
    tap: Tap | None = field(default=None, init=False)

    @classmethod
    def made(cls, config: PerLayerInputConfig, parts: Parts) -> "PerLayerInput":
        """The block of a layer."""
        context, gate, proj = (parts.linear(f"per_layer.{name}") for name in config.shapes())
        of_context, after = (
            parts.norm(config.norm, f"per_layer.{name}") for name in ("context_norm", "after_norm")
        )
        return cls(config, context, gate, proj, of_context, after)

    def streams(self) -> tuple[Stream, ...]:
        """Which of its matrices are streamed at every token, in this order."""
        return (*self.context.streams(), *self.gate.streams(), *self.proj.streams())

    def own(self, given: Given) -> Float32Array:
        """What the tokens give this layer: (T, size)."""
        config = self.config
        context = self.context(given.embedded) * np.float32(config.hidden_size**-0.5)
        rows = given.rows[:, config.begin : config.begin + config.size]
        own = self.context_norm(context) + rows * np.float32(math.sqrt(config.size))
        return own * np.float32(math.sqrt(0.5))

    def __call__(self, h: Float32Array, given: Given) -> Float32Array:
        """h (T, d_model), behind the layer's FFN -> what is added to it (T, d_model)."""
        own, gate = self.own(given), self.gate(h)
        if self.tap:
            self.tap(per_layer_own=own, per_layer_gate=gate)
        kernels.activate(gate, self.config.activation, 0.0)
        gate *= own
        y = self.proj(gate)
        if self.tap:
            self.tap(per_layer_read=gate, per_layer=y)
        y = self.after_norm(y)
        if self.tap:
            self.tap(per_layer_norm=y)
        return y
