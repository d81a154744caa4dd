/*
 * Kernels: products of quantized matrices with activations, and the small vector operations of
 * attention. One struct of function pointers, filled first with plain C and then, ISA by ISA, with
 * faster ones; nothing else in the tree asks about the CPU.
 *
 * Every kernel has one defined order of arithmetic, so that every ISA, batch size and split over
 * threads gives the same bits:
 *
 *  - Activations are quantized by groups of 32: d = max|x| / 127, q = round-half-even(x / d)
 *    computed as x * (1/d), q = 0 and d = 0 where the group is all zero, or so small that 1/d
 *    is infinite. A NaN or an infinity makes d and s of its group NaN (and q = 0), and with them
 *    every quantized product of that token.
 *  - A quantized row product first sums up each group g of 32 columns exactly, in int32:
 *    i = sum of (value(code) - offset) * q. With 16-wide groups (Q6_K), i is the sum of the two
 *    halves' sums, each times its own 8-bit scale, and s_w is the super-group's d; else s_w is the
 *    scale of the weight's group. Two-level scales are multiplied out first, in float:
 *    s_w = d * (float)sc.
 *  - It keeps 8 float lanes; group g goes to lane l = g % 8: acc[l] = fma((float)i, s_w*d_x,
 *    acc[l]), with s_w*d_x rounded to float before. Where the format has minimums, follows
 *    acc[l] = fma(m, s_x, acc[l]), with m the minimum, rounded to float, and s_x below.
 *  - Lanes are added as (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)).
 *  - The q*e formats, which have one scale a row, keep 16 lanes: lane 4 * (g % 4) + k takes columns
 *    4k .. 4k+3 and 16+4k .. 16+4k+3 of group g, whose products table[code] * q are summed exactly
 *    to i: acc[l] = fma((float)i, d_x, acc[l]). Then u[l] = acc[l] + acc[l+8], and the 8 u's are
 *    added as the t's above. Where there is room for escapes, 8 more lanes take those of the row:
 *    escape j goes to lane j % 8 by fma(value, x, lane), with x the activation as it was before it
 *    was quantized; they are added likewise to e, and the row's product is
 *    scale * fma(escape, e, sum), else scale * sum.
 *  - Float formats and dot products keep 32 lanes: lane i % 32 takes column i by fma in order of
 *    i; then u[l] = (acc[l] + acc[l+8]) + (acc[l+16] + acc[l+24]) for l in 0..7, and the 8 u's
 *    are added as the t's above.
 *
 * So a group costs one integer and one rounded number, whatever the width of the registers: eight
 * groups side by side for one token, or eight or sixteen rows side by side for many tokens.
 *
 * Thread safety: kernels are pure; slu_kern_get may be called from any thread.
 */
#ifndef SLU_KERN_KERN_H
#define SLU_KERN_KERN_H

#include "kern/attn.h"
#include "kern/format.h"

/* Sums that must come out the same whatever order their terms arrive in are kept in doubles, of
 * terms rounded to multiples of 2^-32: as long as terms stay below 2^19 and sums below 2^20, every
 * addition is exact. Beyond that the order can touch no more than the double's last bit, 2^-29 of
 * what the float that is made of it resolves. Infinities and NaN stay what they are. */
static inline double slu_grid(double term)
{
    const double shift = 0x1.8p+20; /* so large that the last bit of its sums is worth 2^-32 */
    return term + shift - shift;
}

/* Activations of n tokens, each a row of cols floats. q, d, s and sums are the same rows quantized
 * by groups of 32:
 *   q     column c of token t is q[t*q_stride + slu_acts_at(c)]; columns go on as zeros up to a
 *         multiple of 128
 *   d     d[t*g_stride + g]
 *   s     s[t*g_stride + g] = d * (float)(sum of q over the group)
 *   sums  sums[2*(t*g_stride + g) + k] = sum of q over the first (k = 0) and the second 16 columns
 * d, s and sums go on as zeros up to a whole q. x is what float matrices are multiplied with:
 * x[t*x_stride + i]. */
struct slu_acts {
    uint32_t n, cols;
    const float *x;
    int8_t *q; /* 64-byte aligned rows, all four */
    float *d;
    float *s;
    int16_t *sums;
    size_t x_stride, q_stride, g_stride;
};

/* Where a column lies in a row of q: of every 4 groups the first halves come first and then the
 * second ones, as 64 bytes of nibbles come apart into low and high ones. */
static inline size_t slu_acts_at(size_t c)
{
    return c / 128 * 128 + c / 16 % 2 * 64 + c / 32 % 4 * 16 + c % 16;
}

/* Bytes for q, d, s and sums of n rows, and the carving of such a buffer (64-byte aligned). */
size_t slu_acts_bytes(uint32_t n, uint32_t cols);
void slu_acts_init(struct slu_acts *acts, uint32_t n, uint32_t cols, const float *x,
                   size_t x_stride, void *buffer);

/* y[i*y_stride + row] = row of w times token (tok ? tok[i] : i) of x, for rows lo..hi-1 and
 * i in 0..n-1. w->cols == x->cols. Quantized formats read q, d, s, sums, and
 * the escapes of q*e formats x; float formats read x. y overlaps nothing that is read, and what is
 * to be written of it may serve as scratch. */
typedef void (*slu_mul_fn)(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                           uint32_t hi, const struct slu_acts *x, const uint32_t *tok, uint32_t n);

/* Gated units. */
enum slu_glu {
    SLU_GLU_SILU, /* silu(g) * u */
    SLU_GLU_OAI,  /* g = min(g,7), u = clamp(u,-7,7): g * sigmoid(1.702 g) * (u + 1) */
    SLU_GLUS,
};

struct slu_kern {
    const char *name; /* "c", "avx2" */
    slu_mul_fn mul[SLU_FMTS];
    /* Rows lo .. hi-1 of x -> q, d, s, sums. */
    void (*quantize)(const struct slu_acts *acts, uint32_t lo, uint32_t hi);
    /* One row of w as floats, out[cols]; exact to the format's definition with one rounding per
     * operation: s_w as above, v = s_w * (value - offset), then v + min. */
    void (*row_f32)(float *out, const struct slu_mat *w, uint32_t row);
    float (*dot_f32)(const float *a, const float *b, uint32_t n);
    float (*dot_f16)(const float *a, const uint16_t *b, uint32_t n);
    /* y[i] = fma(a, x[i], y[i]) */
    void (*axpy_f32)(float *y, float a, const float *x, uint32_t n);
    void (*axpy_f16)(float *y, float a, const uint16_t *x, uint32_t n);
    void (*f32_to_f16)(uint16_t *out, const float *x, uint32_t n); /* round to nearest even */
    /* sum[i] += slu_grid(a * x[i]), the product exact, in double. */
    void (*add_grid)(double *sum, float a, const float *x, uint32_t n);
    /* Of attention, see attn.h: its product; k x n numbers as floats, without gaps; and a part of
     * a softmax: *high rises to the largest of x if that is more, *sum shrinks accordingly, x
     * becomes exp(x - *high), and what that sums up to is added to *sum. Returns by how much
     * everything shrinks that was weighed before: 1 if *high stayed. */
    void (*attn_mul)(const struct slu_attn_mul *mul);
    void (*attn_floats)(float *out, const struct slu_attn_mat *m, uint32_t k, uint32_t n);
    float (*attn_weigh)(float *x, uint32_t n, float *high, float *sum);
    /* h[i] = what the unit makes of g = h[i] and u[i], to which biases (nullable) are added first:
     * x / (1 + exp(-x)) * y with attn.h's exp, each operation rounded. */
    void (*glu[SLU_GLUS])(float *h, const float *u, const float *gate_bias, const float *up_bias,
                          uint32_t n);
};

/* Kernels for the given CPU flags (base/cpu.h). Static storage; never fails. */
const struct slu_kern *slu_kern_get(unsigned cpu_flags);

#endif
