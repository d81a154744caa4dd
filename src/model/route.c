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
 * for which allowed is false are passed over; where too few others are there, SLU_ROUTE_NONE ends
 * the list. */
static void choose(const float *score, const bool *allowed, uint32_t n, uint32_t k,
                   uint32_t *ret_chosen)
{
    for (uint32_t i = 0; i < k; i++) {
        uint32_t best = SLU_ROUTE_NONE;
        for (uint32_t e = 0; e < n; e++) {
            if ((allowed && !allowed[e]) || is_among(ret_chosen, i, e)) {
                continue;
            }
            if (best == SLU_ROUTE_NONE || score[e] > score[best] ||
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

struct scores {
    float prob[SLU_EXPERTS_MAX];  /* what weights are made of */
    float score[SLU_EXPERTS_MAX]; /* what is chosen by */
    bool allowed[SLU_EXPERTS_MAX];
};

static void score_all(const struct slu_config *c, const struct slu_layer *layer,
                      const float *logits, struct scores *s)
{
    for (uint32_t e = 0; e < c->n_experts; e++) {
        s->prob[e] = c->gate == SLU_GATE_SIGMOID ? 1.0f / (1.0f + expf(-logits[e])) : logits[e];
        s->allowed[e] = true;
    }
    if (c->gate == SLU_GATE_SOFTMAX) {
        softmax(s->prob, c->n_experts);
    }
    for (uint32_t e = 0; e < c->n_experts; e++) {
        s->score[e] = layer->gate_bias ? s->prob[e] + layer->gate_bias[e] : s->prob[e];
    }
    if (c->n_groups) {
        allow_groups(c, layer, s->score, s->allowed);
    }
}

/* The weights of n chosen experts, times scale. */
static void weigh(const struct slu_config *c, const float *prob, const uint32_t *chosen, uint32_t n,
                  float scale, float *ret_weight)
{
    float sum = 0;
    for (uint32_t k = 0; k < n; k++) {
        ret_weight[k] = prob[chosen[k]];
        sum += ret_weight[k];
    }
    if (c->gate == SLU_GATE_SOFTMAX_CHOSEN) {
        softmax(ret_weight, n);
    } else if (c->gate_renorm) {
        for (uint32_t k = 0; k < n; k++) {
            ret_weight[k] /= sum;
        }
    }
    for (uint32_t k = 0; k < n; k++) {
        ret_weight[k] *= scale;
    }
}

void slu_route(const struct slu_config *c, const struct slu_layer *layer, const float *logits,
               uint32_t *ret_chosen, float *ret_weight)
{
    struct scores s;
    score_all(c, layer, logits, &s);
    choose(s.score, c->n_groups ? s.allowed : NULL, c->n_experts, c->n_used, ret_chosen);
    weigh(c, s.prob, ret_chosen, c->n_used, c->gate_scale, ret_weight);
}

/* How far apart scores are: their standard deviation. */
static float spread(const float *score, uint32_t n)
{
    double sum = 0, squares = 0;
    for (uint32_t e = 0; e < n; e++) {
        sum += score[e];
    }
    for (uint32_t e = 0; e < n; e++) {
        double off = score[e] - sum / n;
        squares += off * off;
    }
    return (float)sqrt(squares / n);
}

void slu_route_prefer(const struct slu_config *c, const struct slu_layer *layer,
                      const float *logits, const bool *members, float bias, uint32_t *chosen,
                      float *weight)
{
    if (!(bias > 0)) {
        return; /* as it was */
    }
    struct scores s;
    score_all(c, layer, logits, &s);
    /* Probabilities of a softmax lie orders of magnitude apart, their logits do not. */
    const float *from = c->gate == SLU_GATE_SIGMOID || layer->gate_bias ? s.score : logits;
    float bonus = bias * spread(from, c->n_experts);
    for (uint32_t e = 0; e < c->n_experts; e++) {
        s.score[e] = from[e] + (members[e] ? bonus : 0);
    }
    s.allowed[chosen[0]] = false;
    choose(s.score, s.allowed, c->n_experts, c->n_used - 1, chosen + 1);
    weigh(c, s.prob, chosen, c->n_used, c->gate_scale, weight);
}

/* Puts members with the highest scores behind the n experts that are chosen, until there are as
 * many as a token uses or no more members. Returns how many are chosen then. */
static uint32_t choose_more(const struct slu_config *c, const struct scores *s, const bool *members,
                            bool with_others, uint32_t n, uint32_t *chosen)
{
    bool allowed[SLU_EXPERTS_MAX];
    for (uint32_t e = 0; e < c->n_experts; e++) {
        allowed[e] = members[e] && (with_others || s->allowed[e]) && !is_among(chosen, n, e);
    }
    choose(s->score, allowed, c->n_experts, c->n_used - n, chosen + n);
    while (n < c->n_used && chosen[n] != SLU_ROUTE_NONE) {
        n++;
    }
    return n;
}

void slu_route_within(const struct slu_config *c, const struct slu_layer *layer,
                      const float *logits, const bool *members, uint32_t *chosen, float *weight)
{
    uint32_t n_in = 0;
    float total = 0, sum = 0;
    for (uint32_t k = 0; k < c->n_used; k++) {
        n_in += members[chosen[k]];
        total += weight[k];
    }
    if (n_in == c->n_used) {
        return; /* nothing is missing */
    }
    struct scores s;
    score_all(c, layer, logits, &s);
    uint32_t n = choose_more(c, &s, members, false, 0, chosen);
    n = c->n_groups && n < c->n_used ? choose_more(c, &s, members, true, n, chosen) : n;
    for (uint32_t k = n; k < c->n_used; k++) {
        chosen[k] = SLU_ROUTE_NONE;
        weight[k] = 0;
    }
    weigh(c, s.prob, chosen, n, c->gate_scale, weight);
    for (uint32_t k = 0; k < n; k++) {
        sum += weight[k];
    }
    for (uint32_t k = 0; k < n && sum > 0; k++) {
        weight[k] *= total / sum;
    }
}

void slu_route_impose(float *logits, uint32_t n_experts, const uint32_t *chosen,
                      const float *weight, uint32_t n_used)
{
    float high = logits[0], least = 1;
    for (uint32_t e = 1; e < n_experts; e++) {
        high = logits[e] > high ? logits[e] : high;
    }
    for (uint32_t k = 0; k < n_used; k++) {
        least = weight[k] > 1e-6f && weight[k] < least ? weight[k] : least;
    }
    for (uint32_t e = 0; e < n_experts; e++) {
        logits[e] += logf(least) - high - 1;
    }
    for (uint32_t k = 0; k < n_used; k++) {
        logits[chosen[k]] = logf(weight[k] > least ? weight[k] : least);
    }
}
