"""A layer that needs more units than it has slots, or large ones: a wave of them at a time."""

import itertools

import numpy as np

from flashinfer.formats.arrays import Float32Array, Int32Array
from flashinfer.paper.flash import Submitted
from flashinfer.paper.neuron_cache import NONE
from flashinfer.paper.neurons import Neurons
from flashinfer.paper.selection import Selection, Tokens
from flashinfer.paper.unit_store import UnitStore
from flashinfer.paper.ways import wave_size


class Waves:
    """Computes a wave of units while the next one is read, where there are slots for two."""

    def __init__(self, store: UnitStore, neurons: Neurons) -> None:
        self.store, self.neurons = store, neurons

    def __call__(
        self, x: Float32Array, selection: Selection, tokens: Tokens, y: Float32Array
    ) -> None:
        """y (T, d_model) += the units of ``selection`` for x (T, d_model)."""
        store, cache, now = self.store, self.store.cache, tokens.now
        size, overlap = wave_size(cache.capacity, len(store.inside), cache.slot_bytes)
        waves = [selection.part(i, i + size) for i in range(0, len(selection.units), size)]
        _, coming, reads = self._begin(waves[0], NONE, now)
        for wave, following in itertools.zip_longest(waves, waves[1:]):
            store.wait(reads)
            slots = coming
            if following is not None and overlap:
                slots, coming, reads = self._begin(following, wave.units, now)
            self.neurons.add(cache.memory, store.offsets(wave.units, slots), x, wave, y)
            cache.used_at(slots, tokens.first, wave.last)
            if following is not None and not overlap:
                _, coming, reads = self._begin(following, NONE, now)

    def _begin(
        self, wave: Selection, held: Int32Array, now: int
    ) -> tuple[Int32Array, Int32Array, Submitted | None]:
        """(slots of the units ``held``, slots of the wave's, the reads begun for those)"""
        units, cache = np.concatenate([held, wave.units]), self.store.cache
        slots, misses, _ = cache.place(units, now)
        cache.hits -= len(held)
        reads = self.store.submit(units[misses], slots[misses])
        return slots[: len(held)], slots[len(held) :], reads
