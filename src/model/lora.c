#include "model/lora.h"

#include <string.h>

#include "adapters/expert_stream.h"

/* Rows of B multiplied at once, into a buffer on the stack. */
#define ROWS_AT_ONCE 256u

/* y[0..n) = rows lo .. lo+n-1 of a float matrix times x. */
static void times(const struct slu_kern *kern, const struct slu_mat *m, uint32_t lo, uint32_t n,
                  const float *x, float *y)
{
    struct slu_mat view = *m;
    view.data += lo * m->at.codes_row;
    view.rows = n;
    struct slu_acts acts = {.n = 1, .cols = m->cols, .x = x, .x_stride = m->cols};
    kern->mul[m->fmt->id](y, n, &view, 0, n, &acts, NULL, 1);
}

/* y[0..n) += rows lo .. lo+n-1 of B times t. */
static void add_times(const struct slu_kern *kern, const struct slu_mat *b, uint32_t lo, uint32_t n,
                      const float *t, float *y)
{
    float part[ROWS_AT_ONCE];
    for (uint32_t i = 0; i < n; i += ROWS_AT_ONCE) {
        uint32_t some = n - i < ROWS_AT_ONCE ? n - i : ROWS_AT_ONCE;
        times(kern, b, lo + i, some, t, part);
        kern->axpy_f32(y + i, 1.0f, part, some);
    }
}

static float element(const struct slu_mat *m, uint32_t row, uint32_t col)
{
    const uint8_t *at = m->data + row * m->at.codes_row;
    if (m->fmt->id == SLU_FMT_F32) {
        return ((const float *)(const void *)at)[col];
    }
    uint16_t bits = ((const uint16_t *)(const void *)at)[col];
    if (m->fmt->id == SLU_FMT_F16) {
        return slu_f16_to_f32(bits);
    }
    union {
        uint32_t u;
        float f;
    } bf16 = {(uint32_t)bits << 16};
    return bf16.f;
}

/* Row `row` of A, columns lo .. lo+n-1, times x[n]: a row as a matrix of one. */
static float dot_columns(const struct slu_kern *kern, const struct slu_mat *a, uint32_t row,
                         uint32_t lo, uint32_t n, const float *x)
{
    struct slu_mat view = *a;
    view.data += row * a->at.codes_row + lo * (a->at.codes_row / a->cols);
    view.rows = 1;
    view.cols = n;
    struct slu_acts acts = {.n = 1, .cols = n, .x = x, .x_stride = n};
    float y;
    kern->mul[a->fmt->id](&y, 1, &view, 0, 1, &acts, NULL, 1);
    return y;
}

static void bank_shape(const struct slu_bank *bank, bool is_down,
                       struct slu_target_shape *ret_shape)
{
    uint32_t in = bank->shape.n_embd, out = bank->shape.n_ff;
    ret_shape->in = is_down ? out : in;
    ret_shape->out = is_down ? in : out;
    ret_shape->n = bank->n_experts;
}

static void mat_shape(const struct slu_mat *mat, struct slu_target_shape *ret_shape)
{
    if (mat->fmt) {
        *ret_shape = (struct slu_target_shape){.in = mat->cols, .out = mat->rows, .n = 1};
    }
}

static void target_shape(void *arg, enum slu_target target, uint32_t l,
                         struct slu_target_shape *ret_shape)
{
    const struct slu_weights *w = arg;
    const struct slu_config *c = &w->config;
    *ret_shape = (struct slu_target_shape){0};
    if (l >= c->n_layers) {
        return;
    }
    const struct slu_layer *layer = &w->layers[l];
    bool is_dense = layer->routed.n_experts == 0;
    /* The files' lineage permutes rows of q and k where RoPE turns adjacent pairs, but for MLA. */
    bool is_permuted = !c->rope_neox && !c->is_mla;
    switch (target) {
    case SLU_TARGET_Q:
        mat_shape(&layer->q, ret_shape);
        ret_shape->permute_heads = is_permuted ? c->n_heads : 0;
        break;
    case SLU_TARGET_K:
        mat_shape(&layer->k, ret_shape);
        ret_shape->permute_heads = is_permuted ? c->n_heads_kv : 0;
        break;
    case SLU_TARGET_V:
        mat_shape(&layer->v, ret_shape);
        break;
    case SLU_TARGET_OUT:
        mat_shape(&layer->out, ret_shape);
        break;
    case SLU_TARGET_Q_A:
        mat_shape(&layer->q_a, ret_shape);
        break;
    case SLU_TARGET_Q_B:
        mat_shape(&layer->q_b, ret_shape);
        break;
    case SLU_TARGET_KV_A:
        mat_shape(&layer->kv_a, ret_shape);
        break;
    case SLU_TARGET_KV_B:
        if (c->is_mla) {
            uint32_t out = c->n_heads * (c->k_dim - c->rope_dims + c->v_dim);
            *ret_shape = (struct slu_target_shape){.in = c->kv_lora, .out = out, .n = 1};
        }
        break;
    case SLU_TARGET_ROUTER:
        mat_shape(&layer->router, ret_shape);
        break;
    case SLU_TARGET_FFN_GATE:
    case SLU_TARGET_FFN_UP:
    case SLU_TARGET_FFN_DOWN:
        if (is_dense) {
            bank_shape(&layer->resident, target == SLU_TARGET_FFN_DOWN, ret_shape);
        }
        break;
    case SLU_TARGET_SHARED_GATE:
    case SLU_TARGET_SHARED_UP:
    case SLU_TARGET_SHARED_DOWN:
        if (!is_dense) {
            bank_shape(&layer->resident, target == SLU_TARGET_SHARED_DOWN, ret_shape);
        }
        break;
    case SLU_TARGET_EXPERT_GATE:
    case SLU_TARGET_EXPERT_UP:
    case SLU_TARGET_EXPERT_DOWN:
        bank_shape(&layer->routed, target == SLU_TARGET_EXPERT_DOWN, ret_shape);
        break;
    case SLU_TARGET_EMBEDDING:
        if (l == 0) {
            *ret_shape = (struct slu_target_shape){.in = c->n_vocab, .out = c->n_embd, .n = 1};
        }
        break;
    case SLU_TARGET_HEAD:
        if (l == 0) {
            *ret_shape = (struct slu_target_shape){.in = c->n_embd, .out = c->n_vocab, .n = 1};
        }
        break;
    default:
        break;
    }
}

struct slu_base slu_lora_base(const struct slu_weights *weights, uint64_t fingerprint)
{
    return (struct slu_base){
        .arch = slu_arch_name(weights->config.arch),
        .fingerprint = fingerprint,
        .n_layers = weights->config.n_layers,
        .n_used = weights->config.n_used,
        .shape = target_shape,
        .arg = (void *)weights,
    };
}

const struct slu_lora *slu_lora_find(const struct slu_adapter_set *set, uint32_t i, uint32_t layer,
                                     enum slu_target target, float *ret_factor)
{
    const struct slu_lora *lora = slu_adapter_find(set->uses[i].adapter, layer, target);
    *ret_factor = lora ? lora->scale * set->uses[i].scale : 0.0f;
    return lora;
}

bool slu_lora_touches(const struct slu_adapter_set *set, uint32_t layer, enum slu_target target)
{
    for (uint32_t i = 0; set && i < set->n; i++) {
        if (slu_adapter_find(set->uses[i].adapter, layer, target)) {
            return true;
        }
    }
    return false;
}

void slu_lora_down(const struct slu_kern *kern, const struct slu_lora *lora, float factor,
                   const float *x, float *t)
{
    times(kern, &lora->a, 0, lora->rank, x, t);
    for (uint32_t r = 0; r < lora->rank; r++) {
        t[r] *= factor;
    }
}

void slu_lora_up(const struct slu_kern *kern, const struct slu_lora *lora, const float *t,
                 uint32_t lo, uint32_t hi, float *y)
{
    add_times(kern, &lora->b, lo, hi - lo, t, y + lo);
}

void slu_lora_embed(const struct slu_kern *kern, const struct slu_adapter_set *set, int32_t id,
                    float scale, float *x)
{
    float t[SLU_LORA_RANKS_MAX];
    for (uint32_t i = 0; set && i < set->n; i++) {
        float factor;
        const struct slu_lora *lora = slu_lora_find(set, i, 0, SLU_TARGET_EMBEDDING, &factor);
        if (lora) {
            for (uint32_t r = 0; r < lora->rank; r++) {
                t[r] = scale * factor * element(&lora->a, r, (uint32_t)id);
            }
            add_times(kern, &lora->b, 0, lora->b.rows, t, x);
        }
    }
}

void slu_lora_absorb(const struct slu_kern *kern, const struct slu_adapter_set *set, uint32_t layer,
                     uint32_t lo, uint32_t n, const float *q, float *row, float *latent)
{
    float t[SLU_LORA_RANKS_MAX], b_row[SLU_LORA_RANKS_MAX];
    for (uint32_t i = 0; set && i < set->n; i++) {
        float factor;
        const struct slu_lora *lora = slu_lora_find(set, i, layer, SLU_TARGET_KV_B, &factor);
        if (!lora) {
            continue;
        }
        memset(t, 0, lora->rank * sizeof *t);
        for (uint32_t j = 0; j < n; j++) {
            kern->row_f32(b_row, &lora->b, lo + j);
            kern->axpy_f32(t, q[j], b_row, lora->rank);
        }
        for (uint32_t r = 0; r < lora->rank; r++) {
            kern->row_f32(row, &lora->a, r);
            kern->axpy_f32(latent, factor * t[r], row, lora->a.cols);
        }
    }
}

void slu_lora_emerge(const struct slu_kern *kern, const struct slu_adapter_set *set, uint32_t layer,
                     uint32_t lo, uint32_t n, const float *latent, float *out)
{
    float t[SLU_LORA_RANKS_MAX];
    for (uint32_t i = 0; set && i < set->n; i++) {
        float factor;
        const struct slu_lora *lora = slu_lora_find(set, i, layer, SLU_TARGET_KV_B, &factor);
        if (lora) {
            slu_lora_down(kern, lora, factor, latent, t);
            add_times(kern, &lora->b, lo, n, t, out);
        }
    }
}

bool slu_lora_block_init(struct slu_lora_block *block, const struct slu_kern *kern,
                         const struct slu_adapter_set *set, uint32_t layer, uint32_t expert,
                         uint32_t n_embd, enum slu_target gate)
{
    *block = (struct slu_lora_block){
        .kern = kern,
        .set = set,
        .layer = layer,
        .expert = expert,
        .n_embd = n_embd,
        .gate = gate,
        .up = (enum slu_target)(gate + 1),
        .down = (enum slu_target)(gate + 2),
    };
    return slu_lora_touches(set, layer, block->gate) || slu_lora_touches(set, layer, block->up) ||
           slu_lora_touches(set, layer, block->down);
}

/* The matrices of use i's pair for the blocks' target; false where it leaves that alone. */
static bool find_pair(const struct slu_lora_block *block, uint32_t i, enum slu_target target,
                      struct slu_lora *ret_pair, float *ret_factor)
{
    const struct slu_lora *lora = slu_lora_find(block->set, i, block->layer, target, ret_factor);
    if (!lora) {
        return false;
    }
    *ret_pair = *lora;
    if (!lora->a.data) {
        const uint8_t *bytes =
            slu_expert_bytes(block->set->uses[i].adapter, block->layer, block->expert);
        slu_lora_of_expert(lora, bytes, &ret_pair->a, &ret_pair->b);
    }
    return true;
}

/* Adds B[rows at->lo ..] (A x) to n rows of a block's hidden values. */
static void add_hidden(const struct slu_lora_block *block, enum slu_target target,
                       const struct slu_block_layout *at, float *hidden, size_t stride,
                       const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    float t[SLU_LORA_RANKS_MAX];
    for (uint32_t i = 0; i < block->set->n; i++) {
        float factor;
        struct slu_lora lora;
        if (!find_pair(block, i, target, &lora, &factor)) {
            continue;
        }
        for (uint32_t j = 0; j < n; j++) {
            slu_lora_down(block->kern, &lora, factor, x->x + tok[j] * x->x_stride, t);
            add_times(block->kern, &lora.b, at->lo, at->n, t, hidden + j * stride);
        }
    }
}

static void on_hidden(void *arg, const struct slu_block_layout *at, float *gate, float *up,
                      size_t stride, const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    const struct slu_lora_block *block = arg;
    add_hidden(block, block->gate, at, gate, stride, x, tok, n);
    add_hidden(block, block->up, at, up, stride, x, tok, n);
}

/* Adds B (A[.., columns at->lo ..] h) to n rows of a block's output. */
static void on_output(void *arg, const struct slu_block_layout *at, const float *h, size_t stride,
                      float *y, size_t y_stride, uint32_t n)
{
    const struct slu_lora_block *block = arg;
    float t[SLU_LORA_RANKS_MAX];
    for (uint32_t i = 0; i < block->set->n; i++) {
        float factor;
        struct slu_lora lora;
        if (!find_pair(block, i, block->down, &lora, &factor)) {
            continue;
        }
        for (uint32_t j = 0; j < n; j++) {
            for (uint32_t r = 0; r < lora.rank; r++) {
                t[r] = factor * dot_columns(block->kern, &lora.a, r, at->lo, at->n, h + j * stride);
            }
            add_times(block->kern, &lora.b, 0, block->n_embd, t, y + j * y_stride);
        }
    }
}

struct slu_block_hook slu_lora_block_hook(struct slu_lora_block *block)
{
    return (struct slu_block_hook){.hidden = on_hidden, .output = on_output, .arg = block};
}
