/*
 * The forward pass. One for all architectures: what differs is in the configuration and in which
 * tensors a layer has. E is the embedding width, n the chunk's tokens.
 */
#include <assert.h>
#include <stdlib.h>

#include "base/arena.h"
#include "model/lookahead.h"
#include "model/ops.h"
#include "model/rope.h"

/* Blocks of other extents are never asked for, so their place doesn't matter. */
static uint32_t expert_of(const void *arg, uint32_t block)
{
    const struct slu_weights *w = arg;
    for (uint32_t l = 0; l < w->config.n_layers; l++) {
        const struct slu_bank *bank = &w->layers[l].routed;
        if (bank->n_experts && block >= bank->first_extent &&
            block - bank->first_extent < bank->n_experts * bank->n_blocks) {
            return l * w->config.n_experts + (block - bank->first_extent) / bank->n_blocks;
        }
    }
    return 0;
}

struct slu_residency_params slu_model_residency_params(const struct slu_model_params *p)
{
    struct slu_residency_params residency = {0};
    if (p->residency && p->weights->n_blocks && !p->is_mapped) {
        residency = *p->residency;
        residency.weights = p->weights;
        residency.n_set = slu_residency_experts(p->weights, p->n_slots, residency.share);
    }
    return residency;
}

/* Of each size, in what a token uses of a layer. Where slots are fewer, a layer needs those of all
 * sizes; and what a residency keeps it counts in slots, whatever their size. */
#define TWO_SIZES_LAYERS_MIN 4u

uint32_t slu_model_two_sizes_from(const struct slu_model_params *p)
{
    const struct slu_weights *w = p->weights;
    uint64_t n_small = w->n_blocks_small, n_large = w->n_blocks - n_small;
    if (n_small == 0 || n_large == 0 || p->residency) {
        return UINT32_MAX;
    }
    /* Of n slots n * n_small / n_blocks are small, rounded down, and the others large. */
    uint64_t n_least = (uint64_t)TWO_SIZES_LAYERS_MIN * w->layer_blocks_max;
    uint64_t for_small = (n_least * w->n_blocks + n_small - 1) / n_small;
    uint64_t for_large = (n_least - 1) * w->n_blocks / n_large + 1;
    uint64_t n = for_small > for_large ? for_small : for_large;
    return n < UINT32_MAX ? (uint32_t)n : UINT32_MAX;
}

struct slu_stream_params slu_model_stream_params(const struct slu_model_params *p,
                                                 uint32_t n_threads)
{
    const struct slu_weights *w = p->weights;
    return (struct slu_stream_params){
        .path = p->path,
        .extents = p->pack->extents,
        .n_extents = p->pack->header.n_extents,
        .n_slots = p->n_slots,
        .n_borrowed_max = p->n_slots_lent,
        .n_blocks = w->n_blocks,
        .slot_bytes = w->block_bytes_max,
        .small_bytes = w->block_bytes_small,
        .n_small_blocks = p->n_slots >= slu_model_two_sizes_from(p) ? w->n_blocks_small : 0,
        .round_blocks_max = slu_scratch_tasks_max(w, p->chunk),
        .n_workers = n_threads,
        .touch_slots = p->touch_memory,
        /* What a residency keeps leaves nothing to rank. */
        .policy = p->residency ? NULL : p->policy,
        .n_layers = w->config.n_layers,
        .n_experts = w->config.n_experts,
        .expert_of = expert_of,
        .expert_arg = w,
        .backend = p->backend,
        .ledger = p->ledger,
    };
}

struct slu_mapped_params slu_model_mapped_params(const struct slu_model_params *p,
                                                 uint32_t n_threads)
{
    return (struct slu_mapped_params){
        .path = p->path,
        .extents = p->pack->extents,
        .n_extents = p->pack->header.n_extents,
        .slot_bytes = p->weights->block_bytes_max,
        .n_workers = n_threads,
        .ledger = p->ledger,
    };
}

static int init_residency(struct slu_model *m, const struct slu_model_params *p,
                          struct slu_err *err)
{
    struct slu_residency_params params = slu_model_residency_params(p);
    if (params.n_set == 0) {
        return 0;
    }
    uint64_t bytes = slu_residency_bytes(&params);
    int rc = slu_ledger_reserve(p->ledger, SLU_ACCOUNT_EXPERTS, bytes, err);
    if (rc < 0) {
        return rc;
    }
    m->residency_bytes = bytes;
    m->residency = slu_residency_create(&params);
    return m->residency ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory for a set of experts");
}

int slu_model_init(struct slu_model *model, const struct slu_model_params *p, struct slu_err *err)
{
    const struct slu_config *c = &p->weights->config;
    uint32_t n_threads = slu_pool_threads(p->pool);
    *model = (struct slu_model){.weights = p->weights,
                                .kern = p->kern,
                                .pool = p->pool,
                                .ledger = p->ledger,
                                .lookahead = p->lookahead,
                                .chunk = p->chunk,
                                .long_chunk = p->long_chunk};
    model->rope_freqs = calloc(c->rope_dims / 2, sizeof *model->rope_freqs);
    if (!model->rope_freqs) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for RoPE's frequencies");
    }
    slu_rope_freqs(c, model->rope_freqs);
    int rc = slu_scratch_init(&model->scratch, p->weights, p->chunk, n_threads, p->ledger, err);
    if (rc == 0 && p->touch_memory) {
        slu_map_touch(model->scratch.memory, model->scratch.bytes);
    }
    if (rc == 0) {
        slu_lookahead_init(model);
    }
    if (rc == 0) {
        rc = slu_embed_init(&model->embed, p->weights, p->path, p->chunk, p->backend, p->kern,
                            p->ledger, err);
    }
    if (rc == 0 && p->weights->n_blocks && p->is_mapped) {
        struct slu_mapped_params mapped = slu_model_mapped_params(p, n_threads);
        rc = slu_mapped_open(&mapped, &model->mapped, err);
    } else if (rc == 0 && p->weights->n_blocks) {
        struct slu_stream_params stream = slu_model_stream_params(p, n_threads);
        rc = slu_stream_create(&stream, &model->stream, err);
        rc = rc < 0 ? rc : init_residency(model, p, err);
    }
    if (rc < 0) {
        slu_model_finish(model);
    }
    return rc;
}

void slu_model_finish(struct slu_model *model)
{
    slu_residency_destroy(model->residency);
    if (model->residency_bytes) {
        slu_ledger_release(model->ledger, SLU_ACCOUNT_EXPERTS, model->residency_bytes);
    }
    slu_stream_destroy(model->stream);
    slu_mapped_close(model->mapped);
    slu_embed_finish(&model->embed);
    slu_scratch_finish(&model->scratch);
    free(model->rope_freqs);
    *model = (struct slu_model){0};
}

static int forward(struct slu_model *m, struct slu_kv_cache *kv, const int32_t *ids, uint32_t n,
                   uint32_t first_out, struct slu_err *err)
{
    const struct slu_weights *w = m->weights;
    struct slu_scratch *s = &m->scratch;
    assert(n > 0 && n <= s->chunk && n <= kv->ctx - kv->n && first_out <= n);
    m->position = kv->n;
    m->first_out = m->inputs ? 0 : first_out;
    /* Whether or not it succeeds, rows up to here are overwritten from now on. */
    kv->n_high = kv->n + n > kv->n_high ? kv->n + n : kv->n_high;

    int rc = slu_embed_rows(&m->embed, ids, n, s->x, err); /* x: n x E */
    size_t half = w->config.rope_dims / 2;
    for (uint32_t t = 0; t < n && rc == 0; t++) {
        slu_lora_embed(m->kern, m->adapters, ids[t], w->config.embd_scale,
                       s->x + (size_t)t * w->config.n_embd);
        slu_rope_angles(&w->config, m->rope_freqs, kv->n + t, s->cos + t * half, s->sin + t * half);
    }
    slu_tally_cross(&m->tally, SLU_PART_EMBED);
    for (uint32_t l = 0; l < w->config.n_layers && rc == 0; l++) {
        const struct slu_layer *layer = &w->layers[l];
        if (m->cancel && atomic_load_explicit(m->cancel, memory_order_relaxed)) {
            return slu_err_set(err, SLU_ECANCEL, "cancelled");
        }
        slu_norm_rows(m, s->h, s->x, layer->attn_norm, n); /* h: n x E */
        slu_attention(m, kv, l, n);                        /* y: n x E */
        slu_add_sublayer(m, 0, n);
        slu_norm_rows(m, s->h, s->x, layer->ffn_norm, n);
        rc = slu_moe(m, l, n, err); /* y: n x E */
        slu_add_sublayer(m, slu_first_needed(m, l), n);
        slu_tally_cross(&m->tally, SLU_PART_EXPERTS);
    }
    if (rc < 0) {
        return rc;
    }
    m->n_tokens += n;
    kv->n += n;
    return 0;
}

/* What kv has no use for with n positions. Of several sessions the first that has any lends, until
 * it has none: the stream borrows from one. */
static void lend(struct slu_model *m, const struct slu_kv_cache *kv, uint32_t n)
{
    const struct slu_kv_cache *lender = m->lender;
    if (m->stream && (!lender || lender == kv)) {
        size_t used = slu_kv_cache_used_bytes(kv, n);
        assert(used <= kv->memory_bytes);
        bool lends =
            slu_stream_borrow(m->stream, (char *)kv->memory + used, kv->memory_bytes - used) > 0;
        m->lender = lends ? kv : NULL;
    }
}

bool slu_model_has_lent(const struct slu_model *m, const struct slu_kv_cache *kv)
{
    return m->lender == kv;
}

static void end_loan(struct slu_model *m)
{
    slu_stream_borrow(m->stream, NULL, 0);
    m->lender = NULL;
}

void slu_model_take_back(struct slu_model *m, const struct slu_kv_cache *kv)
{
    if (slu_model_has_lent(m, kv)) {
        end_loan(m);
    }
}

/* Scratch for n tokens. More than a chunk of them take memory from the cache of experts, of which a
 * prompt reads all anyway, but once instead of with each chunk. */
static void make_room(struct slu_model *m, uint32_t n)
{
    uint32_t chunk = m->chunk;
    size_t bytes = 0;
    if (n > m->chunk) {
        chunk = (n + SLU_LONG_CHUNK_STEP - 1) / SLU_LONG_CHUNK_STEP * SLU_LONG_CHUNK_STEP;
        chunk = chunk < m->long_chunk ? chunk : m->long_chunk;
        bytes = slu_scratch_chunk_bytes(m->weights, chunk, m->scratch.n_threads);
    }
    if (chunk == m->scratch.chunk) {
        return;
    }
    if (m->lender) { /* the stream borrows or lends, not both */
        end_loan(m);
    }
    slu_scratch_move(&m->scratch, m->weights, chunk, slu_stream_lend(m->stream, bytes));
}

int slu_model_forward(struct slu_model *m, struct slu_kv_cache *kv, const int32_t *ids, uint32_t n,
                      uint32_t first_out, struct slu_err *err)
{
    make_room(m, n);
    if (n <= m->chunk) {
        lend(m, kv, kv->n + n);
    }
    slu_pool_enter(m->pool);
    int rc = forward(m, kv, ids, n, first_out, err);
    if (rc < 0 && m->stream) { /* nobody knows what is wanted next, or when */
        slu_stream_hint(m->stream, NULL, 0, 0);
    }
    if (rc < 0) { /* a long chunk may have overwritten what a window still wants */
        slu_kv_cache_truncate(kv, &m->weights->config, kv->n);
    }
    slu_pool_leave(m->pool);
    return rc;
}

void slu_model_rank(struct slu_model *m, const struct slu_ranking *ranking)
{
    struct slu_scratch *s = &m->scratch;
    slu_residency_rank(m->residency, m->stream, ranking);
    uint32_t n = slu_residency_hints(m->residency, m->stream, 0, NULL, 0, s->round, s->n_tasks_max);
    slu_stream_hint(m->stream, s->round, n, SLU_HINTS_DEEP);
}

const float *slu_model_logits(struct slu_model *m, uint32_t first, uint32_t n)
{
    const struct slu_config *c = &m->weights->config;
    struct slu_scratch *s = &m->scratch;
    assert(n > 0 && n <= SLU_LOGIT_ROWS_MAX && first >= m->first_out && first + n <= s->chunk);
    struct slu_acts acts;
    slu_tally_cross(&m->tally, SLU_PART_OTHER);
    slu_norm_rows(m, s->h, s->x + (size_t)first * c->n_embd, m->weights->output_norm, n);
    slu_acts_fill(m, &acts, n, c->n_embd, s->h, s->h_acts);
    struct slu_linear head = {s->logits, c->n_vocab, &m->weights->head, NULL, SLU_TARGET_HEAD};
    slu_pool_enter(m->pool);
    slu_linear_run(m, 0, &head, 1, &acts);
    slu_pool_leave(m->pool);
    if (c->logit_divisor != 1.0f) {
        for (size_t i = 0; i < (size_t)n * c->n_vocab; i++) {
            s->logits[i] /= c->logit_divisor;
        }
    }
    slu_tally_cross(&m->tally, SLU_PART_HEAD);
    return s->logits;
}
