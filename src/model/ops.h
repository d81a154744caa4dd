/*
 * The parts of the forward pass: linear layers over the pool, attention, and the mixture of
 * experts. Internal to src/model.
 */
#ifndef SLU_MODEL_OPS_H
#define SLU_MODEL_OPS_H

#include "model/model.h"

/* y[t*y_stride + row] = w . x[t] + bias[row] for all rows of w and tokens of x, and what adapters
 * add for `target`. */
struct slu_linear {
    float *y;
    size_t y_stride;
    const struct slu_mat *w;
    const float *bias; /* or NULL */
    enum slu_target target;
};

#define SLU_LINEARS_MAX 4u

/* Up to SLU_LINEARS_MAX products of layer l with the same activations, rows shared out over the
 * pool. */
void slu_linear_run(struct slu_model *model, uint32_t l, const struct slu_linear *linears,
                    uint32_t n_linears, const struct slu_acts *x);

/* Calls fn for all n tokens, ranges of which go to the pool's threads where they are many enough.
 */
typedef void (*slu_rows_fn)(void *arg, uint32_t lo, uint32_t hi);
void slu_rows_run(struct slu_model *model, uint32_t n, slu_rows_fn fn, void *arg);

/* Points acts at n rows of x and quantizes them into buffer. */
void slu_acts_fill(struct slu_model *model, struct slu_acts *acts, uint32_t n, uint32_t cols,
                   const float *x, void *buffer);

/* out = x / rms(x) * w over n elements; out may be x. */
void slu_rms_norm(const struct slu_kern *kern, float *out, const float *x, const float *w,
                  uint32_t n, float eps);

/* The same for n rows of n_embd. */
void slu_norm_rows(struct slu_model *model, float *out, const float *x, const float *w, uint32_t n);

/* scratch->x += residual_scale * scratch->y, rows from .. n-1. */
void slu_add_sublayer(struct slu_model *model, uint32_t from, uint32_t n);

/* y[n x E] = attention of layer l over h[n x E] for the chunk's positions kv->n .. ; writes their
 * keys and values. scratch->cos and sin are set. */
void slu_attention(struct slu_model *model, struct slu_kv_cache *kv, uint32_t l, uint32_t n);

/* The first of the chunk's tokens for which layer l's network is needed: after the last layer
 * nobody asks for what came of most tokens of a prompt. */
static inline uint32_t slu_first_needed(const struct slu_model *model, uint32_t l)
{
    return l + 1 == model->weights->config.n_layers ? model->first_out : 0;
}

/* y[n x E] = feed-forward network of layer l over h[n x E], in rows from slu_first_needed on. All
 * tokens are routed, since what they would use tells the cache and the predictor what the next
 * ones will. */
int slu_moe(struct slu_model *model, uint32_t l, uint32_t n, struct slu_err *err);

/* Chooses experts for n tokens from scratch->router: scratch->chosen, chosen_weight. Pure. */
void slu_route(const struct slu_config *config, const struct slu_layer *layer, const float *logits,
               uint32_t *ret_chosen, float *ret_weight);

/* Stands for no expert among those chosen: there were fewer. */
#define SLU_ROUTE_NONE UINT32_MAX

/* Both replace the choice that slu_route has made from the same logits and its weights, where
 * members[n_experts] tells the experts of the layer that are in memory.
 *
 * prefer: the first choice stays; the others are chosen anew, by a score to which members get
 * `bias` times the standard deviation of the token's scores over all experts added. The scores are
 * the logits where a softmax follows, otherwise what the model itself chooses by: sigmoids with its
 * own choice bias. Where the model chooses among groups of experts, the groups stay. Weights are
 * the model's for what was chosen.
 *
 * within: the best members, at most n_used; the rest of the list is SLU_ROUTE_NONE. Those outside
 * of the model's groups come last. Weights are the model's for what was chosen, times what makes
 * their sum that of the weights before. */
void slu_route_prefer(const struct slu_config *config, const struct slu_layer *layer,
                      const float *logits, const bool *members, float bias, uint32_t *chosen,
                      float *weight);
void slu_route_within(const struct slu_config *config, const struct slu_layer *layer,
                      const float *logits, const bool *members, uint32_t *chosen, float *weight);

/* Makes a choice that comes from elsewhere (a recorded one) the best by these logits, so that the
 * two above have something to go by. */
void slu_route_impose(float *logits, uint32_t n_experts, const uint32_t *chosen,
                      const float *weight, uint32_t n_used);

/* Work outside the stream's rounds calls this every now and then, with its thread: the first one,
 * which is the stream's control thread, keeps the reads of hints going. */
static inline void slu_keep_reading(const struct slu_model *model, unsigned thread)
{
    if (thread == 0 && model->stream) {
        slu_stream_poll(model->stream);
    }
}

#endif
