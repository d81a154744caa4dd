#include <criterion/criterion.h>
#include <string.h>

#include "engine.h"
#include "fixture.h"
#include "tools/route_record.h"

static const struct slu_synth_params model = {.arch = SLU_ARCH_QWEN3MOE,
                                              .n_layers = 2,
                                              .n_embd = 64,
                                              .n_ff = 64,
                                              .n_experts = 8,
                                              .n_used = 2,
                                              .n_ctx = 4096};

static struct slu_engine *make_engine(struct fixture *f, uint64_t ram_bytes, bool records)
{
    return fixture_engine(f->slu, &(struct slu_engine_params){.ctx = 4096,
                                                              .ram_bytes = ram_bytes,
                                                              .n_threads = 1,
                                                              .records_routing = records});
}

static uint64_t least(struct fixture *f, bool records)
{
    struct slu_plan plan;
    const struct slu_engine_params params = {
        .ctx = 4096, .ram_bytes = 1 << 30, .n_threads = 1, .records_routing = records};
    cr_assert_eq(slu_plan(f->slu, &params, &plan, NULL), 0);
    return plan.least_ram_bytes;
}

/* What a record takes is in the plan, is charged while it is there, and is enough for all tokens of
 * the context in the least budget. */
Test(route_record, is_planned_and_charged)
{
    struct fixture f;
    struct slu_err err = {0};
    struct slu_route_record *record;
    fixture_open(&f);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 0);
    struct slu_engine *engine = make_engine(&f, least(&f, true), true);
    uint64_t bytes = slu_plan_record_bytes(&engine->weights, 4096);
    cr_assert_geq(bytes, 4096 * 2 * 2 * (sizeof(uint16_t) + sizeof(float)));
    cr_assert_lt(bytes, 4096 * 2 * 2 * 16);
    cr_assert_eq(least(&f, true), least(&f, false) + bytes);
    uint64_t before = slu_ledger_used(engine->ledger);
    struct slu_session *session; /* the plan has room for both */
    cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0, "%s", err.text);
    uint64_t with_session = slu_ledger_used(engine->ledger);
    cr_assert_eq(slu_route_record_create(engine, 4096, &record, &err), 0, "%s", err.text);
    cr_assert_eq(slu_ledger_used(engine->ledger), with_session + bytes);
    slu_route_record_destroy(record);
    slu_session_destroy(session);
    cr_assert_eq(slu_ledger_used(engine->ledger), before);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* A budget that hasn't left room for it refuses it, with a sentence, and goes on. */
Test(route_record, is_refused_where_there_is_no_room)
{
    struct fixture f;
    struct slu_err err = {0};
    struct slu_route_record *record;
    struct slu_session *session;
    const int32_t ids[] = {1, 2, 3};
    fixture_open(&f);
    fixture_synth(&f, &model, SLU_CODEC_RAW, 0);
    struct slu_engine *engine = make_engine(&f, least(&f, false), false);
    cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0, "%s", err.text);
    cr_assert_eq(slu_route_record_create(engine, 4096, &record, &err), SLU_EBUDGET);
    cr_assert(strstr(err.text, "to record the routing of 4096 tokens"), "%s", err.text);
    cr_assert_eq(slu_session_tokens(session, ids, 3, &err), 0);
    cr_assert_eq(slu_session_eval(session, NULL, NULL, &err), 0, "%s", err.text);
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}
