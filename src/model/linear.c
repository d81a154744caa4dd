#include <math.h>
#include <stdatomic.h>

#include "model/ops.h"

/* Rows handed out at once: enough to keep the counter cold, few enough to share out evenly. */
#define ROW_GRAIN 32u

struct linear_run {
    const struct slu_kern *kern;
    const struct slu_linear *linears;
    uint32_t n_linears;
    const struct slu_acts *x;
    _Atomic uint32_t next; /* row grains taken; relaxed, the pool's barrier publishes results */
};

static void run_grain(const struct linear_run *run, const struct slu_linear *lin, uint32_t lo)
{
    uint32_t hi = lo + ROW_GRAIN < lin->w->rows ? lo + ROW_GRAIN : lin->w->rows;
    run->kern->mul[lin->w->fmt->id](lin->y, lin->y_stride, lin->w, lo, hi, run->x, NULL, run->x->n);
    if (lin->bias) {
        for (uint32_t t = 0; t < run->x->n; t++) {
            for (uint32_t row = lo; row < hi; row++) {
                lin->y[t * lin->y_stride + row] += lin->bias[row];
            }
        }
    }
}

static uint32_t n_grains(const struct slu_linear *lin)
{
    return (lin->w->rows + ROW_GRAIN - 1) / ROW_GRAIN;
}

static void work(void *arg, unsigned thread, unsigned n_threads)
{
    struct linear_run *run = arg;
    (void)thread;
    (void)n_threads;
    for (;;) {
        uint32_t grain = atomic_fetch_add_explicit(&run->next, 1, memory_order_relaxed);
        uint32_t i = 0;
        while (i < run->n_linears && grain >= n_grains(&run->linears[i])) {
            grain -= n_grains(&run->linears[i]);
            i++;
        }
        if (i == run->n_linears) {
            return;
        }
        run_grain(run, &run->linears[i], grain * ROW_GRAIN);
    }
}

void slu_linear_run(struct slu_model *model, const struct slu_linear *linears, uint32_t n_linears,
                    const struct slu_acts *x)
{
    struct linear_run run = {
        .kern = model->kern, .linears = linears, .n_linears = n_linears, .x = x};
    slu_pool_run(model->pool, work, &run);
}

void slu_acts_fill(const struct slu_kern *kern, struct slu_acts *acts, uint32_t n, uint32_t cols,
                   const float *x, void *buffer)
{
    slu_acts_init(acts, n, cols, x, cols, buffer);
    for (uint32_t t = 0; t < n; t++) {
        kern->quantize(acts->q + t * acts->q_stride, acts->d + t * acts->g_stride,
                       acts->s + t * acts->g_stride, x + (size_t)t * cols, cols);
    }
}

void slu_rms_norm(const struct slu_kern *kern, float *out, const float *x, const float *w,
                  uint32_t n, float eps)
{
    float scale = 1.0f / sqrtf(kern->dot_f32(x, x, n) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++) {
        out[i] = x[i] * scale * w[i];
    }
}
