/* Many reads in flight from one thread by io_uring, spoken to by system calls (no liburing).
 * See io_uring(7): a ring of submissions, a ring of completions, both shared with the kernel. */
#pragma once

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "read_batch.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#ifdef __NR_io_uring_setup
#define HAVE_IO_URING 1
#endif
#endif
#endif

typedef struct {
    pthread_mutex_t lock;
    int ring;
    int broken;       /* the errno that the kernel refuses every submission with, or 0 */
    unsigned refused; /* submissions in a row that failed for want of something */
    unsigned entries, in_flight, unsubmitted;
    unsigned *sq_head, *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    size_t rings_bytes, sqes_bytes;
} read_ring;

#ifdef HAVE_IO_URING

/* Hand over what is unsubmitted and wait for `least` completions; 0, or the errno. */
static int ring_enter(read_ring *r, unsigned least, unsigned flags) {
    int n = (int)syscall(__NR_io_uring_enter, r->ring, r->unsubmitted, least, flags, NULL, 0);
    if (n > 0) r->unsubmitted -= n;
    return n < 0 ? errno : 0;
}

static void ring_push(read_ring *r, read_request *request) {
    unsigned tail = *r->sq_tail, index = tail & *r->sq_mask;
    struct io_uring_sqe *sqe = &r->sqes[index];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = IORING_OP_READ;
    sqe->fd = request->batch->fd;
    sqe->off = request->offset;
    sqe->addr = (uint64_t)(uintptr_t)request->destination;
    sqe->len = (unsigned)(request->length < 1 << 30 ? request->length : 1 << 30);
    sqe->user_data = (uint64_t)(uintptr_t)request;
    r->sq_array[index] = index;
    __atomic_store_n(r->sq_tail, tail + 1, __ATOMIC_RELEASE);
    r->unsubmitted++;
    r->in_flight++;
}

/* The ring serves no read: it is the ring's error that is told. */
static void ring_refuse(read_ring *r, read_request *request) {
    request->batch->unserved = 1;
    read_request_done(request, r->broken);
}

/* Take the completions that are there; a part read is asked for again from where it ended. */
static void ring_reap(read_ring *r) {
    unsigned head = *r->cq_head;
    while (head != __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE)) {
        struct io_uring_cqe cqe = r->cqes[head & *r->cq_mask];
        __atomic_store_n(r->cq_head, ++head, __ATOMIC_RELEASE);
        read_request *request = (read_request *)(uintptr_t)cqe.user_data;
        int again = cqe.res == -EINTR || cqe.res == -EAGAIN;
        r->in_flight--;
        r->refused = 0;
        if (cqe.res > 0 && cqe.res < request->length) {
            request->offset += cqe.res;
            request->length -= cqe.res;
            request->destination += cqe.res;
            request->begun = again = 1;
            request->retries = 0;
        }
        if (again && request->retries++ < READ_RETRIES) {
            if (r->broken) ring_refuse(r, request);
            else ring_push(r, request);
        } else {
            int error = cqe.res > 0 ? -1 : read_error(request, -cqe.res, request->offset);
            read_request_done(request, error);
        }
    }
}

/* Give the ring up: what the kernel has not taken over fails now; what it has, it still finishes,
 * and until then nobody may free the memory that it writes to. */
static void ring_break(read_ring *r, int error) {
    unsigned tail = *r->sq_tail;
    r->broken = error;
    for (unsigned at = __atomic_load_n(r->sq_head, __ATOMIC_ACQUIRE); at != tail; at++) {
        ring_refuse(r, (read_request *)(uintptr_t)r->sqes[at & *r->sq_mask].user_data);
        r->in_flight--;
    }
    r->unsubmitted = 0;
}

/* Submit, and let at least `least` completions come. What the kernel lacks just then it may have
 * soon; any other refusal, or too many in a row, is for good. */
static void ring_turn(read_ring *r, unsigned least) {
    int error = r->broken ? 0 : ring_enter(r, least, least ? IORING_ENTER_GETEVENTS : 0);
    int lacking = error == EINTR || error == EAGAIN || error == EBUSY || error == ENOMEM;
    ring_reap(r);
    if (error && (!lacking || ++r->refused > READ_RETRIES)) ring_break(r, error);
    else if (r->broken || (error && error != EINTR)) usleep(100);
    else if (!error) r->refused = 0;
}

static void read_ring_submit(read_ring *r, read_batch *batch) {
    read_batch_begin(batch);
    pthread_mutex_lock(&r->lock);
    for (int64_t i = 0; i < batch->count; i++) {
        if (!batch->requests[i].length) { /* a completion of 0 bytes would mean the file's end */
            read_request_done(&batch->requests[i], -1);
            continue;
        }
        while (r->in_flight >= r->entries && !r->broken) ring_turn(r, 1);
        if (r->broken) ring_refuse(r, &batch->requests[i]);
        else ring_push(r, &batch->requests[i]);
    }
    while (r->unsubmitted) ring_turn(r, 0);
    pthread_mutex_unlock(&r->lock);
}

static void read_ring_wait(read_ring *r, read_batch *batch) {
    pthread_mutex_lock(&r->lock);
    ring_reap(r);
    while (batch->done < batch->count) ring_turn(r, 1);
    pthread_mutex_unlock(&r->lock);
}

static void read_ring_free(read_ring *r) {
    if (!r) return;
    if (r->sqes) munmap(r->sqes, r->sqes_bytes);
    if (r->rings) munmap(r->rings, r->rings_bytes);
    if (r->ring >= 0) close(r->ring);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

/* A ring, or NULL with errno where the kernel has none for us. */
static read_ring *read_ring_new(unsigned entries) {
    struct io_uring_params p;
    read_ring *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    pthread_mutex_init(&r->lock, NULL);
    memset(&p, 0, sizeof p);
    r->ring = (int)syscall(__NR_io_uring_setup, entries, &p);
    if (r->ring < 0 || !(p.features & IORING_FEAT_SINGLE_MMAP)) goto fail;
    size_t sq = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    r->rings_bytes = sq > cq ? sq : cq;
    void *rings = mmap(NULL, r->rings_bytes, protection, flags, r->ring, IORING_OFF_SQ_RING);
    if (rings == MAP_FAILED) goto fail;
    r->rings = rings;
    r->sqes_bytes = p.sq_entries * sizeof(struct io_uring_sqe);
    void *sqes = mmap(NULL, r->sqes_bytes, protection, flags, r->ring, IORING_OFF_SQES);
    if (sqes == MAP_FAILED) goto fail;
    r->sqes = sqes;
    char *base = rings;
    r->sq_head = (unsigned *)(base + p.sq_off.head);
    r->sq_tail = (unsigned *)(base + p.sq_off.tail);
    r->sq_mask = (unsigned *)(base + p.sq_off.ring_mask);
    r->sq_array = (unsigned *)(base + p.sq_off.array);
    r->cq_head = (unsigned *)(base + p.cq_off.head);
    r->cq_tail = (unsigned *)(base + p.cq_off.tail);
    r->cq_mask = (unsigned *)(base + p.cq_off.ring_mask);
    r->cqes = (struct io_uring_cqe *)(base + p.cq_off.cqes);
    r->entries = p.sq_entries;
    return r;
fail: {
    int error = errno ? errno : ENOSYS;
    read_ring_free(r);
    errno = error;
    return NULL;
}
}

#else

static read_ring *read_ring_new(unsigned entries) {
    (void)entries;
    errno = ENOSYS;
    return NULL;
}
static void read_ring_free(read_ring *r) { (void)r; }
static void read_ring_submit(read_ring *r, read_batch *batch) { (void)r, (void)batch; }
static void read_ring_wait(read_ring *r, read_batch *batch) { (void)r, (void)batch; }

#endif
