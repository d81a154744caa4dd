#include "model/lookahead.h"

#include "model/ops.h"

/* A rank's share of true guesses moves by this much of the difference. */
#define LEARNING_RATE 0.06f
/* Below that, a wrong block's read costs more than a right one's saves. */
#define SHARE_WORTH_READING 0.6f

void slu_lookahead_score(struct slu_model *m, uint32_t l, const uint32_t *chosen)
{
    struct slu_lookahead *a = &m->scratch.lookahead;
    uint32_t n_used = m->weights->config.n_used;
    if (a->layer != l || l == 0) {
        return;
    }
    float *shares = a->shares + (size_t)l * n_used;
    for (uint32_t rank = 0; rank < n_used; rank++) {
        float is_true = 0;
        for (uint32_t i = 0; i < n_used; i++) {
            is_true = chosen[i] == a->experts[rank] ? 1.0f : is_true;
        }
        shares[rank] += LEARNING_RATE * (is_true - shares[rank]);
    }
    a->layer = 0;
}

uint32_t slu_lookahead_guess(struct slu_model *m, uint32_t l, uint32_t *ret_experts)
{
    const struct slu_config *c = &m->weights->config;
    struct slu_scratch *s = &m->scratch;
    struct slu_lookahead *a = &s->lookahead;
    a->layer = 0;
    if (l + 1 >= c->n_layers) {
        return 0;
    }
    const struct slu_layer *next = &m->weights->layers[l + 1];
    if (!next->routed.n_experts || next->router.fmt->group) {
        return 0; /* a quantized router would take more than a few microseconds */
    }
    slu_rms_norm(m->kern, a->h, s->x, next->ffn_norm, c->n_embd, c->norm_eps);
    struct slu_acts acts = {.n = 1, .cols = c->n_embd, .x = a->h, .x_stride = c->n_embd};
    m->kern->mul[next->router.fmt->id](s->router, c->n_experts, &next->router, 0, c->n_experts,
                                       &acts, NULL, 1);
    for (uint32_t e = 0; next->router_bias && e < c->n_experts; e++) {
        s->router[e] += next->router_bias[e];
    }
    slu_route(c, next, s->router, a->experts, a->weights);
    a->layer = l + 1;

    const float *shares = a->shares + (size_t)a->layer * c->n_used;
    uint32_t n = 0;
    for (uint32_t rank = 0; rank < c->n_used; rank++) {
        if (shares[rank] >= SHARE_WORTH_READING) {
            ret_experts[n++] = a->experts[rank];
        }
    }
    return n;
}
