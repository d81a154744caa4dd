/*
 * Quantized products with AVX-VNNI, whose vpdpbusd multiplies unsigned with signed bytes and adds
 * up four. Signed weights come 128 too large, and the activations' sums take that out again.
 *
 * The same code is built a second time for its test, with the longer encoding that AVX-512 VL has
 * of the same instructions, as few machines have both.
 */
#include "kern/x86/avx2.h"

#define NEEDS_UNSIGNED 1

#ifndef SLU_VNNI256
#define SLU_VNNI256 avxvnni
#define DPBUSD(...) _mm256_dpbusd_avx_epi32(__VA_ARGS__)
#define DPWSSD(...) _mm256_dpwssd_avx_epi32(__VA_ARGS__)
#else
#define DPBUSD(...) _mm256_dpbusd_epi32(__VA_ARGS__)
#define DPWSSD(...) _mm256_dpwssd_epi32(__VA_ARGS__)
#endif

struct kind;
ALWAYS_INLINE __m256i dot32(struct kind k, const __m256i values[2], __m256i q0, __m256i q1);
ALWAYS_INLINE __m256i dot16_scaled(__m256i sums, __m256i values, __m256i q, __m256i factors);

#include "kern/x86/pack256.h"

ALWAYS_INLINE __m256i dot32(struct kind k, const __m256i values[2], __m256i q0, __m256i q1)
{
    (void)k;
    return DPBUSD(DPBUSD(_mm256_setzero_si256(), values[0], q0), values[1], q1);
}

ALWAYS_INLINE __m256i dot16_scaled(__m256i sums, __m256i values, __m256i q, __m256i factors)
{
    return DPWSSD(sums, _mm256_maddubs_epi16(values, q), factors);
}

ALWAYS_INLINE __m256i panel_half(__m256i sum, const uint8_t codes[4][4 * PANEL_ROWS],
                                 const int8_t *q)
{
    for (int j = 0; j < 4; j++) {
        __m256i w = _mm256_load_si256((const __m256i *)(const void *)codes[j]);
        sum = DPBUSD(sum, w, load_quad(q + 4 * j));
    }
    return sum;
}

ALWAYS_INLINE __m256i panel_dot(const enum panel_kind kind, const uint8_t codes[8][4 * PANEL_ROWS],
                                const int8_t *q)
{
    (void)kind;
    return panel_half(panel_half(_mm256_setzero_si256(), codes, q), codes + 4, q + 64);
}

ALWAYS_INLINE __m256i panel_dot_halved(const uint8_t codes[8][4 * PANEL_ROWS], const int8_t *q,
                                       __m256i factors)
{
    __m256i a = panel_half(_mm256_setzero_si256(), codes, q);
    __m256i b = panel_half(_mm256_setzero_si256(), codes + 4, q + 64);
    __m256i first = _mm256_srai_epi32(_mm256_slli_epi32(factors, 16), 16);
    return _mm256_add_epi32(_mm256_mullo_epi32(a, first),
                            _mm256_mullo_epi32(b, _mm256_srai_epi32(factors, 16)));
}

#define QUANT_MUL(name, ...)                                                                       \
    static void mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,        \
                           uint32_t hi, const struct slu_acts *x, const uint32_t *tok, uint32_t n) \
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

#define TEXT_(x)    #x
#define TEXT(x)     TEXT_(x)
#define GLUE_(a, b) a##b
#define GLUE(a, b)  GLUE_(a, b)

extern const struct slu_kern GLUE(slu_kern_, SLU_VNNI256);
const struct slu_kern GLUE(slu_kern_, SLU_VNNI256) = {
    .name = TEXT(SLU_VNNI256),
    .mul =
        {
            [SLU_FMT_F32] = slu_avx2_mul_f32,
            [SLU_FMT_F16] = slu_avx2_mul_f16,
            [SLU_FMT_BF16] = slu_avx2_mul_bf16,
            [SLU_FMT_Q8_0] = mul_q8_0,
            [SLU_FMT_Q4_0] = mul_q4_0,
            [SLU_FMT_Q4_1] = mul_q4_1,
            [SLU_FMT_Q5_0] = mul_q5_0,
            [SLU_FMT_Q5_1] = mul_q5_1,
            [SLU_FMT_Q4_K] = mul_q4_k,
            [SLU_FMT_Q5_K] = mul_q5_k,
            [SLU_FMT_Q6_K] = mul_q6_k,
            [SLU_FMT_IQ4_NL] = mul_iq4_nl,
            [SLU_FMT_MXFP4] = mul_mxfp4,
        },
    .quantize = slu_avx2_quantize,
    .row_f32 = slu_c_row_f32,
    .dot_f32 = slu_avx2_dot_f32,
    .dot_f16 = slu_avx2_dot_f16,
    .axpy_f32 = slu_avx2_axpy_f32,
    .axpy_f16 = slu_avx2_axpy_f16,
    .f32_to_f16 = slu_avx2_f32_to_f16,
};
