/*
 * Rounds of the streamed adapters of a session's set, beside those of the base's stream. For a
 * batch of expert blocks: begin before the base's round, so that reads of both go on at once; fetch
 * on all threads; compute; end. Nothing happens where no adapter of the set is streamed in that
 * layer.
 *
 * Thread safety: the thread of the forward pass.
 */
#ifndef SLU_MODEL_LORA_STREAM_H
#define SLU_MODEL_LORA_STREAM_H

#include "base/pool.h"
#include "model/lora.h"

struct slu_lora_round {
    const struct slu_adapter *adapters[SLU_ADAPTERS_MAX]; /* those streamed in this layer, once */
    uint32_t n;
    uint32_t experts_max; /* of a batch: what all of them can hold at once */
    uint32_t n_begun;     /* of the adapters, in this batch */
};

/* For one layer. set may be NULL. */
void slu_lora_round_init(struct slu_lora_round *round, const struct slu_adapter_set *set,
                         uint32_t layer);

/* n distinct experts, at most experts_max. SLU_EIO, SLU_EFORMAT, after which nothing has begun. */
int slu_lora_round_begin(struct slu_lora_round *round, uint32_t layer, const uint32_t *experts,
                         uint32_t n, struct slu_err *err);
/* Waits for them. On failure the round must be ended at once, which has the sentence. */
int slu_lora_round_fetch(struct slu_lora_round *round, struct slu_pool *pool);
/* Ends what has begun, if anything has: 0, or the first error of the round. */
int slu_lora_round_end(struct slu_lora_round *round, struct slu_err *err);

#endif
