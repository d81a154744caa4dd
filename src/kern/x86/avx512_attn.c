/* Attention with AVX-512. */
#include <math.h>

#include "kern/x86/avx512.h"

#define VEC        __m512
#define LANES      16
#define BLOCK_ROWS 8
#define ATTN(name) slu_avx512_attn_##name

#define vec_set           _mm512_set1_ps
#define vec_load          _mm512_loadu_ps
#define vec_store         _mm512_storeu_ps
#define vec_add           _mm512_add_ps
#define vec_sub           _mm512_sub_ps
#define vec_mul           _mm512_mul_ps
#define vec_div           _mm512_div_ps
#define vec_below         _mm512_min_ps /* x where it is a NaN */
#define vec_above         _mm512_max_ps
#define vec_fma           _mm512_fmadd_ps
#define vec_most(x, most) _mm512_max_ps(x, most) /* the second operand where one is a NaN */

ALWAYS_INLINE VEC vec_halves(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

ALWAYS_INLINE VEC vec_codes(const int8_t *p)
{
    __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}

ALWAYS_INLINE VEC vec_steps(const uint16_t *p)
{
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

ALWAYS_INLINE VEC vec_power(VEC p, VEC t)
{
    __m512i power = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
}

ALWAYS_INLINE VEC vec_limit(VEC x, VEC p)
{
    __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(SLU_EXP_X_MIN), _CMP_NLT_UQ);
    __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_set1_ps(SLU_EXP_X_MAX), _CMP_GT_OQ);
    p = _mm512_mask_mov_ps(_mm512_maskz_mov_ps(kept, p), above, _mm512_set1_ps(INFINITY));
    return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

ALWAYS_INLINE float vec_lanes(const VEC acc[2])
{
    __m256 u[2];
    for (int i = 0; i < 2; i++) {
        u[i] = _mm256_add_ps(_mm512_castps512_ps256(acc[i]), _mm512_extractf32x8_ps(acc[i], 1));
    }
    return lanes_sum(_mm256_add_ps(u[0], u[1]));
}

#include "kern/attn.inc"
