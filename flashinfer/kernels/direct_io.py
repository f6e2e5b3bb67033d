"""Many reads in flight, straight to where they are used (paper section 3.2)."""

import errno
import itertools
import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from flashinfer.formats.arrays import Int64Array, UInt8Array
from flashinfer.kernels import doors
from flashinfer.kernels.doors import checked


@checked(doors.merge_reads)
def merge_reads(
    offsets: Int64Array,
    lengths: Int64Array,
    destinations: Int64Array,
    gap_bytes: int,
    most_bytes: int,
    room: int,
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Merge reads that are neighbours on flash. Only reads sorted by ``offsets`` can be merged.

    Reads at most ``gap_bytes`` apart (-1: merge none) become one of at most ``most_bytes``. If
    their destinations are adjacent too, the data is read in place; otherwise into the staging
    buffer, while its ``room`` lasts. All figures are bytes. Returns three (3, n) arrays: direct
    reads (offset, length, destination), staged reads (offset, length, staging offset), and copies
    (destination, staging offset, length).
    """
    straight: list[tuple[int, int, int]] = []
    staged: list[tuple[int, int, int]] = []
    copies: list[tuple[int, int, int]] = []
    rows = list(zip(offsets.tolist(), lengths.tolist(), destinations.tolist(), strict=True))
    used, i = 0, 0
    while i < len(rows):
        begin, end, side_by_side, n = rows[i][0], sum(rows[i][:2]), True, 1
        for (before, length, place), (offset, n_bytes, to) in itertools.pairwise(rows[i:]):
            span = max(end, offset + n_bytes) - begin
            near = before <= offset <= end + gap_bytes and span <= most_bytes
            straight_on = side_by_side and offset == end and to == place + length
            if not near or not (straight_on or used + span <= room):
                break
            end, side_by_side, n = begin + span, straight_on, n + 1
        if side_by_side:
            straight.append((begin, end - begin, rows[i][2]))
        else:
            staged.append((begin, end - begin, used))
            copies += [(to, used + o - begin, size) for o, size, to in rows[i : i + n]]
            used += end - begin
        i += n
    return _columns(straight), _columns(staged), _columns(copies)


def _columns(rows: list[tuple[int, int, int]]) -> Int64Array:
    """(3, n), from n rows of three."""
    return np.ascontiguousarray(np.array(rows, dtype=np.int64).reshape(-1, 3).T)


@checked(doors.copy_rows)
def copy_rows(
    source: UInt8Array,
    starts: Int64Array,
    target: UInt8Array,
    places: Int64Array,
    lengths: Int64Array,
) -> None:
    """target[places[i]:] = source[starts[i]:], ``lengths[i]`` bytes each."""
    for start, place, length in zip(
        starts.tolist(), places.tolist(), lengths.tolist(), strict=True
    ):
        target[place : place + length] = source[start : start + length]


class Reader:
    """Many reads of files in flight, from a pool of threads (paper section 3.2).

    threads  reads in flight; 0: the compiled twin uses io_uring
    Raises OSError where io_uring is not available.
    """

    def __init__(self, threads: int) -> None:
        doors.reader(threads)
        if not threads:
            raise OSError(errno.ENOSYS, "not with the NumPy kernels")
        self.pool = ThreadPoolExecutor(threads)

    def submit(
        self,
        fd: int,
        end: int,
        offsets: Int64Array,
        lengths: Int64Array,
        memory: UInt8Array,
        destinations: Int64Array,
    ) -> "Ticket":
        """Start reading ``lengths[i]`` bytes at ``offsets[i]`` to ``memory[destinations[i]:]``.

        fd   an open file's descriptor
        end  bytes of the file. A read may ask for more, as direct reads of its last bytes have to:
             it is complete with all that there are.
        """
        doors.submit(fd, end, offsets, lengths, memory, destinations)
        view = memory.data
        spans = zip(offsets.tolist(), lengths.tolist(), destinations.tolist(), strict=True)
        return Ticket(
            [self.pool.submit(_read, fd, end, o, view[d : d + n]) for o, n, d in spans],
        )


def _read(fd: int, end: int, offset: int, view: memoryview) -> None:
    """Fill ``view`` from ``offset`` of a file of ``end`` bytes, as far as these go."""
    done = 0
    while done < len(view) and not (done and offset + done >= end):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count


class Ticket:
    """Reads in flight."""

    def __init__(self, futures: list[Future[None]]) -> None:
        self.futures = futures

    def wait(self) -> None:
        """Return when all reads are complete.

        Raises OSError (errno, text, index of the read) for a read that fails, EOFError (index)
        where the file ends before a read is complete.
        """
        # exception() waits, so that no read is in flight any more when the first failure is raised.
        failures = [(i, error) for i, f in enumerate(self.futures) if (error := f.exception())]
        self.futures = []
        for index, failure in failures:
            if isinstance(failure, EOFError):
                raise EOFError(index)
            if not isinstance(failure, OSError):
                raise failure
            raise OSError(failure.errno, failure.strerror, index)
