/*
 * Random models: a GGUF of any supported architecture and size, from a seed. Weights are normal
 * with a deviation of gain / sqrt(inputs), so that activations stay sane whatever the widths; the
 * tokenizer is small and real. For tests, benches and demonstrations: what such a model says is
 * noise, but it computes all that a trained one does.
 *
 * A model can be written to a file, or be a byte source that makes what is read from it, so that a
 * pack of it needs no GGUF in between. Both are the same bytes; the same parameters give the same
 * bytes on every machine. Memory is bounded by the metadata and a MiB.
 *
 * Thread safety: one call uses one thread; calls share nothing.
 */
#ifndef SLU_TOOLS_SYNTH_H
#define SLU_TOOLS_SYNTH_H

#include <stdatomic.h>

#include "io/source.h"
#include "model/config.h"

/* Zero or NULL everywhere means the default. */
struct slu_synth_params {
    enum slu_arch arch;
    bool is_lite;            /* deepseek2: queries not compressed, softmax gate */
    bool has_split_kv_b;     /* deepseek2: attn_k_b and attn_v_b in place of attn_kv_b */
    bool has_expert_tensors; /* llama: one tensor for each expert, as old files have it */
    bool is_tied;            /* no output.weight */
    bool has_more_bits;      /* half of the values and down matrices, and the head, are Q6_K, as in
                                files called Q4_K_M */
    uint32_t n_layers;       /* 3; deepseek2: the first is dense */
    uint32_t n_ctx;          /* 512 */
    uint32_t n_embd;         /* 64, or 256 with K-quants */
    uint32_t n_ff;           /* neurons of an expert: 96, or 256 with K-quants */
    uint32_t n_experts;      /* 8 */
    uint32_t n_used;         /* 2 */
    uint32_t n_heads, n_heads_kv;
    uint32_t head_dim;
    uint32_t window;           /* gpt-oss: n_ctx / 32 */
    uint32_t n_vocab;          /* 384 */
    const char *expert_type;   /* as GGUF names it: "Q4_0", the default */
    const char *down_type;     /* of ffn_down_exps: expert_type */
    const char *dense_type;    /* "Q8_0" */
    const char *embd_type;     /* of token_embd: dense_type */
    const char *vector_type;   /* of norms, biases and routers: "F32" */
    const char *chat_template; /* none */
    const char *name;          /* general.name: "random" */
    uint64_t seed;
    /* For slu_synth_write, called now and then; may be NULL. */
    void (*progress)(void *arg, uint64_t done_bytes, uint64_t total_bytes);
    void *arg;
    const atomic_bool *cancel; /* SLU_ECANCEL; may be NULL */
};

/* The sizes of a model that exists, by name: "gpt-oss-20b" or "qwen3-30b-a3b". False if no such
 * name is known. */
bool slu_synth_shape(const char *name, struct slu_synth_params *ret_params);

/* Sizes from JSON text: an object with members named as the fields of struct slu_synth_params are
 * (n_layers, expert_type, ..., arch by its name), all optional but arch; or a published
 * checkpoint's config.json, of which the members that matter are taken. Strings are kept in
 * *ret_owned, for slu_synth_shape_free after params was last used. SLU_EINVAL with the member that
 * is wrong. */
int slu_synth_shape_parse(const char *text, size_t len, struct slu_synth_params *ret_params,
                          void **ret_owned, struct slu_err *err);
void slu_synth_shape_free(void *owned); /* NULL is fine */

/* An architecture by its name, "deepseek2-lite" included; false if there is none. */
bool slu_synth_arch(const char *name, struct slu_synth_params *params);

/* Writes the model to `path` through a temporary name. A matrix whose width doesn't suit its type
 * becomes Q8_0, or F16 where that doesn't suit either. SLU_EINVAL for parameters that make no
 * model, SLU_EIO, SLU_ENOMEM. */
int slu_synth_write(const char *path, const struct slu_synth_params *params, struct slu_err *err);

/* The same as a source of bytes. Weights are made as they are read, all whole rows at about a GB a
 * second. SLU_EINVAL, SLU_ENOMEM. */
int slu_synth_open(const struct slu_synth_params *params, struct slu_source **ret_source,
                   struct slu_err *err);

#endif
