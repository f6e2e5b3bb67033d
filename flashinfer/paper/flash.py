"""Reads from flash: submit many, wait, straight into the rows where they are used (paper 3.2).

With O_DIRECT the page cache is out of the way: a read costs what the device costs, and memory is
spent once. It wants offsets, lengths and addresses aligned; ``Flash.span`` widens a read so.
"""

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import AnyArray, Int64Array, UInt8Array
from flashinfer.formats.bundle.in_place import FILE_BYTES
from flashinfer.formats.bundle.stored import PAGE, StoredTensor
from flashinfer.formats.errors import FormatError
from flashinfer.paper.open_file import Engine, OpenFile, reader_of

PIECE_BYTES = 1 << 20  # a large read is cut into pieces of this size, in flight together
MERGED_BYTES = 256 << 10  # the most that neighbours merge to
GAP_BYTES = 4096  # of another neuron are cheaper to read than another request is
HUGE_PAGE = 2 << 20
STAGING_BYTES, STAGINGS = 2 << 20, 3  # a layer's reads, early and late, and the next one's


def aligned_bytes(nbytes: int) -> UInt8Array:
    """Zeroed memory (nbytes,) uint8 on a page boundary, in huge pages where there are any.

    Huge pages spare the kernel a thousand small ones to pin for each large read.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or nbytes < HUGE_PAGE:
        return np.frombuffer(_anonymous(max(nbytes, mmap.PAGESIZE)), dtype=np.uint8)[:nbytes]
    block = _anonymous(nbytes + HUGE_PAGE)
    memory = np.frombuffer(block, dtype=np.uint8)
    skip = -memory.ctypes.data % HUGE_PAGE
    try:  # whole huge pages only, so that no byte more than was asked for is ever used
        block.madvise(mmap.MADV_HUGEPAGE, skip, nbytes // HUGE_PAGE * HUGE_PAGE)
    except OSError:
        pass
    return memory[skip : skip + nbytes]


def _anonymous(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@dataclass(eq=False)
class Submitted:
    """Reads in flight: parts are (ticket, offsets, lengths); and what to copy afterwards:
    (memory, destinations, places in ``staging``, lengths) of rows.

    rows    whether they are those of ``Flash.submit``
    unsent  (memory, offsets, lengths, destinations) of reads that have not begun
    """

    parts: list[tuple[Any, Int64Array, Int64Array]]
    rows: bool = False
    copies: tuple[UInt8Array, Int64Array, Int64Array, Int64Array] | None = None
    staging: UInt8Array | None = None
    unsent: list[tuple[UInt8Array, Int64Array, Int64Array, Int64Array]] = field(
        default_factory=list
    )


class Watcher(Protocol):
    """Is told of every read, while a run is recorded."""

    def submitted(
        self, reads: Submitted, offsets: Int64Array, lengths: Int64Array, streamed: bool
    ) -> None:
        """Some of these reads have begun; streamed: they are pieces of a large one."""

    def done(self, reads: Submitted) -> None:
        """All of them have been waited for."""


# The rows first:stop of a tensor, the offsets in memory where they begin, and their read.
Tile = tuple[int, int, Int64Array, Submitted]


class Flash:
    """A bundle's file, open for reading, and the files that it has weights in. Offsets are
    addresses, as formats/bundle/in_place.py counts: of the bundle's own file, offsets in it.

    io          "auto": O_DIRECT by io_uring, or else by threads, or else through the page cache;
                "io_uring", "threads": O_DIRECT that way or an error; "buffered": the page cache.
                Afterwards, the way that was taken.
    path        named in messages: ``name``, or what was opened
    sources     {path: bytes} of the files that the bundle has weights in
    gap_bytes   reads no further apart than this are merged into one
    alignment   bytes that offsets, lengths and addresses of reads must be multiples of
    bytes_read  so far, alignment's widening included; of them, bytes_streamed in ``submit_range``,
                and the others in ``reads`` reads
    """

    def __init__(
        self,
        path: Path | str,
        io: Engine = "auto",
        gap_bytes: int = GAP_BYTES,
        name: Path | str | None = None,
        sources: Mapping[Path, int] | None = None,
    ) -> None:
        self.gap_bytes = gap_bytes
        self.staging = [aligned_bytes(STAGING_BYTES) for _ in range(STAGINGS)]
        self.path, self.bytes_read, self.bytes_streamed, self.reads = name or path, 0, 0, 0
        self.flying: set[Submitted] = set()  # Submitted, not waited for
        self.watcher: Watcher | None = None
        self.held: list[Submitted] = []  # of these, those that begin when the others are done
        # A tensor, half of the buffer and the tensor's first tile, read before its turn.
        self.early: tuple[StoredTensor, int, Tile] | None = None
        self.files: list[OpenFile] = []
        try:
            self.files.append(OpenFile(path, io, self.path))
            for source, size in (sources or {}).items():
                way: Engine = "buffered" if self.files[0].alignment == 1 else io
                self.files.append(OpenFile(source, way, source, size))
            self.alignment = max(file.alignment for file in self.files)
            if sources and self.alignment > 1:
                # What begins within a page goes to memory faster with that page's beginning.
                self.alignment = max(self.alignment, PAGE)
            self.io, self.reader = reader_of(io, direct=self.alignment > 1)
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return not self.files

    def span(self, offset: int, length: int) -> tuple[int, int, int]:
        """The aligned read that covers a range: (start, length, where the range begins in it)."""
        start = offset // self.alignment * self.alignment
        end = -(-(offset + length) // self.alignment) * self.alignment
        return start, end - start, offset - start

    def slot_bytes(self, row_bytes: int, offset: int = 0) -> int:
        """Room for the span of any row of a tensor at ``offset``."""
        return slot_bytes(row_bytes, row_bytes, offset, self.alignment)

    def submit(
        self,
        offsets: Int64Array,
        lengths: Int64Array,
        memory: UInt8Array,
        destinations: Int64Array,
        urgent: bool = True,
    ) -> Submitted:
        """Start aligned reads of ``lengths`` bytes at ``offsets`` to ``memory[destinations]``.

        All three are int64 arrays; memory is uint8 from ``aligned_bytes``. Neighbours on flash
        become one read, as do those at most ``gap_bytes`` apart. Where they do not lie side by
        side in memory too, that read goes to a staging buffer, and ``wait`` copies the rows. Large
        ones are cut into pieces that are in flight together.

        urgent  False: they begin when no others that were submitted so are left to wait for, see
                ``ways.prefetch_waits``; or when they are waited for
        """
        submitted = self._begin(rows=True)
        room = STAGING_BYTES if self.staging else 0
        straight, staged, copies = reads_of(offsets, lengths, destinations, self.gap_bytes, room)
        submitted.unsent.append((memory, *straight))
        if staged.size:
            submitted.staging = self.staging.pop()
            submitted.unsent.append((submitted.staging, *staged))
            submitted.copies = memory, *copies
        self.held.append(submitted)
        if urgent:
            self._send_held(submitted)
        else:
            self._send_next()
        return submitted

    def hasten(self, submitted: Submitted) -> None:
        """Begin reads that were not urgent and now are."""
        if submitted.unsent:
            self._send_held(submitted)

    def _send_held(self, submitted: Submitted) -> None:
        """Begin reads that are held."""
        self.held.remove(submitted)
        unsent, submitted.unsent = submitted.unsent, []
        for reads in unsent:
            self.reads += self._start(submitted, *reads)

    def _send_next(self) -> None:
        """Begin the reads that are held, unless others would be delayed."""
        if self.held and not any(s.rows and s not in self.held for s in self.flying):
            for submitted in self.held.copy():
                self._send_held(submitted)

    def _begin(self, rows: bool = False) -> Submitted:
        """A Submitted to be, which ``settle`` knows before anything is in flight."""
        submitted = Submitted([], rows)
        self.flying.add(submitted)
        return submitted

    def _start(
        self,
        submitted: Submitted,
        memory: UInt8Array,
        offsets: Int64Array,
        lengths: Int64Array,
        destinations: Int64Array,
        streamed: bool = False,
    ) -> int:
        """Begin these reads; returns how many."""
        self.bytes_read += int(lengths.sum())
        for which in self._by_file(offsets):
            ticket = self._send(offsets[which], lengths[which], memory, destinations[which])
            submitted.parts.append((ticket, offsets[which], lengths[which]))
        if self.watcher is not None:
            self.watcher.submitted(submitted, offsets, lengths, streamed)
        return len(lengths)

    def _by_file(self, offsets: Int64Array) -> Sequence[AnyArray | slice]:
        """Which of the reads are of one file, for each file that there are any of."""
        if len(self.files) == 1:
            return (slice(None),)
        numbers = offsets // FILE_BYTES
        return [numbers == number for number in np.unique(numbers)]

    def _send(
        self, offsets: Int64Array, lengths: Int64Array, memory: UInt8Array, destinations: Int64Array
    ) -> Any:
        """Hands reads of one file over to the reader; returns its ticket."""
        number = int(offsets[0]) // FILE_BYTES if len(offsets) else 0
        file, begin = self.files[number], number * FILE_BYTES
        return self.reader.submit(file.fd, file.end, offsets - begin, lengths, memory, destinations)

    def wait(self, submitted: Submitted) -> None:
        """Return when the reads are done. Raises FormatError naming file, offset and length."""
        self.hasten(submitted)
        failure = None
        for ticket, offsets, lengths in submitted.parts:  # all of them, whatever happens
            try:
                ticket.wait()
            except EOFError as error:
                index, reason = error.args[0], "the file ends before"
            except OSError as error:
                # The third argument, which is another thing where it says to ask again.
                index = getattr(error, "characters_written", error.filename)
                reason = error.strerror
            else:
                continue
            number, offset = divmod(int(offsets[index]), FILE_BYTES)
            failure = failure or (
                f"{self.files[number].name}: reading {lengths[index]} bytes at {offset}: {reason}"
            )
        staging, submitted.staging = submitted.staging, None
        if staging is not None:
            if submitted.copies is not None and failure is None:
                memory, destinations, sources, lengths = submitted.copies
                kernels.copy_rows(staging, sources, memory, destinations, lengths)
            self.staging.append(staging)
        self.flying.discard(submitted)
        if self.watcher is not None:
            self.watcher.done(submitted)
        if failure:
            raise FormatError(failure)
        self._send_next()

    def settle(self) -> None:
        """After a failure: return when nothing is in flight, whatever became of it."""
        self.early = None
        for submitted in self.held:
            submitted.unsent, submitted.copies = [], None
        self.held.clear()
        while self.flying:
            with suppress(FormatError):
                self.wait(next(iter(self.flying)))

    def submit_range(
        self, offset: int, length: int, memory: UInt8Array, destination: int = 0
    ) -> Submitted:
        """Start one aligned read, cut into pieces that are in flight together."""
        starts = np.arange(0, length, PIECE_BYTES, dtype=np.int64)
        lengths = np.minimum(PIECE_BYTES, length - starts)
        submitted = self._begin()
        self._start(submitted, memory, offset + starts, lengths, destination + starts, True)
        self.bytes_streamed += length
        return submitted

    def read_rows(
        self, tensor: StoredTensor, rows: Int64Array, buffer: UInt8Array
    ) -> Iterator[tuple[int, int, UInt8Array, Int64Array]]:
        """Yield (position, n, memory, row_starts) for the given rows of a StoredTensor.

        As many rows at a time as ``buffer`` holds, each by a read of its own.
        """
        self._drop_early()
        slot_bytes = self.slot_bytes(tensor.row_bytes, tensor.offset)
        room = len(buffer) // slot_bytes
        for position in range(0, len(rows), room):
            chosen = np.asarray(rows[position : position + room], dtype=np.int64)
            offsets, lengths, skips = self.row_spans(tensor, chosen)
            destinations = np.arange(len(chosen), dtype=np.int64) * slot_bytes
            self.wait(self.submit(offsets, lengths, buffer, destinations))
            yield position, len(chosen), buffer, destinations + skips

    def row_spans(
        self, tensor: StoredTensor, rows: Int64Array
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(offsets, lengths, skips) of the aligned reads of single rows, wherever the file has
        them; rows int64."""
        place = tensor.place(rows)
        return row_spans(tensor.offset, tensor.row_bytes, place, self.alignment)

    def stream(
        self, tensor: StoredTensor, buffer: UInt8Array, following: StoredTensor | None = None
    ) -> Iterator[tuple[int, int, UInt8Array, Int64Array]]:
        """Yield (first, stop, memory, row_starts), tile by tile, through a whole StoredTensor.

        Tiles come in the order of the rows, wherever these lie: sums are made in that order. Two
        halves of ``buffer``: while the caller computes on one tile the next one is read, and
        during the last one the first of ``following``, the StoredTensor that will be streamed next.
        row_starts (n,) int64 are the bytes of memory where the rows begin.
        """
        self.begin(tensor, buffer)
        (_, side, pending), self.early = self.early, None
        try:
            while pending is not None:
                first, stop, starts, submitted = pending
                side, pending = 1 - side, None
                if stop < tensor.rows:
                    pending = self._read_tile(tensor, stop, buffer, side)
                elif following is not None:
                    self.early = following, side, self._read_tile(following, 0, buffer, side)
                self.wait(submitted)
                yield first, stop, buffer, starts
        finally:
            if pending is not None:  # the caller has had enough
                self.wait(pending[-1])

    def begin(self, tensor: StoredTensor, buffer: UInt8Array) -> None:
        """Start to read the first tile of what ``stream`` will go through next."""
        if self.early is None or self.early[0] is not tensor:
            self._drop_early()
            self.early = tensor, 0, self._read_tile(tensor, 0, buffer, 0)

    def _read_tile(self, tensor: StoredTensor, first: int, buffer: UInt8Array, side: int) -> Tile:
        """Start to read rows from ``first`` on into a half of buffer; what ``stream`` works on."""
        half = len(buffer) // 2 // self.alignment * self.alignment
        if tensor.places is not None:
            return self._gather_tile(tensor, first, buffer, half, side)
        stop = min(first + max(1, (half - self.alignment) // tensor.row_bytes), tensor.rows)
        offset, length, skip = self.span(
            tensor.offset + first * tensor.row_bytes, (stop - first) * tensor.row_bytes
        )
        starts = side * half + skip + np.arange(stop - first, dtype=np.int64) * tensor.row_bytes
        return first, stop, starts, self.submit_range(offset, length, buffer, side * half)

    def _gather_tile(
        self, tensor: StoredTensor, first: int, buffer: UInt8Array, half: int, side: int
    ) -> Tile:
        """The same of rows that lie anywhere: each is read by itself, but neighbours as one."""
        slot_bytes = self.slot_bytes(tensor.row_bytes, tensor.offset)
        stop = min(first + tile_rows(half, slot_bytes), tensor.rows)
        offsets, lengths, skips = self.row_spans(tensor, np.arange(first, stop))
        order = offsets.argsort()
        starts = np.empty(stop - first, dtype=np.int64)
        starts[order] = side * half + np.arange(stop - first) * slot_bytes
        reads = self.submit(offsets[order], lengths[order], buffer, starts[order])
        return first, stop, starts + skips, reads

    def _drop_early(self) -> None:
        """The buffer is wanted for something else than what was read into it early."""
        if self.early is not None:
            (*_, submitted), self.early = self.early[2], None
            self.wait(submitted)

    def close(self) -> None:
        """Close the files; reads in flight are finished first."""
        self.settle()
        self.reader = None
        while self.files:
            self.files.pop().close()


def tile_rows(half: int, slot_bytes: int) -> int:
    """How many rows that lie apart, ``slot_bytes`` each, half of a stream's buffer holds."""
    return max(1, half // slot_bytes)


def slot_bytes(nbytes: int, stride: int, offset: int, alignment: int) -> int:
    """Room for the span of ``nbytes`` that begin at ``offset``, or any number of strides later."""
    worst_skip = alignment - math.gcd(offset, stride, alignment)
    return -(-(worst_skip + nbytes) // alignment) * alignment


def row_spans(
    offset: int, row_bytes: int, rows: Int64Array, alignment: int, stride: int | None = None
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """(offsets, lengths, skips) of the aligned reads of the rows (n,) int64 of a tensor at
    ``offset``; a row begins ``skips`` bytes into its read.

    stride  from where a row begins to where the next one does; None: row_bytes
    """
    stride = row_bytes if stride is None else stride
    begin = offset + rows * stride
    if math.gcd(offset, stride, row_bytes) % alignment == 0:  # nothing to widen
        return begin, np.full(len(rows), row_bytes), np.zeros(len(rows), dtype=np.int64)
    offsets = begin // alignment * alignment
    ends = -(-(begin + row_bytes) // alignment) * alignment
    return offsets, ends - offsets, begin - offsets


def reads_of(
    offsets: Int64Array, lengths: Int64Array, destinations: Int64Array, gap_bytes: int, room: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """How rows of about one length are read: (straight, staged, copies), those of
    ``kernels.merge_reads``.

    Large rows are cut into pieces that are in flight together; small ones are merged with their
    neighbours, through a staging buffer of ``room`` bytes where those are apart in memory.
    """
    if len(lengths) and lengths.max() > PIECE_BYTES:
        none = np.empty((3, 0), dtype=np.int64)
        return _cut(offsets, lengths, destinations), none, none
    return kernels.merge_reads(offsets, lengths, destinations, gap_bytes, MERGED_BYTES, room)


def _cut(offsets: Int64Array, lengths: Int64Array, destinations: Int64Array) -> Int64Array:
    """The same reads in pieces of at most PIECE_BYTES, as one array (3, n)."""
    counts = -(-lengths // PIECE_BYTES)
    whose = np.repeat(np.arange(len(lengths)), counts)
    begins = (np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)) * PIECE_BYTES
    left = lengths[whose] - begins
    lengths = np.minimum(left, PIECE_BYTES)
    return np.stack([offsets[whose] + begins, lengths, destinations[whose] + begins])
