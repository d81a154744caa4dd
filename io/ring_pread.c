#include "io/ring_backend.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/*
 * A few threads take reads from one queue and put completions into another; both are rings of
 * `depth` entries, which is all that can be in flight. A read counts as in flight from submit until
 * wait has handed its completion out, so neither queue can overflow.
 */
struct pread_ring {
    struct slu_ring base; /* first: callers hold this */
    int fd;
    unsigned depth;
    unsigned n_threads; /* started */

    pthread_mutex_t lock; /* guards everything below */
    pthread_cond_t has_work;
    pthread_cond_t has_done;
    struct slu_read *reads; /* [depth], n_reads from first_read */
    unsigned first_read, n_reads;
    struct slu_read_done *dones; /* [depth], n_dones from first_done */
    unsigned first_done, n_dones;
    unsigned n_in_flight;
    bool is_stopping;

    pthread_t threads[SLU_RING_PREAD_MAX];
};

/* All of it, however many calls it takes. */
static int read_whole(const struct pread_ring *ring, const struct slu_read *read)
{
    uint32_t n_read = 0;
    unsigned n_retries = 0;
    while (n_read < read->bytes) {
        ssize_t n = pread(ring->fd, (char *)read->buffer + n_read, read->bytes - n_read,
                          (off_t)(read->offset + n_read));
        if (n < 0) {
            if (errno == EINTR || (errno == EAGAIN && n_retries++ < SLU_RING_RETRIES_MAX)) {
                continue;
            }
            return SLU_EIO;
        }
        if (n_read + (uint32_t)n == read->bytes) {
            break;
        }
        uint32_t kept = slu_ring_kept(ring->base.is_direct, (uint32_t)n);
        if (kept == 0) {
            return SLU_EIO; /* the file ends here */
        }
        n_read += kept;
    }
    slu_ring_used(ring->fd, ring->base.is_direct, read);
    return 0;
}

static void *reader_main(void *arg)
{
    struct pread_ring *ring = arg;
    pthread_mutex_lock(&ring->lock);
    for (;;) {
        while (ring->n_reads == 0 && !ring->is_stopping) {
            pthread_cond_wait(&ring->has_work, &ring->lock);
        }
        if (ring->is_stopping) {
            break;
        }
        struct slu_read read = ring->reads[ring->first_read];
        ring->first_read = (ring->first_read + 1) % ring->depth;
        ring->n_reads--;
        pthread_mutex_unlock(&ring->lock);

        int result = read_whole(ring, &read);

        pthread_mutex_lock(&ring->lock);
        assert(ring->n_dones < ring->depth);
        ring->dones[(ring->first_done + ring->n_dones) % ring->depth] =
            (struct slu_read_done){.tag = read.tag, .result = result};
        ring->n_dones++;
        pthread_cond_signal(&ring->has_done);
    }
    pthread_mutex_unlock(&ring->lock);
    return NULL;
}

static int pread_submit(struct slu_ring *base, const struct slu_read *read, struct slu_err *err)
{
    struct pread_ring *ring = (struct pread_ring *)base;
    pthread_mutex_lock(&ring->lock);
    int e = slu_ring_check(read, ring->n_in_flight, ring->depth, err);
    if (e == 0) {
        ring->reads[(ring->first_read + ring->n_reads) % ring->depth] = *read;
        ring->n_reads++;
        ring->n_in_flight++;
        pthread_cond_signal(&ring->has_work);
    }
    pthread_mutex_unlock(&ring->lock);
    return e;
}

static int pread_wait(struct slu_ring *base, struct slu_read_done *ret_done, unsigned n_max,
                      bool block)
{
    struct pread_ring *ring = (struct pread_ring *)base;
    unsigned n = 0;
    pthread_mutex_lock(&ring->lock);
    while (block && n_max > 0 && ring->n_dones == 0 && ring->n_in_flight > 0) {
        pthread_cond_wait(&ring->has_done, &ring->lock);
    }
    for (; n < n_max && ring->n_dones > 0; n++) {
        ret_done[n] = ring->dones[ring->first_done];
        ring->first_done = (ring->first_done + 1) % ring->depth;
        ring->n_dones--;
        ring->n_in_flight--;
    }
    pthread_mutex_unlock(&ring->lock);
    return (int)n;
}

/* Reads that no thread has begun are dropped; those begun are waited for. */
static void pread_destroy(struct slu_ring *base)
{
    struct pread_ring *ring = (struct pread_ring *)base;
    pthread_mutex_lock(&ring->lock);
    ring->is_stopping = true;
    pthread_cond_broadcast(&ring->has_work);
    pthread_mutex_unlock(&ring->lock);
    for (unsigned i = 0; i < ring->n_threads; i++) {
        pthread_join(ring->threads[i], NULL);
    }
    if (ring->fd >= 0) {
        close(ring->fd);
    }
    pthread_mutex_destroy(&ring->lock);
    pthread_cond_destroy(&ring->has_work);
    pthread_cond_destroy(&ring->has_done);
    free(ring->reads);
    free(ring->dones);
    free(ring);
}

int slu_ring_pread_start(const struct slu_ring_start *start, struct slu_ring **ret_ring,
                         struct slu_err *err)
{
    struct pread_ring *ring = calloc(1, sizeof *ring);
    if (!ring) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for a reader");
    }
    ring->base = (struct slu_ring){
        .submit = pread_submit,
        .wait = pread_wait,
        .destroy = pread_destroy,
        .backend = "pread",
        .is_direct = start->is_direct,
    };
    ring->fd = -1; /* the caller's until all has succeeded */
    ring->depth = start->depth;
    pthread_mutex_init(&ring->lock, NULL);
    pthread_cond_init(&ring->has_work, NULL);
    pthread_cond_init(&ring->has_done, NULL);
    ring->reads = calloc(start->depth, sizeof *ring->reads);
    ring->dones = calloc(start->depth, sizeof *ring->dones);
    if (!ring->reads || !ring->dones) {
        pread_destroy(&ring->base);
        return slu_err_set(err, SLU_ENOMEM, "no memory for a reader of depth %u", start->depth);
    }
    /* No reader looks at fd before the first submit. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int e = 0;
    while (e == 0 && ring->n_threads < start->n_threads) {
        e = pthread_create(&ring->threads[ring->n_threads], NULL, reader_main, ring);
        ring->n_threads += e == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (ring->n_threads == 0) { /* fewer than asked for will do */
        pread_destroy(&ring->base);
        return slu_err_set(err, SLU_ENOMEM, "the system refuses a thread to read with: %s",
                           strerror(e));
    }
    ring->fd = start->fd;
    *ret_ring = &ring->base;
    return 0;
}

size_t slu_ring_pread_bytes(unsigned depth, unsigned n_threads)
{
    size_t touched_stack_bytes = 16384;
    return sizeof(struct pread_ring) +
           depth * (sizeof(struct slu_read) + sizeof(struct slu_read_done)) +
           n_threads * touched_stack_bytes;
}
