"""A layer's units: where their bundles lie on flash, and where their slots are in DRAM."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from flashinfer.formats.arrays import AnyArray, BoolArray, Int32Array, Int64Array, UInt8Array
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.number_formats import Matrices
from flashinfer.paper.flash import Flash, Submitted
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.pieces import pieces_of
from flashinfer.paper.selection import Selection
from flashinfer.paper.ways import WAVE_BYTES

APART_BYTES = 1 << 20  # of units in DRAM: worth computing while the others are being read
MOST_TABLED = 512  # units, such as experts, whose spans are computed once
SPAN_BYTES = 72  # of one of these, in three pieces
EVERY = slice(None)


class UnitStore:
    """Reads a layer's units from flash into the slots of its neuron cache.

    What is read and kept as one is a unit: a neuron, or in a mixture of experts an expert, whose
    neurons lie side by side (or a neuron there, too, where predictors tell them apart).

    bundles  StoredTensor, a row a neuron: [up_i | down_i], or [gate_i | up_i | down_i]; where the
             file has a layout of its own, its ``places`` say where each lies
    units    the same tensor, a row a unit
    cache    NeuronCache; flash: Flash; buffer: uint8 memory that tiles are streamed through
    pieces   what is read of a unit
    inside   int64: bytes from the unit's beginning to each of its neurons (neurons of a unit,), or
             of its matrices (matrices,)
    settled  whether every slot that the cache has given holds its unit
    """

    def __init__(
        self,
        bundles: StoredTensor,
        unit_neurons: int,
        cache: NeuronCache,
        flash: Flash,
        buffer: UInt8Array,
    ) -> None:
        n = unit_neurons
        self.bundles, self.cache, self.flash, self.buffer = bundles, cache, flash, buffer
        self.units = replace(bundles, rows=bundles.rows // n, columns=bundles.columns * n)
        self.pieces = pieces_of(bundles, n, flash.alignment)
        self.rooms = self.pieces.rooms
        self.inside = np.arange(n) * bundles.row_bytes
        if isinstance(bundles.format, Matrices):
            self.inside = np.array([part.at for part in bundles.format.parts.values()])
        if bundles.runs is not None:  # each is a piece, and begins where that does
            self.inside = np.zeros(1, dtype=np.int64)
        self.settled = True
        self.spans_of_all: tuple[Int64Array, ...] | None = None  # the spans of all units, of few
        if self.units.rows <= MOST_TABLED:
            self.spans_of_all = self.pieces.spans(self.units.place(np.arange(self.units.rows)))

    def begin(self) -> None:
        """A layer begins: until it sets ``settled`` again, slots may be given but not filled."""
        self.settled = False

    def abandon(self) -> None:
        """After a failure, once no read is in flight: forgets what may not have been read."""
        if not self.settled:
            self.cache.empty()
            self.settled = True

    def hottest(self, uses: ArrayLike) -> Int32Array:
        """The units used most, as many as there are slots for, ascending; uses (units,)."""
        order = np.argsort(-np.asarray(uses), kind="stable")[: self.cache.capacity]
        return np.sort(order[np.asarray(uses)[order] > 0]).astype(np.int32)

    def warm(self, uses: ArrayLike, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Begin with the hottest units in the cache; uses (units,): how often each is used."""
        self.cache.priority.expect(uses)
        units = self.hottest(uses)
        slots, *_ = self.cache.place(units, 0)
        self.cache.misses = 0
        step = max(1, WAVE_BYTES // self.cache.slot_bytes)
        for first in range(0, len(units), step):
            part = slice(first, first + step)
            self.wait(self.submit(units[part], slots[part]))
            progress(len(units[part]) * self.units.row_bytes)

    def tiles(self) -> Iterator[tuple[int, int, UInt8Array, Int64Array]]:
        """The whole layer, tile by tile: see ``Flash.stream``."""
        return self.flash.stream(self.bundles, self.buffer)

    def submit(self, units: Int32Array, slots: Int32Array, urgent: bool = True) -> Submitted | None:
        """Begins to read units (n,) int32 into their slots (n,), at once or, where that is not
        ``urgent``, when no other reads would be delayed; returns what ``wait`` takes."""
        if not len(units):
            return None
        offsets, lengths, _ = self.spans(units)
        starts = self.cache.starts[slots][:, None] + self.rooms
        # Piece after piece, so that neighbours in the file follow each other.
        offsets, lengths, starts = (a.T.ravel() for a in (offsets, lengths, starts))
        if self.units.places is not None:  # neighbours in the file are read as one
            order = offsets.argsort()
            offsets, lengths, starts = offsets[order], lengths[order], starts[order]
        return self.flash.submit(offsets, lengths, self.cache.memory, starts, urgent)

    def wait(self, reads: Submitted | None) -> None:
        """Returns when the reads are done; None stands for no reads."""
        if reads is not None:
            self.flash.wait(reads)

    def offsets(self, units: Int32Array, slots: Int32Array) -> Int64Array:
        """Where in ``cache.memory`` each neuron of these units begins, or each of their matrices:
        (units, neurons or matrices) int64."""
        _, _, skips = self.spans(units)
        return self.cache.starts[slots][:, None] + self.rooms + skips + self.inside

    def spans(self, units: Int32Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(offsets, lengths, skips) of the aligned reads that cover these units, int64 (units,
        pieces) each."""
        if self.spans_of_all is None:
            return self.pieces.spans(self.units.place(units.astype(np.int64)))
        offsets, lengths, skips = self.spans_of_all
        return offsets[units], lengths[units], skips[units]

    def arrivals(
        self,
        early: BoolArray,
        misses: Int32Array,
        begun: Submitted | None,
        late: Submitted | None,
        selection: Selection,
    ) -> Iterator[AnyArray | slice]:
        """Yield which units, indices (m,) or EVERY, are in DRAM: first those that were there, then
        the ``early`` ones (n,) bool, then the ``misses`` (indices), when their reads ``begun`` and
        ``late`` are done. Reads that were begun for units which nobody needs are waited for last.

        Too few for a product of their own are left to the next, and so are all of a ``selection``
        by several tokens. Where there is no unit at all the empty product still gives a result its
        shape.
        """
        n = len(early)
        least: float = n
        ends = n - len(misses) - np.count_nonzero(early), n - len(misses), n
        if selection.indptr is None:
            least = min(n, APART_BYTES / self.cache.slot_bytes)
        if any(least <= end < n for end in ends):
            kind = early.astype(np.uint8)
            kind[misses] = 2
            order = kind.argsort(kind="stable")
        begin, needed = 0, ends[1] > ends[0]
        for end, reads in zip(ends, (None, begun if needed else None, late), strict=True):
            self.wait(reads)
            if n and (end == begin or (end < n and end - begin < least)):
                continue
            yield order[begin:end] if end - begin < n else EVERY
            begin = end
        if not needed:
            self.wait(begun)
