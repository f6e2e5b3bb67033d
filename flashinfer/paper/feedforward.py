"""The paper: predict -> look up -> read -> compute."""

import itertools
from dataclasses import replace

import numpy as np

from flashinfer import kernels
from flashinfer.paper.neuron_cache import NONE, UNLIMITED
from flashinfer.paper.selection import Selection

# A prompt's neurons together near the whole layer. Reading all of it in large pieces is then
# faster than reading most of it in small ones.
STREAM_SHARE = 0.3
APART_BYTES = 1 << 20  # of units in DRAM: worth computing while the others are being read
WAVE_BYTES = 8 << 20  # of large units, read while as many are computed


class FeedForward:
    """A layer's FFN, its bundles on flash.

    What is read and kept as one is a unit: a neuron, or in a mixture of experts an expert, whose
    neurons lie side by side (or a neuron there, too, where predictors tell them apart).

    neurons    Neurons: what they compute
    bundles    StoredTensor, a row a neuron: [up_i | down_i], or [gate_i | up_i | down_i]
    predictor  a Predictor, Router or RoutedPredictor: which units to use; None: all of them
    cache      NeuronCache for the units kept in DRAM
    buffer     uint8 memory that tiles are streamed through
    shared     a SharedExpert that every token uses besides, or None
    share_ahead  of a guess, the surest first, that is read ahead
    """

    def __init__(
        self, neurons, bundles, predictor, cache, flash, buffer, shared=None, share_ahead=1.0
    ):
        self.neurons, self.config, self.bundles = neurons, neurons.config, bundles
        self.predictor, self.cache, self.flash, self.buffer = predictor, cache, flash, buffer
        self.shared, self.share_ahead = shared, share_ahead
        n = self.config.unit_neurons
        self.units = replace(bundles, rows=self.config.units, columns=bundles.columns * n)
        self.inside = np.arange(n) * bundles.row_bytes  # where a unit's neurons begin in it
        self.following = None  # the StoredTensor that is streamed next, where this one always is
        self.whole_rows = None  # (units, neurons of each): where they begin, once all are there
        self.ahead = None  # reads begun before their token
        self.settled = True  # whether every row that the cache has given is filled

    def __call__(self, x, token, residual=None, meanwhile=lambda: None):
        """x (T, d_model) float32, normalised, and before that; token: number of the first ->
        (T, d_model).

        meanwhile  called once, when this layer's own reads are on their way
        """
        self.settled = False
        y = np.zeros_like(x) if self.shared is None else self.shared(x)
        if self.predictor is None:
            selection = Selection.everything(self.bundles.rows, len(x))
        else:
            selection = self.predictor.select(x, residual)
            if self.whole_rows is None:
                self.cache.priority.note(selection, token)
        if len(x) > 1 or not self.cache.leaves_guesses(selection.units):
            self._wait_ahead()
        if self.cache.borrowed:
            self.cache.empty()
        if self.whole_rows is not None:
            meanwhile()
            self._compute_whole(x, selection, y)
        elif self._streams(selection, len(x)):
            meanwhile()
            self._compute_streamed(x, selection, token, y)
        elif self._fits(selection):
            self._compute_cached(x, selection, token, y, meanwhile)
        else:
            meanwhile()
            self._compute_in_waves(x, selection, token, y)
        self.neurons.add_bias(selection, y)
        self.settled = True
        return y

    def abandon(self):
        """After a failure, once no read is in flight: forget what may not have been read."""
        self.ahead = None
        if not self.settled:
            self.cache.empty()
            self.settled = True

    # ------------------------------------------------------------------ before the first token

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
        n, width, parts = self.bundles.rows, self.neurons.width, self.config.parts
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
        slots, *_ = self.cache.place(units, 0)
        self.cache.misses = 0
        step = max(1, WAVE_BYTES // self.cache.stride)
        for first in range(0, len(units), step):
            part = slice(first, first + step)
            self.flash.wait(self._submit(units[part], slots[part]))
            progress(len(units[part]) * self.units.row_bytes)

    # ------------------------------------------------------------------ ahead of its turn

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
        self.settled = False
        self.ahead = self._submit(*cache.place_ahead(units, kept, token))

    def _wait_ahead(self):
        self._wait(self.ahead)
        self.ahead = None

    # ------------------------------------------------------------------ computing

    def _compute_whole(self, x, selection, y):
        """From DRAM, where all of the layer is."""
        self.cache.hits += len(selection.units)
        apart = self.neurons.width * self.bundles.rows
        rows = self.whole_rows[selection.units]
        self.neurons.add(self.cache.memory, rows, x, selection, y, apart)

    def _fits(self, selection):
        """Whether all units are computed at once, as the cache has rows for them."""
        one_by_one = self.neurons.one_by_one(selection)
        return len(selection.units) <= self.cache.capacity and not one_by_one

    def _compute_cached(self, x, selection, token, y, meanwhile):
        """Through the cache: what is there is computed while the others are read."""
        units = selection.units
        slots, misses, early = self.cache.place(units, token + len(x) - 1)
        rows = self._rows(units, slots)
        late = self._submit(units[misses], slots[misses])
        meanwhile()
        a = self._as_they_come(x, selection, rows, early, misses, late)
        down = rows.ravel() + self.neurons.down_at
        self.neurons.add_down(self.cache.memory, down, a, selection, y)
        self.cache.used_at(slots, token, selection.last)

    def _as_they_come(self, x, selection, rows, early, misses, late):
        """``Neurons.activations`` of the units in DRAM, then of the ``early`` ones (bool), which
        were read ahead, then of the ``misses`` (indices), which the reads ``late`` bring.

        Too few of a kind for a call of their own are computed with the next, and so are all where
        there are several tokens.
        """
        units, n = selection.units, len(selection.units)
        ends = n - len(misses) - np.count_nonzero(early), n - len(misses), n
        least = n if selection.indptr is not None else min(n, APART_BYTES / self.cache.stride)
        if any(least <= end < n for end in ends):
            kind = early.astype(np.uint8)
            kind[misses] = 2
            order = kind.argsort(kind="stable")
        a, begin = np.empty((*rows.shape, len(x)), dtype=np.float32), 0
        for end, reads in zip(ends, (None, self.ahead, late), strict=True):
            self._wait(reads)
            # With no unit in use, one empty call still gives the result its shape.
            if n and (end == begin or (end < n and end - begin < least)):
                continue
            which = order[begin:end] if end - begin < n else slice(None)
            part = self.neurons.activations(
                self.cache.memory, rows[which].ravel(), x, self.neurons.of(units[which]),
                selection.indptr, selection.tokens,
            )  # fmt: skip
            if end - begin == n:
                a = part
            else:
                a[which] = part.reshape(-1, *a.shape[1:])
            begin = end
        self.ahead = None
        return a if selection.indptr is not None else a.reshape(-1, len(x))

    def _compute_in_waves(self, x, selection, token, y):
        """Through fewer rows than are needed, or large units: one wave of them is read while the
        one before it is computed, where there are rows for two."""
        cache, now = self.cache, token + len(x) - 1
        size = max(1, cache.capacity // 2)
        if self.config.unit_neurons > 1:
            size = min(size, max(1, WAVE_BYTES // cache.stride))
        overlap = 2 * size <= cache.capacity
        waves = [selection.part(i, i + size) for i in range(0, len(selection.units), size)]
        _, coming, reads = self._begin_wave(waves[0], NONE, now)
        for wave, following in itertools.zip_longest(waves, waves[1:]):
            self._wait(reads)
            slots = coming
            if following is not None and overlap:
                slots, coming, reads = self._begin_wave(following, wave.units, now)
            self.neurons.add(cache.memory, self._rows(wave.units, slots), x, wave, y)
            cache.used_at(slots, token, wave.last)
            if following is not None and not overlap:
                _, coming, reads = self._begin_wave(following, NONE, now)

    def _begin_wave(self, wave, held, now):
        """(rows of the units held, rows of the wave's, the reads begun for those)"""
        units = np.concatenate([held, wave.units])
        slots, misses, _ = self.cache.place(units, now)
        self.cache.hits -= len(held)
        reads = self._submit(units[misses], slots[misses])
        return slots[: len(held)], slots[len(held) :], reads

    def _streams(self, selection, n_tokens):
        if self.predictor is None:
            return True
        if n_tokens == 1 or self.config.unit_neurons > 1:
            return False
        missing = np.count_nonzero(self.cache.slot_of[selection.units] < 0)
        return missing > STREAM_SHARE * self.units.rows

    def _compute_streamed(self, x, selection, token, y):
        """The whole layer once, in large sequential reads; the last tokens' neurons are kept."""
        kept, slots = self._keep(selection, token + len(x) - 1, token)
        tiles = self.flash.stream(self.bundles, self.buffer, self.following)
        for first, stop, memory, starts in tiles:
            begin, end = np.searchsorted(selection.units, (first, stop))
            part = selection.part(begin, end)
            self.neurons.add(memory, starts[part.units - first, None], x, part, y)
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
        slots = cache.place(neurons, now)[0] if len(neurons) else neurons
        cache.hits, cache.misses = hits, misses + len(selection.units)
        cache.used_at(slots, token, selection.last[kept])
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

    # ------------------------------------------------------------------ reading

    def _submit(self, units, slots):
        """Begin to read units into their rows of the cache; None where there are none."""
        if not len(units):
            return None
        offsets, lengths, _ = self._spans(units)
        places = slots * np.int64(self.cache.stride)
        return self.flash.submit(offsets, lengths, self.cache.memory, places)

    def _wait(self, reads):
        if reads is not None:
            self.flash.wait(reads)

    def _rows(self, units, slots):
        """Where in the cache's memory each neuron of these units begins: (units, neurons)."""
        _, _, skips = self._spans(units)
        return (slots * np.int64(self.cache.stride) + skips)[:, None] + self.inside

    def _spans(self, units):
        return self.flash.row_spans(self.units, units.astype(np.int64))
