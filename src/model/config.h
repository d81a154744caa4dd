/*
 * What a model is, read from its metadata: sizes, and the switches by which the seven
 * architectures differ. Also the list of tensors that a model so configured must have, with their
 * shapes, which the packer checks a GGUF against and the loader a pack. What each architecture
 * computes follows the GGUF files' own lineage, llama.cpp.
 *
 * Thread safety: pure functions over constant data.
 */
#ifndef SLU_MODEL_CONFIG_H
#define SLU_MODEL_CONFIG_H

#include "io/gguf.h"

enum slu_arch {
    SLU_ARCH_GPT_OSS,
    SLU_ARCH_QWEN3MOE,
    SLU_ARCH_OLMOE,
    SLU_ARCH_LLAMA,
    SLU_ARCH_QWEN2MOE,
    SLU_ARCH_GRANITEMOE,
    SLU_ARCH_DEEPSEEK2,
};

enum slu_gate {
    SLU_GATE_SOFTMAX,        /* softmax over all, then top-k */
    SLU_GATE_SOFTMAX_CHOSEN, /* top-k of logits, then softmax over the chosen */
    SLU_GATE_SIGMOID,        /* sigmoid, then top-k */
};

enum slu_qk_norm { SLU_QK_NORM_NONE, SLU_QK_NORM_HEAD, SLU_QK_NORM_FULL };

#define SLU_LAYERS_MAX  512
#define SLU_EXPERTS_MAX 1024
#define SLU_TOP_K_MAX   64

struct slu_config {
    enum slu_arch arch;
    uint32_t n_layers, n_ctx_train, n_embd, n_vocab;
    uint32_t n_heads, n_heads_kv;
    uint32_t k_dim, v_dim; /* of a head: key (and query) and value width */
    float norm_eps;

    uint32_t n_experts, n_used; /* routed */
    uint32_t n_ff_expert;       /* neurons of a routed expert */
    uint32_t n_ff_shared;       /* neurons of the shared expert, 0: none */
    uint32_t n_ff_dense;        /* neurons of the leading dense layers */
    uint32_t n_dense_layers;    /* leading layers without experts */
    enum slu_gate gate;
    bool gate_renorm;                 /* chosen weights divided by their sum */
    float gate_scale;                 /* then multiplied by this */
    uint32_t n_groups, n_groups_used; /* experts chosen from the best groups only; 0: no groups */
    bool has_gate_bias;               /* exp_probs_b: counts for the choice only */
    bool has_shared_gate;             /* shared expert times sigmoid(x . w) */

    bool has_qkv_bias, has_out_bias, has_router_bias, has_expert_bias, has_sinks;
    enum slu_qk_norm qk_norm;
    uint32_t window; /* sliding window of the even layers, 0: none */
    bool rope_neox;  /* split halves instead of adjacent pairs */
    uint32_t rope_dims;
    float rope_base;
    float yarn_factor; /* 0: no YaRN */
    float yarn_orig_ctx;
    float yarn_beta_fast, yarn_beta_slow;
    float rope_linear;    /* linear scaling factor, 1: none */
    float rope_magnitude; /* times cos and sin */

    bool is_mla;
    uint32_t q_lora, kv_lora; /* q_lora 0: attn_q directly (Lite) */

    float attn_scale; /* times q.k */
    float embd_scale, residual_scale, logit_divisor;
};

/* SLU_EUNSUP for another architecture or a variant not supported, by name; SLU_EFORMAT for keys
 * missing, of the wrong type, or out of bounds. */
int slu_config_read(const struct slu_kvs *kvs, struct slu_config *ret_config, struct slu_err *err);

const char *slu_arch_name(enum slu_arch arch);

/* One tensor that the model has outside its expert banks. */
struct slu_tensor_spec {
    char name[64];
    uint32_t rows, cols, n; /* a vector of c floats is 1 x c; n matrices in a stack */
    bool is_optional;
    bool is_vector; /* kept as F32 whatever float type the file has */
};

/* Fills ret_specs (up to n_max) with the dense tensors of the model, in the order of their use:
 * embedding, norms, attention, routers, head. Returns how many there are, at most
 * SLU_TENSORS_MAX. Optional: output.weight (absent: tied to the embedding); with MLA attn_q or the
 * attn_q_a, attn_q_a_norm, attn_q_b trio, and attn_kv_b or the pair attn_k_b + attn_v_b, of which
 * one form must be there. */
#define SLU_TENSORS_MAX (16 * SLU_LAYERS_MAX + 3)
size_t slu_config_tensors(const struct slu_config *config, struct slu_tensor_spec *ret_specs,
                          size_t n_max);

#endif
