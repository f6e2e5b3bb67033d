# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Many reads in flight, straight to where they are used; see flashinfer/kernels.py."""

import os

import numpy as np

cimport cython
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy


cdef extern from "read_batch.h" nogil:
    ctypedef struct read_request:
        int64_t offset, length
        char *destination

    ctypedef struct read_batch:
        int fd
        int64_t count, failed
        int error
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

    read_ring *read_ring_new(int file, unsigned entries)
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

    def wait(self):
        """Return when all is read. Raises OSError, or EOFError, with args (index, ...)."""
        cdef int64_t failed
        cdef int error
        if self.batch == NULL:
            return
        self.reader.wait(self.batch)
        failed, error = self.batch.failed, self.batch.error
        free(self.batch)
        self.batch = NULL
        self.memory = None
        if failed >= 0 and error:
            raise OSError(error, os.strerror(error), int(failed))
        if failed >= 0:
            raise EOFError(int(failed))

    def __dealloc__(self):
        if self.batch != NULL:
            self.reader.wait(self.batch)
            free(self.batch)


cdef class Reader:
    """Reads one file, by a pool of threads, or with none by io_uring.

    Raises OSError where the threads, or the ring, cannot be had.
    """

    cdef read_pool *pool
    cdef read_ring *ring
    cdef int fd

    def __cinit__(self, int fd, int threads):
        self.fd = fd
        if threads:
            self.pool = read_pool_new(threads)
            if self.pool == NULL:
                raise OSError("no thread could be started for reading")
        else:
            self.ring = read_ring_new(fd, RING_ENTRIES)
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

    def submit(self, const int64_t[::1] offsets, const int64_t[::1] lengths,
               uint8_t[::1] memory, const int64_t[::1] destinations):
        """Start reading ``lengths[i]`` bytes at ``offsets[i]`` to ``memory[destinations[i]:]``."""
        cdef Py_ssize_t n = offsets.shape[0], i
        cdef Ticket ticket = Ticket.__new__(Ticket)
        if lengths.shape[0] != n or destinations.shape[0] != n:
            raise ValueError(f"{n} offsets, {lengths.shape[0]} lengths, {destinations.shape[0]} destinations")
        for i in range(n):
            if offsets[i] < 0 or lengths[i] < 0 or destinations[i] < 0 or destinations[i] + lengths[i] > memory.shape[0]:
                raise ValueError(f"read {i} of {lengths[i]} bytes to {destinations[i]} does not fit")
        cdef read_batch *batch = <read_batch *>malloc(sizeof(read_batch) + (n + 1) * sizeof(read_request))
        if batch == NULL:
            raise MemoryError("no memory for the read requests")
        batch.fd, batch.count = self.fd, n
        for i in range(n):
            batch.requests[i].offset, batch.requests[i].length = offsets[i], lengths[i]
            batch.requests[i].destination = <char *>&memory[0] + destinations[i]
        ticket.batch, ticket.reader, ticket.memory = batch, self, memory
        with nogil:
            if self.ring != NULL:
                read_ring_submit(self.ring, batch)
            else:
                read_pool_submit(self.pool, batch)
        return ticket


def merge_reads(const int64_t[::1] offsets, const int64_t[::1] lengths,
                const int64_t[::1] destinations, int64_t gap_bytes, int64_t most_bytes,
                int64_t room):
    """Join reads of neighbours on flash; see flashinfer/kernels.py."""
    cdef Py_ssize_t n = offsets.shape[0], i, k, reads = 0
    cdef int64_t used = 0, begin = 0, end = 0, span, place
    cdef bint straight
    if lengths.shape[0] != n or destinations.shape[0] != n:
        raise ValueError(f"{n} offsets, {lengths.shape[0]} lengths, {destinations.shape[0]} destinations")
    firsts, all_spans, all_places = (np.empty(n, dtype=np.int64) for _ in range(3))
    all_sources = np.full(n, -1, dtype=np.int64)
    cdef int64_t[::1] first = firsts, spans = all_spans, places = all_places, sources = all_sources
    for i in range(n):
        span = offsets[i] + lengths[i] - begin
        if (i > 0 and offsets[i] >= offsets[i - 1] and offsets[i] - end <= gap_bytes
                and span <= most_bytes):
            straight = (places[reads - 1] < 0 and offsets[i] == end
                        and destinations[i] == destinations[i - 1] + lengths[i - 1])
            place = places[reads - 1] if places[reads - 1] >= 0 else used
            if straight or place + span <= room:
                if not straight:
                    for k in range(first[reads - 1] if places[reads - 1] < 0 else i, i + 1):
                        sources[k] = place + offsets[k] - begin
                    places[reads - 1], used = place, place + span
                spans[reads - 1], end = span, offsets[i] + lengths[i]
                continue
        first[reads], spans[reads], places[reads] = i, lengths[i], -1
        reads += 1
        begin, end = offsets[i], offsets[i] + lengths[i]
    return firsts[:reads], all_spans[:reads], all_places[:reads], all_sources


def copy_rows(const uint8_t[::1] source, const int64_t[::1] starts, uint8_t[::1] target,
              const int64_t[::1] places, const int64_t[::1] lengths):
    """Copy rows from one memory to another; see flashinfer/kernels.py."""
    cdef Py_ssize_t n = starts.shape[0], i
    if places.shape[0] != n or lengths.shape[0] != n:
        raise ValueError(f"{n} starts, {places.shape[0]} places, {lengths.shape[0]} lengths")
    for i in range(n):
        if (lengths[i] < 0 or starts[i] < 0 or starts[i] + lengths[i] > source.shape[0]
                or places[i] < 0 or places[i] + lengths[i] > target.shape[0]):
            raise ValueError(f"row {i} of {lengths[i]} bytes does not fit")
    with nogil:
        for i in range(n):
            if lengths[i]:
                memcpy(&target[places[i]], &source[starts[i]], lengths[i])
