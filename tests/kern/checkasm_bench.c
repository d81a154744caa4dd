/* Timing of kernels: medians, with weights that come from memory. */
#include "tests/kern/checkasm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Time of this thread on a processor, so that a busy machine shows less. */
static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

#define BENCH_COLS  2816 /* near 2880, and a multiple of 256 */
#define BENCH_BYTES ((size_t)96 << 20)
#define BENCH_RUNS  9

/* Median of a matrix product that streams all its weights from memory. */
static void bench_mul(const struct slu_kern *kern, const struct slu_fmt *fmt, uint8_t *data,
                      uint32_t n)
{
    struct slu_mat_layout at;
    slu_mat_layout(fmt, 16, BENCH_COLS, &at);
    uint32_t rows = (uint32_t)(BENCH_BYTES / at.bytes * 16);
    /* C is there for comparison, and slow. */
    rows = kern->name[0] == 'c' ? rows / 16 : rows;
    struct slu_mat w;
    slu_mat_view(&w, fmt, rows, BENCH_COLS, data);
    uint32_t pattern = 0x9e3779b9;
    for (size_t i = 0; i < w.at.bytes; i += 4) {
        pattern = pattern * 1664525 + 1013904223;
        memcpy(data + i, &pattern, 4);
    }
    make_sane(&w, data);
    float *x = malloc(n * BENCH_COLS * sizeof *x), *y = malloc((size_t)n * rows * sizeof *y);
    void *buffer = aligned_alloc(64, slu_acts_bytes(n, BENCH_COLS));
    struct slu_acts acts;
    slu_acts_init(&acts, n, BENCH_COLS, x, BENCH_COLS, buffer);
    fill_acts(x, (size_t)n * BENCH_COLS, ACTS_SANE);
    kern->quantize(&acts, 0, n);
    double took[BENCH_RUNS];
    int runs = kern->name[0] == 'c' ? 1 : BENCH_RUNS;
    for (int i = 0; i < runs; i++) {
        double start = now_s();
        kern->mul[fmt->id](y, rows, &w, 0, rows, &acts, NULL, n);
        took[i] = now_s() - start;
    }
    qsort(took, (size_t)runs, sizeof *took, by_value);
    double bytes = (double)rows * BENCH_COLS * (double)at.bytes / 16 / BENCH_COLS;
    double s = took[runs / 2];
    printf("%-5s mul_%-7s n=%-3u %7.2f GB/s of weights %8.2f G weights*tokens/s\n", kern->name,
           fmt->name, n, bytes / s * 1e-9, (double)rows * BENCH_COLS * n / s * 1e-9);
    free(x);
    free(y);
    free(buffer);
}

static void bench_vectors(const struct slu_kern *kern, const char *filter)
{
    enum { N = 4096, REPS = 2000 };
    static float x[N], y[N];
    static uint16_t h[N];
    struct slu_acts acts;
    slu_acts_init(&acts, 1, N, x, N, aligned_alloc(64, slu_acts_bytes(1, N)));
    static const char *const names[] = {"quantize", "dot_f32",  "dot_f16",
                                        "axpy_f32", "axpy_f16", "f32_to_f16"};
    fill_acts(x, N, ACTS_SANE);
    fill_acts(y, N, ACTS_SANE);
    fill_halves((uint8_t *)h, sizeof h, 1);
    volatile float sink = 0;
    for (int which = 0; which < 6; which++) {
        if (filter && !strstr(names[which], filter)) {
            continue;
        }
        double start = now_s();
        for (int i = 0; i < REPS; i++) {
            switch (which) {
            case 0:
                kern->quantize(&acts, 0, 1);
                break;
            case 1:
                sink = sink + kern->dot_f32(x, y, N);
                break;
            case 2:
                sink = sink + kern->dot_f16(x, h, N);
                break;
            case 3:
                kern->axpy_f32(y, 1e-6f, x, N);
                break;
            case 4:
                kern->axpy_f16(y, 1e-6f, h, N);
                break;
            default:
                kern->f32_to_f16(h, x, N);
                break;
            }
        }
        printf("%-5s %-11s %16.2f G numbers/s\n", kern->name, names[which],
               (double)N * REPS / (now_s() - start) * 1e-9);
    }
    free(acts.q);
}

int bench_all(const struct slu_kern *const *kerns, int n_kerns, const char *filter)
{
    static const uint32_t tokens[] = {1, 2, 4, 16};
    uint8_t *data = aligned_alloc(64, BENCH_BYTES + (1 << 20));
    if (!data) {
        return 2;
    }
    for (int i = n_kerns - 1; i >= 0; i--) {
        for (unsigned id = 0; id < SLU_FMTS; id++) {
            char name[32];
            snprintf(name, sizeof name, "mul_%s", slu_fmt_get(id)->name);
            for (int t = 0; t < 4 && (!filter || strstr(name, filter)); t++) {
                bench_mul(kerns[i], slu_fmt_get(id), data, tokens[t]);
            }
        }
        bench_vectors(kerns[i], filter);
        bench_attn(kerns[i], filter);
    }
    free(data);
    return 0;
}
