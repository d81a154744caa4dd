/* Output is the same bits whatever is resident, however it is read, packed, threaded or cut. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "session.h"

#define N_TOKENS 70u

static void make_ids(int32_t *ids, uint32_t n, uint32_t n_vocab)
{
    uint32_t state = 7;
    for (uint32_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        ids[i] = (int32_t)((state >> 8) % n_vocab);
    }
}

static float *logits_of(const char *slu, const struct slu_engine_params *params, size_t *ret_bytes)
{
    struct slu_engine *engine = fixture_engine(slu, params);
    int32_t ids[N_TOKENS];
    make_ids(ids, N_TOKENS, slu_engine_n_vocab(engine));
    float *logits = fixture_logits(engine, ids, N_TOKENS);
    *ret_bytes = (size_t)N_TOKENS * slu_engine_n_vocab(engine) * sizeof *logits;
    slu_engine_close(engine);
    return logits;
}

/* All ways to run one model, against one thread with everything resident. */
static void check_model(const struct slu_synth_params *model)
{
    struct fixture f;
    fixture_open(&f);
    float *want = NULL;
    for (int codec = SLU_CODEC_RAW; codec < SLU_CODECS; codec++) {
        fixture_synth(&f, model, (enum slu_codec_id)codec, 12 << 10);
        for (int run = 0; run < 16; run++) {
            struct slu_engine_params params = {
                .ram_bytes = 1ull << 30,
                .ctx = 96,
                .n_threads = !(run & 1) ? 1
                             : run & 8  ? 7
                                        : 2, /* 7: more than some have rows */
                .io = run & 2 ? SLU_USE_IO_PREAD : SLU_USE_IO_AUTO,
                .minimum_cache = (run & 4) != 0,
            };
            if (run & 8) { /* the least memory: also the smallest prefill chunk */
                struct slu_plan plan;
                cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
                params.ram_bytes = plan.least_ram_bytes;
            }
            size_t bytes;
            float *got = logits_of(f.slu, &params, &bytes);
            if (!want) {
                want = got;
                continue;
            }
            cr_expect(!memcmp(got, want, bytes), "%s: codec %d, run %d differs",
                      slu_arch_name(model->arch), codec, run);
            free(got);
        }
    }
    free(want);
    fixture_close(&f);
}

/* Plain attention, biases, sinks, windows; a 5-bit and a 4-bit format. */
Test(identical, gpt_oss)
{
    check_model(&(struct slu_synth_params){
        .arch = SLU_ARCH_GPT_OSS, .expert_type = "MXFP4", .dense_type = "Q5_1"});
}

/* Two-level scales, and blocks of several super-groups. */
Test(identical, qwen3moe_k_quants)
{
    check_model(&(struct slu_synth_params){.arch = SLU_ARCH_QWEN3MOE,
                                           .n_ff = 512,
                                           .expert_type = "Q4_K",
                                           .down_type = "Q6_K",
                                           .dense_type = "Q5_K"});
}

/* MLA, a dense layer, a shared expert. */
Test(identical, deepseek2)
{
    check_model(&(struct slu_synth_params){
        .arch = SLU_ARCH_DEEPSEEK2, .expert_type = "Q4_1", .dense_type = "Q8_0"});
}

/* Floats. */
Test(identical, olmoe_f16)
{
    check_model(&(struct slu_synth_params){
        .arch = SLU_ARCH_OLMOE, .expert_type = "F16", .dense_type = "BF16"});
}

/* With keys and values in 8 bits: the same bits in chunks of any size and on any number of threads,
 * which come near those of f16 and aren't the same. All experts are used, so that routing can't
 * flip. */
static void check_q8(const struct slu_synth_params *model)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, model, SLU_CODEC_RAW, 12 << 10);
    float *logits[5];
    size_t bytes;
    for (int run = 0; run < 5; run++) {
        struct slu_engine_params params = {.ram_bytes = 1ull << 30,
                                           .ctx = 96,
                                           .n_threads = run & 1 ? 2 : 1,
                                           .kv = run < 4 ? SLU_USE_KV_Q8 : SLU_USE_KV_F16};
        struct slu_plan plan;
        cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
        cr_assert_eq(plan.kv, params.kv);
        if (run & 2) { /* the smallest chunk */
            params.ram_bytes = plan.least_ram_bytes;
        }
        logits[run] = logits_of(f.slu, &params, &bytes);
        cr_expect(run == 4 || !memcmp(logits[run], logits[0], bytes), "%s: run %d differs",
                  slu_arch_name(model->arch), run);
    }
    size_t n_vocab = bytes / sizeof(float) / N_TOKENS;
    for (uint32_t t = 0; t < N_TOKENS; t++) {
        const float *a = logits[0] + t * n_vocab, *b = logits[4] + t * n_vocab;
        double ab = 0, aa = 0, bb = 0;
        for (size_t i = 0; i < n_vocab; i++) {
            ab += (double)a[i] * b[i];
            aa += (double)a[i] * a[i];
            bb += (double)b[i] * b[i];
        }
        cr_expect_geq(ab / sqrt(aa * bb), 0.997, "%s: position %u: cosine %g",
                      slu_arch_name(model->arch), t, ab / sqrt(aa * bb));
    }
    cr_expect(memcmp(logits[0], logits[4], bytes), "8 bits leave no trace");
    for (int run = 0; run < 5; run++) {
        free(logits[run]);
    }
    fixture_close(&f);
}

Test(identical, kv_q8)
{
    static const enum slu_arch archs[] = {SLU_ARCH_GPT_OSS, SLU_ARCH_QWEN3MOE, SLU_ARCH_DEEPSEEK2};
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        check_q8(&(struct slu_synth_params){.arch = archs[i],
                                            .n_experts = 4,
                                            .n_used = 4,
                                            .expert_type = "F16",
                                            .dense_type = "F16"});
    }
}

static int keep_row(void *arg, uint32_t position, const float *logits)
{
    memcpy((float *)arg + (size_t)position * 384, logits, 384 * sizeof *logits);
    return 0;
}

/* Decoding token by token gives the logits that prefilling them at once gives. */
Test(identical, prefill_and_decode)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &(struct slu_synth_params){.arch = SLU_ARCH_QWEN2MOE, .n_vocab = 384},
                  SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 96});
    uint32_t n_vocab = slu_engine_n_vocab(engine);
    int32_t ids[N_TOKENS];
    make_ids(ids, N_TOKENS, n_vocab);
    float *once = fixture_logits(engine, ids, N_TOKENS);
    float *single = calloc((size_t)N_TOKENS * n_vocab, sizeof *single);
    struct slu_session *session = NULL;
    cr_assert_eq(slu_session_create(engine, NULL, &session, NULL), 0);
    for (uint32_t i = 0; i < N_TOKENS; i++) {
        cr_assert_eq(slu_session_tokens(session, &ids[i], 1, NULL), 0);
        cr_assert_eq(slu_session_eval(session, keep_row, single, NULL), 0);
    }
    cr_expect(!memcmp(once, single, (size_t)N_TOKENS * n_vocab * sizeof *once));
    free(single);
    slu_session_destroy(session);
    free(once);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Positions from `first` on; their logits. */
struct tail {
    struct slu_engine *engine;
    uint32_t first, n_vocab;
    float *logits;
};

static int keep_tail(struct slu_session *s, void *arg, uint32_t first_position, uint32_t n)
{
    const struct tail *tail = arg;
    (void)s;
    for (uint32_t t = 0; t < n; t++) {
        if (first_position + t >= tail->first) {
            memcpy(tail->logits + (size_t)(first_position + t) * tail->n_vocab,
                   slu_model_logits(&tail->engine->model, t, 1), tail->n_vocab * sizeof(float));
        }
    }
    return 0;
}

static void count_routed(void *arg, uint32_t layer, uint32_t position, uint32_t n_used,
                         const uint32_t *experts, const float *weights)
{
    uint32_t *n_routed = arg;
    (void)layer, (void)position, (void)n_used, (void)experts, (void)weights;
    (*n_routed)++;
}

/* Where only the tokens from `first` on are asked for, these have the logits that they have where
 * all are, and so has what follows; all are routed; the last layer's experts multiply no others. */
static void check_tail(struct slu_engine *engine, const float *want, const int32_t *ids,
                       uint32_t first)
{
    struct slu_engine_info info;
    struct slu_engine_stats before, after;
    slu_engine_info(engine, &info);
    uint32_t n_vocab = slu_engine_n_vocab(engine), n_routed = 0;
    float *got = calloc((size_t)N_TOKENS * n_vocab, sizeof *got);
    struct tail tail = {engine, first, n_vocab, got};
    struct slu_session *session = NULL;
    cr_assert_eq(slu_session_create(engine, NULL, &session, NULL), 0);
    cr_assert_eq(slu_session_tokens(session, ids, N_TOKENS - 1, NULL), 0);
    slu_engine_set_observer(engine, count_routed, &n_routed);
    slu_engine_stats(engine, &before);
    cr_assert_eq(slu_session_compute(session, first, keep_tail, &tail, NULL), 0);
    slu_engine_stats(engine, &after);
    slu_engine_set_observer(engine, NULL, NULL);
    uint64_t macs =
        after.phases[SLU_PHASE_PREFILL].expert_macs - before.phases[SLU_PHASE_PREFILL].expert_macs;
    uint64_t networks = (uint64_t)(info.n_layers - 1) * (N_TOKENS - 1) + (N_TOKENS - 1 - first);
    cr_expect_eq(n_routed, info.n_layers * (N_TOKENS - 1));
    cr_expect_eq(macs % networks, 0, "%llu products, %llu networks", (unsigned long long)macs,
                 (unsigned long long)networks);
    cr_assert_eq(slu_session_tokens(session, ids + N_TOKENS - 1, 1, NULL), 0);
    cr_assert_eq(slu_session_compute(session, 0, keep_tail, &tail, NULL), 0);
    size_t at = (size_t)first * n_vocab;
    cr_expect(!memcmp(got + at, want + at, (N_TOKENS - first) * n_vocab * sizeof *got),
              "from %u on", first);
    slu_session_destroy(session);
    free(got);
}

/* What is left out of the last layer isn't missed: in one chunk and in many, of which the first
 * ones need no expert of it, streamed and resident. */
Test(identical, last_layer_for_some)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(
        &f, &(struct slu_synth_params){.arch = SLU_ARCH_QWEN2MOE, .n_vocab = 384, .n_used = 3},
        SLU_CODEC_ZSTD, 12 << 10);
    int32_t ids[N_TOKENS];
    make_ids(ids, N_TOKENS, 384);
    for (int run = 0; run < 4; run++) {
        struct slu_engine_params params = {.ram_bytes = 1ull << 30,
                                           .ctx = 96,
                                           .n_threads = run & 1 ? 2 : 1,
                                           .minimum_cache = true};
        struct slu_plan plan;
        cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
        if (run & 2) {
            params.ram_bytes = plan.least_ram_bytes;
        }
        struct slu_engine *engine = fixture_engine(f.slu, &params);
        float *want = fixture_logits(engine, ids, N_TOKENS);
        static const uint32_t firsts[] = {0, 40, N_TOKENS - 2, N_TOKENS - 1};
        for (size_t i = 0; i < sizeof firsts / sizeof *firsts; i++) {
            check_tail(engine, want, ids, firsts[i]);
        }
        free(want);
        slu_engine_close(engine);
    }
    fixture_close(&f);
}

struct stopper {
    float *logits;
    uint32_t stops_left;
};

static int keep_and_stop(void *arg, uint32_t position, const float *logits)
{
    struct stopper *stopper = arg;
    keep_row(stopper->logits, position, logits);
    return position % 7 == 5 && stopper->stops_left-- > 0;
}

/* An evaluation that its callback stops, in the middle of a chunk too, goes on with the very next
 * position. */
Test(identical, stopped_evaluation_goes_on)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &(struct slu_synth_params){.arch = SLU_ARCH_GPT_OSS, .n_vocab = 384},
                  SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 96});
    int32_t ids[N_TOKENS];
    make_ids(ids, N_TOKENS, 384);
    float *want = fixture_logits(engine, ids, N_TOKENS);
    struct stopper stopper = {.logits = calloc(N_TOKENS * 384, sizeof(float)), .stops_left = 1000};
    struct slu_session *session = NULL;
    cr_assert_eq(slu_session_create(engine, NULL, &session, NULL), 0);
    cr_assert_eq(slu_session_tokens(session, ids, N_TOKENS, NULL), 0);
    unsigned n_stops = 0;
    while (slu_session_eval(session, keep_and_stop, &stopper, NULL) == SLU_ECANCEL) {
        n_stops++;
        cr_assert_leq(n_stops, N_TOKENS);
    }
    cr_expect_eq(n_stops, N_TOKENS / 7);
    cr_expect(!memcmp(stopper.logits, want, N_TOKENS * 384 * sizeof *want));
    slu_session_destroy(session);
    free(stopper.logits);
    free(want);
    slu_engine_close(engine);
    fixture_close(&f);
}
