"""Where neurons lie so that those that fire together are read together (Neuralink, Wang et al.
2024, arXiv 2410.19274): along one path through the graph of their common uses."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flashinfer.formats.arrays import BoolArray, Int64Array, UInt8Array
from flashinfer.paper.flash import GAP_BYTES, STAGING_BYTES, reads_of, row_spans
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.pieces import one_piece
from flashinfer.paper.selection import Selection
from flashinfer.plan.expected_reads import expected_reads

BLOCK = 4096  # bytes that reads are aligned to


class Reads(NamedTuple):
    """What a token reads of a layer: bytes, in so many reads."""

    nbytes: int
    reads: int


class Layout(NamedTuple):
    """Where a layer's units are to lie, (units,) int64; and what the missing ones' reads come to,
    as a share of those that as many anywhere take."""

    places: Int64Array
    reads: float


def lay_out(bits: UInt8Array, tokens: int, row_bytes: int) -> Layout:
    """The Layout along the path through what the first of these ``tokens`` used, judged by
    what the last quarter of them read with half of the units in DRAM.

    bits  as of ``path``; row_bytes: of a unit
    """
    begin = tokens * 3 // 4 // 8 * 8
    places = places_of(path(bits[:, : begin // 8]))
    used = np.unpackbits(bits, axis=1, count=tokens).T.astype(bool)
    reads, anywhere, each = 0.0, 0.0, one_piece(row_bytes, BLOCK)
    for units in itertools.islice(_missing(used, len(bits) // 2), begin, None):
        reads += read_together(np.sort(places[units]), row_bytes, GAP_BYTES).reads
        anywhere += expected_reads(len(units), len(bits), each, GAP_BYTES)[1]
    return Layout(places, reads / anywhere if anywhere else 1.0)


def path(bits: UInt8Array) -> Int64Array:
    """The units along one path, each followed by that which fires with it most of those left.

    bits  (units, ceil(T / 8)): which of T tokens used each unit, packed
    Greedy, from the busiest; the weight of a step is the share of either's uses that both have
    (Jaccard's index), so that the busiest do not attract all others. Returns (units,) int64.
    """
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
    words = np.ascontiguousarray(padded).view(np.uint64)  # (units, T / 64)
    busy = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    left, among = np.ones(len(busy), dtype=bool), np.arange(len(busy))
    order = np.empty(len(busy), dtype=np.int64)
    unit, its = (int(busy.argmax()), words[busy.argmax()].copy()) if len(busy) else (0, words)
    for at in range(len(busy)):
        order[at], left[unit] = unit, False
        if at + 1 == len(busy):
            break
        if 2 * (len(busy) - at - 1) < len(among):  # go on among those that are left
            words, among = words[left[among]], among[left[among]]
        both = np.bitwise_count(words & its).sum(axis=1, dtype=np.int64)
        either = np.maximum(1, busy[among] + busy[unit] - both)
        weight = np.where(left[among], both / either, -1.0)
        best = int(weight.argmax())
        if weight[best] <= 0:  # with nothing that is left: the busiest of it
            best = int(np.where(left[among], busy[among], -1).argmax())
        unit, its = int(among[best]), words[best].copy()
    return order


def places_of(order: Int64Array) -> Int64Array:
    """Where each unit lies, of units listed in the file's order: (units,) int64."""
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return places


def _missing(used: BoolArray, slots: int) -> Iterator[Int64Array]:
    """Yield of each token the units that it reads, with a cache of so many slots, ascending; used
    (T, units)."""
    memory = np.zeros(slots, dtype=np.uint8)
    cache = NeuronCache(used.shape[1], memory, 1, "frecency", None)
    for token, row in enumerate(used):
        units = np.flatnonzero(row).astype(np.int32)
        if len(units) > slots:  # they come in waves, and the cache stays as it is
            yield units[cache.slot_of[units] < 0].astype(np.int64)
            continue
        cache.priority.note(Selection(units, None, None, np.zeros_like(units)), token)
        placed, misses, _ = cache.place(units, token)
        cache.used_at(placed, token, np.zeros_like(units))
        yield units[misses].astype(np.int64)


def read_together(rows: Int64Array, row_bytes: int, gap_bytes: int, block: int = BLOCK) -> Reads:
    """What reading these rows of a tensor, ascending, comes to by the engine's own way."""
    if not len(rows):
        return Reads(0, 0)
    offsets, lengths, _ = row_spans(0, row_bytes, rows, block)
    # Slots are given as they come free: no two that are read together lie side by side.
    slots = 2 * np.arange(len(rows)) * int(lengths.max())
    straight, staged, _ = reads_of(offsets, lengths, slots, gap_bytes, STAGING_BYTES)
    nbytes = int(straight[1].sum() + staged[1].sum())
    return Reads(nbytes, len(straight[1]) + len(staged[1]))
