/*
 * Scores, softmax and weighted sums of attention over the KV cache, for a chunk of tokens: H query
 * heads of k_dim against the cache's heads, MLA being one head whose values are the first part of
 * its keys. Internal to src/model.
 */
#ifndef SLU_MODEL_ATTEND_H
#define SLU_MODEL_ATTEND_H

#include "model/model.h"

struct slu_attend {
    uint32_t l;
    uint32_t from, n;   /* tokens, at positions kv->n + from .. , whose rows are stored */
    const float *q;     /* n x H x k_dim */
    float *out;         /* n x H x v_dim */
    const float *sinks; /* H, or NULL */
    uint32_t n_heads;   /* H */
    uint32_t v_dim, window;
    float scale;
};

void slu_attend(struct slu_model *model, const struct slu_kv_cache *kv,
                const struct slu_attend *attend);

/* Floats of scratch that a thread needs for it. */
size_t slu_attend_scratch(const struct slu_config *config);

#endif
