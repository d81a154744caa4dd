#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "fixture.h"
#include "tools/importance.h"
#include "tools/importance_record.h"

#define TOKENS 24u

static const struct slu_synth_params model = {.arch = SLU_ARCH_QWEN3MOE,
                                              .n_layers = 2,
                                              .n_embd = 64,
                                              .n_ff = 64,
                                              .n_experts = 8,
                                              .n_used = 2,
                                              .n_ctx = 64};

static uint32_t chosen_of_layer_1; /* bits */

static void observe(void *arg, uint32_t layer, uint32_t position, uint32_t n_used,
                    const uint32_t *chosen, const float *weight)
{
    (void)arg, (void)position, (void)weight;
    for (uint32_t k = 0; k < n_used && layer == 1; k++) {
        chosen_of_layer_1 |= 1u << chosen[k];
    }
}

/* Computes some tokens and reads what was recorded of them. */
static struct slu_importance *recorded(struct fixture *f, uint32_t n_threads,
                                       struct slu_engine **ret_engine)
{
    struct slu_err err = {0};
    struct slu_importance_record *record;
    struct slu_importance *importance;
    char path[128];
    int32_t ids[TOKENS];
    for (uint32_t i = 0; i < TOKENS; i++) {
        ids[i] = (int32_t)(i * 13 % 300);
    }
    struct slu_engine *engine =
        fixture_engine(f->slu, &(struct slu_engine_params){.n_threads = n_threads, .ctx = 64});
    slu_engine_set_observer(engine, observe, NULL);
    cr_assert_eq(slu_importance_record_create(engine, &record, &err), 0, "%s", err.text);
    free(fixture_logits(engine, ids, TOKENS));
    snprintf(path, sizeof path, "%s/a.imp", f->dir);
    cr_assert_eq(slu_importance_record_write(record, path, &err), 0, "%s", err.text);
    slu_importance_record_destroy(record);
    cr_assert_eq(slu_importance_read(path, &importance, &err), 0, "%s", err.text);
    *ret_engine = engine;
    return importance;
}

/* The inputs of q, k and v are normed, so that their second moments over the norm's weights add up
 * to the width; the three read the same; and exactly the experts that were chosen have entries. */
Test(importance_record, moments_are_those_of_the_inputs)
{
    struct fixture f;
    struct slu_engine *engine;
    fixture_open(&f);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 0);
    struct slu_importance *importance = recorded(&f, 1, &engine);
    for (uint32_t l = 0; l < 2; l++) {
        char q[64], k[64];
        snprintf(q, sizeof q, "blk.%u.attn_q.weight", (unsigned)l);
        snprintf(k, sizeof k, "blk.%u.attn_k.weight", (unsigned)l);
        const float *of_q = slu_importance_find(importance, q, SLU_IMPORTANCE_NO_EXPERT, 64);
        const float *of_k = slu_importance_find(importance, k, SLU_IMPORTANCE_NO_EXPERT, 64);
        cr_assert(of_q && of_k);
        cr_assert_arr_eq(of_q, of_k, 64 * sizeof *of_q);
        const float *norm = engine->weights.layers[l].attn_norm;
        double sum = 0;
        for (int c = 0; c < 64; c++) {
            sum += of_q[c] / (norm[c] * norm[c]);
        }
        cr_assert_float_eq(sum, 64, .5, "%f", sum);
    }
    static const char *const parts[] = {"gate", "up", "down"};
    for (uint32_t e = 0; e < 8; e++) {
        for (int i = 0; i < 3; i++) {
            char name[64];
            snprintf(name, sizeof name, "blk.1.ffn_%s_exps.weight", parts[i]);
            const float *moments = slu_importance_find(importance, name, e, 64);
            cr_assert_eq(moments != NULL, (chosen_of_layer_1 >> e) & 1, "%s %u", name, e);
        }
    }
    cr_assert_neq(chosen_of_layer_1, 0);
    slu_importance_destroy(importance);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* However many threads compute, the file is the same. */
Test(importance_record, threads_change_nothing)
{
    struct fixture f;
    struct slu_engine *engine;
    fixture_open(&f);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 4096);
    struct slu_importance *one = recorded(&f, 1, &engine);
    slu_engine_close(engine);
    struct slu_importance *three = recorded(&f, 3, &engine);
    slu_engine_close(engine);
    cr_assert_eq(slu_importance_entries(one), slu_importance_entries(three));
    for (uint32_t e = 0; e < 8; e++) {
        const float *a = slu_importance_find(one, "blk.1.ffn_down_exps.weight", e, 64);
        const float *b = slu_importance_find(three, "blk.1.ffn_down_exps.weight", e, 64);
        cr_assert_eq(a != NULL, b != NULL);
        cr_assert(!a || memcmp(a, b, 64 * sizeof *a) == 0);
    }
    slu_importance_destroy(one);
    slu_importance_destroy(three);
    fixture_close(&f);
}
