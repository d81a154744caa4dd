/*
 * Shows that adapters can be swapped at will: four sessions on threads of their own go through a
 * thousand random choices of eight adapters, more than fit the adapters' share at once and the last
 * so large that its experts are always streamed, and every output equals the one that a session
 * alone gave. A program of its own, so that it runs under ThreadSanitizer, which Criterion doesn't.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "session.h"
#include "tools/adapter_import.h"
#include "tools/adapter_synth.h"
#include "tools/packer.h"
#include "tools/synth.h"

#define N_ADAPTERS 8
#define N_SESSIONS 4
#define N_TOKENS   4
#define N_PROMPT   6
#define N_LONG     20 /* tokens, with one of the choices: these have sums in common */
/* None; each adapter at two scales; each with its neighbour. */
#define N_CHOICES (1 + 2 * N_ADAPTERS + N_ADAPTERS)

static char dir[64];
static char paths[N_ADAPTERS][96];
static const int32_t prompt[N_LONG] = {11, 22, 33, 44, 55, 66, 77, 88, 99, 12,
                                       23, 34, 45, 56, 67, 78, 89, 98, 87, 76};
static int32_t want[N_CHOICES][N_TOKENS];
static struct slu_engine *engine;
static unsigned n_swaps = 1000;
static atomic_uint n_refused, n_wrong, n_done, n_streamed;

static void must(int rc, const struct slu_err *err)
{
    if (rc < 0) {
        fprintf(stderr, "%s\n", err->text);
        exit(1);
    }
}

static size_t fill(unsigned choice, struct slu_adapter_choice *ret_choices)
{
    if (choice == 0) {
        return 0;
    }
    choice--;
    if (choice < 2 * N_ADAPTERS) {
        ret_choices[0] = (struct slu_adapter_choice){paths[choice / 2], choice % 2 ? .5f : 1.0f};
        return 1;
    }
    choice -= 2 * N_ADAPTERS;
    ret_choices[0] = (struct slu_adapter_choice){paths[choice], 1.0f};
    ret_choices[1] = (struct slu_adapter_choice){paths[(choice + 1) % N_ADAPTERS], -.5f};
    return 2;
}

/* The prompt once more, of which one choice has more, and what follows it. */
static void answer(struct slu_session *session, unsigned choice, int32_t *ret_ids)
{
    struct slu_err err = {0};
    size_t n_prompt = choice == 1 ? N_LONG : N_PROMPT;
    must(slu_session_replace(session, prompt, n_prompt, &err), &err);
    struct slu_generate_params params = {.n_max = N_TOKENS, .ignore_end = true};
    must(slu_session_generate(session, &params, NULL, &err), &err);
    size_t n;
    memcpy(ret_ids, slu_session_ids(session, &n) + n_prompt, N_TOKENS * sizeof *ret_ids);
}

static void *run_session(void *arg)
{
    uint32_t state = 17 + (uint32_t)(uintptr_t)arg;
    struct slu_session *session;
    struct slu_err err = {0};
    must(slu_session_create(engine, NULL, &session, &err), &err);
    unsigned current = 0;
    while (atomic_fetch_add(&n_done, 1) < n_swaps) {
        state = state * 1664525u + 1013904223u;
        unsigned choice = (state >> 8) % N_CHOICES;
        struct slu_adapter_choice choices[2];
        size_t n = fill(choice, choices);
        int rc = slu_session_set_adapters(session, choices, n, &err);
        if (rc == SLU_EBUDGET) {
            atomic_fetch_add(&n_refused, 1); /* others hold the room: go on with what there is */
        } else {
            must(rc, &err);
            current = choice;
        }
        struct slu_registry_stats stats;
        slu_registry_stats(engine->registry, &stats);
        atomic_fetch_add(&n_streamed, stats.n_streamed);
        int32_t got[N_TOKENS];
        answer(session, current, got);
        if (memcmp(got, want[current], sizeof got)) {
            atomic_fetch_add(&n_wrong, 1);
        }
    }
    slu_session_destroy(session);
    return NULL;
}

static void make_files(char *slu, size_t bytes)
{
    struct slu_err err = {0};
    char gguf[96], lora[96];
    snprintf(gguf, sizeof gguf, "%s/m.gguf", dir);
    snprintf(slu, bytes, "%s/m.slu", dir);
    struct slu_synth_params model = {.arch = SLU_ARCH_DEEPSEEK2, .n_experts = 24, .n_used = 4};
    must(slu_synth_write(gguf, &model, &err), &err);
    struct slu_packer_report report;
    must(slu_packer_run(
             &(struct slu_packer_params){
                 .in = gguf, .out = slu, .codec = SLU_CODEC_ZSTD, .block_bytes = 8192},
             &report, &err),
         &err);
    for (unsigned i = 0; i < N_ADAPTERS; i++) {
        snprintf(lora, sizeof lora, "%s/a%u.gguf", dir, i);
        snprintf(paths[i], sizeof paths[i], "%s/a%u.sla", dir, i);
        bool is_last = i == N_ADAPTERS - 1;
        struct slu_adapter_synth_params params = {.base = gguf,
                                                  .rank = is_last ? 128 : 4,
                                                  .gain = 2,
                                                  .seed = i + 1,
                                                  .fmt = i % 3 == 0 || is_last ? SLU_FMT_F32
                                                         : i % 3 == 1          ? SLU_FMT_F16
                                                                               : SLU_FMT_BF16,
                                                  .targets = i % 2 ? ~0u : SLU_ADAPTER_ATTENTION};
        must(slu_adapter_synth_write(lora, &params, &err), &err);
        struct slu_adapter_info info;
        must(slu_adapter_import(
                 &(struct slu_adapter_import_params){.in = lora, .out = paths[i], .base = slu},
                 &info, &err),
             &err);
    }
}

static struct slu_engine *open_engine(const char *slu, uint64_t adapter_bytes)
{
    struct slu_engine_params params = {.ram_bytes = 1ull << 30,
                                       .ctx = 64,
                                       .n_threads = 2,
                                       .adapter_bytes = adapter_bytes,
                                       .adapters_at_once = 1};
    struct slu_err err = {0};
    struct slu_engine *e;
    must(slu_engine_open(slu, &params, &e, &err), &err);
    return e;
}

/* Each choice by a session alone on an engine of its own. */
static void make_references(const char *slu, uint64_t all_bytes)
{
    for (unsigned choice = 0; choice < N_CHOICES; choice++) {
        struct slu_engine *e = open_engine(slu, all_bytes);
        struct slu_session *session;
        struct slu_err err = {0};
        struct slu_adapter_choice choices[2];
        must(slu_session_create(e, NULL, &session, &err), &err);
        must(slu_session_set_adapters(session, choices, fill(choice, choices), &err), &err);
        answer(session, choice, want[choice]);
        slu_session_destroy(session);
        slu_engine_close(e);
    }
}

int main(int argc, char **argv)
{
    if (argc > 1) {
        n_swaps = (unsigned)strtoul(argv[1], NULL, 10);
    }
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%.40s/sluice-swap-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir)) {
        return 1;
    }
    char slu[96];
    make_files(slu, sizeof slu);
    uint64_t all_bytes = 0, last_bytes = 0, expert_bytes = 0;
    struct slu_err err = {0};
    for (unsigned i = 0; i < N_ADAPTERS; i++) {
        must(slu_adapter_memory(NULL, paths[i], &last_bytes, &expert_bytes, &err), &err);
        all_bytes += last_bytes;
    }
    make_references(slu, all_bytes);
    unsigned n_same = 0;
    for (unsigned c = 1; c < N_CHOICES; c++) {
        n_same += memcmp(want[c], want[0], sizeof want[0]) == 0;
    }

    /* Half of the small ones, and of the large one's experts another half. */
    engine = open_engine(slu, (all_bytes - last_bytes) / 2 + last_bytes - expert_bytes / 2);
    pthread_t threads[N_SESSIONS];
    for (uintptr_t i = 0; i < N_SESSIONS; i++) {
        pthread_create(&threads[i], NULL, run_session, (void *)i);
    }
    for (unsigned i = 0; i < N_SESSIONS; i++) {
        pthread_join(threads[i], NULL);
    }
    struct slu_registry_stats stats;
    slu_registry_stats(engine->registry, &stats);
    slu_engine_close(engine); /* asserts that the ledger is back to zero */
    printf("%u swaps, %u refused for want of room, %u wrong, %u beside a streamed one; %llu loads, "
           "%llu evictions; %u of %u choices answer as the base\n",
           n_swaps, atomic_load(&n_refused), atomic_load(&n_wrong), atomic_load(&n_streamed),
           (unsigned long long)stats.loads, (unsigned long long)stats.evictions, n_same,
           N_CHOICES - 1);
    char command[96];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    bool is_clean = system(command) == 0;
    bool is_mixed = stats.evictions > 0 && atomic_load(&n_streamed) > n_swaps / 10;
    return atomic_load(&n_wrong) == 0 && is_mixed && n_same < N_CHOICES / 4 && is_clean ? 0 : 1;
}
