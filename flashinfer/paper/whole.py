"""A layer of which every unit stays in DRAM."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array, Int64Array
from flashinfer.paper.neurons import Neurons
from flashinfer.paper.selection import Selection, Tokens
from flashinfer.paper.unit_store import UnitStore


class Whole:
    """Computes from the cache's memory, where the layer lies in an order of its own.

    All gates lie together there, then all ups, then all downs: DRAM gives up to half as much again
    where a product's rows follow each other. Flash wants a neuron's parts together.

    offsets  (units, neurons of each) int64: where the first parts begin; None before ``fill``
    """

    def __init__(self, store: UnitStore, neurons: Neurons) -> None:
        self.store, self.neurons = store, neurons
        self.offsets: Int64Array | None = None

    @property
    def fits(self) -> bool:
        """Whether every unit has a slot, and keeps it."""
        cache = self.store.cache
        return cache.capacity == self.store.units.rows and cache.window is None

    def fill(self, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Read the layer into the cache's memory. Call it only where it ``fits``."""
        store, bundles = self.store, self.store.bundles
        if not bundles.rows:
            return
        n, width, parts = bundles.rows, self.neurons.width, self.neurons.config.parts
        part, begin, order = np.arange(parts)[:, None], store.cache.starts[0], bundles.order()
        in_file = replace(bundles, places=None)  # nothing is summed: read as the file has them
        for first, stop, memory, starts in store.flash.stream(in_file, store.buffer):
            places = begin + part * n * width + order[first:stop] * width  # (parts, neurons)
            kernels.copy_rows(
                memory, (starts + part * width).ravel(), store.cache.memory, places.ravel(),
                np.full(places.size, width),
            )  # fmt: skip
            progress((stop - first) * bundles.row_bytes)
        offsets = begin + np.arange(n, dtype=np.int64) * width
        self.offsets = offsets.reshape(store.units.rows, -1)

    def __call__(
        self, x: Float32Array, selection: Selection, tokens: Tokens, y: Float32Array
    ) -> None:
        """y (T, d_model) += the units of ``selection`` for x (T, d_model)."""
        cache, apart = self.store.cache, self.neurons.width * self.store.bundles.rows
        cache.hits += len(selection.units)
        self.neurons.add(cache.memory, self.offsets[selection.units], x, selection, y, apart)
