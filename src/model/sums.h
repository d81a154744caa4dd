/*
 * What a layer's experts add up to, token by token, while workers finish blocks in any order. Terms
 * are such that their order doesn't matter (slu_grid). A few tokens have sums for each worker,
 * which are added up at the end: nobody waits for anybody. Many tokens, whose sums no cache has
 * room for twice, have one each, claimed while a worker adds to it; who finds one taken goes on
 * with another.
 *
 * Thread safety: slu_sums_add may be called by all workers at once.
 */
#ifndef SLU_MODEL_SUMS_H
#define SLU_MODEL_SUMS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kern/kern.h"

/* Tokens of a chunk that have sums for each worker. */
#define SLU_SUMS_APART 16u

struct slu_sums {
    uint32_t chunk, n_threads, n_embd;
    double *rows;           /* slu_sums_rows x n_embd */
    atomic_flag *are_taken; /* [chunk] */
};

/* Tokens with sums for each worker that a chunk of so many has room for. */
static inline uint32_t slu_sums_apart(uint32_t chunk)
{
    return chunk < SLU_SUMS_APART ? chunk : SLU_SUMS_APART;
}

/* Rows of sums for chunks of up to so many tokens. */
static inline size_t slu_sums_rows(uint32_t chunk, uint32_t n_threads)
{
    size_t apart = (size_t)n_threads * slu_sums_apart(chunk);
    return chunk > apart ? chunk : apart;
}

/* Whether n tokens have one sum each. */
static inline bool slu_sums_shared(uint32_t n)
{
    return n > SLU_SUMS_APART;
}

/* Of a chunk of n tokens, clears lo .. hi-1 for one worker, or where they are shared for all. */
void slu_sums_clear(const struct slu_sums *sums, unsigned thread, uint32_t n, uint32_t lo,
                    uint32_t hi);

/* Of a chunk of n tokens, adds weight[i] times x[i*n_embd ..] to token tok[i], for i below some, at
 * most SLU_BLOCK_TOKENS. */
void slu_sums_add(const struct slu_sums *sums, const struct slu_kern *kern, unsigned thread,
                  uint32_t n, const uint32_t *tok, const float *weight, const float *x,
                  uint32_t some);

/* y[i] = what all workers have added, for numbers lo .. hi-1 of a chunk of n tokens. */
void slu_sums_take(const struct slu_sums *sums, uint32_t n, float *y, size_t lo, size_t hi);

#endif
