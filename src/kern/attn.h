/*
 * Kernels of attention, and of the exponential that it and the gated units share. Keys and values
 * are kept in tiles (model/kv_cache.h), so that both of attention's products are the same one:
 *
 *   scores[rows x positions] = queries[rows x k_dim] . keys[k_dim x positions]
 *   out[rows x v_dim]       += weights[rows x positions] . values[positions x v_dim]
 *
 * The order of arithmetic, for all instruction sets:
 *
 *  - An element of a product is one chain of fma over k, in order: c = fma(a[k], b[k], c). It
 *    begins with 0, or with c times its row's factor, rounded. Elements don't depend on each
 *    other, so neither the number of rows nor that of columns matters.
 *  - A number of a matrix in codes is (float)code * scale, rounded.
 *  - exp(x): t = fma(x, log2 e, 1.5 * 2^23), n = t - 1.5 * 2^23, r = fma(n, -ln2_high, x),
 *    r = fma(n, -ln2_low, r), q by Horner's rule with fma from the last coefficient on,
 *    p = fma(q, r * r, r) + 1, times 2^n by adding to p's exponent. 0 below -87, infinite above
 *    88.72283; a NaN stays one. It is off by 2 units in the last place at most.
 *  - A sum of exponentials keeps 32 lanes, lane i % 32 taking term i, which are added up as those
 *    of a dot product are (kern.h).
 *
 * Thread safety: pure.
 */
#ifndef SLU_KERN_ATTN_H
#define SLU_KERN_ATTN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum slu_attn_kind {
    SLU_ATTN_F32,
    SLU_ATTN_F16,
    SLU_ATTN_Q8_DOWN,  /* a scale for 32 rows of a column: keys */
    SLU_ATTN_Q8_ALONG, /* a scale for 32 columns of a row: values */
    SLU_ATTN_KINDS
};

/* Numbers of up to k rows: row i begins at element i * stride. Codes are int8, scales the upper
 * halves of floats: of (i, j) at scales[i/32 * scales_stride + j] where they go down, and at
 * scales[i * scales_stride + j/32] where they go along. */
struct slu_attn_mat {
    enum slu_attn_kind kind;
    const void *codes;
    size_t stride;
    const uint16_t *scales;
    size_t scales_stride;
};

/* The matrix from row lo on; a multiple of 32 where scales go down. */
static inline struct slu_attn_mat slu_attn_from_row(struct slu_attn_mat m, size_t lo)
{
    static const size_t bytes[] = {4, 2, 1, 1};
    size_t step = m.kind == SLU_ATTN_Q8_DOWN ? lo / 32 : lo;
    m.codes = (const char *)m.codes + lo * m.stride * bytes[m.kind];
    m.scales = m.scales ? m.scales + step * m.scales_stride : NULL;
    return m;
}

/* The matrix from column lo on; a multiple of 32 where scales go along. */
static inline struct slu_attn_mat slu_attn_from_col(struct slu_attn_mat m, size_t lo)
{
    static const size_t bytes[] = {4, 2, 1, 1};
    size_t step = m.kind == SLU_ATTN_Q8_ALONG ? lo / 32 : lo;
    m.codes = (const char *)m.codes + lo * bytes[m.kind];
    m.scales = m.scales ? m.scales + step : NULL;
    return m;
}

/* c[rows x n] = c * factor + a[rows x k] . b[k x n] */
struct slu_attn_mul {
    float *c;
    size_t c_stride;
    const float *factor; /* rows of them; NULL: c begins with 0 */
    const float *a;
    size_t a_stride;
    struct slu_attn_mat b;
    uint32_t rows, k, n;
    const void *next; /* what will be wanted after it, brought into the cache meanwhile, as far as
                         there is time for that; NULL, or if b is of floats: nothing */
    size_t next_bytes;
};

#define SLU_EXP_LOG2E    0x1.715476p+0f
#define SLU_EXP_LN2_HIGH 0x1.62e43p-1f
#define SLU_EXP_LN2_LOW  -0x1.05c61p-29f
#define SLU_EXP_SHIFT    0x1.8p+23f
#define SLU_EXP_C0       0x1.fffffep-2f
#define SLU_EXP_C1       0x1.555498p-3f
#define SLU_EXP_C2       0x1.5557dp-5f
#define SLU_EXP_C3       0x1.123638p-7f
#define SLU_EXP_C4       0x1.6ab0ap-10f
#define SLU_EXP_X_MIN    -87.0f
#define SLU_EXP_X_MAX    88.72283f

/* One exponential. */
static inline float slu_exp(float x)
{
    float t = __builtin_fmaf(x, SLU_EXP_LOG2E, SLU_EXP_SHIFT);
    float n = t - SLU_EXP_SHIFT;
    float r = __builtin_fmaf(n, -SLU_EXP_LN2_HIGH, x);
    r = __builtin_fmaf(n, -SLU_EXP_LN2_LOW, r);
    float q = __builtin_fmaf(SLU_EXP_C4, r, SLU_EXP_C3);
    q = __builtin_fmaf(q, r, SLU_EXP_C2);
    q = __builtin_fmaf(q, r, SLU_EXP_C1);
    q = __builtin_fmaf(q, r, SLU_EXP_C0);
    float p = __builtin_fmaf(q, r * r, r) + 1.0f;
    uint32_t bits, power;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&power, &t, sizeof power);
    bits += power << 23;
    memcpy(&p, &bits, sizeof p);
    p = x < SLU_EXP_X_MIN ? 0.0f : p;
    p = x > SLU_EXP_X_MAX ? __builtin_inff() : p;
    return x == x ? p : x;
}

/* A step that 16 bits hold, from a group's largest magnitude: the upper half of the float
 * magnitude / 127, rounded up, so that no code passes 127; its inverse too. A group that is too
 * small for a finite inverse is all zero (step 0); one with a NaN or an infinity gets a step of
 * NaN and codes of zero. */
static inline uint16_t slu_attn_step(float magnitude, float *ret_inverse)
{
    float step = magnitude / 127.0f;
    uint32_t bits;
    *ret_inverse = 0;
    memcpy(&bits, &step, sizeof bits);
    if (!(magnitude <= 0x1.fffffep+127f)) {
        return 0x7fc0;
    }
    bits = (bits + 0xffff) & 0xffff0000;
    memcpy(&step, &bits, sizeof step);
    if (step <= 0x1p-126f) {
        return 0;
    }
    *ret_inverse = 1.0f / step;
    return (uint16_t)(bits >> 16);
}

#endif
