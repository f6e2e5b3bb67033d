"""The paper: predict -> look up -> read -> compute."""

from contextlib import suppress

import numpy as np

from flashinfer import kernels
from flashinfer.formats.errors import UserError
from flashinfer.neuron_cache import UNLIMITED
from flashinfer.predictor import Selection

# A prompt's neurons together near the whole layer. Reading all of it in large pieces is then
# faster than reading most of it in small ones.
STREAM_SHARE = 0.3


class FeedForward:
    """A layer's FFN, its bundles on flash: y = down(a) + down_bias, where a neuron's

        a_i = activation(up_i . x + up_bias_i), or where the model is gated
        a_i = activation(gate_i . x + gate_bias_i) * (up_i . x + up_bias_i)

    config     ModelConfig
    bundles    StoredTensor, a row a neuron: [up_i | down_i], or [gate_i | up_i | down_i]
    biases     {"gate", "up": (d_ffn,), "down": (d_model,) float32, or None}
    predictor  which neurons to use; None: all of them
    cache      NeuronCache for the rows kept in DRAM
    buffer     uint8 memory that tiles are streamed through
    """

    def __init__(self, config, bundles, biases, predictor, cache, flash, buffer):
        self.config, self.bundles, self.biases = config, bundles, biases
        self.predictor, self.cache, self.flash, self.buffer = predictor, cache, flash, buffer
        self.format = bundles.format
        self.first = "gate" if config.gated else "up"  # what decides whether a neuron is silent
        self.width = self.format.row_bytes(config.hidden_size)  # bytes of each part of a bundle
        self.down_at = self.width * (config.parts - 1)
        self.cut = None  # ("cats", 0.1): what a model that has no silent neurons takes as silent
        self.following = None  # the StoredTensor that is streamed next, where this one always is
        self.whole_rows = None  # where each neuron begins in memory, once all are there for good
        self.ahead = None  # reads begun before their token, and the neurons they are for

    def __call__(self, x, token, residual=None):
        """x (T, d_model) float32, normalised, and before that; token: number of the first ->
        (T, d_model)."""
        self._finish_reading_ahead()
        if self.predictor is None:
            selection = Selection.everything(self.bundles.rows, len(x))
        else:
            selection = Selection.of_scores(self.predictor.scores(x, residual))
            if self.whole_rows is None:
                self.cache.priority.note(selection, token)
        y = np.zeros_like(x)
        if self.whole_rows is not None:
            self.cache.hits += len(selection.neurons)
            rows = self.whole_rows[selection.neurons]
            self._add(self.cache.memory, rows, x, selection, y, self.width * self.bundles.rows)
        elif self._streams(selection, len(x)):
            self._compute_streamed(x, selection, token, y)
        else:
            self._compute_cached(x, selection, token, y)
        if self.biases["down"] is not None:
            y += self.biases["down"]
        return y

    @property
    def stays_whole(self):
        """Whether every neuron has a row, and keeps it."""
        return self.cache.capacity == self.bundles.rows and self.cache.window == UNLIMITED

    def fill(self, progress=lambda nbytes: None):
        """Bring the whole layer into the cache's memory, which must have a row for every neuron.

        All gates lie together there, then all ups, then all downs: DRAM gives up to half as much
        again where a product's rows follow each other. Flash wants a neuron's parts together.
        """
        n, width, parts = self.bundles.rows, self.width, self.config.parts
        part = np.arange(parts)[:, None]
        for first, stop, memory, starts in self.flash.stream(self.bundles, self.buffer):
            places = part * n * width + np.arange(first, stop) * width  # (parts, neurons)
            kernels.copy_rows(
                memory, (starts + part * width).ravel(), self.cache.memory, places.ravel(),
                np.full(places.size, width),
            )  # fmt: skip
            progress((stop - first) * self.bundles.row_bytes)
        self.whole_rows = np.arange(n, dtype=np.int64) * width

    def read_ahead(self, x, token, residual):
        """Begin to read what the token will probably need (beyond the paper).

        x, residual (1, d_model): this layer's input, after its norm and before, as it would be if
        the layers still to come before it added nothing. The guess costs bandwidth where it is
        wrong, and never changes a result.
        """
        cache = self.cache
        if self.predictor is None or self.whole_rows is not None or not cache.guesses_pay:
            return
        if not self.predictor.in_dram:  # it is streamed in its turn, and not twice
            return
        neurons = Selection.of_scores(self.predictor.scores(x, residual)).neurons
        if len(neurons) > cache.capacity:
            return
        slots, misses = cache.place_ahead(neurons, token)
        if len(misses):
            self.ahead = self._submit(neurons[misses], slots[misses]), neurons[misses]

    def _finish_reading_ahead(self):
        if self.ahead is None:
            return
        (reads, neurons), self.ahead = self.ahead, None
        try:
            self.flash.wait(reads)
        except BaseException:
            self.cache.forget(neurons)  # no half-read row is ever used
            raise

    def forget_ahead(self):
        """Drop what was read ahead for a token that will not come."""
        if self.ahead is None:
            return
        (reads, neurons), self.ahead = self.ahead, None
        with suppress(UserError):
            self.flash.wait(reads)
        self.cache.forget(neurons)

    def _submit(self, neurons, slots):
        """Begin to read neurons into their rows of the cache."""
        offsets, lengths, _ = self._spans(neurons)
        return self.flash.submit(
            offsets, lengths, self.cache.memory, slots * np.int64(self.cache.stride)
        )

    def _streams(self, selection, n_tokens):
        if self.predictor is None:
            return True
        missing = np.count_nonzero(self.cache.slot_of[selection.neurons] < 0)
        return n_tokens > 1 and missing > STREAM_SHARE * self.bundles.rows

    def _compute_cached(self, x, selection, token, y):
        """Through the neuron cache, in waves where it holds fewer rows than are needed."""
        capacity = self.cache.capacity
        waves = len(selection.neurons) > capacity
        for first in range(0, len(selection.neurons), capacity):
            part = selection.part(first, first + capacity) if waves else selection
            slots, misses = self.cache.place(part.neurons, token + len(x) - 1)
            _, _, skips = self._spans(part.neurons)
            rows = slots * np.int64(self.cache.stride) + skips
            reads = self._submit(part.neurons[misses], slots[misses])
            try:
                a = self._activations(x, part, rows, misses, reads)
            except BaseException:
                self.cache.forget(part.neurons[misses])  # no half-read row is ever used
                raise
            kernels.sparse_down(
                self.cache.memory, rows + self.down_at, self.format, a, y, part.indptr, part.tokens
            )
            self.cache.used_at(slots, token + part.last)

    def _activations(self, x, part, rows, misses, reads):
        """``activations``; of rows already in DRAM while the others are being read."""
        memory, neurons = self.cache.memory, part.neurons
        if part.indptr is not None or not len(misses) or len(misses) == len(rows):
            self.flash.wait(reads)
            return self.activations(memory, rows, x, neurons, part.indptr, part.tokens)
        a = np.empty((len(rows), len(x)), dtype=np.float32)
        hits = np.ones(len(rows), dtype=bool)
        hits[misses] = False
        a[hits] = self.activations(memory, rows[hits], x, neurons[hits])
        self.flash.wait(reads)
        a[misses] = self.activations(memory, rows[misses], x, neurons[misses])
        return a

    def _add(self, memory, rows, x, part, y, apart):
        """y += down(activations) for rows that are all in memory; apart as in ``activations``."""
        indptr, tokens = part.indptr, part.tokens
        a = self.activations(memory, rows, x, part.neurons, indptr, tokens, apart)
        down = rows + apart * (self.config.parts - 1)
        kernels.sparse_down(memory, down, self.format, a, y, indptr, tokens)

    def activations(self, memory, rows, x, neurons, indptr=None, tokens=None, apart=None):
        """What ``neurons``, whose first parts begin at ``rows``, give the down projection.

        x (T, d_model) -> (n, T), or with indptr and tokens as ``kernels.sparse_up``; apart: bytes
        from each part of a neuron to its next, which in a bundle follows at once.
        """
        config, (method, cut) = self.config, self.cut or (None, 0.0)
        a = self.products(self.first, memory, rows, x, neurons, indptr, tokens)
        shut = a <= cut if method == "threshold" else None
        kernels.activate(a, config.activation, config.threshold)
        if method == "cats":
            shut = np.abs(a) <= cut
        if shut is not None:
            a[shut] = 0
        if config.gated:
            self._multiply_up(a, memory, rows + (apart or self.width), x, neurons, indptr, tokens)
        if method == "teal":
            a[np.abs(a) <= cut] = 0
        return a

    def _multiply_up(self, a, memory, rows, x, neurons, indptr, tokens):
        if len(x) == 1 and (self.config.sparse or self.cut):  # a gate that is shut needs no up
            open_ = np.flatnonzero(a)
            a[open_] *= self._relu(self.products("up", memory, rows[open_], x, neurons[open_]))
        else:
            a *= self._relu(self.products("up", memory, rows, x, neurons, indptr, tokens))

    def products(self, part, memory, rows, x, neurons, indptr=None, tokens=None):
        """part . x + its bias, for the "gate" or "up" of ``neurons``; as ``activations``."""
        bias = self.biases[part]
        bias = None if bias is None else bias[neurons]
        return kernels.sparse_up(memory, rows, self.format, x, bias, indptr, tokens)

    def _relu(self, up):
        return np.maximum(up, 0, out=up) if self.config.up_relu else up

    def _compute_streamed(self, x, selection, token, y):
        """The whole layer once, in large sequential reads; the last tokens' neurons are kept."""
        kept, slots = self._keep(selection, token + len(x) - 1, token)
        try:
            self._compute_tiles(x, selection, y, kept, slots)
        except BaseException:
            self.cache.forget(kept)  # their rows may not have been filled
            raise

    def _compute_tiles(self, x, selection, y, kept, slots):
        tiles = self.flash.stream(self.bundles, self.buffer, self.following)
        for first, stop, memory, starts in tiles:
            begin, end = np.searchsorted(selection.neurons, (first, stop))
            part = selection.part(begin, end)
            self._add(memory, starts[part.neurons - first], x, part, y, self.width)
            self._copy_kept(kept, slots, first, stop, memory, starts)

    def _keep(self, selection, now, token):
        """Rows for those neurons that the cache would hold, had the tokens come one by one."""
        cache = self.cache
        used_at = token + selection.last.astype(np.int64)
        kept = used_at > now - cache.window
        if self.predictor is None or cache.capacity == 0:
            kept[:] = False
        else:
            kept &= cache.affords(selection.neurons)
        hits, misses = cache.hits, cache.misses
        neurons = selection.neurons[kept]
        slots, _ = cache.place(neurons, now) if len(neurons) else (neurons, neurons)
        cache.hits, cache.misses = hits, misses + len(selection.neurons)
        cache.used_at(slots, used_at[kept])
        return neurons, slots

    def _copy_kept(self, kept, slots, first, stop, memory, starts):
        begin, end = np.searchsorted(kept, (first, stop))
        if begin == end:
            return
        neurons = kept[begin:end]
        _, _, skips = self._spans(neurons)
        kernels.copy_rows(
            memory, starts[neurons - first], self.cache.memory,
            slots[begin:end] * np.int64(self.cache.stride) + skips,
            np.full(len(neurons), self.bundles.row_bytes),
        )  # fmt: skip

    def _spans(self, neurons):
        return self.flash.row_spans(self.bundles, neurons.astype(np.int64))
