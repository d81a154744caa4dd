/*
 * Quantized products with AVX2. maddubs wants its first operand unsigned: signed values go in by
 * magnitude, with their sign moved to q, or q does, with its sign moved to them. Its int16 sums of
 * two don't saturate, for q is never -128: 2 * 128 * 127 < 2^15. Two of them may be added where
 * values are under 32.
 */
#include "kern/x86/avx2.h"

#define NEEDS_UNSIGNED 0

struct kind;
ALWAYS_INLINE __m256i dot32(struct kind k, const __m256i values[2], __m256i q0, __m256i q1,
                            const uint8_t *magnitudes);
ALWAYS_INLINE __m256i dot16_scaled(__m256i sums, __m256i values, __m256i q, __m256i factors);
ALWAYS_INLINE __m256i add_level(struct kind k, int level, __m256i a, __m256i b);
ALWAYS_INLINE __m256i widen(struct kind k, int level, __m256i sums);

#include "kern/x86/pack256.inc"

/* 32 products as int32 sums of four. */
ALWAYS_INLINE __m256i dot16(__m256i magnitudes, __m256i others)
{
    __m256i pairs = _mm256_maddubs_epi16(magnitudes, others);
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

ALWAYS_INLINE __m256i dot16_signed(__m256i values, __m256i q)
{
    return dot16(_mm256_abs_epi8(values), _mm256_sign_epi8(q, values));
}

/* The level of adding up to which sums of products fit an int16: sums of four before the first
 * level, then of eight, then of sixteen. Those of signed values are int32 from the start. */
ALWAYS_INLINE int narrow_levels(struct kind k)
{
    int largest = k.has_table ? 2 * k.offset : (1 << k.bits) - 1;
    return k.is_signed || k.is_halved        ? -1
           : 16 * largest * 127 <= INT16_MAX ? 2
           : 8 * largest * 127 <= INT16_MAX  ? 1
                                             : 0;
}

ALWAYS_INLINE __m256i add_level(struct kind k, int level, __m256i a, __m256i b)
{
    return level < narrow_levels(k) ? _mm256_add_epi16(a, b) : _mm256_add_epi32(a, b);
}

ALWAYS_INLINE __m256i widen(struct kind k, int level, __m256i sums)
{
    return level == narrow_levels(k) ? _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) : sums;
}

ALWAYS_INLINE __m256i dot32(struct kind k, const __m256i values[2], __m256i q0, __m256i q1,
                            const uint8_t *magnitudes)
{
    if (wants_magnitudes(k)) {
        const __m256i *m = (const __m256i *)(const void *)magnitudes;
        return _mm256_add_epi32(dot16(_mm256_load_si256(m), _mm256_sign_epi8(values[0], q0)),
                                dot16(_mm256_load_si256(m + 2), _mm256_sign_epi8(values[1], q1)));
    }
    if (k.is_signed) {
        return _mm256_add_epi32(dot16_signed(values[0], q0), dot16_signed(values[1], q1));
    }
    return _mm256_add_epi16(_mm256_maddubs_epi16(values[0], q0),
                            _mm256_maddubs_epi16(values[1], q1));
}

ALWAYS_INLINE __m256i dot16_scaled(__m256i sums, __m256i values, __m256i q, __m256i factors)
{
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(values, q), factors));
}

/* Quads first .. first+n-1 of a group: pairs of products, where n of them don't overflow. */
ALWAYS_INLINE void panel_pairs(const int n_toks, const uint8_t codes[8][4 * PANEL_ROWS],
                               const struct panel_token *toks, size_t at, int first, int n,
                               __m256i ret[2][BLOCK])
{
    for (int j = first; j < first + n; j++) {
        __m256i a = load_rows(codes[j], 0), b = load_rows(codes[j], 1);
        for (int t = 0; t < n_toks; t++) {
            __m256i q = load_quad(toks[t].q + at + j / 4 * 64 + j % 4 * 4);
            __m256i x = _mm256_maddubs_epi16(a, q), y = _mm256_maddubs_epi16(b, q);
            ret[0][t] = j == first ? x : _mm256_add_epi16(ret[0][t], x);
            ret[1][t] = j == first ? y : _mm256_add_epi16(ret[1][t], y);
        }
    }
}

ALWAYS_INLINE void panel_signed(const int n_toks, const uint8_t codes[8][4 * PANEL_ROWS],
                                const struct panel_token *toks, size_t at, __m256i ret[2][BLOCK])
{
    for (int j = 0; j < 8; j++) {
        for (int v = 0; v < 2; v++) {
            __m256i w = load_rows(codes[j], v);
            for (int t = 0; t < n_toks; t++) {
                __m256i q = load_quad(toks[t].q + at + j / 4 * 64 + j % 4 * 4);
                __m256i sum = dot16_signed(w, q);
                ret[v][t] = j ? _mm256_add_epi32(ret[v][t], sum) : sum;
            }
        }
    }
}

/* An int16 of each pair, twice. */
ALWAYS_INLINE __m256i spread_factor(__m256i factors, int half)
{
    return half ? _mm256_blend_epi16(_mm256_srli_epi32(factors, 16), factors, 0xaa)
                : _mm256_blend_epi16(factors, _mm256_slli_epi32(factors, 16), 0xaa);
}

ALWAYS_INLINE void panel_dots(const enum panel_kind kind, const int n_toks,
                              const uint8_t codes[8][4 * PANEL_ROWS],
                              const struct panel_token *toks, size_t at, const __m256i factors[2],
                              __m256i ret[2][BLOCK])
{
    if (kind == PANEL_SIGNED) {
        panel_signed(n_toks, codes, toks, at, ret);
        return;
    }
    /* Values under 32 may be added four times, those under 64 twice. */
    const int step = kind == PANEL_HALVED ? 2 : 4;
    for (int j = 0; j < 8; j += step) {
        __m256i pairs[2][BLOCK];
        panel_pairs(n_toks, codes, toks, at, j, step, pairs);
        for (int v = 0; v < 2; v++) {
            __m256i factor =
                kind == PANEL_HALVED ? spread_factor(factors[v], j / 4) : _mm256_set1_epi16(1);
            for (int t = 0; t < n_toks; t++) {
                __m256i sum = _mm256_madd_epi16(pairs[v][t], factor);
                ret[v][t] = j ? _mm256_add_epi32(ret[v][t], sum) : sum;
            }
        }
    }
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
