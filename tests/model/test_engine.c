/* Engine and sessions: budgets kept, faults survived, conversations that equal fresh ones. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fixture.h"
#include "session.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IS_SANITIZED 1
#else
#define IS_SANITIZED 0
#endif

static const struct slu_synth_params small = {.arch = SLU_ARCH_GPT_OSS, .n_experts = 16};

static struct slu_session *session_of(struct slu_engine *engine)
{
    struct slu_session *session = NULL;
    struct slu_err err = {0};
    cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0, "%s", err.text);
    return session;
}

static int generate(struct slu_session *session, uint32_t n, struct slu_err *err)
{
    struct slu_result result;
    return slu_session_generate(
        session, &(struct slu_generate_params){.n_max = n, .ignore_end = true}, &result, err);
}

/* The ledger holds exactly what the plan says, line by line, and never more. */
Test(engine, plan_is_exact)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 8192);
    for (int io = SLU_USE_IO_AUTO; io <= SLU_USE_IO_PREAD; io += 2) {
        struct slu_engine_params params = {.ctx = 300, .n_threads = 2, .io = (enum slu_io)io};
        struct slu_plan plan;
        cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
        uint64_t limits[] = {plan.least_ram_bytes, plan.least_ram_bytes + (1 << 20), 1ull << 32};
        for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
            params.ram_bytes = limits[i];
            struct slu_engine *engine = fixture_engine(f.slu, &params);
            struct slu_session *session = session_of(engine);
            const struct slu_plan *p = slu_engine_plan(engine);
            uint64_t sum = 0;
            for (uint32_t l = 0; l < p->n_lines; l++) {
                sum += p->lines[l].bytes;
            }
            struct slu_engine_stats stats;
            slu_engine_stats(engine, &stats);
            cr_expect_eq(stats.ledger_used_bytes, sum);
            cr_assert_eq(slu_session_text(session, "hello", 5, NULL), 0);
            cr_assert_eq(generate(session, 20, NULL), 0);
            slu_engine_stats(engine, &stats);
            cr_expect_eq(stats.ledger_peak_bytes, p->total_bytes);
            cr_expect_leq(stats.ledger_peak_bytes, limits[i]);
            slu_session_destroy(session);
            slu_engine_close(engine);
        }
    }
    fixture_close(&f);
}

/* A context of which the sizes could pass 64 bits is refused. */
Test(engine, refuses_a_boundless_context)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_RAW, 0);
    struct slu_engine_params params = {.ctx = UINT32_MAX};
    struct slu_engine *engine = NULL;
    struct slu_plan plan;
    cr_expect_eq(slu_plan(f.slu, &params, &plan, NULL), SLU_EINVAL);
    cr_expect_eq(slu_engine_open(f.slu, &params, &engine, NULL), SLU_EINVAL);
    params.ctx = 1u << 28;
    cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
    cr_expect_gt(plan.least_ram_bytes, 1ull << 30);
    fixture_close(&f);
}

/* From the limit on that the plan names for it, everything is resident, also with a context shorter
 * than a chunk and whatever limit the question was asked under. */
Test(engine, resident_limit_makes_all_resident)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 8192);
    uint32_t ctxs[] = {1, 3, 48, 64, 300};
    for (size_t i = 0; i < sizeof ctxs / sizeof *ctxs; i++) {
        struct slu_engine_params params = {.ctx = ctxs[i], .n_threads = 2, .ram_bytes = 1};
        struct slu_plan tight, plan;
        cr_assert_eq(slu_plan(f.slu, &params, &tight, NULL), 0);
        params.ram_bytes = tight.resident_ram_bytes;
        cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
        cr_expect(plan.fits && plan.n_slots == plan.n_blocks, "context %u: %u of %u blocks",
                  ctxs[i], plan.n_slots, plan.n_blocks);
        cr_expect_eq(plan.resident_ram_bytes, tight.resident_ram_bytes);
    }
    fixture_close(&f);
}

/* One byte less than the least is refused with the number that would do, and nothing is loaded. */
Test(engine, refuses_below_least)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 8192);
    struct slu_engine_params params = {.ctx = 128};
    struct slu_plan plan;
    cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
    params.ram_bytes = plan.least_ram_bytes - 1;
    struct slu_engine *engine = NULL;
    struct slu_err err;
    cr_assert_eq(slu_engine_open(f.slu, &params, &engine, &err), SLU_EBUDGET);
    cr_assert_null(engine);
    char number[32];
    snprintf(number, sizeof number, "%llu", (unsigned long long)plan.least_ram_bytes);
    cr_assert_not_null(strstr(err.text, number), "%s", err.text);
    fixture_close(&f);
}

static int generate_in_child(const char *slu, uint64_t ram_bytes, long *ret_rss_bytes)
{
    pid_t pid = fork();
    if (pid == 0) {
        struct slu_engine *engine;
        struct slu_session *session;
        struct slu_engine_params params = {.ram_bytes = ram_bytes, .ctx = 128, .n_threads = 2};
        bool is_fine = slu_engine_open(slu, &params, &engine, NULL) == 0 &&
                       slu_session_create(engine, NULL, &session, NULL) == 0 &&
                       slu_session_text(session, "Once upon a time", 16, NULL) == 0 &&
                       generate(session, 24, NULL) == 0;
        struct slu_engine_stats stats;
        if (is_fine) {
            slu_engine_stats(engine, &stats);
            is_fine = stats.ledger_peak_bytes <= ram_bytes;
            slu_session_destroy(session);
            slu_engine_close(engine);
        }
        _exit(is_fine ? 0 : 1);
    }
    int status;
    struct rusage usage;
    cr_assert_eq(wait4(pid, &status, 0, &usage), pid);
    *ret_rss_bytes = usage.ru_maxrss * 1024;
    return status;
}

/* A model of four times its budget generates, and the process holds little beyond the ledger. */
Test(engine, model_four_times_its_budget)
{
    struct fixture f;
    fixture_open(&f);
    pid_t pid = fork(); /* so that what making the model touches isn't counted */
    if (pid == 0) {
        struct slu_synth_params params = {.arch = SLU_ARCH_QWEN3MOE,
                                          .n_layers = 4,
                                          .n_embd = 256,
                                          .n_ff = 512,
                                          .n_experts = 128,
                                          .n_used = 4};
        fixture_synth(&f, &params, SLU_CODEC_ZSTD, 64 << 10);
        _exit(0);
    }
    int status;
    cr_assert(waitpid(pid, &status, 0) == pid && status == 0);
    struct stat st;
    cr_assert_eq(stat(f.slu, &st), 0);
    uint64_t ram_bytes = (uint64_t)st.st_size / 4;
    cr_assert_gt(st.st_size, 64 << 20);
    long rss_bytes;
    cr_assert_eq(generate_in_child(f.slu, ram_bytes, &rss_bytes), 0);
    if (!IS_SANITIZED) {
        cr_expect_lt(rss_bytes, (long)ram_bytes + (32 << 20), "%ld bytes resident, %llu granted",
                     rss_bytes, (unsigned long long)ram_bytes);
    }
    fixture_close(&f);
}

/* A read that fails in the middle of a generation ends it with an error; the same session goes on
 * as if nothing had been, and so do others. */
Test(engine, survives_a_read_error)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 8192);
    struct slu_engine_params params = {.ram_bytes = 1ull << 30, .ctx = 128, .minimum_cache = true};
    struct slu_engine *engine = fixture_engine(f.slu, &params);
    int32_t prompt[] = {5, 6, 7, 8, 9}, want[40], got[40];
    fixture_greedy(engine, prompt, 5, want, 40);

    struct slu_session *session = session_of(engine);
    cr_assert_eq(slu_session_tokens(session, prompt, 5, NULL), 0);
    cr_assert_eq(generate(session, 10, NULL), 0);
    const struct slu_weights *w = &engine->weights;
    for (uint32_t b = w->first_block; b < w->end_block; b++) {
        slu_stream_inject_fault(engine->model.stream, b, 1);
    }
    struct slu_err err = {0};
    cr_assert_eq(generate(session, 30, &err), SLU_EIO);
    cr_assert_gt(strlen(err.text), 10);
    for (uint32_t b = w->first_block; b < w->end_block; b++) {
        slu_stream_inject_fault(engine->model.stream, b, 0);
    }
    size_t n;
    slu_session_ids(session, &n);
    cr_assert_eq(generate(session, (uint32_t)(45 - n), &err), 0, "%s", err.text);
    const int32_t *ids = slu_session_ids(session, &n);
    cr_assert_eq(n, 45);
    cr_expect(!memcmp(ids + 5, want, sizeof want));
    slu_session_destroy(session);
    fixture_greedy(engine, prompt, 5, got, 40);
    cr_expect(!memcmp(got, want, sizeof want));
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Of dense weights that are damaged the first is named, on however many threads they are read. */
Test(engine, names_a_bad_tensor)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 8192);
    struct slu_pack *pack;
    cr_assert_eq(slu_pack_open_file(f.slu, &pack, NULL), 0);
    static const char *const names[] = {"blk.1.attn_q.weight", "blk.1.attn_output.weight"};
    int fd = open(f.slu, O_RDWR);
    cr_assert_geq(fd, 0);
    for (unsigned i = 0; i < 2; i++) {
        const struct slu_pack_tensor *tensor = slu_pack_find(pack, names[i]);
        cr_assert_not_null(tensor);
        off_t at = (off_t)pack->extents[tensor->first_extent].offset;
        char byte;
        cr_assert(pread(fd, &byte, 1, at) == 1);
        byte ^= 1;
        cr_assert(pwrite(fd, &byte, 1, at) == 1);
    }
    close(fd);
    slu_pack_close(pack);
    for (uint32_t n_threads = 1; n_threads <= 4; n_threads++) {
        struct slu_engine *engine;
        struct slu_err err = {0};
        struct slu_engine_params params = {
            .ram_bytes = 1ull << 30, .ctx = 64, .n_threads = n_threads};
        cr_expect_eq(slu_engine_open(f.slu, &params, &engine, &err), SLU_EFORMAT);
        cr_expect_not_null(strstr(err.text, names[0]), "%s", err.text);
    }
    fixture_close(&f);
}

/* An embedding row that is damaged, or no longer there, is named with its place; others serve. */
Test(engine, names_a_bad_embedding_row)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 64});
    const struct slu_weights *w = &engine->weights;
    cr_assert_not(w->is_tied);
    uint64_t at = w->embedding_offset + 9 * (uint64_t)w->embedding.row_stride;
    char place[64];
    snprintf(place, sizeof place, "embedding row 9 at offset %llu ", (unsigned long long)at);
    int fd = open(f.slu, O_RDWR);
    cr_assert_geq(fd, 0);
    char byte;
    cr_assert(pread(fd, &byte, 1, (off_t)at) == 1);
    byte ^= 1;
    cr_assert(pwrite(fd, &byte, 1, (off_t)at) == 1);
    for (int is_gone = 0; is_gone < 2; is_gone++) {
        if (is_gone) {
            cr_assert_eq(ftruncate(fd, (off_t)(w->embedding_offset / 4096 * 4096)), 0);
        }
        struct slu_session *session = session_of(engine);
        struct slu_err err = {0};
        cr_assert_eq(slu_session_tokens(session, (int32_t[]){9}, 1, NULL), 0);
        cr_expect_eq(slu_session_eval(session, NULL, NULL, &err), is_gone ? SLU_EIO : SLU_EFORMAT);
        cr_expect_not_null(strstr(err.text, place), "%s", err.text);
        if (!is_gone) {
            cr_assert_eq(slu_session_replace(session, (int32_t[]){8}, 1, NULL), 0);
            cr_expect_eq(slu_session_eval(session, NULL, NULL, &err), 0, "%s", err.text);
        }
        slu_session_destroy(session);
    }
    close(fd);
    slu_engine_close(engine);
    fixture_close(&f);
}

static int cancel_third(void *arg, const char *text, size_t len, int32_t token)
{
    struct slu_session *session = arg;
    size_t n;
    (void)text;
    (void)len;
    (void)token;
    slu_session_ids(session, &n);
    if (n >= 8) {
        slu_session_cancel(session);
    }
    return 0;
}

/* Cancelling stops at the next step, and the session can go on from there. */
Test(engine, cancel_and_go_on)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_RAW, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 128});
    int32_t prompt[] = {5, 6, 7, 8, 9}, want[20];
    fixture_greedy(engine, prompt, 5, want, 20);
    struct slu_session *session = session_of(engine);
    cr_assert_eq(slu_session_tokens(session, prompt, 5, NULL), 0);
    struct slu_generate_params params = {
        .n_max = 20, .ignore_end = true, .text = cancel_third, .arg = session};
    struct slu_result result;
    struct slu_err err = {0};
    cr_assert_eq(slu_session_generate(session, &params, &result, &err), 0);
    cr_expect(err.code == 0 && err.text[0] == '\0', "%s", err.text);
    cr_assert_eq(result.stop, SLU_STOP_CANCEL);
    cr_assert_lt(result.n_generated, 20);
    cr_assert_eq(generate(session, 20 - result.n_generated, NULL), 0);
    size_t n;
    const int32_t *ids = slu_session_ids(session, &n);
    cr_assert_eq(n, 25);
    cr_expect(!memcmp(ids + 5, want, sizeof want));
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

static uint32_t slots_of(const struct slu_engine *engine)
{
    struct slu_engine_stats stats;
    slu_engine_stats(engine, &stats);
    return stats.n_slots;
}

/* An engine for contexts of `ctx` tokens that keeps a quarter of its experts. */
static struct slu_engine *engine_of_a_quarter(struct fixture *f, uint32_t ctx)
{
    const struct slu_synth_params many = {
        .arch = SLU_ARCH_GPT_OSS, .n_layers = 4, .n_embd = 128, .n_ff = 128, .n_experts = 96};
    struct slu_engine_params params = {.ram_bytes = 1ull << 30, .ctx = ctx, .n_threads = 2};
    struct slu_plan plan;
    fixture_synth(f, &many, SLU_CODEC_RAW, 0);
    cr_assert_eq(slu_plan(f->slu, &params, &plan, NULL), 0);
    cr_assert_eq(plan.n_slots_lent, 0); /* all is resident */
    params.ram_bytes = plan.least_ram_bytes + plan.n_blocks / 4 * plan.slot_bytes;
    return fixture_engine(f->slu, &params);
}

/* As long as a context is short, experts are kept in what it will need later. They leave when it
 * grows, come back when it is cut, and change nothing of what is computed. */
Test(engine, lends_what_a_context_leaves)
{
    enum { CTX = 600, N_PROMPT = 5, N_LONG = CTX - N_PROMPT };
    struct fixture f;
    fixture_open(&f);
    struct slu_engine *engine = engine_of_a_quarter(&f, CTX);
    uint32_t n_own = slu_engine_plan(engine)->n_slots;
    uint32_t n_lent = slu_engine_plan(engine)->n_slots_lent;
    cr_assert(n_lent >= 10 && n_own + n_lent < slu_engine_plan(engine)->n_blocks);
    struct slu_engine *resident = fixture_engine(
        f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = CTX, .n_threads = 2});
    int32_t prompt[N_PROMPT] = {5, 6, 7, 8, 9}, want[N_LONG];
    fixture_greedy(resident, prompt, N_PROMPT, want, N_LONG);
    slu_engine_close(resident);
    cr_expect_eq(slots_of(engine), n_own);
    for (int round = 0; round < 2; round++) {
        struct slu_session *session = session_of(engine);
        cr_assert_eq(slu_session_tokens(session, prompt, N_PROMPT, NULL), 0);
        cr_assert_eq(generate(session, 10, NULL), 0);
        uint32_t n_short = slots_of(engine); /* the end of the memory is no page's */
        cr_expect(n_short == n_own + n_lent || n_short == n_own + n_lent - 1, "%u of %u and %u",
                  n_short, n_own, n_lent);
        cr_assert_eq(generate(session, 300, NULL), 0);
        cr_expect(slots_of(engine) > n_own && slots_of(engine) < n_short);
        cr_assert_eq(generate(session, N_LONG - 310, NULL), 0);
        cr_expect_eq(slots_of(engine), n_own);
        size_t n;
        const int32_t *ids = slu_session_ids(session, &n);
        cr_expect(n == CTX && !memcmp(ids + N_PROMPT, want, sizeof want));
        cr_assert_eq(slu_session_replace(session, prompt, N_PROMPT, NULL), 0);
        cr_assert_eq(generate(session, 10, NULL), 0);
        cr_expect_eq(slots_of(engine), n_short);
        cr_expect(!memcmp(slu_session_ids(session, &n) + N_PROMPT, want, 10 * sizeof *want));
        slu_session_destroy(session);
        cr_expect_eq(slots_of(engine), n_own);
    }
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Where some layers' blocks are smaller than others', there are slots of both sizes: more than of
 * one, and what is computed is the same. */
Test(engine, keeps_experts_of_two_sizes)
{
    enum { N_PROMPT = 5, N_TOKENS = 200, CTX = 256 };
    const struct slu_synth_params mixed = {.arch = SLU_ARCH_QWEN3MOE,
                                           .n_layers = 6,
                                           .n_ff = 256,
                                           .n_experts = 128,
                                           .n_used = 8,
                                           .has_more_bits = true};
    struct slu_engine_params params = {.ram_bytes = 1ull << 30, .ctx = CTX, .n_threads = 2};
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &mixed, SLU_CODEC_RAW, 0);
    int32_t prompt[N_PROMPT] = {5, 6, 7, 8, 9}, want[N_TOKENS], ids[N_TOKENS];
    struct slu_engine *engine = fixture_engine(f.slu, &params);
    const struct slu_plan *plan = slu_engine_plan(engine);
    cr_assert_eq(plan->n_slots, plan->n_blocks);
    uint64_t most_bytes = plan->resident_ram_bytes;
    uint32_t n_before = 0, chunk = 0;
    params.ram_bytes = plan->least_ram_bytes;
    while (n_before < plan->n_blocks) { /* more memory, more slots */
        struct slu_plan other;
        cr_assert_eq(slu_plan(f.slu, &params, &other, NULL), 0);
        cr_expect(other.n_slots >= n_before || other.chunk_tokens > chunk);
        cr_expect_leq(other.total_bytes, params.ram_bytes);
        n_before = other.n_slots;
        chunk = other.chunk_tokens;
        cr_assert(n_before == plan->n_blocks || params.ram_bytes < most_bytes);
        params.ram_bytes += 4 * plan->slot_bytes;
        params.ram_bytes = params.ram_bytes < most_bytes ? params.ram_bytes : most_bytes;
    }
    params.ram_bytes = plan->total_bytes - plan->n_blocks / 6 * plan->slot_bytes;
    fixture_greedy(engine, prompt, N_PROMPT, want, N_TOKENS);
    slu_engine_close(engine);

    engine = fixture_engine(f.slu, &params);
    plan = slu_engine_plan(engine);
    cr_assert(plan->n_slots < plan->n_blocks && plan->small_slot_bytes > 0);
    uint64_t experts = 0;
    for (uint32_t i = 0; i < plan->n_lines; i++) {
        experts += strcmp(plan->lines[i].name, "expert slots") ? 0 : plan->lines[i].bytes;
    }
    cr_expect(experts > 0 && experts < plan->n_slots * plan->slot_bytes / 20 * 19,
              "%zu for %u of %zu", (size_t)experts, plan->n_slots, (size_t)plan->slot_bytes);
    fixture_greedy(engine, prompt, N_PROMPT, ids, N_TOKENS);
    cr_expect(!memcmp(ids, want, sizeof ids));
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Of two sessions the one that computed first lends, until it has nothing more or is gone. */
Test(engine, one_session_lends)
{
    struct fixture f;
    fixture_open(&f);
    struct slu_engine *engine = engine_of_a_quarter(&f, 2000);
    const struct slu_session_params half = {.ctx = 700};
    struct slu_session *sessions[2];
    struct slu_err err = {0};
    int32_t prompt[] = {5, 6, 7};
    uint32_t n_slots[2], n_own = slu_engine_plan(engine)->n_slots;
    for (int i = 0; i < 2; i++) {
        cr_assert_eq(slu_session_create(engine, &half, &sessions[i], &err), 0, "%s", err.text);
        cr_assert_eq(slu_session_tokens(sessions[i], prompt, 3, NULL), 0);
        cr_assert_eq(generate(sessions[i], 10, NULL), 0);
        n_slots[i] = slots_of(engine);
    }
    cr_expect(n_slots[0] > n_own && n_slots[1] == n_slots[0]);
    cr_assert_eq(generate(sessions[1], 300, NULL), 0);
    cr_expect_eq(slots_of(engine), n_slots[0]);
    cr_assert_eq(generate(sessions[0], 687, NULL), 0);
    cr_expect_eq(slots_of(engine), n_own);
    cr_assert_eq(generate(sessions[1], 1, NULL), 0);
    cr_expect(slots_of(engine) > n_own && slots_of(engine) < n_slots[0]);
    slu_session_destroy(sessions[1]);
    cr_expect_eq(slots_of(engine), n_own);
    cr_assert_eq(slu_session_replace(sessions[0], prompt, 3, NULL), 0);
    cr_assert_eq(generate(sessions[0], 10, NULL), 0);
    cr_expect_eq(slots_of(engine), n_slots[0]);
    slu_session_destroy(sessions[0]);
    cr_expect_eq(slots_of(engine), n_own);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Sessions that take turns on one engine don't disturb each other. */
Test(engine, sessions_take_turns)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 128});
    int32_t prompts[2][3] = {{5, 6, 7}, {99, 98, 97}}, want[2][24];
    struct slu_session *sessions[2];
    for (int i = 0; i < 2; i++) {
        fixture_greedy(engine, prompts[i], 3, want[i], 24);
        sessions[i] = session_of(engine);
        cr_assert_eq(slu_session_tokens(sessions[i], prompts[i], 3, NULL), 0);
    }
    for (int step = 0; step < 24; step++) {
        cr_assert_eq(generate(sessions[0], 1, NULL), 0);
        cr_assert_eq(generate(sessions[1], 1, NULL), 0);
    }
    for (int i = 0; i < 2; i++) {
        size_t n;
        const int32_t *ids = slu_session_ids(sessions[i], &n);
        cr_expect(n == 27 && !memcmp(ids + 3, want[i], sizeof want[i]));
        slu_session_destroy(sessions[i]);
    }
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Going back to an earlier point and on another way equals having gone that way at once, also
 * where sliding windows have dropped what the earlier point looked at. */
Test(engine, changed_context_equals_fresh)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 400});
    int32_t ids[300];
    for (int i = 0; i < 300; i++) {
        ids[i] = (i * 37 + i / 7) % 300;
    }
    struct slu_session *session = session_of(engine);
    cr_assert_eq(slu_session_replace(session, ids, 300, NULL), 0);
    cr_assert_eq(generate(session, 20, NULL), 0);
    uint32_t cuts[] = {298, 250, 240, 120, 30, 1};
    for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++) {
        int32_t other[300], want[12];
        memcpy(other, ids, sizeof other);
        other[cuts[c]] ^= 1;
        uint32_t n_other = cuts[c] + 2;
        fixture_greedy(engine, other, n_other, want, 12);
        cr_assert_eq(slu_session_replace(session, other, n_other, NULL), 0);
        cr_assert_eq(generate(session, 12, NULL), 0);
        size_t n;
        const int32_t *got = slu_session_ids(session, &n);
        cr_expect(n == n_other + 12 && !memcmp(got + n_other, want, sizeof want), "cut at %u",
                  cuts[c]);
        /* The longer context again, so that the next cut starts from full rings. */
        cr_assert_eq(slu_session_replace(session, ids, 300, NULL), 0);
        cr_assert_eq(generate(session, 3, NULL), 0);
    }
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* A chunk that fails has overwritten rows of the windows' rings: going back to before it computes
 * those anew. */
Test(engine, going_back_after_a_failed_chunk)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 8192);
    struct slu_engine_params params = {.ram_bytes = 1ull << 30, .ctx = 400, .minimum_cache = true};
    struct slu_engine *engine = fixture_engine(f.slu, &params);
    int32_t ids[300], want[12];
    for (int i = 0; i < 300; i++) {
        ids[i] = (i * 37 + i / 7) % 300;
    }
    fixture_greedy(engine, ids, 145, want, 12);
    struct slu_session *session = session_of(engine);
    cr_assert_eq(slu_session_replace(session, ids, 150, NULL), 0);
    cr_assert_eq(slu_session_eval(session, NULL, NULL, NULL), 0);
    const struct slu_weights *w = &engine->weights;
    for (uint32_t b = w->first_block; b < w->end_block; b++) {
        slu_stream_inject_fault(engine->model.stream, b, 1);
    }
    cr_assert_eq(slu_session_replace(session, ids, 300, NULL), 0);
    cr_assert_eq(slu_session_eval(session, NULL, NULL, NULL), SLU_EIO);
    cr_assert_eq(session->kv.n, 150, "the first chunk after the computed ones is what fails");
    for (uint32_t b = w->first_block; b < w->end_block; b++) {
        slu_stream_inject_fault(engine->model.stream, b, 0);
    }
    cr_assert_eq(slu_session_replace(session, ids, 145, NULL), 0);
    cr_assert_eq(generate(session, 12, NULL), 0);
    size_t n;
    const int32_t *got = slu_session_ids(session, &n);
    cr_expect(n == 157 && !memcmp(got + 145, want, sizeof want));
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* A second message of a chat continues the conversation as a fresh session with all of it would. */
Test(engine, chat_goes_on)
{
    struct fixture f;
    fixture_open(&f);
    struct slu_synth_params params = small;
    params.arch = SLU_ARCH_QWEN3MOE;
    params.chat_template = "{% for m in messages %}<|im_start|>{{m.role}}<|im_end|>{% endfor %}";
    fixture_synth(&f, &params, SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 500});
    struct slu_session *session = session_of(engine);
    cr_assert_eq(slu_session_system(session, "be brief", 8, NULL), 0);
    cr_assert_eq(slu_session_system(session, "or not", 6, NULL), SLU_EINVAL);
    cr_assert_eq(slu_session_chat(session, "one", 3, NULL), 0);
    cr_assert_eq(session->messages[0].role, SLU_ROLE_SYSTEM);
    struct slu_generate_params go = {.n_max = 10};
    cr_assert_eq(slu_session_generate(session, &go, NULL, NULL), 0);
    cr_assert_eq(session->n_messages, 3);
    cr_assert_eq(slu_session_chat(session, "two", 3, NULL), 0);
    cr_expect_gt(session->kv.n, 0, "the common prefix is kept");
    size_t n;
    const int32_t *ids = slu_session_ids(session, &n);
    int32_t want[10], copy[500];
    memcpy(copy, ids, n * sizeof *ids);
    fixture_greedy(engine, copy, n, want, 10);
    go.ignore_end = true;
    cr_assert_eq(slu_session_generate(session, &go, NULL, NULL), 0);
    ids = slu_session_ids(session, &n);
    cr_expect(!memcmp(ids + n - 10, want, sizeof want));
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* A model of which no layer has routed experts runs, and its statistics have no holes. */
Test(engine, without_routed_experts)
{
    struct fixture f;
    fixture_open(&f);
    for (int is_tied = 0; is_tied < 2; is_tied++) {
        fixture_synth(&f,
                      &(struct slu_synth_params){
                          .arch = SLU_ARCH_DEEPSEEK2, .n_layers = 1, .is_tied = is_tied != 0},
                      SLU_CODEC_ZSTD, 0);
        struct slu_engine_params params = {.ctx = 32, .io = SLU_USE_IO_PREAD};
        struct slu_plan plan;
        cr_assert_eq(slu_plan(f.slu, &params, &plan, NULL), 0);
        cr_assert_eq(plan.n_blocks, 0);
        params.ram_bytes = plan.least_ram_bytes;
        struct slu_engine *engine = fixture_engine(f.slu, &params);
        int32_t prompt[] = {5, 6, 7}, ids[8];
        fixture_greedy(engine, prompt, 3, ids, 8);
        struct slu_engine_stats stats;
        slu_engine_stats(engine, &stats);
        cr_assert_not_null(stats.io_backend);
        cr_expect_str_eq(stats.io_backend, is_tied ? "none" : "pread");
        slu_engine_close(engine);
    }
    fixture_close(&f);
}

/* Tokens outside the vocabulary, or more than the context holds, are refused. */
Test(engine, refuses_bad_tokens)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_RAW, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 8});
    struct slu_session *session = session_of(engine);
    int32_t ids[9] = {-1, 1000000};
    struct slu_err err;
    cr_expect_eq(generate(session, 1, &err), SLU_EINVAL);
    cr_expect_eq(slu_session_tokens(session, NULL, 0, &err), 0);
    cr_expect_eq(slu_session_tokens(session, ids, 1, &err), SLU_ERANGE);
    cr_expect_eq(slu_session_tokens(session, ids + 1, 1, &err), SLU_ERANGE);
    cr_expect_eq(slu_session_tokens(session, ids + 2, 7, &err), 0);
    cr_expect_eq(slu_session_tokens(session, ids + 2, 2, &err), SLU_ERANGE);
    struct slu_result result;
    cr_expect_eq(slu_session_generate(session,
                                      &(struct slu_generate_params){.n_max = 9, .ignore_end = true},
                                      &result, &err),
                 0);
    cr_expect_eq(result.stop, SLU_STOP_CONTEXT);
    cr_expect_eq(result.n_generated, 1);
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}
