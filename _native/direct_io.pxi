# Many reads in flight, straight to where they are used; see flashinfer/kernels/.

import os

cimport cython
from libc.errno cimport errno
from libc.stdlib cimport free, malloc
from libc.string cimport memmove


cdef extern from "read_batch.h" nogil:
    ctypedef struct read_request:
        int64_t offset, length
        char *destination

    ctypedef struct read_batch:
        int fd
        int64_t end, count, failed
        int error, unserved
        read_request requests[1]


cdef extern from "read_pool.h" nogil:
    ctypedef struct read_pool:
        int n_threads

    read_pool *read_pool_new(int n)
    void read_pool_free(read_pool *pool)
    void read_pool_submit(read_pool *pool, read_batch *batch)
    void read_pool_wait(read_pool *pool, read_batch *batch)


cdef extern from "read_ring.h" nogil:
    ctypedef struct read_ring:
        unsigned entries

    read_ring *read_ring_new(unsigned entries)
    void read_ring_free(read_ring *ring)
    void read_ring_submit(read_ring *ring, read_batch *batch)
    void read_ring_wait(read_ring *ring, read_batch *batch)


cdef enum:
    RING_ENTRIES = 1024


@cython.no_gc_clear  # __dealloc__ needs the reader, also when a cycle is collected
cdef class Ticket:
    """Reads in flight. The destination lives until they are done, whatever happens."""

    cdef read_batch *batch
    cdef Reader reader
    cdef object memory
    cdef bint waiting

    def wait(self):
        """Return when all is read. Raises OSError (errno, text, index of the read), or
        EOFError (index) where the file ends before."""
        cdef int64_t failed
        cdef int error, unserved
        if self.batch == NULL:
            return
        if self.waiting:
            raise RuntimeError("two threads wait for the same reads")
        self.waiting = True
        self.reader.wait(self.batch)
        failed, error, unserved = self.batch.failed, self.batch.error, self.batch.unserved
        free(self.batch)
        self.batch = NULL
        self.memory = None
        if failed >= 0 and error:
            reason = os.strerror(error)
            if unserved:
                reason = f"io_uring fails: {reason}; --io threads does without"
            raise OSError(error, reason, int(failed))
        if failed >= 0:
            raise EOFError(int(failed))

    def __dealloc__(self):
        if self.batch != NULL:
            self.reader.wait(self.batch)
            free(self.batch)


cdef class Reader:
    """Reads files, by a pool of threads, or with none by io_uring.

    Raises OSError where the threads, or the ring, cannot be had.
    """

    cdef read_pool *pool
    cdef read_ring *ring

    def __cinit__(self, threads):
        try:
            n_threads = <int>whole(threads, 0, MOST_THREADS)
        except REFUSALS:
            explained("reader", threads)
            raise
        if n_threads:
            self.pool = read_pool_new(n_threads)
            if self.pool == NULL:
                raise OSError("no thread could be started for reading")
        else:
            self.ring = read_ring_new(RING_ENTRIES)
            if self.ring == NULL:
                raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        with nogil:
            if self.pool != NULL:
                read_pool_free(self.pool)
            if self.ring != NULL:
                read_ring_free(self.ring)

    cdef void wait(self, read_batch *batch) noexcept:
        with nogil:
            if self.ring != NULL:
                read_ring_wait(self.ring, batch)
            else:
                read_pool_wait(self.pool, batch)

    def submit(self, fd, end, offsets, lengths, memory, destinations):
        """Start reading ``lengths[i]`` bytes at ``offsets[i]`` to ``memory[destinations[i]:]``."""
        try:
            return self._submit(fd, end, offsets, lengths, memory, destinations)
        except REFUSALS:
            explained("submit", fd, end, offsets, lengths, memory, destinations)
            raise

    cdef _submit(self, fd_given, end_given, offsets_array, lengths_array, memory_array,
                 destinations_array):
        cdef int fd = <int>whole(fd_given, 0, (1 << 31) - 1)
        cdef int64_t end_of_file = whole(end_given, 0, MOST)
        cdef const int64_t[::1] offsets = int64s(offsets_array), lengths = int64s(lengths_array)
        cdef const int64_t[::1] destinations = int64s(destinations_array)
        check_array(memory_array, UINT8, 1)
        cdef uint8_t[::1] memory = memory_array
        cdef Py_ssize_t n = offsets.shape[0], i
        cdef Ticket ticket = Ticket.__new__(Ticket)
        if lengths.shape[0] != n or destinations.shape[0] != n:
            raise Refused()
        for i in range(n):
            if not (fits(offsets[i], lengths[i], MOST)
                    and fits(destinations[i], lengths[i], memory.shape[0])):
                raise Refused()
        cdef read_batch *batch = <read_batch *>malloc(sizeof(read_batch) + (n + 1) * sizeof(read_request))
        if batch == NULL:
            raise MemoryError("no memory for the read requests")
        batch.fd, batch.end, batch.count = fd, end_of_file, n
        for i in range(n):
            batch.requests[i].offset, batch.requests[i].length = offsets[i], lengths[i]
            batch.requests[i].destination = <char *>&memory[0] + destinations[i]
        ticket.batch, ticket.reader, ticket.memory = batch, self, memory_array
        with nogil:
            if self.ring != NULL:
                read_ring_submit(self.ring, batch)
            else:
                read_pool_submit(self.pool, batch)
        return ticket


def merge_reads(offsets, lengths, destinations, gap_bytes, most_bytes, room):
    """Join reads of neighbours on flash."""
    try:
        return _merge_reads(offsets, lengths, destinations, gap_bytes, most_bytes, room)
    except REFUSALS:
        explained("merge_reads", offsets, lengths, destinations, gap_bytes, most_bytes, room)
        raise


cdef _merge_reads(offsets_array, lengths_array, destinations_array, gap_given, most_given,
                  room_given):
    cdef const int64_t[::1] offsets = int64s(offsets_array), lengths = int64s(lengths_array)
    cdef const int64_t[::1] destinations = int64s(destinations_array)
    cdef int64_t gap_bytes = whole(gap_given, -1, MOST), most_bytes = whole(most_given, 0, MOST)
    cdef int64_t room = whole(room_given, 0, MOST)
    cdef Py_ssize_t n = offsets.shape[0], i = 0, k, stop, n_straight = 0, n_staged = 0, n_copies = 0
    cdef int64_t used = 0, begin, end, span
    cdef bint side_by_side, straight_on
    if lengths.shape[0] != n or destinations.shape[0] != n:
        raise Refused()
    for k in range(n):
        if not (fits(offsets[k], lengths[k], MOST) and fits(destinations[k], lengths[k], MOST)):
            raise Refused()
    all_straight, all_staged, all_copies = (np.empty((3, n), dtype=np.int64) for _ in range(3))
    cdef int64_t[:, ::1] straight = all_straight, staged = all_staged, copies = all_copies
    while i < n:
        begin, end, side_by_side, stop = offsets[i], offsets[i] + lengths[i], True, i + 1
        while stop < n:
            span = max(end, offsets[stop] + lengths[stop]) - begin
            if offsets[stop] < offsets[stop - 1] or offsets[stop] - end > gap_bytes or span > most_bytes:
                break
            straight_on = (side_by_side and offsets[stop] == end
                           and destinations[stop] == destinations[stop - 1] + lengths[stop - 1])
            if not straight_on and used + span > room:
                break
            end, side_by_side, stop = begin + span, straight_on, stop + 1
        if side_by_side:
            straight[0, n_straight], straight[1, n_straight] = begin, end - begin
            straight[2, n_straight] = destinations[i]
            n_straight += 1
        else:
            staged[0, n_staged], staged[1, n_staged], staged[2, n_staged] = begin, end - begin, used
            n_staged += 1
            for k in range(i, stop):
                copies[0, n_copies], copies[2, n_copies] = destinations[k], lengths[k]
                copies[1, n_copies] = used + offsets[k] - begin
                n_copies += 1
            used += end - begin
        i = stop
    return all_straight[:, :n_straight], all_staged[:, :n_staged], all_copies[:, :n_copies]


def copy_rows(source, starts, target, places, lengths):
    """Copy rows from one memory to another."""
    try:
        _copy_rows(source, starts, target, places, lengths)
    except REFUSALS:
        explained("copy_rows", source, starts, target, places, lengths)
        raise


cdef _copy_rows(source_array, starts_array, target_array, places_array, lengths_array):
    cdef const uint8_t[::1] source = bytes_1d(source_array)
    check_array(target_array, UINT8, 1)
    cdef uint8_t[::1] target = target_array
    cdef const int64_t[::1] starts = int64s(starts_array), places = int64s(places_array)
    cdef const int64_t[::1] lengths = int64s(lengths_array)
    cdef Py_ssize_t n = starts.shape[0], i
    if places.shape[0] != n or lengths.shape[0] != n:
        raise Refused()
    for i in range(n):
        if not (fits(starts[i], lengths[i], source.shape[0])
                and fits(places[i], lengths[i], target.shape[0])):
            raise Refused()
    cdef Extent[4] arrays
    arrays[0] = extent(&target[0], target.shape[0])
    arrays[1] = extent(&starts[0], n * sizeof(int64_t))
    arrays[2] = extent(&places[0], n * sizeof(int64_t))
    arrays[3] = extent(&lengths[0], n * sizeof(int64_t))
    check_apart(arrays, 1, 4)
    with nogil:
        for i in range(n):
            if lengths[i]:
                memmove(&target[places[i]], &source[starts[i]], lengths[i])
