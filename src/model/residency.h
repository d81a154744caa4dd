/*
 * Which experts count as in memory, in the modes that choose by that: prefer and locked. What they
 * go by is not the cache, whose contents depend on when reads end, but a set of experts that is
 * kept here, by rules that know nothing but what routers chose. The set is no larger than the
 * slots, and the stream keeps its blocks; if one of them is still being read when it is wanted, it
 * is waited for. So results depend on the texts computed and on the set's size, and neither on
 * timing, nor on threads, nor on how flash is read.
 *
 *   prefer   the set is what a cache of its size would hold, under the cache's best policy.
 *   locked   while a prompt is computed, each layer takes those experts that the chunk's tokens
 *            give most weight to, as many as are its share. After that the set moves with the text
 *            (experts/locked.h): at each token and layer one expert or another that pays leaves for
 *            another of that layer. The one that leaves is out, and its slots are free, at once;
 *            the one that comes is read in idle time, and is in from the next token on.
 *
 * A new text, one that starts at position 0, begins the locked set anew; prefer's goes on.
 *
 * Thread safety: none; the stream's control thread.
 */
#ifndef SLU_MODEL_RESIDENCY_H
#define SLU_MODEL_RESIDENCY_H

#include "experts/policy.h"
#include "experts/ranking.h"
#include "experts/stream.h"
#include "model/weights.h"

struct slu_residency_params {
    const struct slu_weights *weights; /* described; kept */
    bool is_locked;                    /* otherwise prefer */
    uint32_t n_set;                    /* experts in the set; > 0 */
    float share;                       /* of all experts, that n_set was bounded by; 0: 1 */
    float bias;                        /* prefer's, see slu_route_prefer */
    float reads_per_token;             /* as in experts/locked.h */
    float min_coverage;                /* locked: below this share of the router's weight, lately,
                                          choose as in prefer; in a prompt, read more. 0: never */
    const struct slu_policy_kind *policy; /* prefer's; its observe may be NULL */
};

struct slu_residency;

/* How many experts a set may have where there are n_slots, in whole experts and so that reads have
 * slots to arrive in; and how many slots a set of n_set takes. share (0: 1) is of all experts. */
uint32_t slu_residency_experts(const struct slu_weights *weights, uint32_t n_slots, float share);
uint32_t slu_residency_slots(const struct slu_weights *weights, uint32_t n_set);

/* NULL when out of memory. The caller charges slu_residency_bytes. */
struct slu_residency *slu_residency_create(const struct slu_residency_params *params);
void slu_residency_destroy(struct slu_residency *residency); /* NULL is fine */
uint64_t slu_residency_bytes(const struct slu_residency_params *params);

/* n tokens at one layer, after slu_route: what it chose becomes what the mode makes of it. */
struct slu_residency_chunk {
    uint32_t layer, n;
    uint32_t position;   /* of the first token, in its text */
    uint64_t token;      /* counts those of all texts */
    const float *logits; /* n x n_experts */
    uint32_t *chosen;    /* n x n_used; SLU_ROUTE_NONE where there are fewer */
    float *weight;       /* n x n_used */
};
void slu_residency_route(struct slu_residency *residency, struct slu_stream *stream,
                         const struct slu_residency_chunk *chunk);

/* Blocks to read in idle time, at most n_max: what the set still lacks. Returns how many. Before
 * them come those of layer `next` that a prompt's chunk will want, going by a guess of the weight
 * that its experts will get: gains[n_experts] of n_guessed tokens; NULL without. */
uint32_t slu_residency_hints(struct slu_residency *residency, struct slu_stream *stream,
                             uint32_t next, const float *gains, uint32_t n_guessed,
                             uint32_t *ret_blocks, uint32_t n_max);

/* Whether blocks beyond the set may be wanted of the next layer while decoding, so that it pays to
 * look ahead: not in locked, but where it falls back. */
bool slu_residency_reads_beyond(const struct slu_residency *residency);

/* locked: the set begins anew with this ranking, which has been checked; NULL: with none. */
void slu_residency_rank(struct slu_residency *residency, struct slu_stream *stream,
                        const struct slu_ranking *ranking);

struct slu_residency_stats {
    /* In tokens times layers, while a token's chosen experts count 1 altogether. */
    double router_weight;  /* that routers gave to what they chose */
    double covered_weight; /* of it, to what was then used */
    uint64_t n_moves;      /* locked: experts exchanged while decoding */
};
struct slu_residency_stats slu_residency_stats(const struct slu_residency *residency);

#endif
