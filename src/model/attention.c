/*
 * Attention for a chunk of tokens. MLA is computed in its absorbed form: each head's query is
 * taken through its key projection into the latent space, where all heads share one key and one
 * value row a position (the latent itself), and what attention gives is taken back through the
 * value projection. With that, one routine scores all architectures: H query heads of k_dim
 * against G key-value heads, MLA being G = 1 with values that are the first part of the keys.
 */
#include <assert.h>
#include <string.h>

#include "model/attend.h"
#include "model/ops.h"
#include "model/rope.h"

/* What is done to each token's queries, keys and values between their products and attention. */
struct token_job {
    struct slu_model *model;
    struct slu_kv_cache *kv;
    uint32_t l, from; /* tokens from `from` on */
};

/* Of tokens lo .. hi-1, as below. */
static void norm_heads(struct slu_model *m, float *x, const float *w, uint32_t lo, uint32_t hi,
                       uint32_t width, uint32_t head_dim)
{
    const struct slu_config *c = &m->weights->config;
    uint32_t part = c->qk_norm == SLU_QK_NORM_FULL ? width : head_dim;
    for (size_t i = (size_t)lo * width; i < (size_t)hi * width; i += part) {
        slu_rms_norm(m->kern, x + i, x + i, w, part, c->norm_eps);
    }
}

static void rope_heads(struct slu_model *m, float *x, uint32_t lo, uint32_t hi, uint32_t n_heads,
                       uint32_t stride, uint32_t offset)
{
    const struct slu_config *c = &m->weights->config;
    const struct slu_scratch *s = &m->scratch;
    size_t half = c->rope_dims / 2;
    for (uint32_t t = lo; t < hi; t++) {
        for (uint32_t h = 0; h < n_heads; h++) {
            slu_rope_apply(c, x + ((size_t)t * n_heads + h) * stride + offset, s->cos + t * half,
                           s->sin + t * half);
        }
    }
}

static void finish_qkv(void *arg, uint32_t lo, uint32_t hi)
{
    const struct token_job *job = arg;
    struct slu_model *m = job->model;
    const struct slu_config *c = &m->weights->config;
    const struct slu_layer *layer = &m->weights->layers[job->l];
    const struct slu_scratch *s = &m->scratch;
    uint32_t k_width = c->n_heads_kv * c->k_dim, v_width = c->n_heads_kv * c->v_dim;
    lo += job->from;
    hi += job->from;
    if (c->qk_norm != SLU_QK_NORM_NONE) {
        norm_heads(m, s->q, layer->q_norm, lo, hi, c->n_heads * c->k_dim, c->k_dim);
        norm_heads(m, s->k, layer->k_norm, lo, hi, k_width, c->k_dim);
    }
    rope_heads(m, s->q, lo, hi, c->n_heads, c->k_dim, 0);
    rope_heads(m, s->k, lo, hi, c->n_heads_kv, c->k_dim, 0);
    slu_kv_cache_store(job->kv, m->kern, job->l, job->kv->n + lo, hi - lo,
                       s->k + (size_t)lo * k_width, s->v + (size_t)lo * v_width);
}

/* q[n x H*k_dim], k and v, as they come out of their products. */
static void project_qkv(struct slu_model *m, uint32_t l, uint32_t n)
{
    const struct slu_config *c = &m->weights->config;
    const struct slu_layer *layer = &m->weights->layers[l];
    struct slu_scratch *s = &m->scratch;
    uint32_t q_width = c->n_heads * c->k_dim, k_width = c->n_heads_kv * c->k_dim;
    struct slu_acts acts;
    slu_acts_fill(m, &acts, n, c->n_embd, s->h, s->h_acts);
    struct slu_linear linears[] = {
        {s->q, q_width, &layer->q, layer->q_bias, SLU_TARGET_Q},
        {s->k, k_width, &layer->k, layer->k_bias, SLU_TARGET_K},
        {s->v, c->n_heads_kv * c->v_dim, &layer->v, layer->v_bias, SLU_TARGET_V},
    };
    slu_linear_run(m, l, linears, 3, &acts);
}

/* A head's part of MLA's projections into and out of the latent space. */
struct mla_share {
    struct slu_model *model;
    uint32_t l;
    const struct slu_layer *layer;
    const struct slu_acts *nope, *latent; /* rows t*H + h */
    uint32_t n;
};

/* Query of head h in latent space, for all tokens: its key projection, transposed. */
static void absorb_head(const struct mla_share *a, uint32_t h, float *row)
{
    const struct slu_config *c = &a->model->weights->config;
    const struct slu_kern *kern = a->model->kern;
    const struct slu_scratch *s = &a->model->scratch;
    uint32_t nope = c->k_dim - c->rope_dims, width = c->kv_lora + c->rope_dims;
    if (a->layer->k_b.fmt) {
        struct slu_mat k_b = slu_mat_nth(&a->layer->k_b, h);
        for (uint32_t t = 0; t < a->n; t++) {
            uint32_t from = t * c->n_heads + h;
            kern->mul[k_b.fmt->id](s->q + (size_t)from * width, width, &k_b, 0, k_b.rows, a->nope,
                                   &from, 1);
        }
        return;
    }
    for (uint32_t t = 0; t < a->n; t++) {
        memset(s->q + ((size_t)t * c->n_heads + h) * width, 0, c->kv_lora * sizeof(float));
    }
    for (uint32_t r = 0; r < nope; r++) {
        kern->row_f32(row, &a->layer->kv_b, h * (nope + c->v_dim) + r);
        for (uint32_t t = 0; t < a->n; t++) {
            size_t from = (size_t)t * c->n_heads + h;
            kern->axpy_f32(s->q + from * width, s->nope[from * nope + r], row, c->kv_lora);
        }
    }
}

static void absorb_adapters(const struct mla_share *a, uint32_t h, float *row)
{
    const struct slu_config *c = &a->model->weights->config;
    const struct slu_scratch *s = &a->model->scratch;
    uint32_t nope = c->k_dim - c->rope_dims, width = c->kv_lora + c->rope_dims;
    for (uint32_t t = 0; t < a->n; t++) {
        size_t from = (size_t)t * c->n_heads + h;
        slu_lora_absorb(a->model->kern, a->model->adapters, a->l, h * (nope + c->v_dim), nope,
                        s->nope + from * nope, row, s->q + from * width);
    }
}

static void absorb_share(void *arg, unsigned thread, unsigned n_threads)
{
    const struct mla_share *a = arg;
    const struct slu_config *c = &a->model->weights->config;
    uint32_t lo, hi;
    slu_pool_share(c->n_heads, 1, thread, n_threads, &lo, &hi);
    for (uint32_t h = lo; h < hi; h++) {
        float *row = a->model->scratch.row + (size_t)thread * c->kv_lora;
        absorb_head(a, h, row);
        absorb_adapters(a, h, row);
    }
}

/* Head h's values from what attention gave in latent space. */
static void emerge_share(void *arg, unsigned thread, unsigned n_threads)
{
    const struct mla_share *a = arg;
    const struct slu_config *c = &a->model->weights->config;
    const struct slu_kern *kern = a->model->kern;
    const struct slu_scratch *s = &a->model->scratch;
    uint32_t nope = c->k_dim - c->rope_dims, part = nope + c->v_dim, lo, hi;
    slu_pool_share(c->n_heads, 1, thread, n_threads, &lo, &hi);
    for (uint32_t h = lo; h < hi; h++) {
        struct slu_mat v_b = a->layer->v_b.fmt ? slu_mat_nth(&a->layer->v_b, h) : a->layer->kv_b;
        for (uint32_t t = 0; t < a->n; t++) {
            uint32_t from = t * c->n_heads + h;
            float *out = s->att + (size_t)from * c->v_dim;
            if (a->layer->v_b.fmt) {
                kern->mul[v_b.fmt->id](out, 0, &v_b, 0, v_b.rows, a->latent, &from, 1);
            } else {
                float *rows = s->kv_out + (size_t)t * c->n_heads * part;
                kern->mul[v_b.fmt->id](rows, 0, &v_b, h * part + nope, (h + 1) * part, a->latent,
                                       &from, 1);
                memcpy(out, rows + (size_t)h * part + nope, c->v_dim * sizeof *out);
            }
            slu_lora_emerge(kern, a->model->adapters, a->l, h * part + nope, c->v_dim,
                            s->latent + (size_t)from * c->kv_lora, out);
        }
    }
}

static void norm_q_lora(void *arg, uint32_t lo, uint32_t hi)
{
    const struct token_job *job = arg;
    const struct slu_config *c = &job->model->weights->config;
    const struct slu_layer *layer = &job->model->weights->layers[job->l];
    for (uint32_t t = lo; t < hi; t++) {
        float *row = job->model->scratch.q_lora + (size_t)t * c->q_lora;
        slu_rms_norm(job->model->kern, row, row, layer->q_a_norm, c->q_lora, c->norm_eps);
    }
}

/* Queries come apart into their two parts; rows [latent | rope key] are stored. */
static void finish_mla(void *arg, uint32_t lo, uint32_t hi)
{
    const struct token_job *job = arg;
    struct slu_model *m = job->model;
    const struct slu_config *c = &m->weights->config;
    const struct slu_layer *layer = &m->weights->layers[job->l];
    const struct slu_scratch *s = &m->scratch;
    uint32_t width = job->kv->k_dim, nope = c->k_dim - c->rope_dims;
    rope_heads(m, s->q_raw, lo, hi, c->n_heads, c->k_dim, nope);
    for (size_t i = (size_t)lo * c->n_heads; i < (size_t)hi * c->n_heads; i++) {
        const float *from = s->q_raw + i * c->k_dim;
        memcpy(s->nope + i * nope, from, nope * sizeof *from);
        memcpy(s->q + i * width + c->kv_lora, from + nope, c->rope_dims * sizeof *from);
    }
    for (uint32_t t = lo; t < hi; t++) {
        float *row = s->k + (size_t)t * width;
        slu_rms_norm(m->kern, row, row, layer->kv_a_norm, c->kv_lora, c->norm_eps);
    }
    rope_heads(m, s->k, lo, hi, 1, width, c->kv_lora);
    slu_kv_cache_store(job->kv, m->kern, job->l, job->kv->n + lo, hi - lo,
                       s->k + (size_t)lo * width, NULL);
}

/* q[n x H x (kv_lora + rope)] and this chunk's rows [latent | rope key]. */
static void project_mla(struct slu_model *m, struct slu_kv_cache *kv, uint32_t l, uint32_t n)
{
    const struct slu_config *c = &m->weights->config;
    const struct slu_layer *layer = &m->weights->layers[l];
    struct slu_scratch *s = &m->scratch;
    uint32_t q_width = c->n_heads * c->k_dim, width = kv->k_dim, nope = c->k_dim - c->rope_dims;
    struct slu_acts acts, lora, nope_acts = {0};
    slu_acts_fill(m, &acts, n, c->n_embd, s->h, s->h_acts);
    bool has_lora = layer->q.fmt == NULL;
    struct slu_linear linears[] = {
        {s->k, width, &layer->kv_a, NULL, SLU_TARGET_KV_A},
        {has_lora ? s->q_lora : s->q_raw, has_lora ? c->q_lora : q_width,
         has_lora ? &layer->q_a : &layer->q, NULL, has_lora ? SLU_TARGET_Q_A : SLU_TARGET_Q},
    };
    slu_linear_run(m, l, linears, 2, &acts);
    if (has_lora) {
        slu_rows_run(m, n, norm_q_lora, &(struct token_job){m, kv, l, 0});
        slu_acts_fill(m, &lora, n, c->q_lora, s->q_lora, s->q_lora_acts);
        slu_linear_run(m, l,
                       &(struct slu_linear){s->q_raw, q_width, &layer->q_b, NULL, SLU_TARGET_Q_B},
                       1, &lora);
    }
    slu_rows_run(m, n, finish_mla, &(struct token_job){m, kv, l, 0});
    if (layer->k_b.fmt) {
        slu_acts_fill(m, &nope_acts, n * c->n_heads, nope, s->nope, s->nope_acts);
    }
    for (uint32_t h = 0; h < (layer->k_b.fmt ? c->n_heads : 0); h++) {
        slu_tally_dense(&m->tally, &layer->k_b, n);
    }
    for (uint32_t h = 0; h < (layer->v_b.fmt ? c->n_heads : 0); h++) {
        slu_tally_dense(&m->tally, &layer->v_b, n);
    }
    if (layer->kv_b.fmt) { /* half of it now, the other half after attention */
        slu_tally_dense(&m->tally, &layer->kv_b, n);
    }
    slu_pool_run(
        m->pool, absorb_share,
        &(struct mla_share){.model = m, .l = l, .layer = layer, .nope = &nope_acts, .n = n});
}

/* Attention of tokens from .. from+n-1, whose keys and values are stored first. */
static void attend_part(struct slu_model *m, struct slu_kv_cache *kv, uint32_t l, uint32_t from,
                        uint32_t n)
{
    const struct slu_config *c = &m->weights->config;
    struct slu_scratch *s = &m->scratch;
    float *out = c->is_mla ? s->latent : s->att;
    uint32_t v_dim = c->is_mla ? c->kv_lora : c->v_dim;
    size_t row = (size_t)from * c->n_heads;
    if (!c->is_mla) { /* whose rows are stored, and queries made, before they are absorbed */
        slu_rows_run(m, n, finish_qkv, &(struct token_job){m, kv, l, from});
    }
    struct slu_attend attend = {
        .l = l,
        .from = from,
        .n = n,
        .q = s->q + row * kv->k_dim,
        .out = out + row * v_dim,
        .sinks = m->weights->layers[l].sinks,
        .n_heads = c->n_heads,
        .v_dim = v_dim,
        .window = slu_kv_cache_window(c, l),
        .scale = c->attn_scale,
    };
    slu_tally_cross(&m->tally, SLU_PART_DENSE);
    slu_attend(m, kv, &attend);
    slu_tally_cross(&m->tally, SLU_PART_ATTENTION);
}

void slu_attention(struct slu_model *m, struct slu_kv_cache *kv, uint32_t l, uint32_t n)
{
    const struct slu_config *c = &m->weights->config;
    const struct slu_layer *layer = &m->weights->layers[l];
    struct slu_scratch *s = &m->scratch;
    if (c->is_mla) {
        project_mla(m, kv, l, n);
    } else {
        project_qkv(m, l, n);
    }
    /* A window's ring has room for no more of a long chunk beside the window itself. */
    uint32_t some = slu_kv_cache_window(c, l) ? m->chunk : n;
    assert(!c->is_mla || some >= n);
    for (uint32_t from = 0; from < n; from += some) {
        attend_part(m, kv, l, from, n - from < some ? n - from : some);
    }

    struct slu_acts acts;
    if (c->is_mla) {
        slu_acts_fill(m, &acts, n * c->n_heads, c->kv_lora, s->latent, s->latent_acts);
        slu_pool_run(
            m->pool, emerge_share,
            &(struct mla_share){.model = m, .l = l, .layer = layer, .latent = &acts, .n = n});
    }
    slu_acts_fill(m, &acts, n, c->n_heads * c->v_dim, s->att, s->att_acts);
    slu_linear_run(
        m, l, &(struct slu_linear){s->y, c->n_embd, &layer->out, layer->out_bias, SLU_TARGET_OUT},
        1, &acts);
}
