/* Rows quantized by several threads. Each row's part of a sum is kept and added in the order of
 * rows, so that the pack and its report don't depend on how many threads there were. */
#include <stdatomic.h>
#include <stdlib.h>

#include "tools/packer_parts.h"

#define GRAIN 8 /* rows that a thread takes at once */

/* What a row adds. */
union slu_packer_row_sum {
    struct slu_ecq_scales scales;
    struct slu_ecq_sums sums;
};

struct task {
    const struct slu_packer_rows *rows;
    const struct slu_packer_crew *crew;
    const struct slu_ecq *ecq;
    struct slu_planes *planes; /* NULL: scales alone */
    float unit;
    const float *weights; /* of all of the input's columns */
    atomic_uint next;
    atomic_bool is_faulty;
};

static void crew_free(struct slu_packer_crew *crew)
{
    free(crew->floats);
    free(crew->scratch);
    free(crew->row_sums);
    crew->floats = NULL;
    crew->scratch = NULL;
    crew->row_sums = NULL;
    crew->cols_max = crew->rows_max = 0;
}

void slu_packer_crew_finish(struct slu_packer_crew *crew)
{
    crew_free(crew);
    slu_pool_destroy(crew->pool);
    crew->pool = NULL;
}

static size_t scratch_bytes(uint32_t cols)
{
    return (slu_ecq_scratch_bytes(cols) + 63) / 64 * 64;
}

/* Sees to threads, and to buffers for so many rows and columns. */
static int crew_ready(struct slu_packer_job *job, uint32_t rows, uint32_t cols, struct slu_err *err)
{
    struct slu_packer_crew *crew = &job->crew;
    int code = crew->pool ? 0 : slu_pool_create(job->params->n_threads, &crew->pool, err);
    if (code < 0 || (rows <= crew->rows_max && cols <= crew->cols_max)) {
        return code;
    }
    rows = rows > crew->rows_max ? rows : crew->rows_max;
    cols = cols > crew->cols_max ? cols : crew->cols_max;
    size_t n_threads = slu_pool_threads(crew->pool);
    crew_free(crew);
    crew->floats = malloc(n_threads * cols * sizeof(float));
    crew->scratch = slu_packer_alloc(n_threads * scratch_bytes(cols));
    crew->row_sums = malloc(rows * sizeof *crew->row_sums);
    if (!crew->floats || !crew->scratch || !crew->row_sums) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for %zu threads and rows of %u weights",
                           n_threads, cols);
    }
    crew->rows_max = rows;
    crew->cols_max = cols;
    return 0;
}

static void take_row(struct task *task, uint32_t r, float *x, void *scratch)
{
    const struct slu_packer_rows *rows = task->rows;
    const uint8_t *raw = rows->raw + r * slu_packer_ref_row_bytes(rows->ref);
    union slu_packer_row_sum *sum = &task->crew->row_sums[r];
    *sum = (union slu_packer_row_sum){0};
    if (!slu_packer_floats(rows->ref, raw, rows->first_col, rows->n_cols, x)) {
        atomic_store_explicit(&task->is_faulty, true, memory_order_relaxed);
    } else if (!task->planes) {
        slu_ecq_scales_add(&sum->scales, task->ecq, x, rows->n_cols);
    } else {
        slu_ecq_row_put(task->ecq, task->unit, x, task->weights + rows->first_col, task->planes, r,
                        scratch, &sum->sums);
    }
}

static void take_rows(void *arg, unsigned thread, unsigned n_threads)
{
    (void)n_threads;
    struct task *task = arg;
    const struct slu_packer_crew *crew = task->crew;
    float *x = crew->floats + (size_t)thread * crew->cols_max;
    void *scratch = crew->scratch + thread * scratch_bytes(crew->cols_max);
    for (;;) {
        /* Relaxed: the pool's end of a run orders what was written. */
        unsigned first = atomic_fetch_add_explicit(&task->next, GRAIN, memory_order_relaxed);
        if (first >= task->rows->n) {
            return;
        }
        for (uint32_t r = first; r < first + GRAIN && r < task->rows->n; r++) {
            take_row(task, r, x, scratch);
        }
    }
}

static int run(struct slu_packer_job *job, struct task *task, struct slu_err *err)
{
    const struct slu_packer_ref *ref = task->rows->ref;
    int code = crew_ready(job, task->rows->n, task->rows->n_cols, err);
    if (code < 0) {
        return code;
    }
    task->crew = &job->crew;
    slu_pool_enter(job->crew.pool);
    slu_pool_run(job->crew.pool, take_rows, task);
    slu_pool_leave(job->crew.pool);
    return atomic_load_explicit(&task->is_faulty, memory_order_relaxed)
               ? slu_packer_not_finite(ref, err)
               : 0;
}

int slu_packer_scales_add(struct slu_packer_job *job, const struct slu_packer_rows *rows,
                          const struct slu_ecq *ecq, struct slu_ecq_scales *scales,
                          struct slu_err *err)
{
    struct task task = {.rows = rows, .ecq = ecq};
    int code = run(job, &task, err);
    for (uint32_t r = 0; r < rows->n && code == 0; r++) {
        const struct slu_ecq_scales *row = &job->crew.row_sums[r].scales;
        scales->squares += row->squares;
        scales->n += row->n;
        scales->most = row->most > scales->most ? row->most : scales->most;
    }
    return code;
}

int slu_packer_rows_put(struct slu_packer_job *job, const struct slu_packer_rows *rows,
                        const struct slu_ecq *ecq, float unit, const float *weights,
                        struct slu_planes *planes, struct slu_ecq_sums *sums, struct slu_err *err)
{
    struct task task = {
        .rows = rows, .ecq = ecq, .planes = planes, .unit = unit, .weights = weights};
    int code = run(job, &task, err);
    for (uint32_t r = 0; r < rows->n && code == 0; r++) {
        const struct slu_ecq_sums *row = &job->crew.row_sums[r].sums;
        sums->error += row->error;
        sums->power += row->power;
    }
    return code;
}
