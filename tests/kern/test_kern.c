#include <criterion/criterion.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "kern/kern.h"
#include "tests/kern/planes.h"

enum { TOKENS = 5, ROWS = 7, COLS = 768 };

static void make_acts(struct slu_acts *acts, const struct slu_kern *kern, uint32_t cols,
                      uint64_t *seed)
{
    float *x = malloc(TOKENS * cols * sizeof *x);
    for (size_t i = 0; i < TOKENS * cols; i++) {
        x[i] = test_noise(seed) * (float)(1 + i / 32 % 5);
    }
    slu_acts_init(acts, TOKENS, cols, x, cols, aligned_alloc(64, slu_acts_bytes(TOKENS, cols)));
    kern->quantize(acts, 0, TOKENS);
}

static void free_acts(struct slu_acts *acts)
{
    free((void *)(uintptr_t)acts->x);
    free(acts->q);
}

/* Products come within rounding of float64 on the dequantized numbers, and within half a step of
 * the activations of float64 on the unquantized ones. */
static void check_against_double(enum slu_fmt_id id)
{
    uint64_t seed = 100 + id;
    struct planes p;
    struct slu_acts acts;
    const struct slu_kern *kern = slu_kern_get(0);
    planes_init(&p, id, ROWS, COLS, NULL, &seed);
    make_acts(&acts, kern, COLS, &seed);
    float y[TOKENS * ROWS];
    kern->mul[id](y, ROWS, &p.mat, 0, ROWS, &acts, NULL, TOKENS);
    for (size_t t = 0; t < TOKENS; t++) {
        for (size_t r = 0; r < ROWS; r++) {
            double sum = 0, sum_x = 0, size = 0, steps = 0;
            for (size_t i = 0; i < COLS; i++) {
                double w = p.w[r * COLS + i], x = acts.x[t * COLS + i], xq = x;
                double d = acts.d[t * acts.g_stride + i / 32];
                if (p.mat.fmt->group) {
                    xq = d * acts.q[t * acts.q_stride + slu_acts_at(i)];
                    steps += fabs(w) * d / 2;
                }
                sum += w * xq;
                sum_x += w * x;
                size += p.magnitude[r * COLS + i] * fabs(xq);
            }
            /* A lane takes 24 terms (3 groups, and 3 minimums; or 24 floats), each rounded up to
             * three times before it is added; three more additions bring the lanes together. */
            unsigned terms = p.mat.fmt->group ? 6 : 24;
            double bound = (terms + 3 + 4) * 0x1p-24 * size, got = y[t * ROWS + r];
            cr_assert_leq(fabs(got - sum), bound, "%s: %g for %g", p.mat.fmt->name, got, sum);
            cr_assert_leq(fabs(got - sum_x), bound + 1.0001 * steps, "%s", p.mat.fmt->name);
        }
    }
    free_acts(&acts);
    planes_finish(&p);
}

/* Every format's product, against float64. */
Test(kern, products_in_double)
{
    for (unsigned id = 0; id < SLU_FMTS; id++) {
        check_against_double((enum slu_fmt_id)id);
    }
}

/* The kernels for this machine give the bits of plain C for rows, batches and lists. */
Test(kern, same_bits_as_c)
{
    uint64_t seed = 3;
    const struct slu_kern *c = slu_kern_get(0), *best = slu_kern_get(slu_cpu_flags());
    static const uint32_t tok[9] = {4, 0, 0, 3, 1, 2, 4, 4, 1};
    for (unsigned id = 0; id < SLU_FMTS; id++) {
        struct planes p;
        struct slu_acts acts;
        planes_init(&p, (enum slu_fmt_id)id, ROWS, COLS, NULL, &seed);
        make_acts(&acts, c, COLS, &seed);
        for (uint32_t n = 1; n <= 9; n++) {
            float want[9 * ROWS] = {0}, got[9 * ROWS] = {0};
            c->mul[id](want, ROWS, &p.mat, 0, ROWS, &acts, tok, n);
            best->mul[id](got, ROWS, &p.mat, 0, 2, &acts, tok, n);
            best->mul[id](got, ROWS, &p.mat, 2, ROWS, &acts, tok, n);
            cr_assert_eq(memcmp(got, want, sizeof got), 0, "%s, %u tokens", p.mat.fmt->name, n);
        }
        free_acts(&acts);
        planes_finish(&p);
    }
}

static void check_codes(const struct slu_kern *kern)
{
    enum { N = 33 };
    float x[N] = {0};
    struct slu_acts acts;
    /* Steps of 1: halves go to even. */
    x[0] = 127;
    x[1] = 0.5f;
    x[2] = 1.5f;
    x[3] = -2.5f;
    x[17] = -126.75f;
    slu_acts_init(&acts, 1, N, x, N, aligned_alloc(64, slu_acts_bytes(1, N)));
    memset(acts.q, 0x55, slu_acts_bytes(1, N));
    kern->quantize(&acts, 0, 1);
    const int8_t want[18] = {127, 0, 2, -2, [17] = -127};
    for (size_t i = 0; i < 18; i++) {
        cr_assert_eq(acts.q[slu_acts_at(i)], want[i]);
    }
    cr_assert_eq(acts.d[0], 1);
    cr_assert_eq(acts.s[0], 0);
    cr_assert_eq(acts.sums[0], 127);
    cr_assert_eq(acts.sums[1], -127);
    /* The second group is one zero, and what is left of 128 columns is filled up. */
    for (size_t i = 18; i < 128; i++) {
        cr_assert_eq(acts.q[slu_acts_at(i)], 0);
    }
    for (size_t g = 1; g < 4; g++) {
        cr_assert(acts.d[g] == 0 && acts.s[g] == 0);
        cr_assert(acts.sums[2 * g] == 0 && acts.sums[2 * g + 1] == 0);
    }
    free(acts.q);
}

/* Every column has a place of its own: the halves of 4 groups lie apart. */
Test(kern, columns_have_places)
{
    bool taken[512] = {false};
    for (size_t c = 0; c < 512; c++) {
        size_t at = slu_acts_at(c);
        cr_assert(at < 512 && !taken[at] && at / 128 == c / 128);
        taken[at] = true;
    }
    cr_assert_eq(slu_acts_at(128 + 32 + 16 + 3), 128 + 64 + 16 + 3);
}

/* Activations are rounded half to even, and the last group is filled with zeros. */
Test(kern, quantizes)
{
    check_codes(slu_kern_get(0));
    check_codes(slu_kern_get(slu_cpu_flags()));
}

static void check_odd(const struct slu_kern *kern, float odd, bool poisons)
{
    float x[32];
    struct slu_acts acts;
    for (int i = 0; i < 32; i++) {
        x[i] = poisons ? (float)i : 0;
    }
    x[9] = odd;
    slu_acts_init(&acts, 1, 32, x, 32, aligned_alloc(64, slu_acts_bytes(1, 32)));
    kern->quantize(&acts, 0, 1);
    for (int i = 0; i < 128; i++) {
        cr_assert_eq(acts.q[i], 0);
    }
    cr_assert_eq((bool)isnan(acts.d[0]), poisons);
    cr_assert_eq((bool)isnan(acts.s[0]), poisons);
    cr_assert(poisons || (acts.d[0] == 0 && acts.s[0] == 0));
    free(acts.q);
}

/* A NaN or an infinity makes all products with its group NaN; a number too small for its step to
 * have an inverse is zero. */
Test(kern, quantizes_odd_numbers)
{
    const struct slu_kern *kerns[2] = {slu_kern_get(0), slu_kern_get(slu_cpu_flags())};
    for (int i = 0; i < 2; i++) {
        check_odd(kerns[i], NAN, true);
        check_odd(kerns[i], -NAN, true);
        check_odd(kerns[i], INFINITY, true);
        check_odd(kerns[i], -INFINITY, true);
        check_odd(kerns[i], 1e-45f, false);
        check_odd(kerns[i], -3e-37f, false);
    }
}

/* No kernel is missing, whatever the processor. */
Test(kern, tables_are_full)
{
    const unsigned flags[] = {0, SLU_CPU_AVX2 & slu_cpu_flags(), ~0u};
    for (int i = 0; i < 3; i++) {
        const struct slu_kern *kern = slu_kern_get(flags[i]);
        for (unsigned id = 0; id < SLU_FMTS; id++) {
            cr_assert_not_null(kern->mul[id]);
        }
        cr_assert(kern->quantize && kern->row_f32 && kern->dot_f32 && kern->dot_f16);
        cr_assert(kern->axpy_f32 && kern->axpy_f16 && kern->f32_to_f16);
    }
    cr_assert_str_eq(slu_kern_get(0)->name, "c");
}

/* The exponential that softmax and gated units use is within two units in the last place, of any
 * float's; and nothing, infinite or no number where it has to be. */
Test(kern, exp_in_double)
{
    for (int i = -8700; i <= 8872; i++) {
        float x = (float)i * 0.01f + (float)(i % 7) * 1e-4f;
        x = x < SLU_EXP_X_MIN ? SLU_EXP_X_MIN : x;
        double want = exp((double)x), got = slu_exp(x);
        cr_assert_leq(fabs(got - want), 2 * 0x1p-23 * want, "exp(%g) is %g, not %g", (double)x, got,
                      want);
    }
    cr_expect_eq(slu_exp(0), 1);
    cr_expect_eq(slu_exp(-0.0f), 1);
    cr_expect_eq(slu_exp(-87.5f), 0);
    cr_expect_eq(slu_exp(-INFINITY), 0);
    cr_expect_eq(slu_exp(88.73f), INFINITY);
    cr_expect_eq(slu_exp(INFINITY), INFINITY);
    cr_expect(isnan(slu_exp(NAN)));
}
