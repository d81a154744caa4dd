/*
 * Random models: a GGUF of any supported architecture and size, from a seed. Weights are normal
 * with a deviation of gain / sqrt(inputs), so that activations stay sane whatever the widths; the
 * tokenizer is small and real. For tests, benches and demonstrations: what such a model says is
 * noise, but it computes all that a trained one does.
 *
 * The same parameters give the same bytes on every machine. Memory is bounded by one row.
 *
 * Thread safety: one call uses one thread; calls share nothing.
 */
#ifndef SLU_TOOLS_SYNTH_H
#define SLU_TOOLS_SYNTH_H

#include "model/config.h"

/* Zero or NULL everywhere means the default. */
struct slu_synth_params {
    enum slu_arch arch;
    bool is_lite;            /* deepseek2: queries not compressed, softmax gate */
    bool has_split_kv_b;     /* deepseek2: attn_k_b and attn_v_b in place of attn_kv_b */
    bool has_expert_tensors; /* llama: one tensor for each expert, as old files have it */
    bool is_tied;            /* no output.weight */
    uint32_t n_layers;       /* 3; deepseek2: the first is dense */
    uint32_t n_ctx;          /* 512 */
    uint32_t n_embd;         /* 64, or 256 with K-quants */
    uint32_t n_ff;           /* neurons of an expert: 96, or 256 with K-quants */
    uint32_t n_experts;      /* 8 */
    uint32_t n_used;         /* 2 */
    uint32_t n_heads, n_heads_kv;
    uint32_t head_dim;
    uint32_t n_vocab;          /* 384 */
    const char *expert_type;   /* as GGUF names it: "Q4_0", the default */
    const char *down_type;     /* of ffn_down_exps: expert_type */
    const char *dense_type;    /* "Q8_0" */
    const char *embd_type;     /* of token_embd: dense_type */
    const char *vector_type;   /* of norms, biases and routers: "F32" */
    const char *chat_template; /* none */
    uint64_t seed;
};

/* Writes the model to `path` through a temporary name. A matrix whose width doesn't suit its type
 * becomes Q8_0, or F16 where that doesn't suit either. SLU_EINVAL for parameters that make no
 * model, SLU_EIO, SLU_ENOMEM. */
int slu_synth_write(const char *path, const struct slu_synth_params *params, struct slu_err *err);

#endif
