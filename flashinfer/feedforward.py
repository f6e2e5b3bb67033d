"""The paper: predict -> look up -> read -> compute."""

import itertools
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np

from flashinfer import kernels
from flashinfer.formats.errors import UserError
from flashinfer.neuron_cache import UNLIMITED
from flashinfer.predictor import Selection

# A prompt's neurons together near the whole layer. Reading all of it in large pieces is then
# faster than reading most of it in small ones.
STREAM_SHARE = 0.3
APART_BYTES = 1 << 20  # of units in DRAM: worth computing while the others are being read
WAVE_BYTES = 8 << 20  # of large units, read while as many are computed


class FeedForward:
    """A layer's FFN, its bundles on flash: y = down(a) + down_bias, where a neuron's

        a_i = activation(up_i . x + up_bias_i), or where the model is gated
        a_i = activation(gate_i . x + gate_bias_i) * (up_i . x + up_bias_i)

    What is read and kept as one is a unit: a neuron, or in a mixture of experts an expert, whose
    neurons lie side by side (or a neuron there, too, where predictors tell them apart).

    config     ModelConfig
    bundles    StoredTensor, a row a neuron: [up_i | down_i], or [gate_i | up_i | down_i]
    biases     {"gate", "up": (d_ffn,), "down": (d_model,) or, of experts, (experts, d_model)
               float32, or None}
    predictor  a Predictor, Router or RoutedPredictor: which units to use; None: all of them
    cache      NeuronCache for the units kept in DRAM
    buffer     uint8 memory that tiles are streamed through
    shared     a SharedExpert that every token uses besides, or None
    """

    def __init__(self, config, bundles, biases, predictor, cache, flash, buffer, shared=None):
        self.config, self.bundles, self.biases = config, bundles, biases
        self.predictor, self.cache, self.flash, self.buffer = predictor, cache, flash, buffer
        self.shared = shared
        self.format = bundles.format
        self.first = "gate" if config.gated else "up"  # what decides whether a neuron is silent
        self.width = self.format.row_bytes(config.hidden_size)  # bytes of each part of a bundle
        self.down_at = self.width * (config.parts - 1)
        self.inside = np.arange(config.unit_neurons) * bundles.row_bytes  # a unit's neurons
        self.units = replace(
            bundles, rows=config.units, columns=bundles.columns * config.unit_neurons
        )
        self.cut = None  # ("cats", 0.1): what a model that has no silent neurons takes as silent
        self.following = None  # the StoredTensor that is streamed next, where this one always is
        self.whole_rows = None  # (units, neurons of each): where they begin, once all are there
        self.share_ahead = 1.0  # of a guess, the surest first, that is read ahead
        self.ahead = None  # reads begun before their token, and the units they are for

    def __call__(self, x, token, residual=None, meanwhile=lambda: None):
        """x (T, d_model) float32, normalised, and before that; token: number of the first ->
        (T, d_model).

        meanwhile  called once, when this layer's own reads are on their way
        """
        y = np.zeros_like(x) if self.shared is None else self.shared(x)
        if self.predictor is None:
            selection = Selection.everything(self.bundles.rows, len(x))
        else:
            selection = self.predictor.select(x, residual)
            if self.whole_rows is None:
                self.cache.priority.note(selection, token)
        if len(x) > 1 or not self.cache.leaves_guesses(selection.units):
            self._finish_reading_ahead()
        if self.cache.borrowed:
            self.cache.empty()
        if self.whole_rows is not None:
            meanwhile()
            self.cache.hits += len(selection.units)
            rows = self.whole_rows[selection.units]
            self._add(self.cache.memory, rows, x, selection, y, self.width * self.bundles.rows)
        elif self._streams(selection, len(x)):
            meanwhile()
            self._compute_streamed(x, selection, token, y)
        elif len(selection.units) <= self.cache.capacity and not self._one_by_one(selection):
            self._compute_cached(x, selection, token, y, meanwhile)
        else:
            meanwhile()
            self._compute_in_waves(x, selection, token, y)
        if self.biases["down"] is not None:
            self._add_bias(selection, y)
        return y

    @property
    def stays_whole(self):
        """Whether every unit has a row, and keeps it."""
        cache = self.cache
        whole = cache.capacity == self.units.rows and cache.window == UNLIMITED
        return whole and not cache.borrowed

    def fill(self, progress=lambda nbytes: None):
        """Bring the whole layer into the cache's memory, which must have a row for every unit.

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
        self.whole_rows = (np.arange(n, dtype=np.int64) * width).reshape(self.units.rows, -1)

    def hottest(self, uses):
        """The units used most, as many as the cache has rows for, ascending."""
        order = np.argsort(-np.asarray(uses), kind="stable")[: self.cache.capacity]
        return np.sort(order[np.asarray(uses)[order] > 0]).astype(np.int32)

    def warm(self, uses, progress=lambda nbytes: None):
        """Begin with the hottest units in the cache; uses (units,): how often each is used."""
        self.cache.priority.expect(uses)
        units = self.hottest(uses)
        slots, _ = self.cache.place(units, 0)
        self.cache.misses = 0
        step = max(1, WAVE_BYTES // self.cache.stride)
        for first in range(0, len(units), step):
            part = units[first : first + step]
            try:
                self._wait(self._submit(part, slots[first : first + step]), part)
            except BaseException:
                self.cache.forget(units[first:])
                raise
            progress(len(part) * self.units.row_bytes)

    def read_ahead(self, x, token, residual):
        """Begin to read what the token will probably need (beyond the paper).

        x, residual (1, d_model): this layer's input, after its norm and before, as it would be if
        the layers still to come before it added nothing. The guess costs bandwidth where it is
        wrong, and never changes a result.
        """
        cache = self.cache
        if self.predictor is None or self.whole_rows is not None or cache.borrowed:
            return
        pays = self.share_ahead > 0 and cache.guesses_pay
        if not (pays and self.predictor.in_dram):  # it is streamed in its turn, not twice
            return
        units, kept = self.predictor.early(x, residual, self.share_ahead)
        if max(len(units), self.config.experts_per_token) > cache.capacity:
            return
        missing, slots = cache.place_ahead(units, kept, token)
        if len(missing):
            self.ahead = self._submit(missing, slots), missing

    def _finish_reading_ahead(self):
        if self.ahead is None:
            return
        (reads, units), self.ahead = self.ahead, None
        self._wait(reads, units)

    def forget_ahead(self):
        """Drop what was read ahead for a token that will not come."""
        if self.ahead is None:
            return
        (reads, units), self.ahead = self.ahead, None
        with suppress(UserError):
            self.flash.wait(reads)
        self.cache.forget(units)

    def _submit(self, units, slots):
        """Begin to read units into their rows of the cache."""
        offsets, lengths, _ = self._spans(units)
        return self.flash.submit(
            offsets, lengths, self.cache.memory, slots * np.int64(self.cache.stride)
        )

    def _finish(self, reads):
        """Until reads are done, where there are any."""
        if reads is not None:
            self.flash.wait(reads)

    def _wait(self, reads, units):
        """Until the units' rows are read."""
        try:
            self.flash.wait(reads)
        except BaseException:
            self.cache.forget(units)  # no half-read row is ever used
            raise

    def _streams(self, selection, n_tokens):
        if self.predictor is None:
            return True
        if n_tokens == 1 or self.config.unit_neurons > 1:
            return False
        missing = np.count_nonzero(self.cache.slot_of[selection.units] < 0)
        return missing > STREAM_SHARE * self.units.rows

    def _compute_cached(self, x, selection, token, y, meanwhile):
        """Through the cache, which has rows for all: what is there while the others are read."""
        units = selection.units
        slots, misses = self.cache.place(units, token + len(x) - 1)
        late = np.zeros(len(units), dtype=bool)
        late[misses] = True
        rows = self._rows(units, slots)
        try:
            reads = self._submit(units[misses], slots[misses]) if len(misses) else None
            meanwhile()
            a = self._overlapping(x, selection, rows, late, reads)
        except BaseException:
            self.cache.forget(units[misses])  # no half-read row is ever used
            raise
        self._add_down(self.cache.memory, rows.ravel() + self.down_at, a, selection, y)
        self.cache.used_at(slots, token + selection.last)

    def _overlapping(self, x, selection, rows, late, reads):
        """``activations``: of the units in DRAM first, then of those that were read ahead, then
        of the ``late`` ones (bool), which ``reads`` bring."""
        units, worth = selection.units, APART_BYTES / self.cache.stride
        n_there = len(units) - np.count_nonzero(late)
        n_early = self.cache.on_their_way if self.ahead is not None else 0
        several = selection.indptr is not None
        if several or (n_there - n_early < worth and (reads is None or n_there < worth)):
            self._finish_reading_ahead()  # too few of each kind for calls of their own
            self._finish(reads)
            neurons, whose = self._neurons(units), (selection.indptr, selection.tokens)
            return self.activations(self.cache.memory, rows.ravel(), x, neurons, *whose)
        early = np.zeros_like(late)
        if self.ahead is not None:
            early = np.isin(units, self.ahead[1], assume_unique=True)
        a = np.empty((*rows.shape, len(x)), dtype=np.float32)  # (units, neurons of each, T)
        there = ~(early | late)
        for which, wait in (
            (there, None),
            (early, self._finish_reading_ahead),
            (late, partial(self._finish, reads)),
        ):
            if wait is not None:
                wait()
            there = there | which
            n = np.count_nonzero(there)
            if n == 0 or (which is not late and n < worth):
                continue
            neurons = self._neurons(units[there])
            part = self.activations(self.cache.memory, rows[there].ravel(), x, neurons)
            a[there] = part.reshape(-1, *a.shape[1:])
            there = np.zeros_like(late)
        return a.reshape(-1, len(x))

    def _one_by_one(self, selection):
        """Large units of several tokens: each is multiplied with its own tokens only."""
        return self.config.unit_neurons > 1 and selection.indptr is not None

    def _compute_in_waves(self, x, selection, token, y):
        """Through fewer rows than are needed, or large units: one wave of them is read while the
        one before it is computed, where there are rows for two."""
        cache, now = self.cache, token + len(x) - 1
        size = max(1, cache.capacity // 2)
        if self.config.unit_neurons > 1:
            size = min(size, max(1, WAVE_BYTES // cache.stride))
        overlap = 2 * size <= cache.capacity
        waves = [selection.part(i, i + size) for i in range(0, len(selection.units), size)]
        none = np.empty(0, dtype=np.int32)
        _, coming, reads, missing = self._begin_wave(waves[0], none, now)
        for wave, following in itertools.zip_longest(waves, waves[1:]):
            self._wait(reads, missing)
            slots, missing = coming, none
            if following is not None and overlap:
                slots, coming, reads, missing = self._begin_wave(following, wave.units, now)
            try:
                self._add(cache.memory, self._rows(wave.units, slots), x, wave, y, self.width)
            except BaseException:
                cache.forget(missing)
                raise
            cache.used_at(slots, token + wave.last)
            if following is not None and not overlap:
                _, coming, reads, missing = self._begin_wave(following, none, now)

    def _begin_wave(self, wave, held, now):
        """(rows of the units held, rows of the wave's, reads begun, units that they are for)"""
        units = np.concatenate([held, wave.units])
        slots, misses = self.cache.place(units, now)
        self.cache.hits -= len(held)
        reads = self._submit(units[misses], slots[misses])
        return slots[: len(held)], slots[len(held) :], reads, units[misses]

    def _rows(self, units, slots):
        """Where in the cache's memory each neuron of these units begins: (units, neurons)."""
        _, _, skips = self._spans(units)
        return (slots * np.int64(self.cache.stride) + skips)[:, None] + self.inside

    def _neurons(self, units):
        n = self.config.unit_neurons
        return units if n == 1 else (units[:, None] * n + np.arange(n)).ravel()

    def _add(self, memory, rows, x, part, y, apart):
        """y += down(activations) of the units of ``part``, whose neurons begin at ``rows`` (units,
        neurons) of memory; apart as in ``activations``."""
        down = rows + apart * (self.config.parts - 1)
        if not self._one_by_one(part):
            neurons = self._neurons(part.units)
            a = self.activations(memory, rows.ravel(), x, neurons, part.indptr, part.tokens, apart)
            self._add_down(memory, down.ravel(), a, part, y)
            return
        for i, (begin, end) in enumerate(itertools.pairwise(part.indptr)):
            tokens = part.tokens[begin:end]
            neurons, its_y = self._neurons(part.units[i : i + 1]), y[tokens]
            a = self.activations(memory, rows[i], x[tokens], neurons, apart=apart)
            a *= part.weights[begin:end]
            kernels.sparse_down(memory, down[i], self.format, a, its_y)
            y[tokens] = its_y

    def _add_bias(self, selection, y):
        """y += the down projection's bias, of experts by their weights."""
        bias, indptr = self.biases["down"], selection.indptr
        if not self.config.experts:
            y += bias
            return
        for i, unit in enumerate(selection.units):
            pairs = slice(i, i + 1) if indptr is None else slice(indptr[i], indptr[i + 1])
            tokens = slice(None) if indptr is None else selection.tokens[pairs]
            y[tokens] += selection.weights[pairs, None] * bias[unit]

    def _add_down(self, memory, rows, a, part, y):
        """y += down(a), a as ``activations`` gives it, for rows of the down projection."""
        if part.weights is not None:
            a = a.reshape(len(part.weights), -1) * part.weights[:, None]
            a = a.reshape(-1, 1) if part.indptr is None else a.ravel()
        kernels.sparse_down(memory, rows, self.format, a, y, part.indptr, part.tokens)

    def activations(self, memory, rows, x, neurons, indptr=None, tokens=None, apart=None):
        """What ``neurons``, whose first parts begin at ``rows``, give the down projection.

        x (T, d_model) -> (n, T), or with indptr and tokens as ``kernels.sparse_up``; apart: bytes
        from each part of a neuron to its next, which in a bundle follows at once.
        """
        config, (method, cut) = self.config, self.cut or (None, 0.0)
        a = self.products(self.first, memory, rows, x, neurons, indptr, tokens)
        shut = a <= cut if method == "threshold" else None
        if config.limit:
            np.minimum(a, config.limit, out=a)
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
            a[open_] *= self._up(self.products("up", memory, rows[open_], x, neurons[open_]))
        else:
            a *= self._up(self.products("up", memory, rows, x, neurons, indptr, tokens))

    def products(self, part, memory, rows, x, neurons, indptr=None, tokens=None):
        """part . x + its bias, for the "gate" or "up" of ``neurons``; as ``activations``."""
        bias = self.biases[part]
        bias = None if bias is None else bias[neurons]
        return kernels.sparse_up(memory, rows, self.format, x, bias, indptr, tokens)

    def _up(self, up):
        """What a gate is multiplied with, of up . x + its bias."""
        if self.config.limit:
            np.clip(up, -self.config.limit, self.config.limit, out=up)
            up += 1
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
            begin, end = np.searchsorted(selection.units, (first, stop))
            part = selection.part(begin, end)
            self._add(memory, starts[part.units - first, None], x, part, y, self.width)
            self._copy_kept(kept, slots, first, stop, memory, starts)

    def _keep(self, selection, now, token):
        """Rows for those neurons that the cache would hold, had the tokens come one by one."""
        cache = self.cache
        used_at = token + selection.last.astype(np.int64)
        kept = used_at > now - cache.window
        if self.predictor is None or cache.capacity == 0:
            kept[:] = False
        else:
            kept &= cache.affords(selection.units)
        hits, misses = cache.hits, cache.misses
        neurons = selection.units[kept]
        slots, _ = cache.place(neurons, now) if len(neurons) else (neurons, neurons)
        cache.hits, cache.misses = hits, misses + len(selection.units)
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

    def _spans(self, units):
        return self.flash.row_spans(self.units, units.astype(np.int64))
