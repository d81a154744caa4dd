/*
 * The locked set: which experts are resident in the mode that reads none at the token that wants
 * them. It moves with the text. The router's wishes are observed, fulfilled or not; an expert that
 * is worth more than the least valuable one of the set, by more than a read costs, takes its place.
 * The price of a read is steered so that the reads come to a given rate.
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
    float reads_per_token;        /* how many may be read on average; 0: .6 times the square root of
                                     the number of experts that a token chooses in all layers */
};

struct slu_locked;

struct slu_locked_move {
    uint32_t in, out; /* layer * n_experts + expert; read the first where the second was */
};

/* An empty set. NULL when out of memory. */
struct slu_locked *slu_locked_create(const struct slu_locked_params *params);
void slu_locked_destroy(struct slu_locked *locked); /* NULL is fine */
size_t slu_locked_bytes(const struct slu_locked_params *params);

/* A router's choice, of a prompt or of a token decoded. */
void slu_locked_observe(struct slu_locked *locked, const struct slu_policy_choice *choice);

/* Fills the set anew with the experts that are worth most by now: after the prompt, say. */
void slu_locked_choose(struct slu_locked *locked);

/* Moves that pay after the latest choice, most valuable first: at most n_max, carried out in the
 * set at once. Returns how many. Once a token and layer while decoding, after observe. */
uint32_t slu_locked_move(struct slu_locked *locked, struct slu_locked_move *ret_moves,
                         uint32_t n_max);

bool slu_locked_has(const struct slu_locked *locked, uint32_t layer, uint32_t expert);

#endif
