/* Attention's kernels against plain C, and their timing. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/kern/checkasm.h"

#define ROWS_MAX 21
#define K_MAX    100
#define N_MAX    100

static const char *const kind_names[] = {"f32", "f16", "q8 down", "q8 along"};

/* A matrix of k x n, its planes ending where pages do. */
struct case_mat {
    struct slu_attn_mat m;
    struct guarded codes, scales;
};

static void case_mat_init(struct case_mat *c, enum slu_attn_kind kind, uint32_t k, uint32_t n,
                          enum acts acts)
{
    static const size_t bytes[] = {4, 2, 1, 1};
    bool is_down = kind == SLU_ATTN_Q8_DOWN;
    size_t stride = n + below(3), scales_stride = is_down ? stride : (n + 31) / 32 + below(2);
    size_t codes = (k - 1) * stride + n;
    size_t scales = ((is_down ? (k + 31) / 32 : k) - 1) * scales_stride;
    scales += is_down ? n : (n + 31) / 32;
    guarded_init(&c->codes, codes * bytes[kind], bytes[kind]);
    guarded_init(&c->scales, scales * sizeof(uint16_t), sizeof(uint16_t));
    c->m = (struct slu_attn_mat){kind, c->codes.data, stride,
                                 (const uint16_t *)(const void *)c->scales.data, scales_stride};
    if (kind == SLU_ATTN_F32) {
        fill_acts((float *)(void *)c->codes.data, codes, acts);
    } else if (kind == SLU_ATTN_F16 && acts != ACTS_ODD) {
        fill_halves(c->codes.data, codes * 2, 1);
    } else {
        fill_random(c->codes.data, codes * bytes[kind]);
    }
    for (size_t i = 0; i < scales; i++) {
        float scale = fabsf(noise()) * 0.01f;
        uint32_t bits;
        memcpy(&bits, &scale, sizeof bits);
        uint16_t half =
            acts == ACTS_ODD && below(8) == 0 ? (uint16_t)below(1 << 16) : (uint16_t)(bits >> 16);
        memcpy(c->scales.data + 2 * i, &half, sizeof half);
    }
}

static void case_mat_finish(struct case_mat *c)
{
    guarded_finish(&c->codes);
    guarded_finish(&c->scales);
}

/* The product in a guarded buffer that begins as `start`, against `want`. */
static bool run_mul(const struct slu_kern *kern, const struct slu_attn_mul *mul, const float *start,
                    const float *want)
{
    struct guarded c;
    size_t n_floats = (mul->rows - 1) * mul->c_stride + mul->n;
    guarded_init(&c, n_floats * sizeof(float), sizeof(float));
    memcpy(c.data, start, n_floats * sizeof(float));
    struct slu_attn_mul here = *mul;
    here.c = (float *)(void *)c.data;
    kern->attn_mul(&here);
    bool ok = same(here.c, want, n_floats);
    guarded_finish(&c);
    return ok;
}

static bool check_mul_case(const struct slu_kern *c_kern, const struct slu_kern *kern,
                           enum slu_attn_kind kind, enum acts acts)
{
    uint32_t rows = 1 + below(ROWS_MAX), k = 1 + below(K_MAX), n = 1 + below(N_MAX);
    if (below(2)) {
        n = (n + 15) / 16 * 16;
    }
    struct case_mat b;
    struct guarded a, factor;
    case_mat_init(&b, kind, k, n, acts);
    struct slu_attn_mul mul = {
        .c_stride = n + below(4), .a_stride = k + below(4), .b = b.m, .rows = rows, .k = k, .n = n};
    size_t n_a = (rows - 1) * mul.a_stride + k, n_c = (rows - 1) * mul.c_stride + n;
    guarded_init(&a, n_a * sizeof(float), sizeof(float));
    guarded_init(&factor, rows * sizeof(float), sizeof(float));
    fill_acts((float *)(void *)a.data, n_a, acts);
    fill_acts((float *)(void *)factor.data, rows, ACTS_SANE);
    mul.a = (const float *)(const void *)a.data;
    mul.factor = below(3) ? (const float *)(const void *)factor.data : NULL;
    float *start = malloc(n_c * sizeof *start), *want = malloc(n_c * sizeof *want);
    fill_canary(start, n_c);
    for (size_t row = 0; mul.factor && row < rows; row++) {
        fill_acts(start + row * mul.c_stride, n, acts);
    }
    memcpy(want, start, n_c * sizeof *want);
    mul.c = want;
    c_kern->attn_mul(&mul);
    bool ok = run_mul(kern, &mul, start, want);
    if (!ok) {
        printf("%s: attn_mul differs: %s, %u x %u x %u%s\n", kern->name, kind_names[kind], rows, k,
               n, mul.factor ? ", added" : "");
    }
    /* A row alone, and columns from some place on, have the numbers that they have among others. */
    for (uint32_t row = 0; ok && row < rows; row++) {
        struct slu_attn_mul one = mul;
        uint32_t col = n > 32 ? 32 * below(n / 32) : 0;
        one.b = slu_attn_from_col(mul.b, col);
        one.a += row * mul.a_stride;
        one.factor = mul.factor ? mul.factor + row : NULL;
        one.rows = 1;
        one.n = n - col;
        size_t at = row * mul.c_stride + col;
        ok = run_mul(kern, &one, start + at, want + at);
        if (!ok) {
            printf("%s: attn_mul: row %u of %u differs when alone\n", kern->name, row, rows);
        }
    }
    free(start);
    free(want);
    case_mat_finish(&b);
    guarded_finish(&a);
    guarded_finish(&factor);
    return ok;
}

static bool check_floats(const struct slu_kern *c_kern, const struct slu_kern *kern,
                         enum slu_attn_kind kind, enum acts acts)
{
    uint32_t k = 1 + below(K_MAX), n = 1 + below(N_MAX);
    struct case_mat m;
    struct guarded out;
    case_mat_init(&m, kind, k, n, acts);
    guarded_init(&out, (size_t)k * n * sizeof(float), sizeof(float));
    float *want = malloc((size_t)k * n * sizeof *want);
    c_kern->attn_floats(want, &m.m, k, n);
    kern->attn_floats((float *)(void *)out.data, &m.m, k, n);
    bool ok = same((float *)(void *)out.data, want, (size_t)k * n);
    free(want);
    guarded_finish(&out);
    case_mat_finish(&m);
    return report(ok, kern, "attn_floats");
}

static bool check_weigh(const struct slu_kern *c_kern, const struct slu_kern *kern, int round)
{
    uint32_t n = 1 + below(80);
    struct guarded x;
    guarded_init(&x, n * sizeof(float), sizeof(float));
    float *got = (float *)(void *)x.data, *want = malloc(n * sizeof *want);
    fill_acts(got, n, (enum acts)(round % N_ACTS));
    for (uint32_t i = 0; i < n && round % 3; i++) {
        got[i] *= 30;
    }
    memcpy(want, got, n * sizeof *want);
    float high = round % 2 ? -INFINITY : noise() * 20, sum = round % 2 ? 0 : fabsf(noise());
    float highs[2] = {high, high}, sums[2] = {sum, sum}, shrinks[2];
    shrinks[0] = c_kern->attn_weigh(want, n, &highs[0], &sums[0]);
    shrinks[1] = kern->attn_weigh(got, n, &highs[1], &sums[1]);
    /* Which of two zeros is the largest is of no account. */
    bool ok = same(got, want, n) && same(&sums[0], &sums[1], 1) &&
              same(&shrinks[0], &shrinks[1], 1) && highs[0] == highs[1];
    free(want);
    guarded_finish(&x);
    return report(ok, kern, "attn_weigh");
}

static bool check_glu(const struct slu_kern *c_kern, const struct slu_kern *kern, int round)
{
    uint32_t n = 1 + below(100);
    struct guarded in[4];
    float *x[4], *want = malloc(n * sizeof *want);
    for (int i = 0; i < 4; i++) {
        guarded_init(&in[i], n * sizeof(float), sizeof(float));
        x[i] = (float *)(void *)in[i].data;
        fill_acts(x[i], n, (enum acts)(round % N_ACTS));
        for (uint32_t j = 0; j < n && round % 3; j++) {
            x[i][j] *= 10;
        }
    }
    enum slu_glu glu = (enum slu_glu)(round / N_ACTS % SLU_GLUS);
    const float *gate_bias = below(2) ? x[2] : NULL, *up_bias = below(2) ? x[3] : NULL;
    memcpy(want, x[0], n * sizeof *want);
    c_kern->glu[glu](want, x[1], gate_bias, up_bias, n);
    kern->glu[glu](x[0], x[1], gate_bias, up_bias, n);
    bool ok = same(x[0], want, n);
    free(want);
    for (int i = 0; i < 4; i++) {
        guarded_finish(&in[i]);
    }
    return report(ok, kern, "glu");
}

bool check_attn(const struct slu_kern *c_kern, const struct slu_kern *kern)
{
    bool ok = true;
    for (int round = 0; ok && round < 400; round++) {
        enum slu_attn_kind kind = (enum slu_attn_kind)(round % SLU_ATTN_KINDS);
        enum acts acts = (enum acts)(round / SLU_ATTN_KINDS % N_ACTS);
        ok &= check_mul_case(c_kern, kern, kind, acts);
        ok &= check_floats(c_kern, kern, kind, acts);
        ok &= check_weigh(c_kern, kern, round);
        ok &= check_glu(c_kern, kern, round);
    }
    return ok;
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A tile of 64 positions times queries of 64 numbers, from the cache: billions of multiply-adds a
 * second; and exponentials of a tile's scores. */
void bench_attn(const struct slu_kern *kern, const char *filter)
{
    enum { DIM = 64, ROWS = 64, REPS = 2000 };
    static float c[ROWS * DIM], a[ROWS * DIM], factor[ROWS];
    int reps = kern->name[0] == 'c' ? REPS / 50 : REPS;
    fill_acts(a, ROWS * DIM, ACTS_SANE);
    for (int kind = 0; kind < SLU_ATTN_KINDS; kind++) {
        struct case_mat b;
        case_mat_init(&b, (enum slu_attn_kind)kind, DIM, DIM, ACTS_SANE);
        for (uint32_t rows = 1; rows <= ROWS; rows *= 8) {
            struct slu_attn_mul mul = {.c = c,
                                       .c_stride = DIM,
                                       .factor = factor,
                                       .a = a,
                                       .a_stride = DIM,
                                       .b = b.m,
                                       .rows = rows,
                                       .k = DIM,
                                       .n = DIM};
            double start = now_s();
            for (int i = 0; i < reps && (!filter || strstr("attn_mul", filter)); i++) {
                kern->attn_mul(&mul);
            }
            double s = now_s() - start;
            if (!filter || strstr("attn_mul", filter)) {
                printf("%-5s attn_mul %-8s n=%-3u %9.2f G multiply-adds/s\n", kern->name,
                       kind_names[kind], rows, (double)rows * DIM * DIM * reps / s * 1e-9);
            }
        }
        case_mat_finish(&b);
    }
    if (!filter || strstr("attn_weigh", filter)) {
        float high = 0, sum = 0;
        double start = now_s();
        for (int i = 0; i < reps; i++) {
            kern->attn_weigh(a + i % ROWS * DIM, DIM, &high, &sum);
        }
        printf("%-5s attn_weigh %17.2f G numbers/s\n", kern->name,
               (double)DIM * reps / (now_s() - start) * 1e-9);
    }
}
