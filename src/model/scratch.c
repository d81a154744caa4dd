#include "model/scratch.h"

#include "base/arena.h"
#include "model/attend.h"
#include "model/lora.h"

/* Products of one run that adapters may add to at once: q, k and v. */
#define LINEARS_WITH_PAIRS 3u

struct carver {
    uint8_t *base; /* NULL: only count */
    size_t used;
};

static void *take(struct carver *c, size_t bytes)
{
    void *at = c->base ? c->base + c->used : NULL;
    c->used += (bytes + 63) & ~(size_t)63;
    return at;
}

static float *take_f32(struct carver *c, size_t rows, size_t cols)
{
    return take(c, rows * cols * sizeof(float));
}

uint32_t slu_scratch_tasks_max(const struct slu_weights *w, uint32_t chunk)
{
    const struct slu_config *c = &w->config;
    uint64_t wanted = (uint64_t)chunk * c->n_used;
    uint32_t experts = wanted < c->n_experts ? (uint32_t)wanted : c->n_experts;
    uint32_t most = 0;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        const struct slu_layer *layer = &w->layers[l];
        uint32_t n = layer->resident.n_blocks;
        n += layer->routed.n_experts ? experts * layer->routed.n_blocks : 0;
        most = n > most ? n : most;
    }
    return most;
}

static size_t block_scratch(const struct slu_weights *w, uint32_t chunk)
{
    size_t most = 0;
    for (uint32_t l = 0; l < w->config.n_layers; l++) {
        const struct slu_bank *banks[] = {&w->layers[l].routed, &w->layers[l].resident};
        for (int i = 0; i < 2; i++) {
            if (banks[i]->n_experts) {
                size_t bytes = slu_block_scratch_bytes(&banks[i]->shape, chunk);
                most = bytes > most ? bytes : most;
            }
        }
    }
    return (most + 63) & ~(size_t)63;
}

static void carve_attention(struct slu_scratch *s, const struct slu_config *c, struct carver *at)
{
    size_t t = s->chunk;
    s->attend_stride = (slu_attend_scratch(c) + 15) / 16 * 16;
    s->attend = take_f32(at, s->n_threads, s->attend_stride);
    s->cos = take_f32(at, t, c->rope_dims / 2);
    s->sin = take_f32(at, t, c->rope_dims / 2);
    s->att = take_f32(at, t, (size_t)c->n_heads * c->v_dim);
    s->att_acts = take(at, slu_acts_bytes(s->chunk, c->n_heads * c->v_dim));
    if (!c->is_mla) {
        s->q = take_f32(at, t, (size_t)c->n_heads * c->k_dim);
        s->k = take_f32(at, t, (size_t)c->n_heads_kv * c->k_dim);
        s->v = take_f32(at, t, (size_t)c->n_heads_kv * c->v_dim);
        return;
    }
    uint32_t nope = c->k_dim - c->rope_dims, heads = s->chunk * c->n_heads;
    s->q = take_f32(at, heads, c->kv_lora + c->rope_dims);
    s->k = take_f32(at, t, c->kv_lora + c->rope_dims);
    s->q_raw = take_f32(at, heads, c->k_dim);
    s->q_lora = take_f32(at, t, c->q_lora);
    s->q_lora_acts = take(at, c->q_lora ? slu_acts_bytes(s->chunk, c->q_lora) : 0);
    s->nope = take_f32(at, heads, nope);
    s->nope_acts = take(at, slu_acts_bytes(heads, nope));
    s->latent = take_f32(at, heads, c->kv_lora);
    s->latent_acts = take(at, slu_acts_bytes(heads, c->kv_lora));
    s->kv_out = take_f32(at, heads, nope + c->v_dim);
    s->row = take_f32(at, s->n_threads, c->kv_lora);
}

static void carve_moe(struct slu_scratch *s, const struct slu_weights *w, struct carver *at)
{
    const struct slu_config *c = &w->config;
    size_t t = s->chunk;
    s->router = take_f32(at, t, c->n_experts);
    s->chosen = take(at, t * c->n_used * sizeof *s->chosen);
    s->chosen_weight = take_f32(at, t, c->n_used);
    s->expert_n = take(at, (c->n_experts + 1) * sizeof *s->expert_n);
    s->expert_tok = take(at, t * c->n_used * sizeof *s->expert_tok);
    s->expert_weight = take_f32(at, t, c->n_used);
    s->ones = take_f32(at, t, 1);
    s->n_tasks_max = slu_scratch_tasks_max(w, s->chunk);
    s->tasks = take(at, s->n_tasks_max * sizeof *s->tasks);
    s->round = take(at, s->n_tasks_max * sizeof *s->round);
    size_t n_sums = slu_sums_rows(s->chunk, s->n_threads) * c->n_embd;
    s->sums = (struct slu_sums){
        .chunk = s->chunk,
        .n_threads = s->n_threads,
        .n_embd = c->n_embd,
        .rows = take(at, n_sums * sizeof *s->sums.rows),
        .are_taken = take(at, t * sizeof *s->sums.are_taken),
    };
    s->out_stride = (t < SLU_BLOCK_TOKENS ? t : SLU_BLOCK_TOKENS) * (size_t)c->n_embd;
    s->out = take_f32(at, s->n_threads, s->out_stride);
    s->block_stride = block_scratch(w, s->chunk);
    s->block = take(at, s->n_threads * s->block_stride);
}

/* What stays from chunk to chunk. */
static void carve_kept(struct slu_scratch *s, const struct slu_weights *w, struct carver *at)
{
    const struct slu_config *c = &w->config;
    s->lookahead.experts = take(at, c->n_used * sizeof(uint32_t));
    s->lookahead.weights = take_f32(at, 1, c->n_used);
    s->lookahead.recalled = take(at, c->n_used * sizeof(uint32_t));
    s->lookahead.h = take_f32(at, 1, c->n_embd);
    s->lookahead.shares = take_f32(at, c->n_layers, c->n_used);
}

static void carve_chunk(struct slu_scratch *s, const struct slu_weights *w, struct carver *at)
{
    const struct slu_config *c = &w->config;
    s->x = take_f32(at, s->chunk, c->n_embd);
    s->h = take_f32(at, s->chunk, c->n_embd);
    s->y = take_f32(at, s->chunk, c->n_embd);
    s->h_acts = take(at, slu_acts_bytes(s->chunk, c->n_embd));
    s->lora = take_f32(at, s->chunk, (size_t)LINEARS_WITH_PAIRS * SLU_LORA_RANKS_MAX);
    carve_attention(s, c, at);
    carve_moe(s, w, at);
    s->logits = take_f32(at, SLU_LOGIT_ROWS_MAX, c->n_vocab);
}

static void carve(struct slu_scratch *s, const struct slu_weights *w)
{
    struct carver at = {.base = s->memory};
    carve_kept(s, w, &at);
    carve_chunk(s, w, &at);
    s->bytes = at.used;
}

static struct slu_scratch scratch_of(uint32_t chunk, uint32_t n_threads)
{
    return (struct slu_scratch){.chunk = chunk, .own_chunk = chunk, .n_threads = n_threads};
}

uint64_t slu_scratch_charge_bytes(const struct slu_weights *weights, uint32_t chunk,
                                  uint32_t n_threads)
{
    struct slu_scratch s = scratch_of(chunk, n_threads);
    carve(&s, weights);
    return slu_map_charge_bytes(s.bytes);
}

size_t slu_scratch_chunk_bytes(const struct slu_weights *weights, uint32_t chunk,
                               uint32_t n_threads)
{
    struct slu_scratch s = scratch_of(chunk, n_threads);
    struct carver at = {0};
    carve_chunk(&s, weights, &at);
    return at.used;
}

int slu_scratch_init(struct slu_scratch *scratch, const struct slu_weights *weights, uint32_t chunk,
                     uint32_t n_threads, struct slu_ledger *ledger, struct slu_err *err)
{
    struct slu_scratch s = scratch_of(chunk, n_threads);
    carve(&s, weights);
    int rc = slu_map_alloc(ledger, SLU_ACCOUNT_SCRATCH, s.bytes, &s.memory, err);
    if (rc < 0) {
        return rc;
    }
    s.ledger = ledger;
    carve(&s, weights);
    *scratch = s;
    return 0;
}

void slu_scratch_move(struct slu_scratch *s, const struct slu_weights *weights, uint32_t chunk,
                      void *memory)
{
    struct carver at = {.base = memory};
    s->chunk = memory ? chunk : s->own_chunk;
    if (memory) {
        carve_chunk(s, weights, &at);
    } else {
        carve(s, weights);
    }
}

void slu_scratch_finish(struct slu_scratch *scratch)
{
    if (scratch->memory) {
        slu_map_free(scratch->ledger, SLU_ACCOUNT_SCRATCH, scratch->memory, scratch->bytes);
    }
    *scratch = (struct slu_scratch){0};
}
