#include "tools/synth.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/planes.h"
#include "tools/synth_parts.h"

/* ---- tensors ----------------------------------------------------------------------------- */

struct tensors {
    const struct slu_synth_model *model;
    struct slu_synth_tensor *at;
    size_t n, room;
    bool failed;
    uint32_t layer;
};

static struct slu_synth_tensor *add(struct tensors *list)
{
    if (list->n == list->room) {
        size_t room = list->room ? 2 * list->room : 256;
        struct slu_synth_tensor *at = realloc(list->at, room * sizeof *at);
        if (!at) {
            list->failed = true;
            return NULL;
        }
        list->at = at;
        list->room = room;
    }
    return &list->at[list->n++];
}

static const struct slu_fmt *fitting(const struct slu_fmt *fmt, uint32_t cols)
{
    if (cols % fmt->granule == 0) {
        return fmt;
    }
    return slu_fmt_get(cols % 32 == 0 ? SLU_FMT_Q8_0 : SLU_FMT_F16);
}

/* A matrix, or a stack of n: weights normal around 0 with gain / sqrt(cols). A name that starts
 * with '.' belongs to the current layer. */
static void stack(struct tensors *list, const char *name, const struct slu_fmt *fmt, uint32_t rows,
                  uint32_t cols, uint32_t n, float gain)
{
    struct slu_synth_tensor *tensor = add(list);
    if (!tensor) {
        return;
    }
    *tensor = (struct slu_synth_tensor){
        .fmt = fitting(fmt, cols),
        .n_dims = n > 0 ? 3 : 2,
        .dims = {cols, rows, n > 0 ? n : 1},
        .deviation = gain / sqrtf((float)cols),
    };
    if (name[0] == '.') {
        snprintf(tensor->name, sizeof tensor->name, "blk.%u%s.weight", list->layer, name);
    } else {
        snprintf(tensor->name, sizeof tensor->name, "%s.weight", name);
    }
}

static void matrix(struct tensors *list, const char *name, uint32_t rows, uint32_t cols, float gain)
{
    stack(list, name, list->model->dense, rows, cols, 0, gain);
}

static const struct slu_fmt *with_more_bits(const struct slu_synth_model *m,
                                            const struct slu_fmt *fmt)
{
    return m->better && m->better->bits > fmt->bits ? m->better : fmt;
}

/* Those layers' values and down matrices matter most, llama.cpp's Q4_K_M has it, and get more
 * bits: the first and the last eighth, and every third of the others. */
static const struct slu_fmt *better(const struct tensors *list, const struct slu_fmt *fmt)
{
    const struct slu_synth_model *m = list->model;
    uint32_t l = list->layer, n = m->p.n_layers;
    bool is_chosen = l < n / 8 || l >= 7 * n / 8 || (l - n / 8) % 3 == 2;
    return is_chosen ? with_more_bits(m, fmt) : fmt;
}

/* A vector of the current layer, or n of them. */
static void vectors(struct tensors *list, const char *name, uint32_t cols, uint32_t n, float mean,
                    float deviation)
{
    struct slu_synth_tensor *tensor = add(list);
    if (!tensor) {
        return;
    }
    *tensor = (struct slu_synth_tensor){
        .fmt = list->model->vector,
        .n_dims = n > 0 ? 2 : 1,
        .dims = {cols, n > 0 ? n : 1, 1},
        .mean = mean,
        .deviation = deviation,
    };
    snprintf(tensor->name, sizeof tensor->name, "blk.%u%s", list->layer, name);
}

static void norm(struct tensors *list, const char *name, uint32_t cols)
{
    vectors(list, name, cols, 0, 1.0f, 0.1f);
}

static void bias(struct tensors *list, const char *name, uint32_t cols)
{
    vectors(list, name, cols, 0, 0.0f, 0.3f);
}

static void add_mla(struct tensors *list)
{
    const struct slu_synth_model *m = list->model;
    uint32_t heads = m->p.n_heads, nope = m->k_dim - m->rope_dims;
    if (m->p.is_lite) {
        matrix(list, ".attn_q", heads * m->k_dim, m->p.n_embd, 1.3f);
    } else {
        matrix(list, ".attn_q_a", m->q_lora, m->p.n_embd, 1.0f);
        norm(list, ".attn_q_a_norm.weight", m->q_lora);
        matrix(list, ".attn_q_b", heads * m->k_dim, m->q_lora, 1.3f);
    }
    matrix(list, ".attn_kv_a_mqa", m->kv_lora + m->rope_dims, m->p.n_embd, 1.0f);
    norm(list, ".attn_kv_a_norm.weight", m->kv_lora);
    if (m->p.has_split_kv_b) {
        stack(list, ".attn_k_b", m->dense, m->kv_lora, nope, heads, 1.0f);
        stack(list, ".attn_v_b", m->dense, m->v_dim, m->kv_lora, heads, 1.0f);
    } else {
        matrix(list, ".attn_kv_b", heads * (nope + m->v_dim), m->kv_lora, 1.0f);
    }
    matrix(list, ".attn_output", m->p.n_embd, heads * m->v_dim, 1.0f);
}

static void add_attention(struct tensors *list)
{
    const struct slu_synth_model *m = list->model;
    uint32_t q = m->p.n_heads * m->k_dim, kv = m->p.n_heads_kv * m->k_dim;
    matrix(list, ".attn_q", q, m->p.n_embd, 1.3f);
    matrix(list, ".attn_k", kv, m->p.n_embd, 1.3f);
    stack(list, ".attn_v", better(list, m->dense), kv, m->p.n_embd, 0, 1.0f);
    matrix(list, ".attn_output", m->p.n_embd, q, 1.0f);
    if (m->p.arch == SLU_ARCH_GPT_OSS || m->p.arch == SLU_ARCH_QWEN2MOE) {
        bias(list, ".attn_q.bias", q);
        bias(list, ".attn_k.bias", kv);
        bias(list, ".attn_v.bias", kv);
    }
    if (m->p.arch == SLU_ARCH_GPT_OSS) {
        bias(list, ".attn_output.bias", m->p.n_embd);
        vectors(list, ".attn_sinks.weight", m->p.n_heads, 0, 0.0f, 1.0f);
    }
    if (m->p.arch == SLU_ARCH_QWEN3MOE) {
        norm(list, ".attn_q_norm.weight", m->k_dim);
        norm(list, ".attn_k_norm.weight", m->k_dim);
    }
    if (m->p.arch == SLU_ARCH_OLMOE) {
        norm(list, ".attn_q_norm.weight", q);
        norm(list, ".attn_k_norm.weight", kv);
    }
}

static void add_routed(struct tensors *list)
{
    const struct slu_synth_model *m = list->model;
    uint32_t n_embd = m->p.n_embd, n_ff = m->p.n_ff, n = m->p.n_experts;
    /* gpt-oss clamps its gate: a wider one makes the clamp matter. */
    float gain = m->p.arch == SLU_ARCH_GPT_OSS ? 3.0f : 1.6f;
    if (m->p.has_expert_tensors) {
        char name[48];
        for (uint32_t e = 0; e < n; e++) {
            snprintf(name, sizeof name, ".ffn_gate.%u", e);
            stack(list, name, m->expert, n_ff, n_embd, 0, gain);
            snprintf(name, sizeof name, ".ffn_up.%u", e);
            stack(list, name, m->expert, n_ff, n_embd, 0, gain);
            snprintf(name, sizeof name, ".ffn_down.%u", e);
            stack(list, name, better(list, m->down), n_embd, n_ff, 0, 1.5f);
        }
        return;
    }
    stack(list, ".ffn_gate_exps", m->expert, n_ff, n_embd, n, gain);
    stack(list, ".ffn_up_exps", m->expert, n_ff, n_embd, n, gain);
    stack(list, ".ffn_down_exps", better(list, m->down), n_embd, n_ff, n, 1.5f);
    if (m->p.arch == SLU_ARCH_GPT_OSS) {
        vectors(list, ".ffn_gate_exps.bias", n_ff, n, 0.0f, 0.5f);
        vectors(list, ".ffn_up_exps.bias", n_ff, n, 0.0f, 0.5f);
        vectors(list, ".ffn_down_exps.bias", n_embd, n, 0.0f, 0.3f);
    }
}

static void add_shared(struct tensors *list)
{
    const struct slu_synth_model *m = list->model;
    if (m->n_ff_shared > 0) {
        matrix(list, ".ffn_gate_shexp", m->n_ff_shared, m->p.n_embd, 1.6f);
        matrix(list, ".ffn_up_shexp", m->n_ff_shared, m->p.n_embd, 1.6f);
        matrix(list, ".ffn_down_shexp", m->p.n_embd, m->n_ff_shared, 1.0f);
    }
    if (m->p.arch == SLU_ARCH_QWEN2MOE) {
        vectors(list, ".ffn_gate_inp_shexp.weight", m->p.n_embd, 0, 0.0f,
                2.0f / sqrtf((float)m->p.n_embd));
    }
}

static void add_layer(struct tensors *list)
{
    const struct slu_synth_model *m = list->model;
    uint32_t n_embd = m->p.n_embd;
    norm(list, ".attn_norm.weight", n_embd);
    if (m->p.arch == SLU_ARCH_DEEPSEEK2) {
        add_mla(list);
    } else {
        add_attention(list);
    }
    norm(list, m->p.arch == SLU_ARCH_GPT_OSS ? ".post_attention_norm.weight" : ".ffn_norm.weight",
         n_embd);
    if (m->p.arch == SLU_ARCH_DEEPSEEK2 && list->layer < SLU_SYNTH_DENSE_LAYERS) {
        matrix(list, ".ffn_gate", m->n_ff_dense, n_embd, 1.6f);
        matrix(list, ".ffn_up", m->n_ff_dense, n_embd, 1.6f);
        matrix(list, ".ffn_down", n_embd, m->n_ff_dense, 1.0f);
        return;
    }
    stack(list, ".ffn_gate_inp", slu_fmt_get(SLU_FMT_F32), m->p.n_experts, n_embd, 0, 2.0f);
    if (m->p.arch == SLU_ARCH_GPT_OSS) {
        bias(list, ".ffn_gate_inp.bias", m->p.n_experts);
    }
    if (m->p.arch == SLU_ARCH_DEEPSEEK2 && !m->p.is_lite) {
        vectors(list, ".exp_probs_b.bias", m->p.n_experts, 0, 0.0f, 0.1f);
    }
    add_routed(list);
    add_shared(list);
}

static void add_all(struct tensors *list)
{
    const struct slu_synth_model *m = list->model;
    /* An embedding has unit deviation however wide it is. */
    stack(list, "token_embd", m->embd, m->p.n_vocab, m->p.n_embd, 0, sqrtf((float)m->p.n_embd));
    for (list->layer = 0; list->layer < m->p.n_layers; list->layer++) {
        add_layer(list);
    }
    struct slu_synth_tensor *last = add(list);
    if (last) {
        *last = (struct slu_synth_tensor){.name = "output_norm.weight",
                                          .fmt = m->vector,
                                          .n_dims = 1,
                                          .dims = {m->p.n_embd, 1, 1},
                                          .mean = 1,
                                          .deviation = 0.1f};
    }
    if (!m->p.is_tied) {
        stack(list, "output", with_more_bits(m, m->dense), m->p.n_vocab, m->p.n_embd, 0, 2.0f);
    }
}

/* ---- parameters -------------------------------------------------------------------------- */

static int find_fmt(const char *name, const char *otherwise, const struct slu_fmt **ret_fmt,
                    struct slu_err *err)
{
    const char *wanted = name ? name : otherwise;
    for (unsigned id = 0; id < SLU_FMT_GGUFS; id++) {
        const struct slu_fmt *fmt = slu_fmt_get(id);
        if (strcmp(fmt->name, wanted) == 0) {
            *ret_fmt = fmt;
            return 0;
        }
    }
    return slu_err_set(err, SLU_EINVAL, "no weight format is called %s", wanted);
}

static void set_default(uint32_t *value, uint32_t otherwise)
{
    if (*value == 0) {
        *value = otherwise;
    }
}

static int find_fmts(struct slu_synth_model *m, struct slu_err *err)
{
    const struct slu_synth_params *p = &m->p;
    int code;
    if ((code = find_fmt(p->expert_type, "Q4_0", &m->expert, err)) < 0 ||
        (code = find_fmt(p->down_type, m->expert->name, &m->down, err)) < 0 ||
        (code = find_fmt(p->dense_type, "Q8_0", &m->dense, err)) < 0 ||
        (code = find_fmt(p->embd_type, m->dense->name, &m->embd, err)) < 0) {
        return code;
    }
    m->better = p->has_more_bits ? slu_fmt_get(SLU_FMT_Q6_K) : NULL;
    code = find_fmt(p->vector_type, "F32", &m->vector, err);
    if (code == 0 && m->vector->group != 0) {
        code = slu_err_set(err, SLU_EINVAL, "vectors cannot be %s", m->vector->name);
    }
    return code;
}

static void set_sizes(struct slu_synth_model *m)
{
    struct slu_synth_params *p = &m->p;
    bool is_mla = p->arch == SLU_ARCH_DEEPSEEK2;
    bool is_k =
        m->expert->super || m->down->super || m->dense->super || m->embd->super || m->better;
    set_default(&p->n_layers, 3);
    set_default(&p->n_ctx, 512);
    set_default(&p->n_embd, is_k ? 256 : 64);
    set_default(&p->n_ff, is_k ? 256 : 96);
    set_default(&p->n_experts, 8);
    set_default(&p->n_used, p->n_experts < 2 ? 1 : 2);
    set_default(&p->n_vocab, 384);
    set_default(&p->n_heads, p->n_embd < 256 ? 4 : p->n_embd < 1024 ? 8 : 16);
    bool every = is_mla || p->arch == SLU_ARCH_OLMOE || p->n_heads % 2;
    set_default(&p->n_heads_kv, every ? p->n_heads : p->n_heads % 8 ? 2 : p->n_heads / 4);
    if (is_mla) {
        m->k_dim = p->head_dim ? p->head_dim + p->head_dim / 2 : 48;
        m->rope_dims = m->k_dim / 3;
        m->v_dim = m->k_dim - m->rope_dims;
        m->q_lora = is_k ? 256 : 32;
        m->kv_lora = is_k ? 256 : 64;
        m->n_ff_dense = 2 * p->n_ff;
    } else {
        uint32_t own = p->arch == SLU_ARCH_GPT_OSS    ? 64
                       : p->arch == SLU_ARCH_QWEN3MOE ? 32
                                                      : p->n_embd / p->n_heads;
        m->k_dim = m->v_dim = m->rope_dims = p->head_dim ? p->head_dim : own;
    }
    if (is_mla || p->arch == SLU_ARCH_QWEN2MOE) {
        m->n_ff_shared = 2 * p->n_ff;
    }
}

static int check_sizes(const struct slu_synth_model *m, struct slu_err *err)
{
    const struct slu_synth_params *p = &m->p;
    uint32_t vocab_min = slu_synth_vocab_min(p->arch);
    if (p->n_vocab < vocab_min || p->n_vocab > 700000) {
        return slu_err_set(err, SLU_EINVAL, "a vocabulary has %u to 700000 tokens, not %u",
                           vocab_min, p->n_vocab);
    }
    if (p->n_layers > SLU_LAYERS_MAX || p->n_experts > SLU_EXPERTS_MAX || p->n_embd > 1u << 16 ||
        p->n_ff > 1u << 18 || p->n_heads > 1024 || m->k_dim > 4096) {
        return slu_err_set(err, SLU_EINVAL, "one of the model's sizes is too large");
    }
    if (p->n_used > p->n_experts || p->n_used > SLU_TOP_K_MAX) {
        return slu_err_set(err, SLU_EINVAL, "a token cannot use %u of %u experts", p->n_used,
                           p->n_experts);
    }
    if (p->n_heads % p->n_heads_kv || m->rope_dims < 2 || m->rope_dims % 2) {
        return slu_err_set(err, SLU_EINVAL,
                           "%u heads, %u of them with keys, of width %u make no attention",
                           p->n_heads, p->n_heads_kv, m->k_dim);
    }
    bool is_mla = p->arch == SLU_ARCH_DEEPSEEK2;
    if ((!is_mla && (p->is_lite || p->has_split_kv_b)) ||
        (p->has_expert_tensors && p->arch != SLU_ARCH_LLAMA)) {
        return slu_err_set(err, SLU_EINVAL, "%s has no such variant", slu_arch_name(p->arch));
    }
    return 0;
}

int slu_synth_plan_make(const struct slu_synth_params *params, struct slu_synth_plan *ret_plan,
                        struct slu_err *err)
{
    struct slu_synth_plan plan = {.model = {.p = *params}};
    int code = find_fmts(&plan.model, err);
    if (code < 0) {
        return code;
    }
    if ((unsigned)params->arch > SLU_ARCH_DEEPSEEK2) {
        return slu_err_set(err, SLU_EINVAL, "there is no architecture number %u",
                           (unsigned)params->arch);
    }
    set_sizes(&plan.model);
    code = check_sizes(&plan.model, err);
    if (code < 0) {
        return code;
    }
    struct tensors list = {.model = &plan.model};
    add_all(&list);
    if (list.failed) {
        free(list.at);
        return slu_err_set(err, SLU_ENOMEM, "out of memory for the list of tensors");
    }
    plan.tensors = list.at;
    plan.n_tensors = list.n;
    for (size_t i = 0; i < list.n; i++) {
        struct slu_synth_tensor *tensor = &list.at[i];
        uint32_t cols = (uint32_t)tensor->dims[0];
        tensor->number = i;
        tensor->row_bytes = slu_planes_row_bytes(tensor->fmt, cols);
        tensor->bytes = tensor->dims[1] * tensor->dims[2] * tensor->row_bytes;
        plan.bytes += tensor->bytes;
        plan.cols_max = cols > plan.cols_max ? cols : plan.cols_max;
    }
    *ret_plan = plan;
    return 0;
}

void slu_synth_plan_finish(struct slu_synth_plan *plan)
{
    free(plan->tensors);
    *plan = (struct slu_synth_plan){0};
}
