/*
 * What the back ends of the ring share: the opened file and the rules for reads that the system
 * did only in part. Private to io/ring*.c.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_IO_RING_BACKEND_H
#define SLU_IO_RING_BACKEND_H

#include "io/ring.h"

#define SLU_RING_DEPTH_MAX 1024u
#define SLU_RING_PREAD_MAX 64u /* threads */
/* Of one read that the system puts off or gives up, and of one submission. */
#define SLU_RING_RETRIES_MAX 64u

/* An opened file and resolved parameters: no zeroes that mean a default. */
struct slu_ring_start {
    int fd;
    bool is_direct;
    unsigned depth;
    unsigned n_threads;
    const struct slu_io_range *ranges;
    unsigned n_ranges;
};

/* Both take fd over on success only. */
int slu_ring_pread_start(const struct slu_ring_start *start, struct slu_ring **ret_ring,
                         struct slu_err *err);
/* SLU_EUNSUP when the kernel refuses io_uring. Only there when built with SLU_HAVE_URING. */
int slu_ring_uring_start(const struct slu_ring_start *start, struct slu_ring **ret_ring,
                         struct slu_err *err);

/* 0, or SLU_EINVAL for a read that isn't aligned, is empty, or is one more than depth. */
int slu_ring_check(const struct slu_read *read, unsigned n_in_flight, unsigned depth,
                   struct slu_err *err);

/* Of n bytes that the system read, those after which it can be asked for the rest: direct reads
 * must go on at a multiple of SLU_IO_ALIGN. 0 means that there is no more: the end of the file. */
uint32_t slu_ring_kept(bool is_direct, uint32_t n);

/* After a read is complete: buffered bytes leave the page cache, which has no business holding a
 * second copy. */
void slu_ring_used(int fd, bool is_direct, const struct slu_read *read);

/* Heap and shared ring memory, at most. */
size_t slu_ring_pread_bytes(unsigned depth, unsigned n_threads);
size_t slu_ring_uring_bytes(unsigned depth);

#endif
