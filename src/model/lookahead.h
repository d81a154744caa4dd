/*
 * Layer look-ahead while decoding: which experts the next layer will want, guessed by its own
 * router from what the residual stream holds one sublayer early. The stream then reads them when
 * the flash would idle, which is while the attention between the two layers is computed. A guess
 * never changes a result. How often each rank of the guess comes true is counted all the time, and
 * only ranks that mostly do are named: what is named and resident is also the last to leave. Where
 * none does, the cache policy's memory of past tokens may tell instead (experts/kin.h), but not to
 * who reads ahead whatever it costs or routes by what is in memory. No more is read than the flash
 * delivers in that time, as far as earlier layers tell (experts/pace.h).
 *
 * Thread safety: one control thread.
 */
#ifndef SLU_MODEL_LOOKAHEAD_H
#define SLU_MODEL_LOOKAHEAD_H

#include "model/model.h"

/* Before the first token, with the scratch's memory there; and to forget what was learned. */
void slu_lookahead_init(struct slu_model *model);

/* Layer l's router has chosen for one token: how good were the guesses? */
void slu_lookahead_score(struct slu_model *model, uint32_t l, const uint32_t *chosen);

/* While layer l's blocks are on their way: the experts of layer l + 1 that are worth reading, in
 * order, n_used of them at most, and the share of such that came true lately, 0 to 1. scratch->x is
 * the residual stream before layer l's experts. */
uint32_t slu_lookahead_guess(struct slu_model *model, uint32_t l, uint32_t *ret_experts,
                             float *ret_share);

/* While a chunk's layer l is computed: the router's weight that the experts of layer l + 1 may get,
 * in ret_gains[n_experts] where a chosen one has 1 on average. Goes by some of the n tokens, and
 * returns by how many: 0 where that can't be told. */
uint32_t slu_lookahead_gains(struct slu_model *model, uint32_t l, uint32_t n, float *ret_gains);

#endif
