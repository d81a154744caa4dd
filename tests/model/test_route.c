#include <criterion/criterion.h>
#include <math.h>

#include "model/ops.h"

#define N 6u

static const float logits[N] = {2.0f, 0.5f, 1.5f, -1.0f, 1.0f, 0.0f};

static struct slu_config config_of(enum slu_gate gate, bool renorm)
{
    return (struct slu_config){.n_experts = N,
                               .n_used = 3,
                               .gate = gate,
                               .gate_renorm = renorm,
                               .gate_scale = gate == SLU_GATE_SIGMOID ? 2.5f : 1};
}

/* What an expert weighs before the chosen ones' weights are made to add up. */
static double raw(enum slu_gate gate, uint32_t e)
{
    double sum = 0;
    for (uint32_t i = 0; i < N; i++) {
        sum += exp(logits[i]);
    }
    return gate == SLU_GATE_SIGMOID ? 1 / (1 + exp(-(double)logits[e])) : exp(logits[e]) / sum;
}

/* Members alone are chosen, best first, and their weights have the ratios of the gating function
 * and the sum that the router's own choice had. */
Test(route, within_renormalizes)
{
    static const bool members[N] = {false, true, true, true, false, true};
    static const uint32_t want[] = {2, 1, 5};
    static const uint32_t exact[] = {0, 2, 4};
    for (int gate = SLU_GATE_SOFTMAX; gate <= SLU_GATE_SIGMOID; gate++) {
        for (int renorm = 0; renorm < 2; renorm++) {
            struct slu_config c = config_of((enum slu_gate)gate, renorm);
            struct slu_layer layer = {0};
            uint32_t chosen[3];
            float weight[3];
            slu_route(&c, &layer, logits, chosen, weight);
            double total = 0, sum = 0, raw_sum = 0;
            for (unsigned k = 0; k < 3; k++) {
                cr_expect_eq(chosen[k], exact[k]);
                total += weight[k];
                raw_sum += raw((enum slu_gate)gate, want[k]);
            }
            slu_route_within(&c, &layer, logits, members, chosen, weight);
            for (unsigned k = 0; k < 3; k++) {
                cr_expect_eq(chosen[k], want[k]);
                double share = raw((enum slu_gate)gate, want[k]) / raw_sum;
                cr_expect_float_eq(weight[k], share * total, 1e-6, "gate %d: %g", gate, weight[k]);
                sum += weight[k];
            }
            cr_expect_float_eq(sum, total, 1e-6);
        }
    }
}

/* Where there are fewer members than the model uses, all of them are chosen, with all the weight.
 */
Test(route, within_takes_fewer)
{
    static const bool members[N] = {false, false, false, true, true, false};
    struct slu_config c = config_of(SLU_GATE_SOFTMAX_CHOSEN, false);
    struct slu_layer layer = {0};
    uint32_t chosen[3];
    float weight[3];
    slu_route(&c, &layer, logits, chosen, weight);
    slu_route_within(&c, &layer, logits, members, chosen, weight);
    cr_expect(chosen[0] == 4 && chosen[1] == 3 && chosen[2] == SLU_ROUTE_NONE);
    cr_expect_float_eq(weight[0] + weight[1], 1, 1e-6);
    cr_expect_eq(weight[2], 0);
}

/* prefer keeps the first choice, whatever the bias; the others make way for members that come
 * near enough; the weights are the model's. */
Test(route, prefer_leans)
{
    static const bool members[N] = {false, true, false, true, false, false};
    struct slu_layer layer = {0};
    for (int gate = SLU_GATE_SOFTMAX; gate <= SLU_GATE_SIGMOID; gate++) {
        struct slu_config c = config_of((enum slu_gate)gate, true);
        static const float biases[] = {0, 0.01f, 1.2f, 100};
        static const uint32_t want[][3] = {{0, 2, 4}, {0, 2, 4}, {0, 1, 2}, {0, 1, 3}};
        for (unsigned i = 0; i < 4; i++) {
            uint32_t chosen[3];
            float weight[3];
            double sum = 0;
            slu_route(&c, &layer, logits, chosen, weight);
            slu_route_prefer(&c, &layer, logits, members, biases[i], chosen, weight);
            for (unsigned k = 0; k < 3; k++) {
                cr_expect_eq(chosen[k], want[i][k], "gate %d, bias %g: %u at %u", gate, biases[i],
                             chosen[k], k);
                sum += gate == SLU_GATE_SOFTMAX_CHOSEN ? exp(logits[chosen[k]])
                                                       : raw((enum slu_gate)gate, chosen[k]);
            }
            double first =
                gate == SLU_GATE_SOFTMAX_CHOSEN ? exp(logits[0]) : raw((enum slu_gate)gate, 0);
            cr_expect_float_eq(weight[0], first / sum * c.gate_scale, 1e-5);
        }
    }
}

/* A router's own choice bias counts for prefer and within as it does for the router. */
Test(route, choice_bias_counts)
{
    static const float bias[N] = {-5, 0, 0, 5, 0, 0};
    static const bool members[N] = {true, true, false, true, false, true};
    struct slu_config c = config_of(SLU_GATE_SIGMOID, true);
    struct slu_layer layer = {.gate_bias = bias};
    uint32_t chosen[3];
    float weight[3];
    slu_route(&c, &layer, logits, chosen, weight);
    cr_expect(chosen[0] == 3 && chosen[1] == 2 && chosen[2] == 4);
    slu_route_within(&c, &layer, logits, members, chosen, weight);
    cr_expect(chosen[0] == 3 && chosen[1] == 1 && chosen[2] == 5);
}
