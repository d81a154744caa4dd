/*
 * What the ARM files share. Only they may include it: everything here is inlined.
 */
#ifndef SLU_KERN_ARM_NEON_H
#define SLU_KERN_ARM_NEON_H

#include <arm_neon.h>

#include "kern/isa.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)) */
ALWAYS_INLINE float lanes_sum(float32x4_t low, float32x4_t high)
{
    float32x4_t t = vaddq_f32(low, high);
    float32x2_t u = vadd_f32(vget_low_f32(t), vget_high_f32(t));
    return vget_lane_f32(u, 0) + vget_lane_f32(u, 1);
}

void slu_neon_mul_f32(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_neon_mul_f16(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_neon_mul_bf16(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                       const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_neon_mul_q3e(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_neon_mul_q4e(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_neon_mul_q5e(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_neon_mul_q6e(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n);
float slu_neon_dot_f32(const float *a, const float *b, uint32_t n);
float slu_neon_dot_f16(const float *a, const uint16_t *b, uint32_t n);
void slu_neon_add_grid(double *sum, float a, const float *x, uint32_t n);
void slu_neon_axpy_f32(float *y, float a, const float *x, uint32_t n);
void slu_neon_axpy_f16(float *y, float a, const uint16_t *x, uint32_t n);
void slu_neon_f32_to_f16(uint16_t *out, const float *x, uint32_t n);
void slu_neon_attn_mul(const struct slu_attn_mul *mul);
void slu_neon_attn_floats(float *out, const struct slu_attn_mat *m, uint32_t k, uint32_t n);
float slu_neon_attn_weigh(float *x, uint32_t n, float *high, float *sum);
void slu_neon_attn_silu(float *h, const float *u, const float *gate_bias, const float *up_bias,
                        uint32_t n);
void slu_neon_attn_oai(float *h, const float *u, const float *gate_bias, const float *up_bias,
                       uint32_t n);
void slu_neon_quantize(const struct slu_acts *acts, uint32_t lo, uint32_t hi);

#endif
