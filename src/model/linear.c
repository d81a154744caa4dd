#include <assert.h>
#include <stdatomic.h>

#include "model/ops.h"

/* Rows handed out at once. Kernels read two streams of rows half a call apart, and calls of 512
 * rows run at 25 % more than calls of 32; but each thread should get several. */
#define ROW_GRAIN_MIN 32u
#define ROW_GRAIN_MAX 512u
/* Of less, as many as kernels finish at once. */
#define ROW_GRAIN_EVEN 8u
/* With many tokens rows take long, and there is no more to gain: a thread should not wait for the
 * other's last grain, nor the flash for the first one's next look (slu_keep_reading). */
#define ROW_GRAIN_LONG 256u
#define TOKENS_LONG    32u
/* Columns of an adapter's second product, likewise. */
#define UP_GRAIN 512u

/* An adapter's pair that adds to one of the run's products. */
struct pair {
    const struct slu_linear *linear;
    const struct slu_lora *lora;
    float factor;
    float *t; /* n x rank, between A and B */
};

struct linear_run {
    const struct slu_model *model;
    const struct slu_kern *kern;
    const struct slu_linear *linears;
    uint32_t n_linears;
    const struct slu_acts *x;
    uint32_t grain; /* rows */
    struct pair pairs[SLU_LINEARS_MAX * SLU_ADAPTERS_MAX];
    uint32_t n_pairs;
    _Atomic uint32_t next; /* grains taken; relaxed, the pool's barrier publishes results */
};

static void run_grain(const struct linear_run *run, const struct slu_linear *lin, uint32_t lo)
{
    uint32_t hi = lo + run->grain < lin->w->rows ? lo + run->grain : lin->w->rows;
    run->kern->mul[lin->w->fmt->id](lin->y, lin->y_stride, lin->w, lo, hi, run->x, NULL, run->x->n);
    if (lin->bias) {
        for (uint32_t t = 0; t < run->x->n; t++) {
            for (uint32_t row = lo; row < hi; row++) {
                lin->y[t * lin->y_stride + row] += lin->bias[row];
            }
        }
    }
}

static uint32_t n_grains(uint32_t n, uint32_t grain)
{
    return (n + grain - 1) / grain;
}

static uint32_t take(struct linear_run *run)
{
    return atomic_fetch_add_explicit(&run->next, 1, memory_order_relaxed);
}

/* Products of the base, and of the pairs' first halves, which need nothing but x either. */
static void work(void *arg, unsigned thread, unsigned n_threads)
{
    struct linear_run *run = arg;
    (void)n_threads;
    for (;;) {
        slu_keep_reading(run->model, thread);
        uint32_t grain = take(run), i = 0;
        if (grain < run->n_pairs) {
            const struct pair *p = &run->pairs[grain];
            for (uint32_t t = 0; t < run->x->n; t++) {
                slu_lora_down(run->kern, p->lora, p->factor, run->x->x + t * run->x->x_stride,
                              p->t + (size_t)t * p->lora->rank);
            }
            continue;
        }
        grain -= run->n_pairs;
        while (i < run->n_linears && grain >= n_grains(run->linears[i].w->rows, run->grain)) {
            grain -= n_grains(run->linears[i++].w->rows, run->grain);
        }
        if (i == run->n_linears) {
            return;
        }
        run_grain(run, &run->linears[i], grain * run->grain);
    }
}

/* The pairs' second halves. A grain is a range of one product's columns, to which all its pairs
 * are added in their order. */
static void work_up(void *arg, unsigned thread, unsigned n_threads)
{
    struct linear_run *run = arg;
    (void)thread;
    (void)n_threads;
    for (;;) {
        uint32_t grain = take(run), i = 0;
        while (i < run->n_linears && grain >= n_grains(run->linears[i].w->rows, UP_GRAIN)) {
            grain -= n_grains(run->linears[i++].w->rows, UP_GRAIN);
        }
        if (i == run->n_linears) {
            return;
        }
        const struct slu_linear *lin = &run->linears[i];
        uint32_t lo = grain * UP_GRAIN;
        uint32_t hi = lo + UP_GRAIN < lin->w->rows ? lo + UP_GRAIN : lin->w->rows;
        for (uint32_t p = 0; p < run->n_pairs; p++) {
            const struct pair *pair = &run->pairs[p];
            for (uint32_t t = 0; pair->linear == lin && t < run->x->n; t++) {
                slu_lora_up(run->kern, pair->lora, pair->t + (size_t)t * pair->lora->rank, lo, hi,
                            lin->y + t * lin->y_stride);
            }
        }
    }
}

/* The pairs that the session's adapters have for these products. */
static void list_pairs(struct linear_run *run, const struct slu_model *model, uint32_t l)
{
    const struct slu_adapter_set *set = model->adapters;
    float *t = model->scratch.lora;
    for (uint32_t i = 0; i < run->n_linears; i++) {
        for (uint32_t u = 0; set && u < set->n; u++) {
            struct pair pair = {.linear = &run->linears[i], .t = t};
            pair.lora = slu_lora_find(set, u, l, run->linears[i].target, &pair.factor);
            if (pair.lora) {
                run->pairs[run->n_pairs++] = pair;
                t += (size_t)run->x->n * pair.lora->rank;
            }
        }
    }
}

/* Rows that a thread takes at once, of so many in all of a run's products. With few tokens, what
 * doesn't come to two grains for each thread, a router's rows above all, is shared out evenly. */
static uint32_t grain_of(uint32_t rows, uint32_t n_tokens, uint32_t n_threads)
{
    bool is_long = n_tokens >= TOKENS_LONG;
    assert(rows > 0);
    if (rows < 2 * ROW_GRAIN_MIN * n_threads && !is_long) {
        uint32_t share = (rows + n_threads - 1) / n_threads;
        return (share + ROW_GRAIN_EVEN - 1) / ROW_GRAIN_EVEN * ROW_GRAIN_EVEN;
    }
    uint32_t most = is_long ? ROW_GRAIN_LONG : ROW_GRAIN_MAX, grain = rows / (4 * n_threads);
    grain = grain < ROW_GRAIN_MIN ? ROW_GRAIN_MIN : grain > most ? most : grain;
    return grain / ROW_GRAIN_MIN * ROW_GRAIN_MIN;
}

void slu_linear_run(struct slu_model *model, uint32_t l, const struct slu_linear *linears,
                    uint32_t n_linears, const struct slu_acts *x)
{
    struct linear_run run = {
        .model = model, .kern = model->kern, .linears = linears, .n_linears = n_linears, .x = x};
    uint32_t rows = 0;
    for (uint32_t i = 0; i < n_linears; i++) {
        rows += linears[i].w->rows;
        slu_tally_dense(&model->tally, linears[i].w, x->n);
    }
    run.grain = grain_of(rows, x->n, slu_pool_threads(model->pool));
    for (uint32_t i = 0; i < n_linears && model->inputs; i++) {
        model->inputs->see(model->inputs->arg, l, linears[i].target, 0, 0, linears[i].w->cols, x->x,
                           x->x_stride, NULL, x->n);
    }
    list_pairs(&run, model, l);
    slu_pool_run(model->pool, work, &run);
    if (run.n_pairs) {
        atomic_store_explicit(&run.next, 0, memory_order_relaxed);
        slu_pool_run(model->pool, work_up, &run);
    }
}
