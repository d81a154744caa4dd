/*
 * LoRA in the forward pass: what a session's adapters add to the linear maps of the base, computed
 * beside the base's own products and never merged into its weights. Each addition has one order of
 * arithmetic, adapter by adapter, so results stay independent of threads and chunks.
 *
 * Thread safety: a set is constant while a forward pass uses it.
 */
#ifndef SLU_MODEL_LORA_H
#define SLU_MODEL_LORA_H

#include "adapters/adapter.h"
#include "kern/block.h"
#include "model/weights.h"

#define SLU_ADAPTERS_MAX 8u
/* Ranks of a session's adapters together: bounds the scratch between A and B. */
#define SLU_LORA_RANKS_MAX 512u

struct slu_adapter_use {
    const struct slu_adapter *adapter;
    float scale; /* the user's; an adapter's own alpha / rank is in its pairs */
};

struct slu_adapter_set {
    struct slu_adapter_use uses[SLU_ADAPTERS_MAX];
    uint32_t n;
};

/* What adapters of this model are checked against. weights must outlive the result. */
struct slu_base slu_lora_base(const struct slu_weights *weights, uint64_t fingerprint);

/* The set's pair for a map, and the factor of its product; NULL where use i leaves it alone. */
const struct slu_lora *slu_lora_find(const struct slu_adapter_set *set, uint32_t i, uint32_t layer,
                                     enum slu_target target, float *ret_factor);
bool slu_lora_touches(const struct slu_adapter_set *set, uint32_t layer, enum slu_target target);

/* t[rank] = factor * A x; then y[lo..hi) += B[lo..hi) t. */
void slu_lora_down(const struct slu_kern *kern, const struct slu_lora *lora, float factor,
                   const float *x, float *t);
void slu_lora_up(const struct slu_kern *kern, const struct slu_lora *lora, const float *t,
                 uint32_t lo, uint32_t hi, float *y);

/* x[E] += scale times what the embedding's pairs have for id. */
void slu_lora_embed(const struct slu_kern *kern, const struct slu_adapter_set *set, int32_t id,
                    float scale, float *x);

/* MLA's key and value projection, attn_kv_b, in its absorbed form, for rows lo..lo+n-1 of it:
 * latent[kv_lora] += A^T (B[lo..]^T q[n])  and  out[n] += B[lo..] (A latent). row is room for
 * kv_lora floats. */
void slu_lora_absorb(const struct slu_kern *kern, const struct slu_adapter_set *set, uint32_t layer,
                     uint32_t lo, uint32_t n, const float *q, float *row, float *latent);
void slu_lora_emerge(const struct slu_kern *kern, const struct slu_adapter_set *set, uint32_t layer,
                     uint32_t lo, uint32_t n, const float *latent, float *out);

/* Additions to one expert's blocks: slu_block_hook's functions with a struct slu_lora_block. */
struct slu_lora_block {
    const struct slu_kern *kern;
    const struct slu_adapter_set *set;
    uint32_t layer, expert, n_embd;
    enum slu_target gate, up, down;
};
/* False where no adapter touches the blocks: then no hook is needed. Of routed experts, what is
 * streamed must be there: model/lora_stream.h. */
bool slu_lora_block_init(struct slu_lora_block *block, const struct slu_kern *kern,
                         const struct slu_adapter_set *set, uint32_t layer, uint32_t expert,
                         uint32_t n_embd, enum slu_target gate);
struct slu_block_hook slu_lora_block_hook(struct slu_lora_block *block);

#endif
