/* Recorded routing laid over models of the same and of other sizes. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "scratch.h"
#include "tools/route_map.h"

/* Three prompt tokens and two decoded ones, two layers, eight experts, two of them used: prompt
 * token t takes experts t and t + 1 of layer 0, t + 2 and t + 3 of layer 1; decoding, seven less.
 */
static void write_trace(const char *path)
{
    char text[4096];
    int n = snprintf(text, sizeof text,
                     "# route_trace v1\n# model=m arch=a n_layer=2 n_expert=8 n_expert_used=2\n"
                     "phase,step,layer,slot,expert,weight\n");
    for (int phase = 0; phase < 2; phase++) {
        for (int t = 0; t < 3 - phase; t++) {
            for (int i = 0; i < 4; i++) {
                int expert = phase == 0 ? t + i : 7 - t - i;
                n += snprintf(text + n, sizeof text - (size_t)n, "%d,%d,%d,%d,%d,%s\n", phase, t,
                              i / 2, i % 2, expert, i % 2 ? "0.25" : "0.75");
            }
        }
    }
    scratch_write(path, text, (size_t)n);
}

static struct slu_route_map *open_map(const char *path, const struct slu_route_map_params *params)
{
    struct slu_route_map *map;
    struct slu_err err = {0};
    cr_assert_eq(slu_route_map_open(path, params, &map, &err), 0, "%s", err.text);
    return map;
}

static void expect(const struct slu_route_map *map, uint32_t layer, uint32_t position, uint32_t a,
                   uint32_t b)
{
    uint32_t chosen[2];
    float weight[2];
    slu_route_map_choose(map, layer, position, chosen, weight);
    cr_assert(chosen[0] == a && chosen[1] == b, "layer %u, position %u: %u and %u", layer, position,
              chosen[0], chosen[1]);
    cr_assert_float_eq(weight[0], 0.75f, 1e-6);
    cr_assert_float_eq(weight[1], 0.25f, 1e-6);
}

/* A model of the trace's own sizes gets the trace's choices, the prompt's around and around, and
 * ends with its last: what is decoded follows that. */
Test(route_map, same_sizes)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "trace.csv");
    write_trace(path);
    const struct slu_route_map_params params = {
        .n_layers = 2, .n_experts = 8, .n_used = 2, .n_prompt = 4};
    struct slu_route_map *map = open_map(path, &params);
    for (uint32_t p = 0; p < 4; p++) {
        uint32_t t = (p + 2) % 3; /* 2, 0, 1, 2 */
        expect(map, 0, p, t, t + 1);
        expect(map, 1, p, t + 2, t + 3);
    }
    for (uint32_t p = 4; p < 9; p++) {
        uint32_t t = (p - 4) % 2;
        expect(map, 0, p, 7 - t, 6 - t);
        expect(map, 1, p, 5 - t, 4 - t);
    }
    slu_route_map_close(map);
    scratch_finish(&scratch);
}

/* As a trace of its own: the prompt's tokens and then the decoded ones, with their choices. */
Test(route_map, makes_a_trace)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "trace.csv");
    write_trace(path);
    const struct slu_route_map_params params = {
        .n_layers = 2, .n_experts = 8, .n_used = 2, .n_prompt = 3};
    struct slu_route_map *map = open_map(path, &params);
    struct slu_route_trace trace, recorded;
    struct slu_err err = {0};
    cr_assert_eq(slu_route_map_trace(map, 2, &trace, &err), 0, "%s", err.text);
    cr_assert_eq(slu_route_trace_open(path, &recorded, &err), 0, "%s", err.text);
    cr_assert(trace.n_layers == 2 && trace.n_experts == 8 && trace.n_routed_layers == 2);
    cr_assert(trace.n_tokens == 5 && trace.n_decoded_tokens == 2);
    cr_assert(trace.n_visits == recorded.n_visits && trace.n_choices == recorded.n_choices);
    for (uint32_t v = 0; v < trace.n_visits; v++) {
        const struct slu_route_visit *a = &trace.visits[v], *b = &recorded.visits[v];
        cr_assert(a->token == b->token && a->layer == b->layer && a->first == b->first &&
                      a->n == b->n && a->is_decoding == b->is_decoding,
                  "visit %u", v);
    }
    for (uint32_t i = 0; i < trace.n_choices; i++) {
        cr_assert_eq(trace.experts[i], recorded.experts[i], "choice %u", i);
        cr_assert_float_eq(trace.weights[i], recorded.weights[i], 1e-6);
    }
    slu_route_trace_finish(&trace);
    slu_route_trace_finish(&recorded);
    cr_assert_eq(slu_route_map_trace(map, UINT32_MAX, &trace, &err), SLU_EINVAL);
    cr_assert_eq(slu_route_map_trace(map, 1u << 24, &trace, &err), SLU_EINVAL);
    slu_route_map_close(map);
    static const struct slu_route_map_params too_large[] = {
        {.n_layers = SLU_ROUTE_LAYERS_MAX + 1, .n_experts = 2, .n_used = 1, .n_prompt = 1},
        {.n_layers = 1, .n_experts = SLU_ROUTE_EXPERTS_MAX + 1, .n_used = 1, .n_prompt = 1},
        {.n_layers = 4096, .n_experts = 4096, .n_used = 1, .n_prompt = 1},
    };
    for (size_t i = 0; i < sizeof too_large / sizeof *too_large; i++) {
        map = open_map(path, &too_large[i]);
        cr_assert_eq(slu_route_map_trace(map, 1, &trace, &err), SLU_EINVAL, "%zu", i);
        slu_route_map_close(map);
    }
    scratch_finish(&scratch);
}

/* A guess is right as often as it is told to be, and the same each time; what is wrong in it is
 * distinct, and nothing that the token goes to. */
Test(route_map, guesses)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "trace.csv");
    write_trace(path);
    const struct slu_route_map_params params = {
        .n_layers = 6, .n_experts = 16, .n_used = 4, .n_prompt = 2};
    struct slu_route_map *map = open_map(path, &params);
    static const float shares[] = {0, 0.25f, 0.9f, 1};
    for (unsigned s = 0; s < 4; s++) {
        unsigned n_right = 0;
        for (uint32_t i = 0; i < 6 * 1000; i++) {
            uint32_t chosen[4], guessed[4], again[4];
            float weight[4];
            slu_route_map_choose(map, i % 6, i / 6, chosen, weight);
            slu_route_map_guess(map, i % 6, i / 6, shares[s], guessed, weight);
            slu_route_map_guess(map, i % 6, i / 6, shares[s], again, weight);
            cr_assert_eq(memcmp(guessed, again, sizeof guessed), 0);
            for (uint32_t k = 0; k < 4; k++) {
                n_right += guessed[k] == chosen[k];
                cr_assert_lt(guessed[k], 16);
                for (uint32_t j = 0; j < 4; j++) {
                    cr_assert(j == k || (guessed[k] != guessed[j] && guessed[k] != chosen[j]));
                }
            }
        }
        cr_assert_float_eq(n_right / 24000.0, shares[s], 0.02, "%u of 24000 for %.2f", n_right,
                           (double)shares[s]);
    }
    slu_route_map_close(map);
    scratch_finish(&scratch);
}

/* Whatever the sizes, choices are distinct and within the model, weights add up to one, the same
 * token gets the same ones, and what two tokens of the trace share they share here. */
Test(route_map, other_sizes)
{
    static const struct slu_route_map_params models[] = {
        {.n_layers = 5, .n_experts = 8, .n_used = 4, .n_prompt = 3},
        {.n_layers = 1, .n_experts = 128, .n_used = 3, .n_prompt = 3},
        {.n_layers = 3, .n_experts = 4, .n_used = 4, .n_prompt = 3},
        {.n_layers = 3, .n_experts = 5, .n_used = 1, .n_prompt = 3},
        {.n_layers = 3, .n_experts = 64, .n_used = 64, .n_prompt = 3},
    };
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "trace.csv");
    write_trace(path);
    for (size_t m = 0; m < sizeof models / sizeof *models; m++) {
        const struct slu_route_map_params *model = &models[m];
        struct slu_route_map *map = open_map(path, model);
        for (uint32_t l = 0; l < model->n_layers; l++) {
            for (uint32_t p = 0; p < 8; p++) {
                uint32_t chosen[64], again[64];
                float weight[64], weight_again[64], sum = 0;
                bool seen[128] = {false};
                slu_route_map_choose(map, l, p, chosen, weight);
                for (uint32_t k = 0; k < model->n_used; k++) {
                    cr_assert(chosen[k] < model->n_experts && !seen[chosen[k]]);
                    seen[chosen[k]] = true;
                    cr_assert(weight[k] >= 0);
                    sum += weight[k];
                }
                cr_assert_float_eq(sum, 1, 1e-5);
                /* Decoding has two tokens: the one after next is the same again. */
                slu_route_map_choose(map, l, p < 3 ? p : p + 2, again, weight_again);
                cr_assert_arr_eq(chosen, again, model->n_used * sizeof *chosen);
            }
        }
        slu_route_map_close(map);
    }
    /* With 4 of 8 experts the layer's own two come first, then those of the other layer, under
     * another numbering: one that keeps shared experts shared and others apart. */
    struct slu_route_map *map = open_map(path, &models[0]);
    uint32_t first[4], second[4];
    float weight[4];
    slu_route_map_choose(map, 0, 0, first, weight);
    slu_route_map_choose(map, 0, 1, second, weight);
    cr_assert(first[0] == 0 && first[1] == 1 && second[0] == 1 && second[1] == 2);
    slu_route_map_close(map);
    scratch_finish(&scratch);
}

/* Files that are no traces are refused with a sentence that names them. */
Test(route_map, refused)
{
    static const char *const texts[] = {
        "",
        "hello\n",
        "# route_trace v1\n",
        "# route_trace v1\n# model=m n_layer=2 n_expert=8\nphase,step,layer,expert\n0,0,2,1\n",
        "# route_trace v1\n# model=m n_layer=2 n_expert=8\nphase,step,layer,expert\n0,0,1,8\n",
        "# route_trace v1\n# model=m n_layer=2 n_expert=8\nphase,step,layer,expert\n0,0,1\n",
        "# route_trace v1\n# model=m n_layer=0 n_expert=8\nphase,step,layer,expert\n0,0,1,1\n",
    };
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "trace.csv");
    const struct slu_route_map_params params = {
        .n_layers = 2, .n_experts = 8, .n_used = 2, .n_prompt = 4};
    struct slu_route_map *map = NULL;
    struct slu_err err;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        scratch_write(path, texts[i], strlen(texts[i]));
        cr_assert_eq(slu_route_map_open(path, &params, &map, &err), SLU_EFORMAT, "case %zu", i);
        cr_assert_not_null(strstr(err.text, "trace.csv"));
    }
    cr_assert_eq(slu_route_map_open("/nowhere/t.csv", &params, &map, &err), SLU_ENOENT);
    write_trace(path);
    cr_assert_eq(
        slu_route_map_open(path, &(struct slu_route_map_params){.n_layers = 2}, &map, &err),
        SLU_EINVAL);
    cr_assert_null(map);
    scratch_finish(&scratch);
}
