/* Attention with AVX2. */
#include <math.h>

#include "kern/x86/avx2.h"

#define VEC        __m256
#define LANES      8
#define BLOCK_ROWS 4
#define ATTN(name) slu_avx2_attn_##name

#define vec_set           _mm256_set1_ps
#define vec_load          _mm256_loadu_ps
#define vec_store         _mm256_storeu_ps
#define vec_add           _mm256_add_ps
#define vec_sub           _mm256_sub_ps
#define vec_mul           _mm256_mul_ps
#define vec_div           _mm256_div_ps
#define vec_below         _mm256_min_ps /* x where it is a NaN */
#define vec_above         _mm256_max_ps
#define vec_fma           _mm256_fmadd_ps
#define vec_most(x, most) _mm256_max_ps(x, most) /* the second operand where one is a NaN */

ALWAYS_INLINE VEC vec_halves(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

ALWAYS_INLINE VEC vec_codes(const int8_t *p)
{
    __m128i codes = _mm_loadl_epi64((const __m128i *)(const void *)p);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

ALWAYS_INLINE VEC vec_steps(const uint16_t *p)
{
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

ALWAYS_INLINE VEC vec_power(VEC p, VEC t)
{
    __m256i power = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

ALWAYS_INLINE VEC vec_limit(VEC x, VEC p)
{
    __m256 below = _mm256_cmp_ps(x, _mm256_set1_ps(SLU_EXP_X_MIN), _CMP_LT_OQ);
    __m256 above = _mm256_cmp_ps(x, _mm256_set1_ps(SLU_EXP_X_MAX), _CMP_GT_OQ);
    p = _mm256_blendv_ps(_mm256_andnot_ps(below, p), _mm256_set1_ps(INFINITY), above);
    return _mm256_blendv_ps(p, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

ALWAYS_INLINE float vec_lanes(const VEC acc[4])
{
    return lanes_sum(_mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3])));
}

#include "kern/attn.inc"
