"""Many reads in flight, straight to where they are used (paper section 3.2)."""

import errno
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flashinfer.kernels import doors
from flashinfer.kernels.doors import checked


@checked(doors.merge_reads)
def merge_reads(offsets, lengths, destinations, gap_bytes, most_bytes, room):
    """Merge reads of neighbours on flash. Inputs are int64, sorted by ``offsets`` to be of use.

    Reads at most ``gap_bytes`` apart (-1: none) become one of at most ``most_bytes``. If their
    destinations are adjacent too, the data is read in place; otherwise into the staging buffer,
    while its ``room`` lasts. Returns three (3, n) arrays: direct reads (offset, length,
    destination), staged reads (offset, length, staging offset), and copies (destination, staging
    offset, length).
    """
    straight, staged, copies = [], [], []
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
    reads = (np.array(x, dtype=np.int64).reshape(-1, 3).T for x in (straight, staged, copies))
    return tuple(map(np.ascontiguousarray, reads))


@checked(doors.copy_rows)
def copy_rows(source, starts, target, places, lengths):
    """target[places[i]:] = source[starts[i]:], ``lengths[i]`` bytes each; all uint8, int64."""
    for start, place, length in zip(
        starts.tolist(), places.tolist(), lengths.tolist(), strict=True
    ):
        target[place : place + length] = source[start : start + length]


class Reader:
    """Many reads of one file in flight, from a pool of threads (paper section 3.2).

    With 0 threads the compiled twin uses io_uring. Raises OSError where that cannot be had.
    """

    def __init__(self, fd, threads):
        doors.reader(fd, threads)
        if not threads:
            raise OSError(errno.ENOSYS, "not with the NumPy kernels")
        self.fd = fd
        self.pool = ThreadPoolExecutor(threads)

    def submit(self, offsets, lengths, memory, destinations):
        """Start reading ``lengths[i]`` bytes at ``offsets[i]`` to ``memory[destinations[i]:]``.

        Returns a ticket; ``ticket.wait()`` returns when all is read. It raises OSError (errno,
        text, index of the read), or EOFError (index) where the file ends before.
        """
        doors.submit(offsets, lengths, memory, destinations)
        view = memoryview(memory)
        spans = zip(offsets.tolist(), lengths.tolist(), destinations.tolist(), strict=True)
        return Ticket(
            [self.pool.submit(self._read, o, view[d : d + n]) for o, n, d in spans],
        )

    def _read(self, offset, view):
        done = 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done:]], offset + done)
            if count == 0:
                raise EOFError
            done += count


class Ticket:
    """Reads in flight."""

    def __init__(self, futures):
        self.futures = futures

    def wait(self):
        """Return when all is read. Raises as ``Reader.submit`` says."""
        failures = [(i, f.exception()) for i, f in enumerate(self.futures) if f.exception()]
        self.futures = []
        for index, failure in failures:
            if isinstance(failure, EOFError):
                raise EOFError(index)
            if not isinstance(failure, OSError):
                raise failure
            raise OSError(failure.errno, failure.strerror, index)
