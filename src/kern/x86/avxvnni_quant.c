/*
 * Quantized products with AVX-VNNI, whose vpdpbusd multiplies unsigned with signed bytes and adds
 * up four. Signed weights come 128 too large, and the activations' sums take that out again.
 */
#include "kern/x86/avxvnni.h"

#define NEEDS_UNSIGNED 1

struct kind;
ALWAYS_INLINE __m256i dot32(struct kind k, const __m256i values[2], __m256i q0, __m256i q1,
                            const uint8_t *magnitudes);
ALWAYS_INLINE __m256i dot16_scaled(__m256i sums, __m256i values, __m256i q, __m256i factors);
ALWAYS_INLINE __m256i add_level(struct kind k, int level, __m256i a, __m256i b);
ALWAYS_INLINE __m256i widen(struct kind k, int level, __m256i sums);

#include "kern/x86/pack256.inc"

ALWAYS_INLINE __m256i dot32(struct kind k, const __m256i values[2], __m256i q0, __m256i q1,
                            const uint8_t *magnitudes)
{
    (void)k;
    (void)magnitudes;
    return DPBUSD(DPBUSD(_mm256_setzero_si256(), values[0], q0), values[1], q1);
}

ALWAYS_INLINE __m256i add_level(struct kind k, int level, __m256i a, __m256i b)
{
    (void)k;
    (void)level;
    return _mm256_add_epi32(a, b);
}

ALWAYS_INLINE __m256i widen(struct kind k, int level, __m256i sums)
{
    (void)k;
    (void)level;
    return sums;
}

ALWAYS_INLINE __m256i dot16_scaled(__m256i sums, __m256i values, __m256i q, __m256i factors)
{
    return DPWSSD(sums, _mm256_maddubs_epi16(values, q), factors);
}

/* Half h of a group. */
ALWAYS_INLINE void panel_half(const int n_toks, const uint8_t codes[8][4 * PANEL_ROWS],
                              const struct panel_token *toks, size_t at, int h,
                              __m256i sums[2][BLOCK])
{
    for (int j = 0; j < 4; j++) {
        __m256i a = load_rows(codes[4 * h + j], 0), b = load_rows(codes[4 * h + j], 1);
        for (int t = 0; t < n_toks; t++) {
            __m256i q = load_quad(toks[t].q + at + 64 * h + 4 * j);
            sums[0][t] = DPBUSD(sums[0][t], a, q);
            sums[1][t] = DPBUSD(sums[1][t], b, q);
        }
    }
}

ALWAYS_INLINE void panel_dots(const enum panel_kind kind, const int n_toks,
                              const uint8_t codes[8][4 * PANEL_ROWS],
                              const struct panel_token *toks, size_t at, const __m256i factors[2],
                              __m256i ret[2][BLOCK])
{
    __m256i second[2][BLOCK];
    for (int t = 0; t < n_toks; t++) {
        second[0][t] = second[1][t] = _mm256_setzero_si256();
    }
    panel_half(n_toks, codes, toks, at, 0, ret);
    if (kind != PANEL_HALVED) {
        panel_half(n_toks, codes, toks, at, 1, ret);
        return;
    }
    panel_half(n_toks, codes, toks, at, 1, second);
    for (int v = 0; v < 2; v++) {
        __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(factors[v], 16), 16);
        __m256i high = _mm256_srai_epi32(factors[v], 16);
        for (int t = 0; t < n_toks; t++) {
            ret[v][t] = _mm256_add_epi32(_mm256_mullo_epi32(ret[v][t], low),
                                         _mm256_mullo_epi32(second[v][t], high));
        }
    }
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
            [SLU_FMT_Q3E] = ECQ_MUL_NAME(SLU_VNNI256, q3e),
            [SLU_FMT_Q4E] = ECQ_MUL_NAME(SLU_VNNI256, q4e),
            [SLU_FMT_Q5E] = ECQ_MUL_NAME(SLU_VNNI256, q5e),
            [SLU_FMT_Q6E] = ECQ_MUL_NAME(SLU_VNNI256, q6e),
        },
    .quantize = slu_avx2_quantize,
    .row_f32 = slu_c_row_f32,
    .dot_f32 = slu_avx2_dot_f32,
    .dot_f16 = slu_avx2_dot_f16,
    .axpy_f32 = slu_avx2_axpy_f32,
    .axpy_f16 = slu_avx2_axpy_f16,
    .add_grid = slu_avx2_add_grid,
    .f32_to_f16 = slu_avx2_f32_to_f16,
    .attn_mul = slu_avx2_attn_mul,
    .attn_floats = slu_avx2_attn_floats,
    .attn_weigh = slu_avx2_attn_weigh,
    .glu = {slu_avx2_attn_silu, slu_avx2_attn_oai},
};
