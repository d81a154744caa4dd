/*
 * The tally of a pass: where the time of computing a chunk went, and how many weights were
 * multiplied in it. Whoever computes chunks starts it before one and reads it after; the parts of
 * the forward pass cross a border each, and workers add to entries of their own, so that nothing
 * here is atomic.
 *
 * Thread safety: one control thread; during a run of the pool, each thread its own entry.
 */
#ifndef SLU_MODEL_TALLY_H
#define SLU_MODEL_TALLY_H

#include "base/pool.h"
#include "kern/format.h"

/* What the control thread was at. The parts of a chunk add up to its wall time. */
enum slu_part {
    SLU_PART_EMBED,     /* embedding rows from flash, RoPE's angles */
    SLU_PART_DENSE,     /* projections of attention and router, and the norms before them */
    SLU_PART_ATTENTION, /* scores and weighted sums over the KV cache */
    SLU_PART_EXPERTS,   /* feed-forward networks: streaming, decoding, products, their sum */
    SLU_PART_HEAD,      /* final norm and logits */
    SLU_PART_OTHER,     /* what follows the pass: sampling */
    SLU_PARTS
};

/* One thread's, padded so that no two threads write to one cache line. */
struct slu_tally_thread {
    uint64_t stall_ns;           /* with nothing to do but wait for blocks */
    uint64_t unpack_ns;          /* decoding and checking blocks that arrived */
    uint64_t product_ns;         /* multiplying blocks */
    uint64_t weight_bytes, macs; /* of those blocks */
    uint64_t unused[11];
};

struct slu_tally {
    uint64_t part_ns[SLU_PARTS];
    uint64_t border_ns;          /* when the last one was crossed */
    uint64_t weight_bytes, macs; /* of dense matrices: each counts once a chunk */
    struct slu_tally_thread threads[SLU_POOL_THREADS_MAX];
};

/* Forgets what was there; the first part begins now. */
void slu_tally_start(struct slu_tally *tally, unsigned n_threads);

/* Everything since the last border was `part`. */
void slu_tally_cross(struct slu_tally *tally, enum slu_part part);

/* A dense matrix was multiplied with n tokens. */
void slu_tally_dense(struct slu_tally *tally, const struct slu_mat *mat, uint32_t n);

#endif
