/* An engine that several threads use at once. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "fixture.h"

#define N_THREADS 3
#define N_PROMPT  80u
#define N_TOKENS  24u

struct user {
    struct slu_engine *engine;
    int32_t prompt[N_PROMPT], want[N_TOKENS], got[N_TOKENS];
    atomic_uint *n_running; /* relaxed: tells when to stop asking, and orders nothing */
};

static void *use(void *arg)
{
    struct user *user = arg;
    fixture_greedy(user->engine, user->prompt, N_PROMPT, user->got, N_TOKENS);
    atomic_fetch_sub_explicit(user->n_running, 1, memory_order_relaxed);
    return NULL;
}

/* Sessions on threads of their own give what they give alone, while another thread asks for
 * statistics, which only grow, and encodes text. */
Test(threads, sessions_at_once)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &(struct slu_synth_params){.arch = SLU_ARCH_GPT_OSS, .n_experts = 16},
                  SLU_CODEC_ZSTD, 8192);
    struct slu_engine *engine = fixture_engine(
        f.slu, &(struct slu_engine_params){
                   .ram_bytes = 1ull << 30, .ctx = 128, .n_threads = 2, .minimum_cache = true});
    struct user users[N_THREADS];
    atomic_uint n_running = N_THREADS;
    for (int i = 0; i < N_THREADS; i++) {
        users[i] = (struct user){.engine = engine, .n_running = &n_running};
        for (uint32_t t = 0; t < N_PROMPT; t++) {
            users[i].prompt[t] = (int32_t)((t * 31 + (uint32_t)i * 17 + t / 5) % 300);
        }
        fixture_greedy(engine, users[i].prompt, N_PROMPT, users[i].want, N_TOKENS);
    }
    pthread_t threads[N_THREADS];
    for (int i = 0; i < N_THREADS; i++) {
        cr_assert_eq(pthread_create(&threads[i], NULL, use, &users[i]), 0);
    }
    uint64_t flash_bytes = 0;
    while (atomic_load_explicit(&n_running, memory_order_relaxed) > 0) {
        struct slu_engine_stats stats;
        slu_engine_stats(engine, &stats);
        cr_assert_geq(stats.flash_bytes, flash_bytes);
        flash_bytes = stats.flash_bytes;
        cr_assert_gt(slu_engine_encode(engine, "some text", 9, false, NULL, 0, NULL), 0);
    }
    for (int i = 0; i < N_THREADS; i++) {
        pthread_join(threads[i], NULL);
        cr_expect(!memcmp(users[i].got, users[i].want, sizeof users[i].got), "thread %d", i);
    }
    slu_engine_close(engine);
    fixture_close(&f);
}
