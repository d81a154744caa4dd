/*
 * What the AVX2 files share. Only they may include it: everything here is inlined, since a copy
 * left to the linker could be picked for machines without AVX2.
 */
#ifndef SLU_KERN_X86_AVX2_H
#define SLU_KERN_X86_AVX2_H

#include <immintrin.h>

#include "kern/isa.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)) */
ALWAYS_INLINE float lanes_sum(__m256 t)
{
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

void slu_avx2_mul_f32(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_avx2_mul_f16(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n);
void slu_avx2_mul_bf16(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                       const struct slu_acts *x, const uint32_t *tok, uint32_t n);
float slu_avx2_dot_f32(const float *a, const float *b, uint32_t n);
float slu_avx2_dot_f16(const float *a, const uint16_t *b, uint32_t n);
void slu_avx2_axpy_f32(float *y, float a, const float *x, uint32_t n);
void slu_avx2_add_grid(double *sum, float a, const float *x, uint32_t n);
void slu_avx2_axpy_f16(float *y, float a, const uint16_t *x, uint32_t n);
void slu_avx2_f32_to_f16(uint16_t *out, const float *x, uint32_t n);
void slu_avx2_attn_mul(const struct slu_attn_mul *mul);
void slu_avx2_attn_floats(float *out, const struct slu_attn_mat *m, uint32_t k, uint32_t n);
float slu_avx2_attn_weigh(float *x, uint32_t n, float *high, float *sum);
void slu_avx2_attn_silu(float *h, const float *u, const float *gate_bias, const float *up_bias,
                        uint32_t n);
void slu_avx2_attn_oai(float *h, const float *u, const float *gate_bias, const float *up_bias,
                       uint32_t n);
void slu_avx2_quantize(const struct slu_acts *acts, uint32_t lo, uint32_t hi);

/* One function for each quantized format. */
#define QUANT_MUL_DECLARE(name)                                                                    \
    void slu_avx2_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,      \
                             uint32_t hi, const struct slu_acts *x, const uint32_t *tok,           \
                             uint32_t n);
QUANT_MUL_DECLARE(q8_0)
QUANT_MUL_DECLARE(q4_0)
QUANT_MUL_DECLARE(q4_1)
QUANT_MUL_DECLARE(q5_0)
QUANT_MUL_DECLARE(q5_1)
QUANT_MUL_DECLARE(q4_k)
QUANT_MUL_DECLARE(q5_k)
QUANT_MUL_DECLARE(q6_k)
QUANT_MUL_DECLARE(iq4_nl)
QUANT_MUL_DECLARE(mxfp4)

#endif
