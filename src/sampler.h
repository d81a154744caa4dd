/*
 * The sampler: which token follows, given the logits. Greedy, or drawn by chance from what a chain
 * of cuts leaves, in this order:
 *
 *   repetition penalty   logits of recent tokens are divided by it where positive, multiplied
 *                        where negative, once however often they occur
 *   top-k                the k likeliest stay
 *   top-p                of those, the likeliest that together hold at least p of the probability
 *   min-p                of those, the ones at least min_p times as likely as the likeliest
 *   temperature          probabilities of the rest are raised to 1/temperature, and one is drawn
 *
 * The cuts judge the model's own probabilities, before temperature. A seed gives the same tokens on
 * every machine: the generator and the exponential are the sampler's own, and every tie goes to
 * the lower id. NaN logits are never chosen; infinite ones count as the largest finite numbers.
 *
 * Nothing is allocated after create, and no cut sorts the vocabulary: each is a radix selection,
 * linear in the vocabulary whatever the logits are.
 *
 * Thread safety: one thread at a time for each sampler.
 */
#ifndef SLU_SAMPLER_H
#define SLU_SAMPLER_H

#include <stddef.h>
#include <stdint.h>

#include "slu.h"

struct slu_sampler;

/* Greedy until slu_sampler_start says otherwise. SLU_EINVAL (n_vocab 0 or over 2^28), SLU_ENOMEM.
 */
int slu_sampler_create(uint32_t n_vocab, struct slu_sampler **ret_sampler, struct slu_err *err);
void slu_sampler_destroy(struct slu_sampler *sampler); /* NULL is fine */

/* What a sampler holds on the heap, for the ledger: its owner charges it. */
size_t slu_sampler_bytes(uint32_t n_vocab);

/* Takes the settings and starts the generator anew from their seed. Values that make no sense
 * (negative, NaN) count as off. */
void slu_sampler_start(struct slu_sampler *sampler, const struct slu_sampling *sampling);

/* The next token, from n_vocab logits, which are left as they are. recent: n_recent ids of the
 * context, oldest first, of which the penalty looks at the last repeat_window; ids outside the
 * vocabulary are ignored; NULL with 0 is fine. Returns the id, or SLU_ERANGE if every logit is NaN.
 */
int32_t slu_sampler_next(struct slu_sampler *sampler, const float *logits, const int32_t *recent,
                         size_t n_recent);

#endif
