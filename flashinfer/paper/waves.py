"""A layer that needs more units than it has slots, or large ones: a wave of them at a time."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from flashinfer.formats.arrays import Float32Array, Int32Array
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.neurons import Neurons
from flashinfer.paper.selection import Selection, Tokens
from flashinfer.paper.unit_store import UnitStore
from flashinfer.paper.ways import wave_size

Reads = TypeVar("Reads")


class Waves:
    """Computes a wave of units while the next ones are read, where there are slots for them.

    Units are added in ascending order, so they are computed in that order, too, whichever of them
    are in DRAM.
    """

    def __init__(self, store: UnitStore, neurons: Neurons) -> None:
        self.store, self.neurons = store, neurons

    def __call__(
        self, x: Float32Array, selection: Selection, tokens: Tokens, y: Float32Array
    ) -> None:
        """y (T, d_model) += the units of ``selection`` for x (T, d_model)."""
        store, cache, now = self.store, self.store.cache, tokens.now
        each = self.neurons.config.unit_neurons
        cuts = in_waves(cache, selection.units, now, each, store.submit, store.wait)
        for first, stop, slots in cuts:
            part = selection.part(first, stop)
            rows = store.offsets(part.units, slots)
            self.neurons.add(cache.memory, rows, x, part, y, passing=True)
        slots = cache.slot_of[selection.units]
        stay = slots >= 0
        cache.used_at(slots[stay], tokens.first, selection.last[stay])


def in_waves(
    cache: NeuronCache,
    units: Int32Array,
    now: int,
    unit_neurons: int,
    submit: Callable[[Int32Array, Int32Array], Reads],
    wait: Callable[[Reads], None] = lambda reads: None,
) -> Iterator[tuple[int, int, Int32Array]]:
    """Give the units (n,) slots, wave after wave.

    submit  is called as submit(units, slots) with those to read: of a wave, and before it is
            yielded of those after it that ``wave_size`` says. To begin more of them would be too
            soon: what has been computed by then may make room for what is worth more.
    wait    is called with what ``submit`` returned, before a wave is yielded
    Yields (first, stop, slots of units[first:stop]): to be computed until the next is asked for,
    which may then have the slots in transit.
    """
    size, ahead = wave_size(cache.capacity, cache.transit, unit_neurons, cache.slot_bytes)
    cache.begin_waves(units, now)
    free = list(range(cache.capacity, cache.capacity + cache.transit))
    begun: deque[tuple[int, Int32Array, Reads]] = deque()

    def begin(start: int, first: int) -> None:
        """Begin the wave at ``start``, while units from ``first`` on are in use."""
        stop = min(start + size, len(units))
        wave = units[start:stop]
        slots, misses = cache.place_wave(wave, units[first:start], units[stop:], now)
        for i in np.flatnonzero(slots < 0):
            slots[i] = free.pop()
        begun.append((stop, slots, submit(wave[misses], slots[misses])))

    for first in range(0, len(units), size):
        if not begun:
            begin(first, first)
        stop, slots, reads = begun.popleft()
        # The next reads begin only now, so that they take nothing of the flash from these.
        wait(reads)
        last = min(first + ahead * size, len(units) - 1)
        for start in range(stop + len(begun) * size, last + 1, size):
            begin(start, first)
        yield first, stop, slots
        free += slots[slots >= cache.capacity].tolist()
