/*
 * What the instruction sets offer to the dispatch, and to each other where one has nothing better
 * than the one below it. Private to kern.
 *
 * Thread safety: everything here is constant or pure.
 */
#ifndef SLU_KERN_ISA_H
#define SLU_KERN_ISA_H

#include <string.h>

#include "kern/kern.h"

extern const struct slu_kern slu_kern_c;
/* x86-64 builds only. */
extern const struct slu_kern slu_kern_avx2;
extern const struct slu_kern slu_kern_avxvnni;
extern const struct slu_kern slu_kern_avx512;

/* aarch64 builds only. */
extern const struct slu_kern slu_kern_dotprod;
extern const struct slu_kern slu_kern_i8mm;

/* Plain C, in the order of arithmetic that kern.h defines. */
void slu_c_mul_quant(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                     const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_c_mul_float(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                     const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_c_quantize(const struct slu_acts *acts, uint32_t lo, uint32_t hi);
void slu_c_row_f32(float *out, const struct slu_mat *w, uint32_t row);
float slu_c_dot_f32(const float *a, const float *b, uint32_t n);
float slu_c_dot_f16(const float *a, const uint16_t *b, uint32_t n);
void slu_c_axpy_f32(float *y, float a, const float *x, uint32_t n);
void slu_c_axpy_f16(float *y, float a, const uint16_t *x, uint32_t n);
void slu_c_f32_to_f16(uint16_t *out, const float *x, uint32_t n);
void slu_c_add_grid(double *sum, float a, const float *x, uint32_t n);
void slu_c_attn_mul(const struct slu_attn_mul *mul);
void slu_c_attn_floats(float *out, const struct slu_attn_mat *m, uint32_t k, uint32_t n);
float slu_c_attn_weigh(float *x, uint32_t n, float *high, float *sum);
void slu_c_attn_silu(float *h, const float *u, const float *gate_bias, const float *up_bias,
                     uint32_t n);
void slu_c_attn_oai(float *h, const float *u, const float *gate_bias, const float *up_bias,
                    uint32_t n);

/* The gated units for one neuron. Comparisons are written so that a NaN stays one. */
static inline float slu_silu(float g, float u)
{
    return g / (1.0f + slu_exp(-g)) * u;
}

static inline float slu_oai(float g, float u)
{
    g = g > 7.0f ? 7.0f : g;
    u = u > 7.0f ? 7.0f : u < -7.0f ? -7.0f : u;
    return g / (1.0f + slu_exp(-1.702f * g)) * (u + 1.0f);
}

/* One number of a matrix of attention. */
static inline float slu_attn_at(const struct slu_attn_mat *m, size_t k, size_t n)
{
    size_t at = k * m->stride + n;
    if (m->kind == SLU_ATTN_F32) {
        return ((const float *)m->codes)[at];
    }
    if (m->kind == SLU_ATTN_F16) {
        return slu_f16_to_f32(((const uint16_t *)m->codes)[at]);
    }
    bool is_down = m->kind == SLU_ATTN_Q8_DOWN;
    uint32_t bits =
        (uint32_t)m->scales[is_down ? k / 32 * m->scales_stride + n : k * m->scales_stride + n / 32]
        << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return (float)((const int8_t *)m->codes)[at] * scale;
}

/* The step of a group of activations from the bits of its largest magnitude, and its inverse.
 * Too small a group to have a finite inverse counts as zero (d = 0, inverse 0). One with a NaN or
 * an infinity in it gets the step NaN and codes of zero, so that every product with it is NaN:
 * hiding the fault would be worse. */
static inline float slu_quant_step(uint32_t magnitude_bits, float *ret_inverse)
{
    float magnitude;
    memcpy(&magnitude, &magnitude_bits, sizeof magnitude);
    *ret_inverse = 0;
    if (magnitude_bits >= 0x7f800000) {
        return __builtin_nanf("");
    }
    float d = magnitude / 127.0f;
    /* 1/d is infinite up to and including 2^-128. */
    if (d <= 0x1p-128f) {
        return 0;
    }
    *ret_inverse = 1.0f / d;
    return d;
}

#endif
