#include <math.h>

#include "model/ops.h"

static void softmax(float *x, uint32_t n)
{
    float high = x[0], sum = 0;
    for (uint32_t i = 1; i < n; i++) {
        high = x[i] > high ? x[i] : high;
    }
    for (uint32_t i = 0; i < n; i++) {
        x[i] = expf(x[i] - high);
        sum += x[i];
    }
    for (uint32_t i = 0; i < n; i++) {
        x[i] /= sum;
    }
}

static bool is_among(const uint32_t *list, uint32_t n, uint32_t item)
{
    for (uint32_t i = 0; i < n; i++) {
        if (list[i] == item) {
            return true;
        }
    }
    return false;
}

/* A group's worth: its best score, or with a choice bias (DeepSeek-V3) the sum of its best two. */
static float group_score(const struct slu_layer *layer, const float *score, uint32_t n)
{
    float first = -INFINITY, second = -INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        if (score[i] > first) {
            second = first;
            first = score[i];
        } else if (score[i] > second) {
            second = score[i];
        }
    }
    return layer->gate_bias && n > 1 ? first + second : first;
}

/* The k highest of n in descending order, ties to the lower index; NaN counts as lowest. Entries
 * for which allowed is false are passed over, given that enough others are there. */
static void choose(const float *score, const bool *allowed, uint32_t n, uint32_t k,
                   uint32_t *ret_chosen)
{
    for (uint32_t i = 0; i < k; i++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t e = 0; e < n; e++) {
            if ((allowed && !allowed[e]) || is_among(ret_chosen, i, e)) {
                continue;
            }
            if (best == UINT32_MAX || score[e] > score[best] ||
                (isnan(score[best]) && !isnan(score[e]))) {
                best = e;
            }
        }
        ret_chosen[i] = best;
    }
}

static void allow_groups(const struct slu_config *c, const struct slu_layer *layer,
                         const float *score, bool *ret_allowed)
{
    float groups[SLU_EXPERTS_MAX];
    uint32_t chosen[SLU_EXPERTS_MAX];
    uint32_t size = c->n_experts / c->n_groups;
    for (uint32_t g = 0; g < c->n_groups; g++) {
        groups[g] = group_score(layer, score + (size_t)g * size, size);
    }
    choose(groups, NULL, c->n_groups, c->n_groups_used, chosen);
    for (uint32_t e = 0; e < c->n_experts; e++) {
        ret_allowed[e] = is_among(chosen, c->n_groups_used, e / size);
    }
}

void slu_route(const struct slu_config *c, const struct slu_layer *layer, const float *logits,
               uint32_t *ret_chosen, float *ret_weight)
{
    float prob[SLU_EXPERTS_MAX], score[SLU_EXPERTS_MAX];
    bool allowed[SLU_EXPERTS_MAX];
    for (uint32_t e = 0; e < c->n_experts; e++) {
        prob[e] = c->gate == SLU_GATE_SIGMOID ? 1.0f / (1.0f + expf(-logits[e])) : logits[e];
    }
    if (c->gate == SLU_GATE_SOFTMAX) {
        softmax(prob, c->n_experts);
    }
    for (uint32_t e = 0; e < c->n_experts; e++) {
        score[e] = layer->gate_bias ? prob[e] + layer->gate_bias[e] : prob[e];
    }
    if (c->n_groups) {
        allow_groups(c, layer, score, allowed);
    }
    choose(score, c->n_groups ? allowed : NULL, c->n_experts, c->n_used, ret_chosen);

    float sum = 0;
    for (uint32_t k = 0; k < c->n_used; k++) {
        ret_weight[k] = prob[ret_chosen[k]];
        sum += ret_weight[k];
    }
    if (c->gate == SLU_GATE_SOFTMAX_CHOSEN) {
        softmax(ret_weight, c->n_used);
    } else if (c->gate_renorm) {
        for (uint32_t k = 0; k < c->n_used; k++) {
            ret_weight[k] /= sum;
        }
    }
    for (uint32_t k = 0; k < c->n_used; k++) {
        ret_weight[k] *= c->gate_scale;
    }
}
