/* Adapters whose experts are streamed: the same bits as those in memory, whatever there is room
 * for, and failures that leave the session as it was. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/sla.h"
#include "fixture.h"
#include "session.h"
#include "tools/adapter_import.h"
#include "tools/adapter_synth.h"

#define N_TOKENS 40u

/* A model whose adapters have so many experts of so high a rank that a stream's own tables are
 * small beside them. */
static const struct slu_synth_params model = {
    .arch = SLU_ARCH_QWEN3MOE, .n_layers = 3, .n_experts = 32, .n_used = 4, .n_vocab = 384};

struct adapters {
    struct fixture f;
    char sla[3][128];
    uint64_t bytes[3], least[3];
};

/* What the adapter takes in memory, and with as few slots as can be. */
static void measure(struct adapters *a, unsigned i)
{
    struct slu_err err = {0};
    struct slu_source *source;
    struct slu_adapter_streaming streaming = {.path = a->sla[i], .n_workers = 2};
    cr_assert_eq(slu_adapter_memory(NULL, a->sla[i], &a->bytes[i], NULL, &err), 0, "%s", err.text);
    cr_assert_eq(slu_source_open_file(a->sla[i], &source, &err), 0, "%s", err.text);
    const struct slu_base base = {.n_used = model.n_used};
    cr_assert_eq(slu_adapter_fit(source, &base, 0, &streaming, &a->least[i], &err), SLU_EBUDGET);
    cr_assert_eq(streaming.n_slots, model.n_used);
    cr_assert_lt(a->least[i], a->bytes[i]);
    slu_source_destroy(source);
}

static void adapters_open(struct adapters *a, unsigned n)
{
    static const uint32_t ranks[] = {48, 64, 80};
    static const uint32_t targets[] = {~0u, SLU_ADAPTER_EXPERTS, ~(1u << SLU_TARGET_EXPERT_UP)};
    static const enum slu_fmt_id fmts[] = {SLU_FMT_F32, SLU_FMT_BF16, SLU_FMT_F16};
    fixture_open(&a->f);
    fixture_synth(&a->f, &model, SLU_CODEC_ZSTD, 8192);
    for (unsigned i = 0; i < n; i++) {
        struct slu_err err = {0};
        struct slu_adapter_info info;
        char gguf[128];
        snprintf(gguf, sizeof gguf, "%s/a%u.gguf", a->f.dir, i);
        snprintf(a->sla[i], sizeof a->sla[i], "%s/a%u.sla", a->f.dir, i);
        struct slu_adapter_synth_params params = {.base = a->f.gguf,
                                                  .rank = ranks[i],
                                                  .gain = 2,
                                                  .seed = i,
                                                  .fmt = fmts[i],
                                                  .targets = targets[i]};
        cr_assert_eq(slu_adapter_synth_write(gguf, &params, &err), 0, "%s", err.text);
        struct slu_adapter_import_params import = {.in = gguf, .out = a->sla[i], .base = a->f.slu};
        cr_assert_eq(slu_adapter_import(&import, &info, &err), 0, "%s", err.text);
        measure(a, i);
    }
}

static void make_ids(int32_t *ids, uint32_t n)
{
    uint32_t state = 7;
    for (uint32_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        ids[i] = (int32_t)((state >> 8) % model.n_vocab);
    }
}

static int keep(void *arg, uint32_t position, const float *logits)
{
    memcpy((float *)arg + (size_t)position * model.n_vocab, logits, model.n_vocab * sizeof *logits);
    return 0;
}

/* Logits of a prefill and of steps of one token behind it. */
static float *logits_of(const struct adapters *a, const struct slu_engine_params *params,
                        const struct slu_adapter_choice *choices, size_t n, uint32_t n_streamed)
{
    struct slu_engine *engine = fixture_engine(a->f.slu, params);
    struct slu_session *session = NULL;
    struct slu_err err = {0};
    int32_t ids[N_TOKENS];
    make_ids(ids, N_TOKENS);
    float *logits = calloc((size_t)N_TOKENS * model.n_vocab, sizeof *logits);
    cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0, "%s", err.text);
    cr_assert_eq(slu_session_set_adapters(session, choices, n, &err), 0, "%s", err.text);
    for (uint32_t i = 0, some = N_TOKENS - 8; i < N_TOKENS; i += some, some = 1) {
        cr_assert_eq(slu_session_tokens(session, ids + i, some, &err), 0, "%s", err.text);
        cr_assert_eq(slu_session_eval(session, keep, logits, &err), 0, "%s", err.text);
    }
    struct slu_engine_stats stats;
    slu_engine_stats(engine, &stats);
    cr_assert_eq(stats.n_adapters_streamed, n_streamed, "%u, not %u", stats.n_adapters_streamed,
                 n_streamed);
    slu_session_destroy(session);
    slu_engine_close(engine);
    return logits;
}

/* One adapter, several, the same twice: streamed, with the fewest slots and with more, they give
 * what they give in memory. */
Test(lora_stream, equals_resident)
{
    struct adapters a = {0};
    adapters_open(&a, 3);
    const struct slu_adapter_choice sets[][3] = {
        {{a.sla[0], 1}},
        {{a.sla[1], 1}, {a.sla[0], -.5f}},
        {{a.sla[0], .5f}, {a.sla[0], 2}},
        {{a.sla[2], 1}, {a.sla[1], 1}, {a.sla[0], .25f}},
    };
    static const uint32_t n_choices[] = {1, 2, 2, 3}, n_adapters[] = {1, 2, 1, 3};
    for (unsigned set = 0; set < 4; set++) {
        struct slu_engine_params params = {
            .ram_bytes = 1ull << 30, .ctx = 64, .adapter_bytes = 64 << 20};
        float *want = logits_of(&a, &params, sets[set], n_choices[set], 0);
        for (unsigned run = 0; run < 8; run++) {
            uint64_t least = a.least[0] > a.least[1] ? a.least[0] : a.least[1];
            least = a.least[2] > least ? a.least[2] : least;
            params.n_threads = run & 1 ? 2 : 1;
            params.io = run & 2 ? SLU_USE_IO_PREAD : SLU_USE_IO_AUTO;
            params.adapters_at_once = n_adapters[set];
            params.adapter_bytes = n_adapters[set] * (least + (run & 4 ? 200000 : 0));
            params.minimum_cache = run & 4;
            float *got = logits_of(&a, &params, sets[set], n_choices[set], n_adapters[set]);
            cr_expect(!memcmp(got, want, N_TOKENS * model.n_vocab * sizeof *got),
                      "set %u, run %u differs", set, run);
            free(got);
        }
        free(want);
    }
    fixture_close(&a.f);
}

static struct slu_engine *open_engine(const struct adapters *a, uint64_t adapter_bytes)
{
    struct slu_engine_params params = {
        .ram_bytes = 1ull << 30, .ctx = 64, .n_threads = 2, .adapter_bytes = adapter_bytes};
    return fixture_engine(a->f.slu, &params);
}

static struct slu_session *open_session(struct slu_engine *engine, const char *sla)
{
    struct slu_session *session = NULL;
    struct slu_err err = {0};
    cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0, "%s", err.text);
    cr_assert_eq(
        slu_session_set_adapters(session, &(struct slu_adapter_choice){sla, 1}, sla ? 1 : 0, &err),
        0, "%s", err.text);
    return session;
}

static int answer(struct slu_session *session, int32_t *ret_ids, struct slu_err *err)
{
    static const int32_t prompt[] = {3, 14, 15, 92, 65, 35};
    struct slu_generate_params params = {.n_max = 12, .ignore_end = true};
    /* What is computed of the same prompt is to be computed again. */
    cr_assert_eq(slu_session_replace(session, prompt + 1, 1, err), 0, "%s", err->text);
    cr_assert_eq(slu_session_replace(session, prompt, 6, err), 0, "%s", err->text);
    int rc = slu_session_generate(session, &params, NULL, err);
    size_t n;
    const int32_t *ids = slu_session_ids(session, &n);
    if (rc == 0) {
        memcpy(ret_ids, ids + 6, 12 * sizeof *ret_ids);
    }
    return rc;
}

/* Adds `by` to a byte of each expert block. */
static void damage(const char *sla, uint8_t by)
{
    struct slu_source *source;
    struct slu_sla index;
    struct slu_err err = {0};
    cr_assert_eq(slu_source_open_file(sla, &source, &err), 0, "%s", err.text);
    cr_assert_eq(slu_sla_open(source, &index, &err), 0, "%s", err.text);
    FILE *file = fopen(sla, "r+b");
    cr_assert_not_null(file);
    for (uint32_t i = 0; i < index.info.n_blocks; i++) {
        long at = (long)index.extents[index.n_extents + i].offset + 100;
        fseek(file, at, SEEK_SET);
        int byte = fgetc(file);
        fseek(file, at, SEEK_SET);
        fputc((uint8_t)(byte + by), file);
    }
    cr_assert_eq(fclose(file), 0);
    slu_sla_finish(&index);
    slu_source_destroy(source);
}

/* A file that goes bad under a session fails what it generates, with a sentence that names it; once
 * it is good again the session goes on, and says what it said before. */
Test(lora_stream, damaged_in_use)
{
    struct adapters a = {0};
    adapters_open(&a, 1);
    struct slu_engine *engine = open_engine(&a, a.least[0]);
    struct slu_session *session = open_session(engine, a.sla[0]);
    struct slu_err err = {0};
    int32_t want[12], got[12];
    cr_assert_eq(answer(session, want, &err), 0, "%s", err.text);
    for (unsigned i = 0; i < 3; i++) {
        damage(a.sla[0], 1);
        cr_assert_eq(answer(session, got, &err), SLU_EFORMAT);
        cr_expect(strstr(err.text, a.sla[0]), "%s", err.text);
        cr_expect(strstr(err.text, "checksum"), "%s", err.text);
        damage(a.sla[0], 0xff);
        cr_assert_eq(answer(session, got, &err), 0, "%s", err.text);
        cr_expect(!memcmp(got, want, sizeof got));
    }
    /* The session is as good as any without the adapter, too. */
    damage(a.sla[0], 1);
    cr_assert_lt(answer(session, got, &err), 0);
    cr_assert_eq(slu_session_set_adapters(session, NULL, 0, &err), 0);
    cr_assert_eq(answer(session, got, &err), 0, "%s", err.text);
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&a.f);
}

/* What is damaged from the start is refused when it is asked for, though it would be streamed. */
Test(lora_stream, refused_at_once)
{
    struct adapters a = {0};
    adapters_open(&a, 2);
    struct slu_engine *engine = open_engine(&a, a.least[0] + a.least[1]);
    struct slu_session *session = open_session(engine, a.sla[0]);
    struct slu_err err = {0};
    int32_t want[12], got[12];
    cr_assert_eq(answer(session, want, &err), 0, "%s", err.text);
    damage(a.sla[1], 1);
    struct slu_adapter_choice choice = {a.sla[1], 1};
    cr_assert_eq(slu_session_set_adapters(session, &choice, 1, &err), SLU_EFORMAT);
    cr_expect(strstr(err.text, a.sla[1]) && strstr(err.text, "expert"), "%s", err.text);
    cr_assert_eq(answer(session, got, &err), 0, "%s", err.text);
    cr_expect(!memcmp(got, want, sizeof got));
    slu_session_destroy(session);
    slu_engine_close(engine);

    /* And so is what even the fewest slots don't fit. */
    engine = open_engine(&a, a.least[0] - 1);
    session = open_session(engine, NULL);
    choice.adapter = a.sla[0];
    cr_assert_eq(slu_session_set_adapters(session, &choice, 1, &err), SLU_EBUDGET);
    cr_expect(strstr(err.text, "even with its experts streamed"), "%s", err.text);
    cr_assert_eq(answer(session, got, &err), 0, "%s", err.text);
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&a.f);
}

/* Sessions share an adapter and its stream; what nobody holds leaves when there is need of room,
 * and the ledger has what the registry counts. */
Test(lora_stream, shared_and_evicted)
{
    struct adapters a = {0};
    adapters_open(&a, 2);
    struct slu_engine *engine = open_engine(&a, a.least[0]);
    struct slu_session *one = open_session(engine, a.sla[0]), *two = open_session(engine, a.sla[0]);
    struct slu_err err = {0};
    struct slu_registry_stats stats;
    int32_t first[12], second[12];
    cr_assert_eq(answer(one, first, &err), 0, "%s", err.text);
    cr_assert_eq(answer(two, second, &err), 0, "%s", err.text);
    cr_expect(!memcmp(first, second, sizeof first));
    slu_registry_stats(engine->registry, &stats);
    cr_expect(stats.loads == 1 && stats.n_streamed == 1 && stats.n_held == 1);
    cr_expect_eq(stats.used_bytes, a.least[0]);
    cr_expect_eq(slu_ledger_account_used(engine->ledger, SLU_ACCOUNT_ADAPTERS), stats.used_bytes);
    uint64_t flash_bytes = stats.flash_bytes;

    struct slu_adapter_choice other = {a.sla[1], 1};
    cr_assert_eq(slu_session_set_adapters(one, &other, 1, &err), SLU_EBUDGET);
    cr_assert_eq(slu_session_set_adapters(one, NULL, 0, &err), 0);
    cr_assert_eq(slu_session_set_adapters(one, &other, 1, &err), SLU_EBUDGET, "two holds it");
    cr_assert_eq(slu_session_set_adapters(two, NULL, 0, &err), 0);
    cr_assert_eq(slu_session_set_adapters(one, &other, 1, &err), 0, "%s", err.text);
    cr_assert_eq(answer(one, second, &err), 0, "%s", err.text);
    cr_expect(memcmp(first, second, sizeof first));
    slu_registry_stats(engine->registry, &stats);
    cr_expect(stats.evictions == 1 && stats.n_streamed == 1 && stats.n_resident == 1);
    cr_expect_eq(slu_ledger_account_used(engine->ledger, SLU_ACCOUNT_ADAPTERS), stats.used_bytes);
    cr_expect_gt(stats.flash_bytes, flash_bytes);
    slu_session_destroy(one);
    slu_session_destroy(two);
    slu_engine_close(engine); /* asserts that the ledger is back to zero */
    fixture_close(&a.f);
}

/* The share that experts of adapters may take by default is a part of the budget, and what isn't
 * for experts is on top. */
Test(lora_stream, planned_share)
{
    struct adapters a = {0};
    adapters_open(&a, 1);
    struct slu_engine_params params = {.ram_bytes = 64 << 20, .ctx = 64};
    struct slu_plan plan;
    cr_assert_eq(slu_adapter_memory(NULL, a.sla[0], &params.adapter_bytes,
                                    &params.adapter_expert_bytes, NULL),
                 0);
    cr_assert_gt(params.adapter_expert_bytes, 8 << 20);
    for (int i = 0; i < 2; i++, params.ram_bytes = 1 << 30) {
        uint64_t want = params.adapter_bytes, got = 0;
        want -= i == 0 ? params.adapter_expert_bytes - params.ram_bytes / 8 : 0;
        cr_assert_eq(slu_plan(a.f.slu, &params, &plan, NULL), 0);
        for (uint32_t l = 0; l < plan.n_lines; l++) {
            got = strcmp(plan.lines[l].name, "adapters") == 0 ? plan.lines[l].bytes : got;
        }
        cr_expect_eq(got, want, "%llu, not %llu", (unsigned long long)got,
                     (unsigned long long)want);
    }
    /* The least budget that a plan names does, though that share grows with it, and none below. */
    params.ram_bytes = 1 << 20;
    cr_assert_eq(slu_plan(a.f.slu, &params, &plan, NULL), 0);
    uint64_t least = plan.least_ram_bytes;
    for (params.ram_bytes = least - 1; params.ram_bytes <= least; params.ram_bytes++) {
        cr_assert_eq(slu_plan(a.f.slu, &params, &plan, NULL), 0);
        cr_expect_eq(plan.fits, params.ram_bytes == least);
        cr_expect_eq(plan.least_ram_bytes, least);
    }
    fixture_close(&a.f);
}
