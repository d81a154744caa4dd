/*
 * What the tests of the stream share: a file of blocks whose bytes are known, a stream over it, and
 * whole rounds of which every byte is looked at. Failures fail the running test.
 */
#ifndef SLU_TESTS_EXPERTS_STREAM_FIXTURE_H
#define SLU_TESTS_EXPERTS_STREAM_FIXTURE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/pool.h"
#include "experts/stream.h"

#define N_BLOCKS   64u
#define N_EXTENTS  72u /* the last ones aren't blocks, and are too large to be */
#define SLOT_BYTES 20000u
#define ROUND_MAX  32u

extern const enum slu_io_backend stream_backends[2];

struct stream_fixture {
    char path[64];
    struct slu_extent extents[N_EXTENTS];
    struct slu_ledger *ledger;
    struct slu_stream_params params;
    struct slu_stream *stream;
};

/* A file of extents, every third of them raw, in /tmp; and parameters for a stream over it. */
void stream_setup(struct stream_fixture *f);
void stream_teardown(struct stream_fixture *f);
/* False where the kernel has no io_uring. */
bool stream_open(struct stream_fixture *f, enum slu_io_backend backend, uint32_t n_slots,
                 uint32_t n_workers);

struct stream_round {
    struct slu_stream *stream;
    const struct slu_extent *extents;
    const uint32_t *blocks;
    _Atomic uint32_t n_seen[ROUND_MAX];
    _Atomic uint32_t n_wrong;
    int results[SLU_POOL_THREADS_MAX];
};

/* Takes and checks blocks until there are no more: a pool's function, arg is a stream_round. */
void stream_round_work(void *arg, unsigned thread, unsigned n_threads);
/* A whole round; what end says. Every block must have come exactly once unless it failed, and
 * never with wrong bytes. */
int stream_round_run(struct stream_fixture *f, struct slu_pool *pool, const uint32_t *blocks,
                     uint32_t n, struct slu_err *err);

#endif
