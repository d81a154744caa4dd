#include "model/lookahead.h"

#include <assert.h>
#include <string.h>

#include "model/ops.h"

/* A rank's share of true guesses moves by this much of the difference. */
#define LEARNING_RATE 0.06f
/* Below that, others had better stay and be read in idle time. What every rank begins with. */
#define SHARE_WORTH_READING 0.6f
/* What is known of the share of all that is named keeps so much of its weight with each layer; and
 * as long as nothing is, it is as if so many had been named, and so many of them come true. */
#define KEPT            0.995f
#define NAMED_BEFORE    16.0f
#define TRUE_BEFORE     12.0f
#define RECALLED_BEFORE 6.0f /* true, of those recalled */
/* What memory tells is asked for where flash idles anyway, so that a wrong one costs no time but a
 * read and a place in the cache. So high must an expert's chance be, and so many of the like have
 * come true. */
#define CHANCE_WORTH_READING 0.3f
#define SHARE_WORTH_RECALL   0.25f
/* Of a chunk, so many tokens tell which experts the next layer will want most. */
#define GAIN_ROWS 16u

void slu_lookahead_init(struct slu_model *m)
{
    const struct slu_config *c = &m->weights->config;
    struct slu_lookahead *a = &m->scratch.lookahead;
    a->layer = 0;
    a->n_recalled = 0;
    a->by_router = a->by_memory = (struct slu_named){0};
    for (size_t i = 0; i < (size_t)c->n_layers * c->n_used; i++) {
        a->shares[i] = SHARE_WORTH_READING;
    }
}

static void fade(struct slu_named *named)
{
    named->n *= KEPT;
    named->n_true *= KEPT;
}

/* 1 if it is among the n chosen, else 0. */
static float is_chosen(const uint32_t *chosen, uint32_t n, uint32_t expert)
{
    for (uint32_t i = 0; i < n; i++) {
        if (chosen[i] == expert) {
            return 1;
        }
    }
    return 0;
}

static void score_recalled(struct slu_lookahead *a, const uint32_t *chosen, uint32_t n_used)
{
    fade(&a->by_memory);
    for (uint32_t i = 0; i < a->n_recalled; i++) {
        a->by_memory.n += 1;
        a->by_memory.n_true += is_chosen(chosen, n_used, a->recalled[i]);
    }
    a->n_recalled = 0;
}

void slu_lookahead_score(struct slu_model *m, uint32_t l, const uint32_t *chosen)
{
    struct slu_lookahead *a = &m->scratch.lookahead;
    uint32_t n_used = m->weights->config.n_used;
    if (a->n_recalled > 0 && a->recalled_layer == l) {
        score_recalled(a, chosen, n_used);
    }
    if (a->layer != l || l == 0) {
        return;
    }
    float *shares = a->shares + (size_t)l * n_used;
    fade(&a->by_router);
    for (uint32_t rank = 0; rank < n_used; rank++) {
        float is_true = is_chosen(chosen, n_used, a->experts[rank]);
        if (shares[rank] >= SHARE_WORTH_READING) {
            a->by_router.n += 1;
            a->by_router.n_true += is_true;
        }
        shares[rank] += LEARNING_RATE * (is_true - shares[rank]);
    }
    a->layer = 0;
}

/* Layer l's router on row t of the residual stream before the layer before's experts; into
 * lookahead.experts and .weights. A quantized router would take more than a few microseconds. */
static bool guess_row(struct slu_model *m, uint32_t l, uint32_t t)
{
    const struct slu_config *c = &m->weights->config;
    const struct slu_layer *layer = &m->weights->layers[l];
    struct slu_scratch *s = &m->scratch;
    struct slu_lookahead *a = &s->lookahead;
    if (!layer->routed.n_experts || layer->router.fmt->group) {
        return false;
    }
    slu_rms_norm(m->kern, a->h, s->x + (size_t)t * c->n_embd, layer->ffn_norm, c->n_embd,
                 c->norm_eps);
    struct slu_acts acts = {.n = 1, .cols = c->n_embd, .x = a->h, .x_stride = c->n_embd};
    m->kern->mul[layer->router.fmt->id](s->router, c->n_experts, &layer->router, 0, c->n_experts,
                                        &acts, NULL, 1);
    for (uint32_t e = 0; layer->router_bias && e < c->n_experts; e++) {
        s->router[e] += layer->router_bias[e];
    }
    slu_route(c, layer, s->router, a->experts, a->weights);
    if (m->guess) {
        m->guess(m->guess_arg, l, m->position + t, c->n_used, a->experts, a->weights);
        for (uint32_t i = 0; i < c->n_used; i++) {
            assert(a->experts[i] < c->n_experts);
        }
    }
    return true;
}

uint32_t slu_lookahead_gains(struct slu_model *m, uint32_t l, uint32_t n, float *ret_gains)
{
    const struct slu_config *c = &m->weights->config;
    struct slu_lookahead *a = &m->scratch.lookahead;
    uint32_t n_rows = n < GAIN_ROWS ? n : GAIN_ROWS;
    a->layer = 0; /* what was guessed before is gone */
    memset(ret_gains, 0, c->n_experts * sizeof *ret_gains);
    for (uint32_t i = 0; i < n_rows; i++) {
        uint32_t t = (uint32_t)((uint64_t)n * i / n_rows);
        if (!guess_row(m, l + 1, t)) {
            return 0;
        }
        float sum = 0;
        for (uint32_t k = 0; k < c->n_used; k++) {
            sum += a->weights[k];
        }
        for (uint32_t k = 0; k < c->n_used; k++) {
            ret_gains[a->experts[k]] += sum > 0 ? a->weights[k] / sum * (float)c->n_used : 0;
        }
    }
    return n_rows;
}

/* Layer l's experts that its router would choose now, as far as their ranks are worth reading. */
static uint32_t ask_router(struct slu_model *m, uint32_t l, uint32_t *ret_experts)
{
    const struct slu_config *c = &m->weights->config;
    struct slu_lookahead *a = &m->scratch.lookahead;
    if (!guess_row(m, l, 0)) {
        return 0;
    }
    a->layer = l;
    const float *shares = a->shares + (size_t)l * c->n_used;
    uint32_t n = 0;
    for (uint32_t rank = 0; rank < c->n_used; rank++) {
        if (m->lookahead == SLU_MODEL_AHEAD_WRONG) {
            ret_experts[n++] = (a->experts[rank] + c->n_experts / 2) % c->n_experts;
        } else if (shares[rank] >= SHARE_WORTH_READING) {
            ret_experts[n++] = a->experts[rank];
        }
    }
    return n;
}

static bool is_absent(const struct slu_model *m, const struct slu_bank *bank, uint32_t expert)
{
    uint32_t first = bank->first_extent + expert * bank->n_blocks;
    for (uint32_t b = 0; b < bank->n_blocks; b++) {
        if (slu_stream_is_absent(m->stream, first + b)) {
            return true;
        }
    }
    return false;
}

static float share_of(const struct slu_named *named, float true_before)
{
    return (named->n_true + true_before) / (named->n + NAMED_BEFORE);
}

/* Those of layer l that tokens routed like this one used, and that are not in memory. Scored even
 * when they are not named. */
static uint32_t ask_memory(struct slu_model *m, uint32_t l, uint32_t *ret_experts)
{
    const struct slu_config *c = &m->weights->config;
    const struct slu_bank *bank = &m->weights->layers[l].routed;
    struct slu_lookahead *a = &m->scratch.lookahead;
    float chances[SLU_EXPERTS_MAX];
    if (!bank->n_experts || !slu_stream_foresee(m->stream, l, chances)) {
        return 0;
    }
    a->recalled_layer = l;
    while (a->n_recalled < c->n_used) {
        uint32_t best = 0;
        for (uint32_t e = 1; e < c->n_experts; e++) {
            best = chances[e] > chances[best] ? e : best;
        }
        if (chances[best] < CHANCE_WORTH_READING) {
            break;
        }
        chances[best] = 0;
        if (is_absent(m, bank, best)) {
            a->recalled[a->n_recalled++] = best;
        }
    }
    memcpy(ret_experts, a->recalled, a->n_recalled * sizeof *ret_experts);
    return share_of(&a->by_memory, RECALLED_BEFORE) < SHARE_WORTH_RECALL ? 0 : a->n_recalled;
}

uint32_t slu_lookahead_guess(struct slu_model *m, uint32_t l, uint32_t *ret_experts,
                             float *ret_share)
{
    struct slu_lookahead *a = &m->scratch.lookahead;
    a->layer = 0;
    a->n_recalled = 0;
    *ret_share = 0;
    if (m->lookahead == SLU_MODEL_AHEAD_OFF || l + 1 >= m->weights->config.n_layers) {
        return 0;
    }
    uint32_t n = ask_router(m, l + 1, ret_experts);
    *ret_share = share_of(&a->by_router, TRUE_BEFORE);
    if (n == 0 && m->lookahead == SLU_MODEL_AHEAD_AUTO && !m->residency) {
        n = ask_memory(m, l + 1, ret_experts);
        *ret_share = share_of(&a->by_memory, RECALLED_BEFORE);
    }
    return n;
}
