/* A batch of reads of one file, however they are carried out. */
#pragma once

#include <errno.h>
#include <stdint.h>

enum { READ_RETRIES = 20000 }; /* of what fails for want of something just then, in a row */

typedef struct {
    int64_t offset, length; /* in the file, bytes; what is left where a part was read */
    char *destination;
    struct read_batch *batch;
    int begun;   /* a part was read */
    int retries; /* how often it was asked for again, as nothing could be read just then */
} read_request;

typedef struct read_batch {
    struct read_batch *next;
    int fd;
    int64_t end; /* bytes of the file: a read that got all up to there is whole */
    int64_t count, taken, done;
    int64_t failed; /* index of the first request that failed, or -1 */
    int error;      /* its errno, or 0 where the file ended before it */
    int unserved;   /* that is an error of the ring's own, not of the read */
    read_request requests[];
} read_batch;

static void read_batch_begin(read_batch *batch) {
    batch->next = NULL;
    batch->taken = batch->done = 0;
    batch->failed = -1;
    batch->unserved = 0;
    for (int64_t i = 0; i < batch->count; i++) {
        read_request *request = &batch->requests[i];
        request->batch = batch;
        request->begun = request->retries = 0;
    }
}

/* What an error of a read that got up to `at` means: after a part that ends off the alignment of
 * direct reads, where only the file's end leaves one, EINVAL is that end. -1: it has what there is,
 * as a direct read of a file's last bytes asks for more than these. */
static int read_error(const read_request *request, int error, int64_t at) {
    if (error == EINVAL && request->begun) error = 0;
    return error == 0 && request->begun && at >= request->batch->end ? -1 : error;
}

/* Count a request as done; error: its errno, 0 for the file's end, or -1 where it succeeded. */
static void read_request_done(read_request *request, int error) {
    read_batch *batch = request->batch;
    int64_t index = request - batch->requests;
    batch->done++;
    if (error >= 0 && (batch->failed < 0 || index < batch->failed)) {
        batch->failed = index;
        batch->error = error;
    }
}
