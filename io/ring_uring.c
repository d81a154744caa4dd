#include "io/ring_backend.h"

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/*
 * One io_uring. Submissions come from many threads and completions are taken by one, so the
 * submission queue and the table of requests have a lock, and the completion queue needs none.
 * A request stays in the table, and its index is the kernel's user_data, until it is complete;
 * what the kernel did only in part is submitted again by whoever waits.
 *
 * SQPOLL, SINGLE_ISSUER and DEFER_TASKRUN were measured to give nothing here.
 */

/* The kernel takes no larger registered buffer, and no more of them than this. */
#define BUFFER_BYTES_MAX ((size_t)1 << 30)
#define BUFFERS_MAX      1024u

/* Of a submission that the kernel refused and that was made into nothing. */
#define NO_REQUEST UINT64_MAX

struct request {
    struct slu_read read;
    uint32_t n_read;
    unsigned n_retries;
    unsigned next_free;
};

struct uring_ring {
    struct slu_ring base; /* first: callers hold this */
    struct io_uring uring;
    int fd;
    bool has_fixed_file;
    unsigned depth;
    struct iovec *buffers; /* registered; none overlap */
    unsigned n_buffers;

    pthread_mutex_t lock;     /* guards everything below, and uring's submission side */
    struct request *requests; /* [depth] */
    unsigned first_free;
    unsigned n_in_flight; /* submitted, completion not yet handed out */
};

/* The registered buffer that holds all of the bytes, or -1. */
static int find_buffer(const struct uring_ring *ring, const char *start, size_t bytes)
{
    for (unsigned i = 0; i < ring->n_buffers; i++) {
        const char *base = ring->buffers[i].iov_base;
        size_t len = ring->buffers[i].iov_len;
        if (start >= base && bytes <= len && (size_t)(start - base) <= len - bytes) {
            return (int)i;
        }
    }
    return -1;
}

/* Hands all that is queued to the kernel, which may take it in parts. 0 or a negative errno. */
static int flush_locked(struct uring_ring *ring)
{
    int n = 0;
    for (unsigned i = 0; i < SLU_RING_RETRIES_MAX; i++) {
        n = io_uring_submit(&ring->uring);
        if (io_uring_sq_ready(&ring->uring) == 0) {
            return 0;
        }
        if (n < 0 && n != -EINTR && n != -EAGAIN && n != -EBUSY) {
            break;
        }
    }
    return n < 0 ? n : -EIO;
}

/* Hands the rest of a request to the kernel. 0 or a negative errno. */
static int submit_locked(struct uring_ring *ring, unsigned index)
{
    const struct request *request = &ring->requests[index];
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
    if (!sqe) { /* nothing but what the kernel refused before */
        int e = flush_locked(ring);
        sqe = e == 0 ? io_uring_get_sqe(&ring->uring) : NULL;
        if (!sqe) {
            return e < 0 ? e : -EBUSY;
        }
    }
    int fd = ring->has_fixed_file ? 0 : ring->fd;
    char *at = (char *)request->read.buffer + request->n_read;
    uint32_t n_left = request->read.bytes - request->n_read;
    uint64_t offset = request->read.offset + request->n_read;
    int buffer = find_buffer(ring, at, n_left);
    if (buffer >= 0) {
        io_uring_prep_read_fixed(sqe, fd, at, n_left, offset, buffer);
    } else {
        io_uring_prep_read(sqe, fd, at, n_left, offset);
    }
    if (ring->has_fixed_file) {
        sqe->flags |= IOSQE_FIXED_FILE;
    }
    if (request->read.is_fresh && buffer < 0) {
        sqe->flags |= IOSQE_ASYNC; /* or its memory is provided right here, one read at a time */
    }
    io_uring_sqe_set_data64(sqe, index);

    int e = flush_locked(ring);
    if (e < 0) {
        /* The entry can't be taken out of the queue any more, but it can be made harmless. */
        io_uring_prep_nop(sqe);
        io_uring_sqe_set_data64(sqe, NO_REQUEST);
    }
    return e;
}

static int uring_submit(struct slu_ring *base, const struct slu_read *read, struct slu_err *err)
{
    struct uring_ring *ring = (struct uring_ring *)base;
    pthread_mutex_lock(&ring->lock);
    int e = slu_ring_check(read, ring->n_in_flight, ring->depth, err);
    if (e == 0) {
        unsigned index = ring->first_free;
        struct request *request = &ring->requests[index];
        unsigned next_free = request->next_free;
        *request = (struct request){.read = *read, .next_free = next_free};
        e = submit_locked(ring, index);
        if (e == 0) {
            ring->first_free = next_free;
            ring->n_in_flight++;
        } else {
            e = slu_err_set(err, SLU_EIO, "io_uring takes no read: %s", strerror(-e));
        }
    }
    pthread_mutex_unlock(&ring->lock);
    return e;
}

/* Results after which a read is to be tried again. When a thread ends, the kernel gives up what it
 * had submitted: with ECANCELED, or with EFAULT where the read wants that thread's memory. */
static bool is_transient(int result)
{
    return result == -EINTR || result == -EAGAIN || result == -ECANCELED || result == -EFAULT;
}

/* Books `result` of the kernel. True when the request is complete, *ret_result then being 0 or
 * SLU_EIO; otherwise the rest of it has been submitted. */
static bool advance_locked(struct uring_ring *ring, unsigned index, int result, int *ret_result)
{
    struct request *request = &ring->requests[index];
    *ret_result = SLU_EIO;
    if (is_transient(result)) {
        if (request->n_retries++ >= SLU_RING_RETRIES_MAX) {
            return true;
        }
    } else if (result < 0) {
        return true;
    } else {
        if (request->n_read + (uint32_t)result == request->read.bytes) {
            *ret_result = 0;
            return true;
        }
        uint32_t kept = slu_ring_kept(ring->base.is_direct, (uint32_t)result);
        if (kept == 0) {
            return true; /* the file ends here */
        }
        request->n_read += kept;
    }
    /* A system that can start no thread for it gives it up; what is tried again goes without. */
    request->read.is_fresh = false;
    return submit_locked(ring, index) < 0;
}

/* Takes one completion off the queue. 1 when it ended a read, 0 when not. */
static int take(struct uring_ring *ring, struct io_uring_cqe *cqe, struct slu_read_done *ret_done)
{
    uint64_t data = cqe->user_data;
    int result = cqe->res;
    io_uring_cqe_seen(&ring->uring, cqe);
    if (data == NO_REQUEST) {
        return 0;
    }
    unsigned index = (unsigned)data;
    struct slu_read read = {0};
    pthread_mutex_lock(&ring->lock);
    assert(index < ring->depth && ring->n_in_flight > 0);
    bool is_complete = advance_locked(ring, index, result, &result);
    if (is_complete) {
        read = ring->requests[index].read;
        ring->requests[index].next_free = ring->first_free;
        ring->first_free = index;
        ring->n_in_flight--;
    }
    pthread_mutex_unlock(&ring->lock);
    if (is_complete) {
        *ret_done = (struct slu_read_done){.tag = read.tag, .result = result};
        slu_ring_used(ring->fd, ring->base.is_direct, &read);
    }
    return is_complete;
}

static unsigned in_flight(struct uring_ring *ring)
{
    pthread_mutex_lock(&ring->lock);
    unsigned n = ring->n_in_flight;
    pthread_mutex_unlock(&ring->lock);
    return n;
}

static int uring_wait(struct slu_ring *base, struct slu_read_done *ret_done, unsigned n_max,
                      bool block)
{
    struct uring_ring *ring = (struct uring_ring *)base;
    unsigned n = 0;
    while (n < n_max && in_flight(ring) > 0) {
        struct io_uring_cqe *cqe = NULL;
        int e = block && n == 0 ? io_uring_wait_cqe(&ring->uring, &cqe)
                                : io_uring_peek_cqe(&ring->uring, &cqe);
        if (e == 0 && cqe) {
            n += (unsigned)take(ring, cqe, &ret_done[n]);
        } else if (!block || n > 0) {
            break;
        }
        /* Interrupted or busy: anything else would mean that the ring itself is not one. */
        assert(e == 0 || e == -EINTR || e == -EAGAIN || e == -EBUSY);
    }
    return (int)n;
}

static void uring_destroy(struct slu_ring *base)
{
    struct uring_ring *ring = (struct uring_ring *)base;
    struct slu_read_done done;
    while (uring_wait(base, &done, 1, true) > 0) {
    }
    if (ring->n_buffers > 0) {
        io_uring_unregister_buffers(&ring->uring); /* or the pages stay pinned for a while */
    }
    io_uring_queue_exit(&ring->uring);
    if (ring->fd >= 0) {
        close(ring->fd);
    }
    pthread_mutex_destroy(&ring->lock);
    free(ring->buffers);
    free(ring->requests);
    free(ring);
}

/* A kernel that has io_uring may lack single operations, or be forbidden them. */
static bool has_reads(struct io_uring *uring)
{
    struct io_uring_probe *probe = io_uring_get_probe_ring(uring);
    bool has = probe && io_uring_opcode_supported(probe, IORING_OP_READ) &&
               io_uring_opcode_supported(probe, IORING_OP_READ_FIXED);
    io_uring_free_probe(probe);
    return has;
}

/* Leaves the ring without registered buffers where the kernel, or the limit on locked memory,
 * won't have them. */
static void register_buffers(struct uring_ring *ring, const struct slu_io_range *ranges,
                             unsigned n_ranges)
{
    size_t n = 0;
    for (unsigned i = 0; i < n_ranges; i++) {
        n += ranges[i].bytes / BUFFER_BYTES_MAX + (ranges[i].bytes % BUFFER_BYTES_MAX != 0);
    }
    if (n == 0 || n > BUFFERS_MAX) {
        return;
    }
    ring->buffers = calloc(n, sizeof *ring->buffers);
    if (!ring->buffers) {
        return;
    }
    unsigned n_filled = 0;
    for (unsigned i = 0; i < n_ranges; i++) {
        for (size_t at = 0; at < ranges[i].bytes; at += BUFFER_BYTES_MAX) {
            size_t left = ranges[i].bytes - at;
            ring->buffers[n_filled++] = (struct iovec){
                .iov_base = (char *)ranges[i].start + at,
                .iov_len = left < BUFFER_BYTES_MAX ? left : BUFFER_BYTES_MAX,
            };
        }
    }
    if (io_uring_register_buffers(&ring->uring, ring->buffers, n_filled) == 0) {
        ring->n_buffers = n_filled;
        ring->base.is_registered = true;
    }
}

int slu_ring_uring_start(const struct slu_ring_start *start, struct slu_ring **ret_ring,
                         struct slu_err *err)
{
    struct uring_ring *ring = calloc(1, sizeof *ring);
    struct request *requests = calloc(start->depth, sizeof *requests);
    if (!ring || !requests) {
        free(ring);
        free(requests);
        return slu_err_set(err, SLU_ENOMEM, "no memory for a reader of depth %u", start->depth);
    }
    int e = io_uring_queue_init(start->depth, &ring->uring, 0);
    if (e == 0 && !has_reads(&ring->uring)) {
        io_uring_queue_exit(&ring->uring);
        e = -ENOSYS;
    }
    if (e < 0) {
        free(ring);
        free(requests);
        return slu_err_set(err, SLU_EUNSUP,
                           "the kernel refuses io_uring (%s); use the pread back end instead",
                           strerror(-e));
    }
    ring->base = (struct slu_ring){
        .submit = uring_submit,
        .wait = uring_wait,
        .destroy = uring_destroy,
        .backend = "io_uring",
        .is_direct = start->is_direct,
    };
    ring->fd = start->fd;
    ring->depth = start->depth;
    ring->requests = requests;
    for (unsigned i = 0; i < start->depth; i++) {
        requests[i].next_free = i + 1;
    }
    pthread_mutex_init(&ring->lock, NULL);
    ring->has_fixed_file = io_uring_register_files(&ring->uring, &start->fd, 1) == 0;
    register_buffers(ring, start->ranges, start->n_ranges);
    *ret_ring = &ring->base;
    return 0;
}

/* The queues are pages that the kernel shares: 64 bytes a submission with its 4-byte index, twice
 * as many completions of 16 bytes; the kernel rounds the depth up to a power of two. */
size_t slu_ring_uring_bytes(unsigned depth)
{
    size_t n_entries = 1;
    while (n_entries < depth) {
        n_entries *= 2;
    }
    size_t pages = 2 * 4096;
    return sizeof(struct uring_ring) + depth * sizeof(struct request) +
           n_entries * (64 + 4 + 2 * 16) + pages;
}
