"""A text on its way through a model, all of its tokens through one layer before the next.

So each layer's weights are read once or thrice, and what is kept in DRAM is one layer's inputs,
whatever the model's size.
"""

from collections.abc import Iterator

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float32Array, Int64Array
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import UserError
from flashinfer.model import Model
from flashinfer.paper.router import Router
from flashinfer.transformer.layer import Layer
from flashinfer.transformer.text import MOST_IN_PASS, Rows


def state_numbers(config: ModelConfig) -> int:
    """Numbers of a token's states, inputs and outputs that are in DRAM together: those of one
    layer, and what all layers are given or lend."""
    lent = {layer.mixer.memory_of for layer in config.layers} - {None}
    given = config.per_layer_width + config.hidden_size if config.per_layer_rows else 0
    return (6 + len(lent)) * config.hidden_size + given


class TextStates:
    """The hidden states of a text's N tokens, which attend to each other in sequences.

    h       (N, d_model), after the layers that are done
    given   of each sequence what its tokens give all layers, or None
    lent    {layer: (N, d_model)}: the hidden states before a layer whose memory later ones read,
            which holds one sequence only
    starts  where each sequence begins, ascending, 0 first
    before  (N, d_model), before the layer that ``attend`` was given, where its router reads that;
            else None
    """

    def __init__(self, model: Model, ids: AnyArray, sequence: int) -> None:
        if model.config.hidden_states > 1:
            raise UserError(
                f"{model.bundle.path}: tokens have several hidden states, which are not supported "
                "where all of a text goes through one layer before the next"
            )
        self.model = model
        self.starts: Int64Array = np.arange(0, len(ids), sequence)
        self.before: Float32Array | None = None
        self.spans = [slice(start, start + sequence) for start in self.starts]
        self.h: Float32Array = np.concatenate(
            [model.decoder.embed(ids[span], np.arange(len(ids[span]))) for span in self.spans]
        )
        self.given = [model.decoder.given(ids[span], self.h[span].copy()) for span in self.spans]
        self.lent: dict[int, Float32Array] = {}

    def attend(
        self, layer: Layer, residual: bool = True
    ) -> tuple[Float32Array, Float32Array | None]:
        """Through a layer's attention; its FFN's input, after its norm and, where ``residual`` is
        asked for, before it, else None: (N, d_model) each."""
        x = np.empty_like(self.h)
        unnormed = np.empty_like(self.h) if residual else None
        self.before = None
        router: Router | None = layer.feed_forward.router
        if router is not None and router.config.early:
            self.before = self.h.copy()
            router.choose_early(self.before)
        number = next(i for i, other in enumerate(self.model.layers) if other is layer)
        lends = layer.config.mixer.memory_of
        if any(other.config.mixer.memory_of == number for other in self.model.layers):
            self.lent[number] = self.h.copy()
        for piece, start in self._pieces():
            if lends is not None:
                self._attend(lends, self.lent[lends][piece], start)
            self.h[piece], x[piece], its_residual = self._attend(number, self.h[piece], start)
            if unnormed is not None:
                unnormed[piece] = its_residual
        return x, unnormed

    def _pieces(self) -> Iterator[tuple[slice, int]]:
        """Yield (tokens that may share a pass, the position of the first), of each sequence."""
        for span in self.spans:
            end = min(span.stop, len(self.h))
            for first in range(span.start, end, MOST_IN_PASS):
                yield slice(first, min(first + MOST_IN_PASS, end)), first - span.start

    def _attend(
        self, number: int, h: Float32Array, start: int
    ) -> tuple[Float32Array, Float32Array, Float32Array]:
        """``Layer.attend`` of tokens at ``start`` of a sequence, h (n, d_model)."""
        rows = Rows(self.model.text.caches[number], 0, len(h), start)
        return self.model.layers[number].attend(h, [rows])

    def early_input(
        self, number: int, last: int | None = None
    ) -> tuple[Float32Array, Float32Array] | None:
        """What a layer's FFN would read if the layers still to come before it added nothing, of the
        ``last`` tokens: after its norm and before, or None where there is no such layer. Either
        may be ``h`` itself, which will change."""
        if number == len(self.model.layers):
            return None
        h = self.h if last is None else self.h[-last:]
        return self.model.layers[number].early_input(h)

    def add(self, layer: Layer, y: Float32Array) -> None:
        """y (N, d_model), the FFN's output, and the layer is done."""
        for span, given in zip(self.spans, self.given, strict=True):
            self.h[span] = layer.add(self.h[span], y[span], given)
