/* What is done to each token of a chunk by itself, shared out over the pool. */
#include <math.h>

#include "model/ops.h"

/* Fewer tokens than that take less time than waking the other threads. */
#define ROWS_MIN 8u

struct rows {
    struct slu_model *model;
    slu_rows_fn fn;
    void *arg;
    uint32_t n;
};

static void work(void *arg, unsigned thread, unsigned n_threads)
{
    const struct rows *rows = arg;
    uint32_t lo, hi;
    slu_keep_reading(rows->model, thread);
    slu_pool_share(rows->n, 1, thread, n_threads, &lo, &hi);
    if (lo < hi) {
        rows->fn(rows->arg, lo, hi);
    }
}

void slu_rows_run(struct slu_model *model, uint32_t n, slu_rows_fn fn, void *arg)
{
    if (n < ROWS_MIN) {
        fn(arg, 0, n);
    } else {
        slu_pool_run(model->pool, work, &(struct rows){model, fn, arg, n});
    }
}

struct acts_job {
    const struct slu_kern *kern;
    const struct slu_acts *acts;
};

static void quantize(void *arg, uint32_t lo, uint32_t hi)
{
    const struct acts_job *job = arg;
    job->kern->quantize(job->acts, lo, hi);
}

void slu_acts_fill(struct slu_model *model, struct slu_acts *acts, uint32_t n, uint32_t cols,
                   const float *x, void *buffer)
{
    slu_acts_init(acts, n, cols, x, cols, buffer);
    struct acts_job job = {model->kern, acts};
    slu_rows_run(model, n, quantize, &job);
}

void slu_rms_norm(const struct slu_kern *kern, float *out, const float *x, const float *w,
                  uint32_t n, float eps)
{
    float scale = 1.0f / sqrtf(kern->dot_f32(x, x, n) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++) {
        out[i] = x[i] * scale * w[i];
    }
}

struct norm_job {
    const struct slu_model *model;
    float *out;
    const float *x, *w;
};

static void norm(void *arg, uint32_t lo, uint32_t hi)
{
    const struct norm_job *job = arg;
    const struct slu_config *c = &job->model->weights->config;
    for (size_t t = lo; t < hi; t++) {
        slu_rms_norm(job->model->kern, job->out + t * c->n_embd, job->x + t * c->n_embd, job->w,
                     c->n_embd, c->norm_eps);
    }
}

void slu_norm_rows(struct slu_model *model, float *out, const float *x, const float *w, uint32_t n)
{
    struct norm_job job = {model, out, x, w};
    slu_rows_run(model, n, norm, &job);
}

struct add_job {
    const struct slu_model *model;
    uint32_t from;
};

static void add(void *arg, uint32_t lo, uint32_t hi)
{
    const struct add_job *job = arg;
    const struct slu_model *model = job->model;
    const struct slu_config *c = &model->weights->config;
    size_t at = (size_t)(job->from + lo) * c->n_embd;
    model->kern->axpy_f32(model->scratch.x + at, c->residual_scale, model->scratch.y + at,
                          (hi - lo) * c->n_embd);
}

void slu_add_sublayer(struct slu_model *model, uint32_t from, uint32_t n)
{
    struct add_job job = {model, from};
    slu_rows_run(model, n - from, add, &job);
}
