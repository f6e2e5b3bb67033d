/* Many reads in flight from a pool of threads: submit a batch, wait for it. */
#pragma once

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "read_batch.h"

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    read_batch *head, *tail; /* batches with requests not yet taken */
    int stopping, n_threads;
    pthread_t *threads;
} read_pool;

/* Read all of a request; -1, or the errno, or 0 where the file ended. */
static int read_fully(int fd, read_request *r) {
    int64_t done = 0;
    while (done < r->length) {
        ssize_t n = pread(fd, r->destination + done, r->length - done, r->offset + done);
        if (n < 0 && errno == EINTR && r->retries++ < READ_RETRIES) continue;
        if (n <= 0) return read_error(r, n ? errno : 0, r->offset + done);
        done += n;
        r->begun = 1;
    }
    return -1;
}

static void *read_worker(void *argument) {
    read_pool *pool = argument;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->head && !pool->stopping) pthread_cond_wait(&pool->work, &pool->lock);
        if (!pool->head) break;
        read_batch *batch = pool->head;
        int64_t index = batch->taken++;
        if (batch->taken == batch->count) {
            pool->head = batch->next;
            if (!pool->head) pool->tail = NULL;
        }
        pthread_mutex_unlock(&pool->lock);
        int error = read_fully(batch->fd, &batch->requests[index]);
        pthread_mutex_lock(&pool->lock);
        read_request_done(&batch->requests[index], error);
        if (batch->done == batch->count) pthread_cond_broadcast(&pool->finished);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void read_pool_free(read_pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    pool->stopping = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->n_threads; i++) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->finished);
    pthread_mutex_destroy(&pool->lock);
    free(pool->threads);
    free(pool);
}

/* A pool of up to n threads, or NULL where not even one could be had. */
static read_pool *read_pool_new(int n) {
    read_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->threads = calloc(n, sizeof *pool->threads);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 64 << 10);
    while (pool->threads && pool->n_threads < n &&
           !pthread_create(&pool->threads[pool->n_threads], &attributes, read_worker, pool))
        pool->n_threads++;
    pthread_attr_destroy(&attributes);
    if (pool->n_threads) return pool;
    read_pool_free(pool);
    return NULL;
}

static void read_pool_submit(read_pool *pool, read_batch *batch) {
    read_batch_begin(batch);
    if (!batch->count) return;
    pthread_mutex_lock(&pool->lock);
    if (pool->tail) pool->tail->next = batch;
    else pool->head = batch;
    pool->tail = batch;
    if (batch->count == 1) pthread_cond_signal(&pool->work);
    else pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
}

static void read_pool_wait(read_pool *pool, read_batch *batch) {
    pthread_mutex_lock(&pool->lock);
    while (batch->done < batch->count) pthread_cond_wait(&pool->finished, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}
