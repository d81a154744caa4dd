/* What experts add up to, whoever adds and in whatever order. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "base/pool.h"
#include "kern/block.h"
#include "model/sums.h"

enum { N_EMBD = 200, N_THREADS = 4, N_BLOCKS = 60, GUARD = 64 };

struct work {
    struct slu_sums sums;
    const struct slu_kern *kern;
    uint32_t n; /* tokens */
    float x[SLU_BLOCK_TOKENS * N_EMBD];
};

/* The tokens of a block and their weights: some of them, from anywhere. */
static uint32_t block_of(const struct work *w, uint32_t block, uint32_t *tok, float *weight)
{
    uint32_t some = 0, step = block % 3 + 1;
    for (uint32_t t = block % w->n; t < w->n && some < SLU_BLOCK_TOKENS; t += step) {
        tok[some] = t;
        weight[some++] = 1.0f / (float)(block + t + 1);
    }
    return some;
}

static void add_blocks(void *arg, unsigned thread, unsigned n_threads)
{
    const struct work *w = arg;
    uint32_t tok[SLU_BLOCK_TOKENS];
    float weight[SLU_BLOCK_TOKENS];
    for (uint32_t block = thread; block < N_BLOCKS; block += n_threads) {
        uint32_t some = block_of(w, block, tok, weight);
        slu_sums_add(&w->sums, w->kern, thread, w->n, tok, weight, w->x, some);
    }
}

static void check(struct slu_pool *pool, uint32_t chunk, uint32_t n)
{
    static struct work w;
    size_t n_rows = slu_sums_rows(chunk, N_THREADS);
    size_t n_numbers = (size_t)n * N_EMBD;
    double *rows = malloc((n_rows * N_EMBD + GUARD) * sizeof *rows);
    atomic_flag *are_taken = malloc(chunk * sizeof *are_taken);
    float *got = malloc(n_numbers * sizeof *got);
    double *want = calloc(n_numbers, sizeof *want);
    memset(rows, 0xff, (n_rows * N_EMBD + GUARD) * sizeof *rows);
    memset(are_taken, 0xff, chunk * sizeof *are_taken);
    w.sums = (struct slu_sums){chunk, N_THREADS, N_EMBD, rows, are_taken};
    w.kern = slu_kern_get(slu_cpu_flags());
    w.n = n;
    for (size_t i = 0; i < SLU_BLOCK_TOKENS * N_EMBD; i++) {
        w.x[i] = (float)(i * 7919 % 1000) / 300.0f - 1.5f;
    }
    for (uint32_t block = 0; block < N_BLOCKS; block++) {
        uint32_t tok[SLU_BLOCK_TOKENS];
        float weight[SLU_BLOCK_TOKENS];
        uint32_t some = block_of(&w, block, tok, weight);
        for (uint32_t i = 0; i < some; i++) {
            slu_kern_get(0)->add_grid(want + (size_t)tok[i] * N_EMBD, weight[i],
                                      w.x + (size_t)i * N_EMBD, N_EMBD);
        }
    }
    for (unsigned thread = 0; thread < (slu_sums_shared(n) ? 1 : N_THREADS); thread++) {
        slu_sums_clear(&w.sums, thread, n, 0, n);
    }
    slu_pool_run(pool, add_blocks, &w);
    slu_sums_take(&w.sums, n, got, 0, n_numbers / 2);
    slu_sums_take(&w.sums, n, got, n_numbers / 2, n_numbers);
    for (size_t i = 0; i < n_numbers; i++) {
        cr_assert_eq(got[i], (float)want[i], "%u of %u tokens: number %zu", n, chunk, i);
    }
    for (size_t i = 0; i < GUARD * sizeof *rows; i++) {
        cr_assert_eq(((unsigned char *)(rows + n_rows * N_EMBD))[i], 0xff, "beyond its rows");
    }
    free(want);
    free(got);
    free(are_taken);
    free(rows);
}

/* Few tokens and many, in chunks that are larger than them, and smaller than what is kept apart. */
Test(sums, are_the_same_in_any_order)
{
    struct slu_pool *pool = NULL;
    cr_assert_eq(slu_pool_create(N_THREADS, &pool, NULL), 0);
    static const struct {
        uint32_t chunk, n;
    } cases[] = {{1, 1},    {5, 3},     {SLU_SUMS_APART, SLU_SUMS_APART},
                 {40, 1},   {40, 16},   {SLU_SUMS_APART + 1, SLU_SUMS_APART + 1},
                 {200, 17}, {200, 150}, {512, 512}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int round = 0; round < 5; round++) {
            check(pool, cases[i].chunk, cases[i].n);
        }
    }
    slu_pool_destroy(pool);
}
