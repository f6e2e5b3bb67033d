"""A layer read whole, tile by tile, each computed as it comes."""

from collections.abc import Iterator

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array, Int32Array, Int64Array, UInt8Array
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.paper.flash import Flash
from flashinfer.paper.interfaces import Stream
from flashinfer.paper.neurons import Neurons
from flashinfer.paper.selection import Selection, Tokens
from flashinfer.paper.unit_store import UnitStore


def streamed_tiles(
    flash: Flash, tensor: StoredTensor, buffer: UInt8Array, following: StoredTensor | None
) -> Iterator[tuple[int, kernels.Matrix]]:
    """Yield (the number of its first row, some rows) of a matrix on flash, as they come."""
    for first, stop, memory, starts in flash.stream(tensor, buffer, following):
        begin = int(starts[0])
        rows = memory[begin : begin + (stop - first) * tensor.row_bytes]
        rows = rows.reshape(stop - first, tensor.row_bytes)
        yield first, kernels.Matrix(rows, tensor.columns, tensor.format)


def streamed_linear(
    flash: Flash,
    tensor: StoredTensor,
    buffer: UInt8Array,
    following: StoredTensor | None,
    x: Float32Array,
    bias: Float32Array | None = None,
    rounded: bool = False,
) -> Float32Array:
    """x (T, columns) times a matrix on flash, (T, rows) float32, tile by tile as it comes; the
    others as in ``kernels.linear``."""
    out = np.empty((len(x), tensor.rows), dtype=np.float32)
    for first, matrix in streamed_tiles(flash, tensor, buffer, following):
        stop = first + len(matrix.data)
        own = None if bias is None else bias[first:stop]
        out[:, first:stop] = kernels.linear(x, matrix, own, rounded)
    return out


class Streamed:
    """Reads all of a layer once, in the order of its neurons' numbers; keeps those that the last
    tokens used.

    tensor     StoredTensor: the layer's bundles
    following  the StoredTensor that is streamed next, where this layer always is; else None
    """

    def __init__(self, store: UnitStore, neurons: Neurons) -> None:
        self.store, self.neurons = store, neurons
        self.tensor = store.bundles
        self.following: StoredTensor | None = None

    def streams(self) -> tuple[Stream, ...]:
        """What is streamed at every token."""
        return (self,)

    def __call__(
        self, x: Float32Array, selection: Selection, tokens: Tokens, y: Float32Array
    ) -> None:
        """y (T, d_model) += the units of ``selection`` for x (T, d_model)."""
        store = self.store
        kept, slots = self._keep(selection, tokens)
        for first, stop, memory, starts in store.flash.stream(
            self.tensor, store.buffer, self.following
        ):
            begin, end = np.searchsorted(selection.units, (first, stop))
            part = selection.part(begin, end)
            rows = starts[part.units - first, None]
            self.neurons.add(memory, rows, x, part, y, passing=True)
            self._copy_kept(kept, slots, first, stop, memory, starts)

    def _keep(self, selection: Selection, tokens: Tokens) -> tuple[Int32Array, Int32Array]:
        """(neurons, their slots) that the cache would hold, had the tokens come one by one."""
        cache, (token, _), now = self.store.cache, tokens, tokens.now
        kept = np.ones(len(selection.units), dtype=bool)
        if cache.window is not None:
            kept = token + selection.last.astype(np.int64) > now - cache.window
        if cache.capacity:
            kept &= cache.affords(selection.units)
        else:
            kept[:] = False
        hits, misses = cache.hits, cache.misses
        neurons = selection.units[kept]
        slots = cache.place(neurons, now)[0] if len(neurons) else neurons
        cache.hits, cache.misses = hits, misses + len(selection.units)
        cache.used_at(slots, token, selection.last[kept])
        return neurons, slots

    def _copy_kept(
        self,
        kept: Int32Array,
        slots: Int32Array,
        first: int,
        stop: int,
        memory: UInt8Array,
        starts: Int64Array,
    ) -> None:
        """Copy those of a tile's neurons that are kept into their slots."""
        begin, end = np.searchsorted(kept, (first, stop))
        if begin == end:
            return
        store, neurons = self.store, kept[begin:end]
        _, _, skips = store.spans(neurons)
        kernels.copy_rows(
            memory, starts[neurons - first], store.cache.memory,
            store.cache.starts[slots[begin:end]] + skips[:, 0],
            np.full(len(neurons), self.tensor.row_bytes),
        )  # fmt: skip
