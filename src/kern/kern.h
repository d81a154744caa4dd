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
 *  - A quantized row product keeps 8 float lanes. For group g (32 columns), lane l first sums, in
 *    int32, value(code)*q over columns 4l..4l+3, then acc[l] = fma((float)sum, s_w*d_x, acc[l])
 *    where s_w is the scale of the weight's group (with 16-wide groups lanes 0-3 use the first
 *    scale of the 32, lanes 4-7 the second). Two-level scales are multiplied out first, in float:
 *    s_w = d * (float)sc. s_w*d_x is rounded to float before the fma.
 *  - A constant `offset` or a minimum goes to a second set of 8 lanes, lane g % 8:
 *    bias[g%8] = fma(m, d_x*sum_x, bias[g%8]) where sum_x = (float)sum of q over the group,
 *    d_x*sum_x is rounded to float, and m = -(offset*s_w) or the minimum, rounded to float.
 *    A format has an offset in this sense only where it is folded in here (Q4_0, Q5_0, MXFP4);
 *    Q6_K's is subtracted from the code before the integer product.
 *  - Lanes are added as t[i] = acc[i] + bias[i], then (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)).
 *  - Float formats and dot products keep 32 lanes: lane i % 32 takes column i by fma in order of
 *    i; then u[l] = (acc[l] + acc[l+8]) + (acc[l+16] + acc[l+24]) for l in 0..7, and the 8 u's
 *    are added as the t's above.
 *
 * Thread safety: kernels are pure; slu_kern_get may be called from any thread.
 */
#ifndef SLU_KERN_KERN_H
#define SLU_KERN_KERN_H

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

/* Activations of n tokens, each a row of cols floats. q, d and s are the same rows quantized by
 * groups of 32 (cols rounded up to a whole group, the rest zero): q[t*q_stride + i],
 * d[t*g_stride + g], s[t*g_stride + g] = d * (float)(sum of q over the group).
 * x is what float matrices are multiplied with: x[t*x_stride + i]. */
struct slu_acts {
    uint32_t n, cols;
    const float *x;
    int8_t *q; /* 32-byte aligned rows */
    float *d;
    float *s;
    size_t x_stride, q_stride, g_stride;
};

/* Bytes for q, d and s of n rows, and the carving of such a buffer (64-byte aligned). */
size_t slu_acts_bytes(uint32_t n, uint32_t cols);
void slu_acts_init(struct slu_acts *acts, uint32_t n, uint32_t cols, const float *x,
                   size_t x_stride, void *buffer);

/* y[i*y_stride + row] = row of w times token (tok ? tok[i] : i) of x, for rows lo..hi-1 and
 * i in 0..n-1. w->cols == x->cols. Quantized formats read q, d, s; float formats read x. */
typedef void (*slu_mul_fn)(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                           uint32_t hi, const struct slu_acts *x, const uint32_t *tok, uint32_t n);

struct slu_kern {
    const char *name; /* "c", "avx2" */
    slu_mul_fn mul[SLU_FMTS];
    /* x[n] -> q, d, s; n >= 1; q is written up to a multiple of 32. */
    void (*quantize)(int8_t *q, float *d, float *s, const float *x, uint32_t n);
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
};

/* Kernels for the given CPU flags (base/cpu.h). Static storage; never fails. */
const struct slu_kern *slu_kern_get(unsigned cpu_flags);

#endif
