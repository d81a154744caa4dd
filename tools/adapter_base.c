#include "tools/adapter_base.h"

#include <string.h>

#include "io/pack.h"

static int read_pack(struct slu_source *source, struct slu_adapter_base *base, struct slu_err *err)
{
    struct slu_pack *pack;
    int rc = slu_pack_open(source, &pack, err);
    if (rc < 0) {
        slu_source_destroy(source);
        return rc;
    }
    rc = slu_config_read(&pack->kvs, &base->config, err);
    if (rc < 0) {
        slu_err_prefix(err, "%s", source->name);
    }
    base->has_q = slu_pack_find(pack, "blk.0.attn_q.weight") != NULL;
    base->fingerprint = pack->fingerprint;
    slu_pack_close(pack);
    return rc;
}

static int read_gguf(struct slu_source *source, struct slu_adapter_base *base, struct slu_err *err)
{
    struct slu_gguf *gguf;
    int rc = slu_gguf_open(source, &gguf, err);
    if (rc == 0) {
        rc = slu_config_read(&gguf->kvs, &base->config, err);
        if (rc < 0) {
            slu_err_prefix(err, "%s", source->name);
        }
        base->has_q = slu_gguf_find(gguf, "blk.0.attn_q.weight") != NULL;
        slu_gguf_close(gguf);
    }
    slu_source_destroy(source);
    return rc;
}

int slu_adapter_base_open(const char *path, struct slu_adapter_base *ret_base, struct slu_err *err)
{
    struct slu_source *source;
    struct slu_adapter_base base = {0};
    char magic[sizeof SLU_PACK_MAGIC - 1] = {0};
    int rc = slu_source_open_file(path, &source, err);
    if (rc < 0) {
        return rc;
    }
    if (source->size_bytes >= sizeof magic) {
        rc = source->read_at(source, 0, magic, sizeof magic, err);
    }
    if (rc < 0) {
        slu_source_destroy(source);
        return rc;
    }
    rc = memcmp(magic, SLU_PACK_MAGIC, sizeof magic) == 0 ? read_pack(source, &base, err)
                                                          : read_gguf(source, &base, err);
    if (rc == 0) {
        *ret_base = base;
    }
    return rc;
}

static struct slu_target_shape matrix(uint32_t in, uint32_t out, uint32_t n)
{
    bool is_there = in && out && n;
    return is_there ? (struct slu_target_shape){.in = in, .out = out, .n = n}
                    : (struct slu_target_shape){0};
}

static struct slu_target_shape attention_shape(const struct slu_adapter_base *base,
                                               enum slu_target target)
{
    const struct slu_config *c = &base->config;
    /* Rows of q and k are permuted where RoPE turns adjacent pairs, but for MLA. */
    bool is_permuted = !c->rope_neox && !c->is_mla;
    bool has_q_lora = c->is_mla && !base->has_q;
    struct slu_target_shape shape = {0};
    uint32_t q = c->n_heads * c->k_dim;
    switch (target) {
    case SLU_TARGET_Q:
        shape = matrix(c->n_embd, q, !has_q_lora);
        shape.permute_heads = is_permuted ? c->n_heads : 0;
        return shape;
    case SLU_TARGET_K:
        shape = matrix(c->n_embd, c->n_heads_kv * c->k_dim, !c->is_mla);
        shape.permute_heads = is_permuted ? c->n_heads_kv : 0;
        return shape;
    case SLU_TARGET_V:
        return matrix(c->n_embd, c->n_heads_kv * c->v_dim, !c->is_mla);
    case SLU_TARGET_OUT:
        return matrix(c->n_heads * c->v_dim, c->n_embd, 1);
    case SLU_TARGET_Q_A:
        return matrix(c->n_embd, c->q_lora, has_q_lora);
    case SLU_TARGET_Q_B:
        return matrix(c->q_lora, q, has_q_lora);
    case SLU_TARGET_KV_A:
        return matrix(c->n_embd, c->kv_lora + c->rope_dims, c->is_mla);
    default: /* SLU_TARGET_KV_B */
        return matrix(c->kv_lora, c->n_heads * (c->k_dim - c->rope_dims + c->v_dim), c->is_mla);
    }
}

static struct slu_target_shape target_shape(const struct slu_adapter_base *base,
                                            enum slu_target target, uint32_t layer)
{
    const struct slu_config *c = &base->config;
    bool is_dense = layer < c->n_dense_layers;
    switch (target) {
    case SLU_TARGET_ROUTER:
        return matrix(c->n_embd, c->n_experts, !is_dense);
    case SLU_TARGET_FFN_GATE:
    case SLU_TARGET_FFN_UP:
        return matrix(c->n_embd, c->n_ff_dense, is_dense);
    case SLU_TARGET_FFN_DOWN:
        return matrix(c->n_ff_dense, c->n_embd, is_dense);
    case SLU_TARGET_SHARED_GATE:
    case SLU_TARGET_SHARED_UP:
        return matrix(c->n_embd, c->n_ff_shared, !is_dense);
    case SLU_TARGET_SHARED_DOWN:
        return matrix(c->n_ff_shared, c->n_embd, !is_dense);
    case SLU_TARGET_EXPERT_GATE:
    case SLU_TARGET_EXPERT_UP:
        return matrix(c->n_embd, c->n_ff_expert, is_dense ? 0 : c->n_experts);
    case SLU_TARGET_EXPERT_DOWN:
        return matrix(c->n_ff_expert, c->n_embd, is_dense ? 0 : c->n_experts);
    case SLU_TARGET_EMBEDDING:
        return matrix(c->n_vocab, c->n_embd, layer == 0);
    case SLU_TARGET_HEAD:
        return matrix(c->n_embd, c->n_vocab, layer == 0);
    default:
        return attention_shape(base, target);
    }
}

static void shape_of(void *arg, enum slu_target target, uint32_t layer,
                     struct slu_target_shape *ret_shape)
{
    const struct slu_adapter_base *base = arg;
    *ret_shape = (struct slu_target_shape){0};
    if (layer < base->config.n_layers && (unsigned)target < SLU_TARGETS) {
        *ret_shape = target_shape(base, target, layer);
    }
}

struct slu_base slu_adapter_base_view(const struct slu_adapter_base *base)
{
    return (struct slu_base){
        .arch = slu_arch_name(base->config.arch),
        .fingerprint = base->fingerprint,
        .n_layers = base->config.n_layers,
        .n_used = base->config.n_used,
        .shape = shape_of,
        .arg = (void *)base, /* shape_of only reads it */
    };
}
