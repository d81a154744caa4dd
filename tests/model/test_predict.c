#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"
#include "experts/predict.h"
#include "fixture.h"
#include "io/pack_section.h"
#include "tools/calibrate.h"

static const struct slu_synth_params model = {.arch = SLU_ARCH_QWEN3MOE,
                                              .n_layers = 2,
                                              .n_embd = 64,
                                              .n_ff = 64,
                                              .n_experts = 8,
                                              .n_used = 2,
                                              .n_ctx = 64};

/* Puts a linear predictor of that width, which expects the same of all experts, into the pack. */
static void put_predictor(const char *path, uint32_t n_embd)
{
    const struct slu_predict_shape shape = {.n_embd = n_embd,
                                            .n_layers = 2,
                                            .n_experts = 8,
                                            .has_direct = 1,
                                            .n_tokens_max = 16,
                                            .n_answer = 4};
    float *weights = calloc(2 * 16 * (size_t)n_embd + 32, sizeof *weights);
    size_t bytes = slu_predict_store(&shape, weights, NULL, 0);
    void *section = malloc(bytes);
    struct slu_err err = {0};
    slu_predict_store(&shape, weights, section, bytes);
    cr_assert_eq(slu_pack_section_write(path, SLU_SECTION_PREDICTOR, section, bytes, &err), 0, "%s",
                 err.text);
    free(section);
    free(weights);
}

/* Without a predictor there is no guess; with one there is, within the ledger; one of another shape
 * is told of and left aside. The answer is the same each time. */
Test(session_predict, guesses_where_it_can)
{
    static const int32_t prompt[] = {5, 6, 7, 8};
    struct fixture f;
    int32_t expected[8], got[8];
    fixture_open(&f);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 0);
    for (int which = 0; which < 3; which++) {
        if (which > 0) {
            put_predictor(f.slu, which == 1 ? 64 : 32);
        }
        struct slu_engine *engine = fixture_engine(f.slu, &(struct slu_engine_params){.ctx = 64});
        const char *why;
        cr_assert_eq(slu_engine_has_predictor(engine, &why), which == 1);
        cr_assert_eq(why != NULL, which == 2);
        struct slu_session *session;
        struct slu_err err = {0};
        float scores[16], answer[16];
        cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0);
        cr_assert_eq(slu_session_predict(session, scores, answer, &err), 0, "nothing is pending");
        cr_assert_eq(slu_session_tokens(session, prompt, 4, &err), 0);
        cr_assert_eq(slu_session_predict(session, scores, answer, &err), which == 1);
        if (which == 1) {
            const struct slu_ranking ranking = {2, 8, answer};
            cr_assert_float_eq(scores[3], .125f, 1e-5);
            cr_assert_eq(slu_session_rank_answer(session, &ranking, &err), 0, "%s", err.text);
        }
        slu_session_destroy(session);
        fixture_greedy(engine, prompt, 4, which == 0 ? expected : got, 8);
        cr_assert(which == 0 || memcmp(expected, got, sizeof got) == 0);
        slu_engine_close(engine);
    }
    fixture_close(&f);
}

/* A predictor is left aside where the budget has no room for it: a pack needs no more memory than
 * without. Only who asked for another routing than exact is told. */
Test(session_predict, gives_way_to_a_small_budget)
{
    struct fixture f;
    struct slu_plan without, with;
    struct slu_err err = {0};
    fixture_open(&f);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 0);
    for (int is_locked = 0; is_locked < 2; is_locked++) {
        struct slu_engine_params params = {
            .ctx = 64, .routing = is_locked ? SLU_ROUTING_LOCKED : SLU_ROUTING_EXACT};
        cr_assert_eq(slu_pack_section_remove(f.slu, &err), 0, "%s", err.text);
        cr_assert_eq(slu_plan(f.slu, &params, &without, &err), 0);
        put_predictor(f.slu, 64);
        cr_assert_eq(slu_plan(f.slu, &params, &with, &err), 0);
        cr_assert_eq(with.least_ram_bytes, without.least_ram_bytes);
        cr_assert_gt(with.resident_ram_bytes, without.resident_ram_bytes);
        const uint64_t budgets[] = {with.least_ram_bytes, with.resident_ram_bytes};
        for (int i = 0; i < 2; i++) {
            const char *why;
            params.ram_bytes = budgets[i];
            struct slu_engine *engine = fixture_engine(f.slu, &params);
            cr_assert_eq(slu_engine_has_predictor(engine, &why), i == 1);
            cr_assert_eq(why != NULL, is_locked && i == 0);
            slu_engine_close(engine);
        }
    }
    fixture_close(&f);
}

/* A long prompt is guessed for in whatever memory is left, from fewer of its tokens; without room
 * for any there is no guess, and nothing stays reserved. */
Test(session_predict, takes_the_memory_that_is_left)
{
    enum { N = 60, ROW_BYTES = 64 * sizeof(float) };
    static const int rows[] = {64, 33, 16, 15};
    struct fixture f;
    struct slu_err err = {0};
    int32_t prompt[N];
    for (int i = 0; i < N; i++) {
        prompt[i] = 5 + i;
    }
    fixture_open(&f);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 0);
    put_predictor(f.slu, 64);
    struct slu_engine *engine = fixture_engine(f.slu, &(struct slu_engine_params){.ctx = 64});
    struct slu_session *session;
    cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0);
    cr_assert_eq(slu_session_tokens(session, prompt, N, &err), 0);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        float scores[16];
        uint64_t used = slu_ledger_used(engine->ledger);
        uint64_t taken = slu_ledger_limit(engine->ledger) - used - (uint64_t)rows[i] * ROW_BYTES;
        cr_assert_eq(slu_ledger_reserve(engine->ledger, SLU_ACCOUNT_SCRATCH, taken, &err), 0);
        cr_assert_eq(slu_session_predict(session, scores, NULL, &err), rows[i] >= 16);
        slu_ledger_release(engine->ledger, SLU_ACCOUNT_SCRATCH, taken);
        cr_assert_eq(slu_ledger_used(engine->ledger), used);
    }
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Puts another model where the one was that is being calibrated. */
static void replace(void *arg, const char *what, uint64_t done, uint64_t total)
{
    const struct fixture *f = arg;
    struct slu_synth_params other = model;
    struct fixture to = *f;
    (void)done, (void)total;
    if (strcmp(what, "fitting") == 0 && access(f->gguf, F_OK) == 0) {
        other.seed = 99;
        snprintf(to.slu, sizeof to.slu, "%s/new.slu", f->dir);
        fixture_synth(&to, &other, SLU_CODEC_RAW, 0);
        cr_assert_eq(rename(to.slu, f->slu), 0);
        cr_assert_eq(unlink(f->gguf), 0);
    }
}

/* A predictor isn't put into a pack that has taken the place of the one it was fitted to. */
Test(calibrate, leaves_another_model_alone)
{
    struct fixture f;
    struct slu_err err = {0};
    char text[128];
    fixture_open(&f);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 0);
    snprintf(text, sizeof text, "%s/text", f.dir);
    FILE *file = fopen(text, "w");
    cr_assert(file && fputs("what a text may be that is long enough to learn from", file) >= 0 &&
              fclose(file) == 0);
    const struct slu_engine_params engine = {.ctx = 64};
    const struct slu_calibrate_params params = {
        .model = f.slu, .engine = &engine, .text = text, .progress = replace, .arg = &f};
    struct slu_calibrate_report report;
    cr_assert_eq(slu_calibrate_run(&params, &report, &err), SLU_EINVAL, "%s", err.text);
    cr_assert(strstr(err.text, "replaced"), "%s", err.text);
    struct slu_pack *pack;
    cr_assert_eq(slu_pack_open_file(f.slu, &pack, &err), 0);
    cr_assert_null(pack->section);
    slu_pack_close(pack);
    fixture_close(&f);
}

/* Rankings for the answer are checked when they come. */
Test(session_predict, rankings_are_checked)
{
    struct fixture f;
    struct slu_session *session;
    struct slu_err err = {0};
    float scores[16] = {0};
    fixture_open(&f);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 0);
    struct slu_engine *engine = fixture_engine(f.slu, &(struct slu_engine_params){.ctx = 64});
    cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0);
    struct slu_ranking ranking = {2, 8, scores};
    cr_assert_eq(slu_session_rank_answer(session, &ranking, &err), 0);
    scores[9] = NAN;
    cr_assert_eq(slu_session_rank_answer(session, &ranking, &err), SLU_EINVAL);
    scores[9] = -1;
    cr_assert_eq(slu_session_rank_answer(session, &ranking, &err), SLU_EINVAL);
    ranking.n_layers = 3;
    cr_assert_eq(slu_session_rank_answer(session, &ranking, &err), SLU_EINVAL);
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* A profile comes back as it was saved; one with a byte wrong, cut off or of another model is
 * refused, and what was there stays. */
Test(session_predict, profiles)
{
    struct fixture f, g;
    struct slu_err err = {0};
    float scores[16], got[16];
    char path[128];
    struct slu_synth_params other = model;
    other.seed = 99;
    fixture_open(&f);
    fixture_open(&g);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 0);
    fixture_synth(&g, &other, SLU_CODEC_RAW, 0);
    struct slu_engine *engine = fixture_engine(f.slu, &(struct slu_engine_params){.ctx = 64});
    struct slu_engine *stranger = fixture_engine(g.slu, &(struct slu_engine_params){.ctx = 64});
    snprintf(path, sizeof path, "%s/a.prof", f.dir);
    for (int i = 0; i < 16; i++) {
        scores[i] = (float)i / 4;
        got[i] = -7;
    }
    cr_assert_eq(slu_profile_save(path, engine, scores, &err), 0, "%s", err.text);
    cr_assert_eq(slu_profile_load(path, stranger, got, &err), SLU_EFORMAT);
    FILE *file = fopen(path, "r+b");
    for (long at = 0; at < 40 + 64; at++) {
        cr_assert(fseek(file, at, SEEK_SET) == 0);
        int byte = fgetc(file);
        cr_assert(fseek(file, at, SEEK_SET) == 0 && fputc(byte ^ 4, file) >= 0);
        fflush(file);
        cr_assert_lt(slu_profile_load(path, engine, got, &err), 0, "byte %ld", at);
        cr_assert(fseek(file, at, SEEK_SET) == 0 && fputc(byte, file) >= 0);
        fflush(file);
    }
    fclose(file);
    cr_assert_eq(got[0], -7);
    cr_assert_eq(slu_profile_load(path, engine, got, &err), 0, "%s", err.text);
    cr_assert_arr_eq(got, scores, sizeof got);
    scores[3] = INFINITY;
    cr_assert_eq(slu_profile_save(path, engine, scores, &err), SLU_EINVAL);
    slu_engine_close(engine);
    slu_engine_close(stranger);
    fixture_close(&f);
    fixture_close(&g);
}
