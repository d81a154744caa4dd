/* Routing by what is in memory: what stays exact, what is bounded, and what nothing depends on. */
#include <criterion/criterion.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "experts/ranking.h"
#include "fixture.h"
#include "model/lookahead.h"

#define N_PROMPT 40u
#define N_TOKENS 70u
#define N_VOCAB  384u

static const struct slu_synth_params qwen = {
    .arch = SLU_ARCH_QWEN3MOE, .expert_type = "Q8_0", .dense_type = "Q8_0", .n_vocab = N_VOCAB};
static const struct slu_synth_params oss = {
    .arch = SLU_ARCH_GPT_OSS, .expert_type = "MXFP4", .dense_type = "Q8_0", .n_vocab = N_VOCAB};
static const struct slu_synth_params deepseek = {
    .arch = SLU_ARCH_DEEPSEEK2, .expert_type = "Q8_0", .dense_type = "Q8_0", .n_vocab = N_VOCAB};

/* Experts that take much more than all else. */
static const struct slu_synth_params large = {.arch = SLU_ARCH_QWEN3MOE,
                                              .expert_type = "Q8_0",
                                              .dense_type = "Q8_0",
                                              .n_layers = 4,
                                              .n_experts = 16,
                                              .n_used = 3,
                                              .n_ff = 512,
                                              .n_vocab = N_VOCAB};

static void make_ids(int32_t *ids, uint32_t n)
{
    uint32_t state = 7;
    for (uint32_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        ids[i] = (int32_t)((state >> 8) % N_VOCAB);
    }
}

static int keep_row(void *arg, uint32_t position, const float *logits)
{
    memcpy((float *)arg + (size_t)position * N_VOCAB, logits, N_VOCAB * sizeof *logits);
    return 0;
}

/* A prompt in one go, then token after token: N_TOKENS rows of logits, to be freed. */
static float *decode_in(struct slu_engine *engine, const struct slu_ranking *ranking)
{
    int32_t ids[N_TOKENS];
    make_ids(ids, N_TOKENS);
    float *logits = calloc((size_t)N_TOKENS * N_VOCAB, sizeof *logits);
    struct slu_session *session = NULL;
    cr_assert_eq(slu_session_create(engine, NULL, &session, NULL), 0);
    if (ranking) {
        cr_assert_eq(slu_session_rank(session, ranking, NULL), 0);
    }
    for (uint32_t i = 0; i < N_TOKENS; i = i ? i + 1 : N_PROMPT) {
        cr_assert_eq(slu_session_tokens(session, &ids[i], i ? 1 : N_PROMPT, NULL), 0);
        cr_assert_eq(slu_session_eval(session, keep_row, logits, NULL), 0);
    }
    slu_session_destroy(session);
    return logits;
}

static struct slu_engine_params with(enum slu_routing routing, float share)
{
    return (struct slu_engine_params){
        .ram_bytes = 1ull << 30, .ctx = 96, .routing = routing, .set_share = share};
}

static float *decode(const char *slu, const struct slu_engine_params *params,
                     struct slu_engine_stats *ret_stats)
{
    struct slu_engine *engine = fixture_engine(slu, params);
    float *logits = decode_in(engine, NULL);
    if (ret_stats) {
        slu_engine_stats(engine, ret_stats);
    }
    slu_engine_close(engine);
    return logits;
}

static bool is_same(const float *a, const float *b)
{
    return memcmp(a, b, (size_t)N_TOKENS * N_VOCAB * sizeof *a) == 0;
}

static double sum_covered(const struct slu_engine_stats *stats, double *ret_all)
{
    double covered = 0;
    *ret_all = 0;
    for (int i = 0; i < SLU_PHASES; i++) {
        *ret_all += stats->phases[i].router_weight;
        covered += stats->phases[i].covered_weight;
    }
    return covered;
}

static uint64_t sum_guesses(const struct slu_engine_stats *stats, uint64_t *ret_foreseen)
{
    uint64_t guesses = 0;
    *ret_foreseen = 0;
    for (int i = 0; i < SLU_PHASES; i++) {
        guesses += stats->phases[i].guesses;
        *ret_foreseen += stats->phases[i].foreseen;
    }
    return guesses;
}

/* With wrong hints, without any, and with few slots, exact is the same bits. */
Test(modes, exact_whatever_is_read_ahead)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &large, SLU_CODEC_ZSTD, 12 << 10);
    struct slu_engine_params params = with(SLU_ROUTING_EXACT, 0);
    float *want = decode(f.slu, &params, NULL);
    for (int run = 0; run < 8; run++) {
        params.read_ahead = (enum slu_read_ahead)(run % 4);
        if (run >= 4) {
            struct slu_plan plan;
            cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
            params.ram_bytes = plan.least_ram_bytes + (512 << 10);
        }
        struct slu_engine_stats stats;
        float *got = decode(f.slu, &params, &stats);
        cr_expect(is_same(got, want), "run %d differs", run);
        if (params.read_ahead == SLU_AHEAD_WRONG && run >= 4) {
            uint64_t foreseen;
            cr_expect_gt(sum_guesses(&stats, &foreseen), 0, "nothing wrong was read");
        }
        free(got);
    }
    free(want);
    fixture_close(&f);
}

/* Experts by lot, or in turns, as many tokens apart as there are experts. */
struct imposed {
    uint32_t shift; /* how far from them */
    bool in_turns;
};

static void impose(void *arg, uint32_t layer, uint32_t position, uint32_t n_used, uint32_t *chosen,
                   float *weight)
{
    const struct imposed *imposed = arg;
    uint32_t lot = (position * 97 + layer) * 2654435761u;
    lot = (lot ^ lot >> 15) * 2246822519u;
    uint32_t first = imposed->in_turns ? position * 7 + layer * 5 : lot >> 16;
    for (uint32_t i = 0; i < n_used; i++) {
        chosen[i] = (first + i + imposed->shift) % large.n_experts;
        weight[i] = 1.0f / (float)n_used;
    }
}

/* What is told of imposed choices is what look-ahead goes by, and changes no bit. */
Test(modes, guesses_at_imposed_choices)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &large, SLU_CODEC_RAW, 12 << 10);
    struct slu_engine_params params = with(SLU_ROUTING_EXACT, 0);
    struct slu_plan plan;
    cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
    params.ram_bytes = plan.least_ram_bytes + (512 << 10);
    params.read_ahead = SLU_AHEAD_ON;
    float *logits[2];
    for (uint32_t shift = 0; shift < 2; shift++) {
        struct imposed choices = {0}, guessed = {.shift = shift * large.n_used};
        struct slu_engine *engine = fixture_engine(f.slu, &params);
        slu_engine_set_route(engine, impose, &choices);
        slu_engine_set_guess(engine, impose, &guessed);
        logits[shift] = decode_in(engine, NULL);
        struct slu_engine_stats stats;
        slu_engine_stats(engine, &stats);
        uint64_t foreseen, guesses = sum_guesses(&stats, &foreseen);
        if (shift == 0) {
            cr_expect_gt(guesses, 100);
            cr_expect_gt(foreseen, guesses * 9 / 10, "%" PRIu64 " of %" PRIu64 " guesses", foreseen,
                         guesses);
        } else {
            cr_expect_lt(foreseen, 20, "%" PRIu64 " of %" PRIu64 " wrong guesses", foreseen,
                         guesses);
        }
        slu_engine_close(engine);
    }
    cr_expect(is_same(logits[0], logits[1]));
    free(logits[0]);
    free(logits[1]);
    fixture_close(&f);
}

/* Where the next router guesses wrongly, how tokens like this one were routed tells, if it does;
 * where all is in memory nothing is named. */
Test(modes, remembers_what_it_cannot_guess)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &large, SLU_CODEC_RAW, 12 << 10);
    struct slu_engine_params params = with(SLU_ROUTING_EXACT, 0);
    float *logits[2];
    for (int is_small = 0; is_small < 2; is_small++) {
        if (is_small) {
            struct slu_plan plan;
            cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
            params.ram_bytes = plan.least_ram_bytes + (512 << 10);
        }
        struct imposed choices = {.in_turns = true};
        struct imposed guessed = {.in_turns = true, .shift = large.n_used};
        struct slu_engine *engine = fixture_engine(f.slu, &params);
        slu_engine_set_route(engine, impose, &choices);
        slu_engine_set_guess(engine, impose, &guessed);
        logits[is_small] = decode_in(engine, NULL);
        const struct slu_named *named = &engine->model.scratch.lookahead.by_memory;
        if (is_small) {
            cr_expect(named->n > 30 && named->n_true > 0.9f * named->n, "%g of %g", named->n_true,
                      named->n);
        } else {
            cr_expect_eq(named->n, 0);
        }
        slu_engine_close(engine);
    }
    cr_expect(is_same(logits[0], logits[1]));
    free(logits[0]);
    free(logits[1]);
    fixture_close(&f);
}

struct told {
    uint32_t n, n_wrong;
    uint32_t first, end; /* positions */
};

static void listen(void *arg, uint32_t layer, uint32_t position, uint32_t n_used, uint32_t *chosen,
                   float *weight)
{
    struct told *told = arg;
    (void)n_used, (void)chosen, (void)weight;
    told->n++;
    told->n_wrong += layer == 0 || layer >= large.n_layers;
    told->first = position < told->first ? position : told->first;
    told->end = position >= told->end ? position + 1 : told->end;
}

/* Where a set is chosen for a chunk, guesses are asked for from all over it, of all layers but the
 * first. */
Test(modes, guesses_at_a_chunk)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &large, SLU_CODEC_RAW, 12 << 10);
    struct slu_engine_params params = with(SLU_ROUTING_LOCKED, 0.3f);
    struct slu_engine *engine = fixture_engine(f.slu, &params);
    struct told told = {.first = UINT32_MAX};
    slu_engine_set_guess(engine, listen, &told);
    struct slu_session *session;
    int32_t ids[N_PROMPT];
    make_ids(ids, N_PROMPT);
    cr_assert_eq(slu_session_create(engine, NULL, &session, NULL), 0);
    cr_assert_eq(slu_session_tokens(session, ids, N_PROMPT, NULL), 0);
    cr_assert_eq(slu_session_eval(session, NULL, NULL, NULL), 0);
    cr_expect_geq(told.n, 16 * (large.n_layers - 1));
    cr_expect_eq(told.n_wrong, 0);
    cr_expect_eq(told.first, 0);
    cr_expect_gt(told.end, N_PROMPT * 3 / 4);
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* How often guesses come true is learned, soon, from "three of four" on; and forgotten when others
 * guess. */
Test(modes, look_ahead_learns)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &large, SLU_CODEC_RAW, 12 << 10);
    struct slu_engine_params params = with(SLU_ROUTING_EXACT, 0);
    struct slu_engine *engine = fixture_engine(f.slu, &params);
    struct slu_model *model = &engine->model;
    const struct slu_lookahead *a = &model->scratch.lookahead;
    for (uint32_t shift = 0; shift < 2; shift++) {
        struct imposed choices = {0}, guessed = {.shift = shift * large.n_used};
        uint32_t experts[8];
        float share;
        slu_engine_set_route(engine, impose, &choices);
        slu_engine_set_guess(engine, impose, &guessed);
        cr_expect_eq(slu_lookahead_guess(model, 1, experts, &share), large.n_used);
        cr_expect_float_eq(share, 0.75f, 1e-6);
        free(decode_in(engine, NULL));
        uint32_t n = slu_lookahead_guess(model, 1, experts, &share);
        cr_expect_eq(n, shift ? 0 : large.n_used);
        if (shift == 0) {
            cr_expect_gt(share, 0.95f);
        } else {
            cr_expect_lt(share, 0.7f);
        }
        for (uint32_t rank = 0; rank < large.n_used; rank++) {
            float of_rank = a->shares[2 * large.n_used + rank];
            cr_expect(shift ? of_rank < 0.2f : of_rank > 0.8f, "%g", of_rank);
        }
    }
    slu_engine_close(engine);
    fixture_close(&f);
}

static void check_all_in(const struct slu_synth_params *model)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, model, SLU_CODEC_RAW, 12 << 10);
    struct slu_engine_params params = with(SLU_ROUTING_EXACT, 0);
    float *want = decode(f.slu, &params, NULL);
    struct slu_engine_stats stats;
    double all;

    params = with(SLU_ROUTING_LOCKED, 0);
    float *locked = decode(f.slu, &params, &stats);
    cr_expect(is_same(locked, want), "%s: locked differs", slu_arch_name(model->arch));
    cr_expect_eq(sum_covered(&stats, &all), all);
    cr_expect_gt(all, 0);
    free(locked);

    params = with(SLU_ROUTING_PREFER, 0.3f);
    params.route_bias = -1;
    float *prefer = decode(f.slu, &params, &stats);
    cr_expect(is_same(prefer, want), "%s: prefer differs", slu_arch_name(model->arch));
    cr_expect_eq(sum_covered(&stats, &all), all);
    free(prefer);

    params = with(SLU_ROUTING_LOCKED, 0.3f);
    float *less = decode(f.slu, &params, &stats);
    cr_expect(!is_same(less, want), "%s: a set of a third changes nothing",
              slu_arch_name(model->arch));
    cr_expect_lt(sum_covered(&stats, &all), all);
    for (uint32_t i = 0; i < N_TOKENS * N_VOCAB; i++) {
        cr_assert(isfinite(less[i]));
    }
    free(less);
    free(want);
    fixture_close(&f);
}

/* A set of all experts is exact, bit for bit, and covers all; so is prefer without a bias. A
 * smaller set isn't. All gating functions. */
Test(modes, all_experts_is_exact_softmax)
{
    check_all_in(&qwen);
}

Test(modes, all_experts_is_exact_softmax_of_chosen)
{
    check_all_in(&oss);
}

Test(modes, all_experts_is_exact_dense_layer_and_shared_expert)
{
    check_all_in(&deepseek);
}

/* Given the size of the set, results depend neither on threads, nor on how flash is read, nor on
 * how many slots there are, nor on what was computed before (locked), nor on what is read ahead. */
Test(modes, nothing_depends_on_timing)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &large, SLU_CODEC_ZSTD, 12 << 10);
    for (int routing = SLU_ROUTING_PREFER; routing <= SLU_ROUTING_LOCKED; routing++) {
        struct slu_engine_params params = with((enum slu_routing)routing, 0.4f);
        params.n_threads = 1;
        float *want = decode(f.slu, &params, NULL);
        for (int run = 0; run < 8; run++) {
            params.n_threads = run & 1 ? 2 : 1;
            params.io = run & 2 ? SLU_USE_IO_PREAD : SLU_USE_IO_AUTO;
            params.read_ahead = run & 1 ? SLU_AHEAD_WRONG : SLU_AHEAD_OFF;
            params.ram_bytes = 1ull << 30;
            if (run & 4) { /* as few slots as hold the set, so that it decides what stays */
                struct slu_plan all, plan = {0};
                cr_assert_eq(slu_plan(f.slu, &params, &all, NULL), 0);
                params.ram_bytes = all.least_ram_bytes;
                do {
                    params.ram_bytes += 16 << 10;
                    cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
                } while (plan.set_experts < all.set_experts ||
                         plan.chunk_tokens < all.chunk_tokens);
                cr_assert_lt(plan.n_slots, all.n_slots);
            }
            float *got = decode(f.slu, &params, NULL);
            cr_expect(is_same(got, want), "mode %d, run %d differs", routing, run);
            free(got);
        }
        free(want);
    }
    fixture_close(&f);
}

/* A text is computed alike after another one and after none, and a ranking is for one text. */
Test(modes, locked_begins_anew)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &oss, SLU_CODEC_RAW, 12 << 10);
    struct slu_engine_params params = with(SLU_ROUTING_LOCKED, 0.4f);
    struct slu_engine *engine = fixture_engine(f.slu, &params);
    struct slu_engine_info info;
    slu_engine_info(engine, &info);
    float *score = calloc((size_t)info.n_layers * info.n_experts, sizeof *score);
    for (uint32_t i = 0; i < info.n_layers * info.n_experts; i++) {
        score[i] = i % 3 == 0 ? 1.0f : 0;
    }
    struct slu_ranking ranking = {info.n_layers, info.n_experts, score};
    float *first = decode_in(engine, NULL);
    float *ranked = decode_in(engine, &ranking);
    float *ranked_again = decode_in(engine, &ranking);
    float *last = decode_in(engine, NULL);
    cr_expect(is_same(first, last));
    cr_expect(is_same(ranked, ranked_again));
    cr_expect(!is_same(first, ranked), "the ranking has no effect");
    free(first);
    free(ranked);
    free(ranked_again);
    free(last);
    free(score);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* A ranking of another shape, with negative scores or without numbers is refused; in exact, a good
 * one changes nothing. */
Test(modes, rankings_are_checked)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &qwen, SLU_CODEC_RAW, 0);
    struct slu_engine_params params = with(SLU_ROUTING_EXACT, 0);
    struct slu_engine *engine = fixture_engine(f.slu, &params);
    struct slu_engine_info info;
    slu_engine_info(engine, &info);
    uint32_t n = info.n_layers * info.n_experts;
    float *score = calloc(n, sizeof *score);
    score[1] = 1;
    struct slu_ranking ranking = {info.n_layers, info.n_experts, score};
    float *want = decode_in(engine, NULL), *got = decode_in(engine, &ranking);
    cr_expect(is_same(got, want));
    struct slu_session *session = NULL;
    struct slu_err err;
    cr_assert_eq(slu_session_create(engine, NULL, &session, NULL), 0);
    ranking.n_layers++;
    cr_expect_eq(slu_session_rank(session, &ranking, &err), SLU_EINVAL);
    ranking.n_layers--;
    static const float bad[] = {-1, NAN, INFINITY};
    for (unsigned i = 0; i < 3; i++) {
        score[n - 1] = bad[i];
        cr_expect_eq(slu_session_rank(session, &ranking, &err), SLU_EINVAL);
        cr_expect_gt(strlen(err.text), 10);
    }
    slu_session_destroy(session);
    free(want);
    free(got);
    free(score);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* locked reads about as many experts a token as it may, and none where it may read next to none;
 * prefer reads the less, the larger the bias. */
Test(modes, reads_are_bounded)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &large, SLU_CODEC_RAW, 0);
    struct slu_engine_params params = with(SLU_ROUTING_LOCKED, 0.4f);
    params.minimum_cache = false;
    static const float rates[] = {0.01f, 2};
    double moved[2];
    for (unsigned i = 0; i < 2; i++) {
        struct slu_engine_stats stats;
        params.set_reads = rates[i];
        free(decode(f.slu, &params, &stats));
        moved[i] = stats.phases[SLU_PHASE_PREFILL].experts_read +
                   stats.phases[SLU_PHASE_DECODE].experts_read;
    }
    cr_expect_leq(moved[0], moved[1]);

    uint64_t misses[3];
    static const float biases[] = {-1, 0.5f, 4};
    for (unsigned i = 0; i < 3; i++) {
        struct slu_plan plan;
        struct slu_engine_stats stats;
        params = with(SLU_ROUTING_PREFER, 0.4f);
        params.route_bias = biases[i];
        cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
        params.ram_bytes = plan.least_ram_bytes + (256 << 10);
        free(decode(f.slu, &params, &stats));
        misses[i] = stats.misses;
    }
    cr_expect_gt(misses[0], misses[1]);
    cr_expect_gt(misses[1], misses[2]);
    fixture_close(&f);
}

/* What locked uses is its set's: once that is there and stays as it is, nothing is read, whatever
 * the next router names. */
Test(modes, locked_reads_its_set_alone)
{
    struct fixture f;
    enum { N = 200, FIRST = 10, SETTLED = 45 };
    int32_t ids[N];
    make_ids(ids, N);
    fixture_open(&f);
    fixture_synth(&f, &large, SLU_CODEC_RAW, 0);
    struct slu_engine_params params = with(SLU_ROUTING_LOCKED, 0.85f);
    params.ctx = N;
    params.set_reads = 1e-6f;
    params.read_ahead = SLU_AHEAD_ON;
    struct slu_engine *engine = fixture_engine(f.slu, &params);
    struct slu_session *session;
    cr_assert_eq(slu_session_create(engine, NULL, &session, NULL), 0);
    double read = 0;
    for (uint32_t i = 0; i < N; i = i ? i + 1 : FIRST) {
        struct slu_engine_stats stats;
        cr_assert_eq(slu_session_tokens(session, &ids[i], i ? 1 : FIRST, NULL), 0);
        cr_assert_eq(slu_session_eval(session, NULL, NULL, NULL), 0);
        slu_engine_stats(engine, &stats);
        double now = stats.phases[SLU_PHASE_PREFILL].experts_read +
                     stats.phases[SLU_PHASE_DECODE].experts_read;
        read = i < SETTLED ? now : read;
        cr_assert_eq(read, now, "%g experts are read at token %u", now - read, i);
    }
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Below the least coverage, locked takes in what it lacks, and covers more; all of it where all is
 * asked for in a prompt. */
Test(modes, least_coverage_falls_back)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &oss, SLU_CODEC_RAW, 0);
    double share[3], all;
    static const float least[] = {0, 0.9f, 1};
    for (unsigned i = 0; i < 3; i++) {
        struct slu_engine_params params = with(SLU_ROUTING_LOCKED, 0.3f);
        struct slu_engine_stats stats;
        params.min_coverage = least[i];
        params.route_bias = -1;
        free(decode(f.slu, &params, &stats));
        share[i] = sum_covered(&stats, &all) / all;
    }
    cr_expect_lt(share[0], 0.8);
    cr_expect_gt(share[1], share[0]);
    cr_expect_gt(share[2], 0.97, "%f", share[2]);
    fixture_close(&f);
}

/* What makes no sense is refused with a sentence. */
Test(modes, bad_parameters_are_refused)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &qwen, SLU_CODEC_RAW, 0);
    struct slu_engine_params bad[] = {
        with(SLU_ROUTING_LOCKED, 1.5f),  with(SLU_ROUTING_LOCKED, NAN),
        with(SLU_ROUTING_LOCKED, -0.1f), with((enum slu_routing)7, 0),
        with(SLU_ROUTING_LOCKED, 0),     with(SLU_ROUTING_LOCKED, 0),
        with(SLU_ROUTING_PREFER, 0),
    };
    bad[4].io = SLU_USE_IO_MMAP;
    bad[5].min_coverage = 2;
    bad[6].route_bias = INFINITY;
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct slu_engine *engine = NULL;
        struct slu_err err = {0};
        cr_expect_eq(slu_engine_open(f.slu, &bad[i], &engine, &err), SLU_EINVAL, "case %u", i);
        cr_expect_gt(strlen(err.text), 10);
    }
    fixture_close(&f);
}
