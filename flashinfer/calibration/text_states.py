"""A text on its way through a model, all of its tokens through one layer before the next.

So each layer's weights are read once or thrice, and what is kept in DRAM is one layer's inputs,
whatever the model's size.
"""

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float32Array, Int64Array
from flashinfer.model import Model
from flashinfer.paper.router import Router
from flashinfer.transformer.layer import Layer
from flashinfer.transformer.text import Rows


class TextStates:
    """The hidden states of a text's N tokens, which attend to each other in sequences.

    h       (N, d_model), after the layers that are done
    starts  where each sequence begins, ascending, 0 first
    before  (N, d_model), before the layer that ``attend`` was given, where its router reads that;
            else None
    """

    def __init__(self, model: Model, ids: AnyArray, sequence: int) -> None:
        self.model = model
        self.starts: Int64Array = np.arange(0, len(ids), sequence)
        self.before: Float32Array | None = None
        self.spans = [slice(start, start + sequence) for start in self.starts]
        self.h: Float32Array = np.concatenate(
            [model.decoder.embed(ids[span], np.arange(len(ids[span]))) for span in self.spans]
        )

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
        cache = self.model.text.caches[number]
        for span in self.spans:
            rows = Rows(cache, 0, len(self.h[span]), 0)
            self.h[span], x[span], its_residual = layer.attend(self.h[span], [rows])
            if unnormed is not None:
                unnormed[span] = its_residual
        return x, unnormed

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
        for span in self.spans:
            self.h[span] = layer.add(self.h[span], y[span])
