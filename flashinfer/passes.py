"""Passes of the model over the next tokens of some texts, which leave nothing half done."""

from collections.abc import Callable, Sequence

import numpy as np

from flashinfer.formats.arrays import Float32Array
from flashinfer.paper.flash import Flash
from flashinfer.paper.selection import Tokens
from flashinfer.transformer.decoder import Decoder
from flashinfer.transformer.kv_flash import KeyValueFile
from flashinfer.transformer.text import Part, Text, rows_of


class Passes:
    """Runs a decoder, and keeps the texts in step with it.

    kv_file  keys and values on flash, or None
    chunk  tokens that go through a layer together, at most
    token  tokens ever processed; the neuron caches count by these
    """

    def __init__(
        self, decoder: Decoder, flash: Flash, kv_file: KeyValueFile | None, chunk: int
    ) -> None:
        self.decoder, self.flash, self.kv_file, self.chunk = decoder, flash, kv_file, chunk
        self.token = 0

    def __call__(
        self,
        parts: Sequence[Part],
        sure: int | None = None,
        progress: Callable[[float], None] = lambda done: None,
    ) -> Float32Array:
        """The next tokens of some texts, T in all -> hidden states after the last layer
        (T, d_model).

        sure      how many of them, the first ones, belong to the text; the others are drafts, until
                  ``settle``; None: all
        progress  is called with the share of the layers that is done
        """
        for part in parts:
            self._recall(part.text)
        total = sum(len(part.ids) for part in parts)
        tokens = Tokens(self.token, total if sure is None else sure)
        try:
            if self.kv_file is not None:
                layers = range(len(self.decoder.layers))
                self.kv_file.begin(rows for layer in layers for rows in rows_of(parts, layer))
            h = self.decoder(parts, tokens, progress)
        except BaseException:
            self.flash.settle()
            if self.kv_file is not None:
                self.kv_file.abandon()
            self.decoder.abandon()
            raise
        for part in parts:
            part.text.ids += part.ids.tolist()
        self.token += total
        return h

    def _recall(self, text: Text) -> None:
        """Process a text's tokens again where layers have moved past what the next one sees: after
        a failure, or where many tokens were forgotten."""
        if text.holds(text.position):
            return
        ids, text.ids, text.incomplete = text.ids, [], False
        try:
            for first in range(0, len(ids), self.chunk):
                self([Part(text, np.array(ids[first : first + self.chunk]))])
        except BaseException:
            text.ids, text.incomplete = ids, True
            raise

    def settle(self, text: Text, drafted: int, accepted: int) -> None:
        """Forget those of the last pass's drafted tokens that were wrong: all but the first
        ``accepted``. The neuron caches learn what the others used."""
        wrong = drafted - accepted
        self.decoder.settle(1 + accepted)
        del text.ids[text.position - wrong :]
        self.token -= wrong

    def counters(self) -> tuple[int, int, int, int, int]:
        """(bytes read, of them streamed, reads of the others, hits, misses) since the opening."""
        caches = [layer.feed_forward.store.cache for layer in self.decoder.layers]
        keys_and_values = 0 if self.kv_file is None else self.kv_file.flash.bytes_read
        return (
            self.flash.bytes_read + keys_and_values,
            self.flash.bytes_streamed + keys_and_values,
            self.flash.reads,
            sum(cache.hits for cache in caches),
            sum(cache.misses for cache in caches),
        )
