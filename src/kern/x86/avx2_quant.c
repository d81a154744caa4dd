/*
 * Quantized products with AVX2. maddubs wants its first operand unsigned: signed values go in by
 * magnitude, with their sign moved to q. Its int16 sums of two don't saturate, for q is never -128:
 * 2 * 128 * 127 < 2^15. Two of them may be added where values are under 32.
 */
#include "kern/x86/avx2.h"

#define NEEDS_UNSIGNED 0

struct kind;
ALWAYS_INLINE __m256i dot32(struct kind k, const __m256i values[2], __m256i q0, __m256i q1);
ALWAYS_INLINE __m256i dot16_scaled(__m256i sums, __m256i values, __m256i q, __m256i factors);

#include "kern/x86/pack256.h"

ALWAYS_INLINE __m256i dot16_signed(__m256i values, __m256i q)
{
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(values), _mm256_sign_epi8(q, values));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

ALWAYS_INLINE __m256i dot32(struct kind k, const __m256i values[2], __m256i q0, __m256i q1)
{
    if (k.is_signed) {
        return _mm256_add_epi32(dot16_signed(values[0], q0), dot16_signed(values[1], q1));
    }
    __m256i pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16(values[0], q0), _mm256_maddubs_epi16(values[1], q1));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

ALWAYS_INLINE __m256i dot16_scaled(__m256i sums, __m256i values, __m256i q, __m256i factors)
{
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(values, q), factors));
}

/* Four columns of a half: 4 times two products in each of 16 lanes, where that doesn't overflow. */
ALWAYS_INLINE __m256i panel_pairs(const uint8_t codes[][4 * PANEL_ROWS], const int8_t *q, int n)
{
    __m256i sum = _mm256_setzero_si256();
    for (int j = 0; j < n; j++) {
        __m256i w = _mm256_load_si256((const __m256i *)(const void *)codes[j]);
        __m256i pairs = _mm256_maddubs_epi16(w, load_quad(q + 4 * j));
        sum = j ? _mm256_add_epi16(sum, pairs) : pairs;
    }
    return sum;
}

ALWAYS_INLINE __m256i panel_dot(const enum panel_kind kind, const uint8_t codes[8][4 * PANEL_ROWS],
                                const int8_t *q)
{
    const __m256i ones = _mm256_set1_epi16(1);
    if (kind != PANEL_SIGNED) {
        return _mm256_add_epi32(_mm256_madd_epi16(panel_pairs(codes, q, 4), ones),
                                _mm256_madd_epi16(panel_pairs(codes + 4, q + 64, 4), ones));
    }
    __m256i sum = _mm256_setzero_si256();
    for (int j = 0; j < 8; j++) {
        __m256i w = _mm256_load_si256((const __m256i *)(const void *)codes[j]);
        __m256i quad = load_quad(q + j / 4 * 64 + j % 4 * 4);
        sum = _mm256_add_epi32(sum, dot16_signed(w, quad));
    }
    return sum;
}

/* Values are under 64: two pairs of products at a time. */
ALWAYS_INLINE __m256i panel_dot_halved(const uint8_t codes[8][4 * PANEL_ROWS], const int8_t *q,
                                       __m256i factors)
{
    __m256i first = _mm256_and_si256(factors, _mm256_set1_epi32(0xffff));
    first = _mm256_or_si256(first, _mm256_slli_epi32(factors, 16));
    __m256i second = _mm256_srli_epi32(factors, 16);
    second = _mm256_blend_epi16(second, factors, 0xaa);
    __m256i a = _mm256_madd_epi16(panel_pairs(codes, q, 2), first);
    __m256i b = _mm256_madd_epi16(panel_pairs(codes + 2, q + 8, 2), first);
    __m256i c = _mm256_madd_epi16(panel_pairs(codes + 4, q + 64, 2), second);
    __m256i d = _mm256_madd_epi16(panel_pairs(codes + 6, q + 72, 2), second);
    return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
}

#define QUANT_MUL(name, ...)                                                                       \
    void slu_avx2_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,      \
                             uint32_t hi, const struct slu_acts *x, const uint32_t *tok,           \
                             uint32_t n)                                                           \
    {                                                                                              \
        mul_quant((struct kind){__VA_ARGS__}, y, y_stride, w, lo, hi, x, tok, n);                  \
    }

QUANT_MUL(q8_0, .bits = 8, .is_signed = true, .scale = SLU_SCALE_F16)
QUANT_MUL(q4_0, .bits = 4, .offset = 8, .scale = SLU_SCALE_F16)
QUANT_MUL(q4_1, .bits = 4, .scale = SLU_SCALE_F16, .min = SLU_MIN_F16)
QUANT_MUL(q5_0, .bits = 5, .offset = 16, .scale = SLU_SCALE_F16)
QUANT_MUL(q5_1, .bits = 5, .scale = SLU_SCALE_F16, .min = SLU_MIN_F16)
QUANT_MUL(q4_k, .bits = 4, .scale = SLU_SCALE_U8_SUPER, .min = SLU_MIN_U8_SUPER)
QUANT_MUL(q5_k, .bits = 5, .scale = SLU_SCALE_U8_SUPER, .min = SLU_MIN_U8_SUPER)
QUANT_MUL(q6_k, .bits = 6, .is_halved = true, .offset = 32, .scale = SLU_SCALE_I8_SUPER)
QUANT_MUL(iq4_nl, .bits = 4, .has_table = true, .is_signed = true, .scale = SLU_SCALE_F16)
QUANT_MUL(mxfp4, .bits = 4, .has_table = true, .offset = 12, .scale = SLU_SCALE_E8M0)
