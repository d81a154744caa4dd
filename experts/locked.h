/*
 * The locked set: which experts are resident in the mode that reads none at the token that wants
 * them. It moves with the text. The router's wishes are observed, fulfilled or not; an expert that
 * is worth more than the least valuable one of the set, by more than a read costs, takes its place.
 * The price of a read is steered so that the reads come to a given rate, or to fewer where what is
 * read turns out not to be worth what was expected.
 *
 * It decides and keeps count; reading is the caller's. Pure: no locks, no clock, no I/O.
 *
 * Thread safety: none.
 */
#ifndef SLU_EXPERTS_LOCKED_H
#define SLU_EXPERTS_LOCKED_H

#include "experts/policy.h"

struct slu_locked_params {
    uint32_t n_layers, n_experts; /* experts of each layer */
    uint32_t n_resident;          /* how many the set holds, of all layers together; > 0 */
    float reads_per_token;        /* how many may be read on average; 0: 1.15 times the power of .38
                                     of the number of experts that a token chooses in all layers */
    uint32_t layer_min;           /* no layer has fewer of the set once it has so many; no more than
                                     n_resident           over n_layers. 0: no such bound */
};

struct slu_locked;

struct slu_locked_move {
    uint32_t in, out; /* layer * n_experts + expert; read the first where the second was. out is
                         SLU_LOCKED_NONE while the set isn't full */
};
#define SLU_LOCKED_NONE UINT32_MAX

/* An empty set. NULL when out of memory. */
struct slu_locked *slu_locked_create(const struct slu_locked_params *params);
void slu_locked_destroy(struct slu_locked *locked); /* NULL is fine */
size_t slu_locked_bytes(const struct slu_locked_params *params);

/* Forgets everything: the set is empty. */
void slu_locked_reset(struct slu_locked *locked);

/* What is expected of a layer before any choice of its router: scores[n_experts] as in
 * experts/ranking.h, n_chosen experts a token. In place of what was observed of it. */
void slu_locked_expect(struct slu_locked *locked, uint32_t layer, const float *scores,
                       float n_chosen);

/* A router's choice, of a prompt or of a token decoded. */
void slu_locked_observe(struct slu_locked *locked, const struct slu_policy_choice *choice);

/* Fills the set anew with the experts that are worth most by now: after the prompt, say. */
void slu_locked_choose(struct slu_locked *locked);

/* The layer's part of the set becomes the n experts of the highest scores[n_experts], of equals
 * the lower; fewer where the set has no room for them. While a prompt is computed layer by layer.
 */
void slu_locked_fill(struct slu_locked *locked, uint32_t layer, const float *scores, uint32_t n);

/* Moves that pay after the latest choice, most valuable first: at most n_max, carried out in the
 * set at once. Returns how many. Once a token and layer while decoding, after observe. */
uint32_t slu_locked_move(struct slu_locked *locked, struct slu_locked_move *ret_moves,
                         uint32_t n_max);

bool slu_locked_has(const struct slu_locked *locked, uint32_t layer, uint32_t expert);
/* How many of a layer's experts are in. */
uint32_t slu_locked_count(const struct slu_locked *locked, uint32_t layer);
/* An expert's share of the router's weight lately, where a chosen one has 1 on average. */
float slu_locked_worth(const struct slu_locked *locked, uint32_t layer, uint32_t expert);

#endif
