/*
 * A memory of how recent tokens were routed, and what it says of the tokens to come. It rests on
 * two observations from recorded routing. Tokens that were routed alike so far will be routed alike
 * further on; and what came after such a token in the text is a good guess at what comes after the
 * present one, much better than what is frequent overall. So each past token is weighed by how much
 * its routing overlaps with that of the newest token, and the tokens that followed it vote.
 *
 * It owns numbers alone: it neither reads nor knows what a model is.
 *
 * Thread safety: none.
 */
#ifndef SLU_EXPERTS_KIN_H
#define SLU_EXPERTS_KIN_H

#include "experts/policy.h"

struct slu_kin;

/* Remembers up to SLU_KIN_TOKENS tokens. NULL when out of memory. */
#define SLU_KIN_TOKENS 256u
struct slu_kin *slu_kin_create(uint32_t n_layers, uint32_t n_experts);
void slu_kin_destroy(struct slu_kin *kin); /* NULL is fine */
size_t slu_kin_bytes(uint32_t n_layers, uint32_t n_experts);

/* One token at one layer. A choice of a token that isn't the newest is remembered, but doesn't
 * change what the newest one is compared with. */
void slu_kin_observe(struct slu_kin *kin, const struct slu_policy_choice *choice);

/* The number of the newest token; 0 before any. */
uint64_t slu_kin_newest(const struct slu_kin *kin);

/* How soon the experts of a layer will be used again, as of the newest token: the higher, the
 * sooner; natural logarithms of something like a rate. `horizon_x` is ln(h / 16) where h is for how
 * many tokens the caller looks ahead: far ahead, recent use counts for more and likeness for less.
 * Fills ret_scores[n_experts]. Takes some 10 us with a full memory of 128 experts a layer. */
void slu_kin_rank(struct slu_kin *kin, uint32_t layer, float horizon_x, float *ret_scores);

/* The chance, 0 to 1, that the newest token uses each expert of a layer that it hasn't come to: the
 * share of the tokens routed alike so far that did. Fills ret_chances[n_experts]. Takes some 3 us
 * with a full memory. */
void slu_kin_foresee(struct slu_kin *kin, uint32_t layer, float *ret_chances);

#endif
