/*
 * Reading a configuration. Numbers come from a file: each is checked against a bound before
 * anything is computed from it, so that later code may multiply without fear.
 */
#include "model/config.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    enum slu_arch arch;
} archs[] = {
    {"gpt-oss", SLU_ARCH_GPT_OSS},     {"qwen3moe", SLU_ARCH_QWEN3MOE},
    {"olmoe", SLU_ARCH_OLMOE},         {"llama", SLU_ARCH_LLAMA},
    {"qwen2moe", SLU_ARCH_QWEN2MOE},   {"granitemoe", SLU_ARCH_GRANITEMOE},
    {"deepseek2", SLU_ARCH_DEEPSEEK2},
};

const char *slu_arch_name(enum slu_arch arch)
{
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        if (archs[i].arch == arch) {
            return archs[i].name;
        }
    }
    return "unknown";
}

/* The reader keeps the first error: keys are read one after another without a test for each. */
struct reader {
    const struct slu_kvs *kvs;
    const char *arch;
    int error;
    struct slu_err *err;
};

static void key_name(const struct reader *r, const char *key, char *ret_name, size_t bytes)
{
    snprintf(ret_name, bytes, "%s.%s", r->arch, key);
}

static void fail(struct reader *r, int code, const char *key, const char *what)
{
    if (!r->error) {
        r->error = slu_err_set(r->err, code, "metadata key %s.%s %s", r->arch, key, what);
    }
}

/* An integer in [lo, hi]; `otherwise` where absent, unless that is UINT64_MAX: then required. */
static uint32_t read_u32(struct reader *r, const char *key, uint64_t otherwise, uint64_t lo,
                         uint64_t hi)
{
    char name[128];
    key_name(r, key, name, sizeof name);
    uint64_t value = otherwise;
    struct slu_err err;
    int rc = slu_kvs_u64(r->kvs, name, &value, &err);
    if (rc == SLU_ENOENT) {
        if (otherwise == UINT64_MAX) {
            fail(r, SLU_EFORMAT, key, "is missing");
            return (uint32_t)lo;
        }
        return (uint32_t)otherwise;
    }
    if (rc < 0) {
        fail(r, SLU_EFORMAT, key, "is not a single integer");
        return (uint32_t)lo;
    }
    if (value < lo || value > hi) {
        char what[96];
        snprintf(what, sizeof what, "is %llu, outside %llu to %llu", (unsigned long long)value,
                 (unsigned long long)lo, (unsigned long long)hi);
        fail(r, SLU_EFORMAT, key, what);
        return (uint32_t)lo;
    }
    return (uint32_t)value;
}

static float read_f32(struct reader *r, const char *key, double otherwise)
{
    char name[128];
    key_name(r, key, name, sizeof name);
    double value = otherwise;
    int rc = slu_kvs_f64(r->kvs, name, &value, NULL);
    if (rc < 0 && rc != SLU_ENOENT) {
        fail(r, SLU_EFORMAT, key, "is not a number");
    } else if (!isfinite(value)) {
        fail(r, SLU_EFORMAT, key, "is not finite");
    }
    return (float)value;
}

static bool read_bool(struct reader *r, const char *key, bool otherwise)
{
    char name[128];
    key_name(r, key, name, sizeof name);
    bool value = otherwise;
    int rc = slu_kvs_bool(r->kvs, name, &value, NULL);
    if (rc < 0 && rc != SLU_ENOENT) {
        fail(r, SLU_EFORMAT, key, "is not a boolean");
    }
    return value;
}

static int read_arch(const struct slu_kvs *kvs, struct slu_config *config, struct slu_err *err)
{
    struct slu_str name;
    int rc = slu_kvs_str(kvs, "general.architecture", &name, err);
    if (rc < 0) {
        return rc == SLU_ENOENT
                   ? slu_err_set(err, SLU_EFORMAT, "metadata key general.architecture is missing")
                   : rc;
    }
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        if (strlen(archs[i].name) == name.len && !memcmp(archs[i].name, name.at, name.len)) {
            config->arch = archs[i].arch;
            return 0;
        }
    }
    int shown = name.len > 64 ? 64 : (int)name.len;
    return slu_err_set(err, SLU_EUNSUP,
                       "architecture '%.*s' is not supported; gpt-oss, qwen3moe, olmoe, llama with "
                       "experts, qwen2moe, granitemoe and deepseek2 are",
                       shown, name.at);
}

static void read_sizes(struct reader *r, struct slu_config *c)
{
    c->n_layers = read_u32(r, "block_count", UINT64_MAX, 1, SLU_LAYERS_MAX);
    c->n_ctx_train = read_u32(r, "context_length", UINT64_MAX, 1, 1u << 28);
    c->n_embd = read_u32(r, "embedding_length", UINT64_MAX, 1, 1u << 16);
    c->n_heads = read_u32(r, "attention.head_count", UINT64_MAX, 1, 1024);
    c->n_heads_kv = read_u32(r, "attention.head_count_kv", c->n_heads, 1, 1024);
    c->norm_eps = read_f32(r, "attention.layer_norm_rms_epsilon", 1e-5);

    /* The tokenizer's list is what the embedding's rows are; a bare model may have only a size. */
    const struct slu_kv *tokens = slu_kvs_find(r->kvs, "tokenizer.ggml.tokens");
    if (tokens && tokens->type == SLU_KV_ARRAY && tokens->n_items > 0 &&
        tokens->n_items <= 1u << 24) {
        c->n_vocab = (uint32_t)tokens->n_items;
    } else {
        c->n_vocab = read_u32(r, "vocab_size", UINT64_MAX, 1, 1u << 24);
    }
    if (!r->error && c->n_heads % c->n_heads_kv) {
        fail(r, SLU_EFORMAT, "attention.head_count_kv", "does not divide the number of heads");
    }
}

static void read_heads(struct reader *r, struct slu_config *c)
{
    uint32_t even = c->n_embd / c->n_heads;
    if (even < 1 || even > 4096) {
        even = even < 1 ? 1 : 4096;
    }
    c->k_dim = read_u32(r, "attention.key_length", even, 2, 4096);
    c->v_dim = read_u32(r, "attention.value_length", even, 1, 4096);
    if (c->is_mla) {
        c->q_lora = read_u32(r, "attention.q_lora_rank", 0, 0, 1u << 16);
        c->kv_lora = read_u32(r, "attention.kv_lora_rank", UINT64_MAX, 1, 1u << 16);
        /* Files for the absorbed form give the latent widths there and a head's own here. */
        c->k_dim = read_u32(r, "attention.key_length_mla", c->k_dim, 2, 4096);
        c->v_dim = read_u32(r, "attention.value_length_mla", c->v_dim, 1, 4096);
    }
    uint32_t rope = c->is_mla ? UINT32_MAX : c->k_dim;
    c->rope_dims =
        read_u32(r, "rope.dimension_count", rope == UINT32_MAX ? UINT64_MAX : rope, 2, c->k_dim);
    if (!r->error && c->rope_dims % 2) {
        fail(r, SLU_EFORMAT, "rope.dimension_count", "is odd");
    }
    if (!r->error && c->is_mla && c->rope_dims >= c->k_dim) {
        fail(r, SLU_EFORMAT, "rope.dimension_count", "leaves no room in the key");
    }
}

static bool str_is(const struct slu_str *s, const char *text)
{
    return s->len == strlen(text) && !memcmp(s->at, text, s->len);
}

static void read_rope(struct reader *r, struct slu_config *c)
{
    c->rope_base = read_f32(r, "rope.freq_base", 10000.0);
    if (!r->error && !(c->rope_base > 0)) {
        fail(r, SLU_EFORMAT, "rope.freq_base", "is not positive");
    }
    c->rope_linear = 1.0f;
    c->rope_magnitude = 1.0f;
    /* As the lineage has it: linear unless said otherwise, 0 means none, and scale_linear is the
     * factor's old name. */
    float factor = read_f32(r, "rope.scaling.factor", 0.0);
    factor = factor != 0.0f ? factor : read_f32(r, "rope.scale_linear", 0.0);
    factor = factor != 0.0f ? factor : 1.0f;
    if (!(factor >= 1.0f)) {
        fail(r, SLU_EFORMAT, "rope.scaling.factor", "is below 1");
    }
    char name[128];
    key_name(r, "rope.scaling.type", name, sizeof name);
    struct slu_str type = {.at = "linear", .len = 6};
    int rc = slu_kvs_str(r->kvs, name, &type, NULL);
    if (rc < 0 && rc != SLU_ENOENT) {
        fail(r, SLU_EFORMAT, "rope.scaling.type", "is not a string");
    } else if (str_is(&type, "linear")) {
        c->rope_linear = factor;
    } else if (str_is(&type, "yarn")) {
        c->yarn_factor = factor;
        c->yarn_orig_ctx =
            (float)read_u32(r, "rope.scaling.original_context_length", c->n_ctx_train, 1, 1u << 28);
        c->yarn_beta_fast = read_f32(r, "rope.scaling.yarn_beta_fast", 32.0);
        c->yarn_beta_slow = read_f32(r, "rope.scaling.yarn_beta_slow", 1.0);
        c->rope_magnitude = 1.0f + 0.1f * logf(factor);
    } else if (!str_is(&type, "none")) {
        fail(r, SLU_EUNSUP, "rope.scaling.type", "names a scaling that is not supported");
    }
}

static void read_experts(struct reader *r, struct slu_config *c)
{
    c->n_experts = read_u32(r, "expert_count", 0, 0, SLU_EXPERTS_MAX);
    if (!r->error && c->n_experts == 0) {
        r->error = slu_err_set(r->err, SLU_EUNSUP,
                               "this %s model has no experts; sluice runs mixture-of-experts "
                               "models only",
                               r->arch);
        return;
    }
    uint32_t used_max = c->n_experts < SLU_TOP_K_MAX ? c->n_experts : SLU_TOP_K_MAX;
    c->n_used = read_u32(r, "expert_used_count", UINT64_MAX, 1, used_max);
    uint32_t n_ff = read_u32(r, "feed_forward_length", 0, 0, 1u << 20);
    uint64_t fallback = n_ff ? n_ff : UINT64_MAX;
    if (n_ff && c->arch == SLU_ARCH_QWEN2MOE) {
        fallback = n_ff / c->n_used;
    }
    c->n_ff_expert = read_u32(r, "expert_feed_forward_length", fallback, 1, 1u << 20);
    c->gate_scale = 1.0f;
    c->gate = SLU_GATE_SOFTMAX;
    c->gate_renorm = true;

    switch (c->arch) {
    case SLU_ARCH_GPT_OSS:
        c->gate = SLU_GATE_SOFTMAX_CHOSEN;
        c->gate_renorm = false;
        break;
    case SLU_ARCH_OLMOE:
        c->gate_renorm = false;
        break;
    case SLU_ARCH_QWEN2MOE:
        c->gate_renorm = false;
        c->has_shared_gate = true;
        c->n_ff_shared =
            read_u32(r, "expert_shared_feed_forward_length", n_ff ? n_ff : UINT64_MAX, 1, 1u << 20);
        break;
    case SLU_ARCH_GRANITEMOE:
        c->n_ff_shared = read_u32(r, "expert_shared_feed_forward_length", 0, 0, 1u << 20);
        break;
    case SLU_ARCH_DEEPSEEK2:
        c->n_dense_layers = read_u32(r, "leading_dense_block_count", 0, 0, c->n_layers);
        c->n_ff_dense = c->n_dense_layers ? n_ff : 0;
        if (!r->error && c->n_dense_layers && !n_ff) {
            fail(r, SLU_EFORMAT, "feed_forward_length", "is missing");
        }
        c->n_ff_shared = read_u32(r, "expert_shared_count", 0, 0, 64) * c->n_ff_expert;
        c->gate_renorm = read_bool(r, "expert_weights_norm", false);
        c->gate_scale = read_f32(r, "expert_weights_scale", 1.0);
        if (c->gate_scale == 0.0f) {
            c->gate_scale = 1.0f; /* some converters write 0 for "none" */
        }
        c->gate =
            read_u32(r, "expert_gating_func", 1, 0, 2) == 2 ? SLU_GATE_SIGMOID : SLU_GATE_SOFTMAX;
        c->has_gate_bias = c->gate == SLU_GATE_SIGMOID;
        c->n_groups = read_u32(r, "expert_group_count", 0, 0, c->n_experts);
        c->n_groups_used = read_u32(r, "expert_group_used_count", c->n_groups, 0, c->n_groups);
        if (c->n_groups <= 1 || c->n_groups_used == c->n_groups) {
            c->n_groups = c->n_groups_used = 0;
        } else if (c->n_experts % c->n_groups || c->n_groups_used == 0 ||
                   c->n_experts / c->n_groups * c->n_groups_used < c->n_used) {
            fail(r, SLU_EFORMAT, "expert_group_count", "doesn't fit the number of experts");
        }
        break;
    default:
        break;
    }
}

static void read_switches(struct reader *r, struct slu_config *c)
{
    c->rope_neox = true;
    c->attn_scale = 1.0f / sqrtf((float)c->k_dim);
    c->embd_scale = c->residual_scale = c->logit_divisor = 1.0f;
    switch (c->arch) {
    case SLU_ARCH_GPT_OSS:
        c->has_qkv_bias = c->has_out_bias = c->has_router_bias = true;
        c->has_expert_bias = c->has_sinks = true;
        c->window = read_u32(r, "attention.sliding_window", 0, 0, 1u << 28);
        break;
    case SLU_ARCH_QWEN3MOE:
        c->qk_norm = SLU_QK_NORM_HEAD;
        break;
    case SLU_ARCH_OLMOE:
        c->qk_norm = SLU_QK_NORM_FULL;
        if (read_f32(r, "attention.clamp_kqv", 0) != 0) {
            fail(r, SLU_EUNSUP, "attention.clamp_kqv", "is set, which is not supported");
        }
        break;
    case SLU_ARCH_QWEN2MOE:
        c->has_qkv_bias = true;
        break;
    case SLU_ARCH_LLAMA:
        c->rope_neox = false;
        break;
    case SLU_ARCH_GRANITEMOE: {
        c->rope_neox = false;
        c->embd_scale = read_f32(r, "embedding_scale", 1.0);
        c->residual_scale = read_f32(r, "residual_scale", 1.0);
        c->logit_divisor = read_f32(r, "logit_scale", 1.0);
        float scale = read_f32(r, "attention.scale", 0.0);
        c->attn_scale = scale != 0.0f ? scale : c->attn_scale;
        if (c->logit_divisor == 0.0f) {
            fail(r, SLU_EFORMAT, "logit_scale", "is zero");
        }
        if (!read_bool(r, "rope.scaling.finetuned", true)) {
            fail(r, SLU_EUNSUP, "rope.scaling.finetuned", "turns RoPE off, which is not supported");
        }
        break;
    }
    case SLU_ARCH_DEEPSEEK2: {
        c->rope_neox = false;
        c->rope_magnitude = 1.0f;
        float log_multiplier = read_f32(r, "rope.scaling.yarn_log_multiplier", 0.0);
        float magnitude =
            1.0f + (c->yarn_factor > 0 ? log_multiplier * logf(c->yarn_factor) : 0.0f);
        c->attn_scale *= magnitude * magnitude;
        break;
    }
    }
}

int slu_config_read(const struct slu_kvs *kvs, struct slu_config *ret_config, struct slu_err *err)
{
    struct slu_config config = {0};
    int rc = read_arch(kvs, &config, err);
    if (rc < 0) {
        return rc;
    }
    config.is_mla = config.arch == SLU_ARCH_DEEPSEEK2;
    struct reader r = {.kvs = kvs, .arch = slu_arch_name(config.arch), .err = err};
    read_sizes(&r, &config);
    if (!r.error) {
        read_heads(&r, &config);
    }
    if (!r.error) {
        read_rope(&r, &config);
    }
    if (!r.error) {
        read_experts(&r, &config);
    }
    if (!r.error) {
        read_switches(&r, &config);
    }
    if (r.error) {
        return r.error;
    }
    *ret_config = config;
    return 0;
}

struct spec_list {
    struct slu_tensor_spec *specs;
    size_t n, n_max;
    uint32_t layer;
};

static void add(struct spec_list *list, uint32_t rows, uint32_t cols, uint32_t n, bool is_optional,
                const char *format, ...) __attribute__((format(printf, 6, 7)));

static void add(struct spec_list *list, uint32_t rows, uint32_t cols, uint32_t n, bool is_optional,
                const char *format, ...)
{
    if (list->n < list->n_max) {
        struct slu_tensor_spec *spec = &list->specs[list->n];
        *spec = (struct slu_tensor_spec){
            .rows = rows, .cols = cols, .n = n, .is_optional = is_optional, .is_vector = rows == 1};
        va_list args;
        va_start(args, format);
        vsnprintf(spec->name, sizeof spec->name, format, args);
        va_end(args);
    }
    list->n++;
}

static void add_vector(struct spec_list *list, uint32_t n, const char *what)
{
    add(list, 1, n, 1, false, "blk.%u.%s", list->layer, what);
}

static void add_matrix(struct spec_list *list, uint32_t rows, uint32_t cols, const char *what)
{
    add(list, rows, cols, 1, false, "blk.%u.%s.weight", list->layer, what);
}

static void add_mla(struct spec_list *list, const struct slu_config *c)
{
    uint32_t l = list->layer;
    uint32_t nope = c->k_dim - c->rope_dims;
    bool has_lora = c->q_lora > 0;
    add(list, c->n_heads * c->k_dim, c->n_embd, 1, has_lora, "blk.%u.attn_q.weight", l);
    if (has_lora) {
        add(list, c->q_lora, c->n_embd, 1, true, "blk.%u.attn_q_a.weight", l);
        add(list, 1, c->q_lora, 1, true, "blk.%u.attn_q_a_norm.weight", l);
        add(list, c->n_heads * c->k_dim, c->q_lora, 1, true, "blk.%u.attn_q_b.weight", l);
    }
    add_matrix(list, c->kv_lora + c->rope_dims, c->n_embd, "attn_kv_a_mqa");
    add_vector(list, c->kv_lora, "attn_kv_a_norm.weight");
    add(list, c->n_heads * (nope + c->v_dim), c->kv_lora, 1, true, "blk.%u.attn_kv_b.weight", l);
    add(list, c->kv_lora, nope, c->n_heads, true, "blk.%u.attn_k_b.weight", l);
    add(list, c->v_dim, c->kv_lora, c->n_heads, true, "blk.%u.attn_v_b.weight", l);
    add_matrix(list, c->n_embd, c->n_heads * c->v_dim, "attn_output");
}

static void add_attention(struct spec_list *list, const struct slu_config *c)
{
    uint32_t q = c->n_heads * c->k_dim, k = c->n_heads_kv * c->k_dim, v = c->n_heads_kv * c->v_dim;
    add_matrix(list, q, c->n_embd, "attn_q");
    add_matrix(list, k, c->n_embd, "attn_k");
    add_matrix(list, v, c->n_embd, "attn_v");
    if (c->has_qkv_bias) {
        add_vector(list, q, "attn_q.bias");
        add_vector(list, k, "attn_k.bias");
        add_vector(list, v, "attn_v.bias");
    }
    if (c->qk_norm != SLU_QK_NORM_NONE) {
        bool full = c->qk_norm == SLU_QK_NORM_FULL;
        add_vector(list, full ? q : c->k_dim, "attn_q_norm.weight");
        add_vector(list, full ? k : c->k_dim, "attn_k_norm.weight");
    }
    if (c->has_sinks) {
        add_vector(list, c->n_heads, "attn_sinks.weight");
    }
    add_matrix(list, c->n_embd, c->n_heads * c->v_dim, "attn_output");
    if (c->has_out_bias) {
        add_vector(list, c->n_embd, "attn_output.bias");
    }
}

static void add_router(struct spec_list *list, const struct slu_config *c)
{
    add_matrix(list, c->n_experts, c->n_embd, "ffn_gate_inp");
    if (c->has_router_bias) {
        add_vector(list, c->n_experts, "ffn_gate_inp.bias");
    }
    if (c->has_gate_bias) {
        add(list, 1, c->n_experts, 1, true, "blk.%u.exp_probs_b.bias", list->layer);
    }
    if (c->has_shared_gate) {
        add_vector(list, c->n_embd, "ffn_gate_inp_shexp.weight");
    }
}

size_t slu_config_tensors(const struct slu_config *c, struct slu_tensor_spec *ret_specs,
                          size_t n_max)
{
    struct spec_list list = {.specs = ret_specs, .n_max = n_max};
    add(&list, c->n_vocab, c->n_embd, 1, false, "token_embd.weight");
    for (uint32_t l = 0; l < c->n_layers; l++) {
        list.layer = l;
        add_vector(&list, c->n_embd, "attn_norm.weight");
        if (c->is_mla) {
            add_mla(&list, c);
        } else {
            add_attention(&list, c);
        }
        add_vector(&list, c->n_embd,
                   c->arch == SLU_ARCH_GPT_OSS ? "post_attention_norm.weight" : "ffn_norm.weight");
        if (l >= c->n_dense_layers) {
            add_router(&list, c);
        }
    }
    add(&list, 1, c->n_embd, 1, false, "output_norm.weight");
    add(&list, c->n_vocab, c->n_embd, 1, true, "output.weight");
    return list.n;
}
