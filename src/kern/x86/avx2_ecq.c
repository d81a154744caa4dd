/*
 * Products of the q*e formats with AVX2: a row at a time, for up to four tokens that share its
 * decoding; for many tokens some rows are decoded beforehand, and lie in the first level until all
 * have met them. Lanes 0 to 7 of the sixteen are groups 0 and 1 of every four, lanes 8 to 15 the
 * others.
 */
#include "kern/x86/ecq.h"
#include "kern/x86/load256.h"

#define TOKENS     SLU_ECQ_TOKENS
#define ROWS       4    /* that are decoded beforehand, */
#define COLS_MAX   4096 /* if they are no wider than this, */
#define TOKENS_MIN 8    /* for so many tokens */

/* |q| is there where every value has its opposite, which -128 hasn't. */
struct token {
    const int8_t *q;
    const uint8_t *magnitudes;
    const float *d;
    __m256 acc[2];
};

ALWAYS_INLINE __m256i table_part(const struct slu_ecq_head *head, int i)
{
    return _mm256_broadcastsi128_si256(
        _mm_loadu_si128((const __m128i *)(const void *)(head->table + 16 * i)));
}

/* Entries of a table of up to 16, 32 or 64; the signs of the bytes of high[i] are bit 4 + i of the
 * codes. */
ALWAYS_INLINE __m256i look_up(const int bits, const __m256i table[4], __m256i low,
                              const __m256i high[2])
{
    __m256i v = _mm256_shuffle_epi8(table[0], low);
    if (bits < 5) {
        return v;
    }
    v = _mm256_blendv_epi8(v, _mm256_shuffle_epi8(table[1], low), high[0]);
    if (bits == 5) {
        return v;
    }
    __m256i upper = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], low),
                                       _mm256_shuffle_epi8(table[3], low), high[0]);
    return _mm256_blendv_epi8(v, upper, high[1]);
}

/* Values of pair i of a row's groups: their first halves, and their second ones. Without is_pair
 * the second group isn't touched, and its values are anything. */
ALWAYS_INLINE void decode_pair(const int bits, const __m256i table[4],
                               const struct slu_ecq_row *row, size_t i, bool is_pair,
                               __m256i ret[2])
{
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low[2], masks[2] = {nibble, nibble}, pairs[2] = {nibble, nibble};
    if (bits == 3 || bits == 5) {
        bit_masks(row->high + 8 * i, is_pair, masks);
    }
    if (bits == 3) {
        low_pairs(row->codes + 16 * i, is_pair, pairs);
        for (int h = 0; h < 2; h++) {
            low[h] = _mm256_or_si256(_mm256_and_si256(pairs[h], _mm256_set1_epi8(3)),
                                     _mm256_and_si256(masks[h], _mm256_set1_epi8(4)));
        }
    } else {
        __m256i v = load_pair16(row->codes + 32 * i, is_pair);
        low[0] = _mm256_and_si256(v, nibble);
        low[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    }
    if (bits == 6) {
        low_pairs(row->high + 16 * i, is_pair, pairs);
    }
    for (int h = 0; h < 2; h++) {
        const __m256i high[2] = {bits == 6 ? _mm256_slli_epi16(pairs[h], 7) : masks[h],
                                 _mm256_slli_epi16(pairs[h], 6)};
        ret[h] = look_up(bits, table, low[h], high);
    }
}

ALWAYS_INLINE __m256i load_q(const void *at)
{
    return _mm256_load_si256((const __m256i *)at);
}

/* Sums of four products with a token's columns from `at` on; magnitudes are at most 128 and q at
 * most 127, so that two fit 16 bits. */
ALWAYS_INLINE __m256i dot4(__m256i values, const struct token *token, size_t at,
                           const bool has_magnitudes)
{
    __m256i q = load_q(token->q + at);
    __m256i pairs = has_magnitudes ? _mm256_maddubs_epi16(load_q(token->magnitudes + at),
                                                          _mm256_sign_epi8(values, q))
                                   : _mm256_maddubs_epi16(_mm256_abs_epi8(values),
                                                          _mm256_sign_epi8(q, values));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

/* Groups 2p and 2p + 1 of the four from g on. */
ALWAYS_INLINE void pair_mul(const __m256i values[2], size_t g, const int p, struct token *toks,
                            const int n, const bool has_magnitudes)
{
    const __m256i spread = p == 0 ? _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)
                                  : _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    for (int t = 0; t < n; t++) {
        size_t at = 32 * g + 32 * (size_t)p;
        __m256i sum = _mm256_add_epi32(dot4(values[0], &toks[t], at, has_magnitudes),
                                       dot4(values[1], &toks[t], at + 64, has_magnitudes));
        __m256 d = _mm256_broadcast_ps((const __m128 *)(const void *)(toks[t].d + g));
        d = _mm256_permutevar_ps(d, spread);
        toks[t].acc[p] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, toks[t].acc[p]);
    }
}

ALWAYS_INLINE void row_mul(const int bits, const struct slu_mat *w, const struct slu_ecq_row *row,
                           const __m256i table[4], struct token *toks, const int n,
                           const bool has_magnitudes)
{
    size_t n_groups = w->cols / 32, g = 0;
    __m256i values[2][2];
    for (; g + 4 <= n_groups; g += 4) {
        decode_pair(bits, table, row, g / 2, true, values[0]);
        decode_pair(bits, table, row, g / 2 + 1, true, values[1]);
        pair_mul(values[0], g, 0, toks, n, has_magnitudes);
        pair_mul(values[1], g, 1, toks, n, has_magnitudes);
    }
    switch (n_groups - g) {
    case 1:
        decode_pair(bits, table, row, g / 2, false, values[0]);
        pair_mul(values[0], g, 0, toks, n, has_magnitudes);
        break;
    case 3:
        decode_pair(bits, table, row, g / 2 + 1, false, values[1]);
        pair_mul(values[1], g, 1, toks, n, has_magnitudes);
        /* fall through */
    case 2:
        decode_pair(bits, table, row, g / 2, true, values[0]);
        pair_mul(values[0], g, 0, toks, n, has_magnitudes);
        break;
    }
}

ALWAYS_INLINE struct token token_of(const struct slu_acts *x, uint32_t t)
{
    return (struct token){.q = x->q + t * x->q_stride,
                          .d = x->d + t * x->g_stride,
                          .acc = {_mm256_setzero_ps(), _mm256_setzero_ps()}};
}

ALWAYS_INLINE void few_mul_with(const int bits, float *y, size_t y_stride,
                                const struct slu_mat *w, uint32_t lo, uint32_t hi,
                                const struct token all[TOKENS], const int n,
                                const bool has_magnitudes)
{
    __m256i table[4];
    for (int i = 0; i < 4; i++) {
        table[i] = table_part(slu_ecq_head_of(w), i);
    }
    for (uint32_t r = lo; r < hi; r++) {
        struct slu_ecq_row row = slu_ecq_row_at(w, r);
        struct token toks[TOKENS];
        for (int t = 0; t < n; t++) {
            toks[t] = all[t];
        }
        row_mul(bits, w, &row, table, toks, n, has_magnitudes);
        for (int t = 0; t < n; t++) {
            float sum = lanes_sum(_mm256_add_ps(toks[t].acc[0], toks[t].acc[1]));
            ecq_finish(&y[t * y_stride + r], w, &row, sum);
        }
    }
}

/* maddubs wants one operand unsigned: |q|, which is found once for all rows, or else that of the
 * values, which more tokens share. */
ALWAYS_INLINE void few_mul(const int bits, float *y, size_t y_stride, const struct slu_mat *w,
                           uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                           const int n)
{
    uint8_t magnitudes[COLS_MAX] __attribute__((aligned(32)));
    struct token toks[TOKENS];
    for (int t = 0; t < n; t++) {
        toks[t] = token_of(x, tok[t]);
    }
    if (n > 1 || w->cols > COLS_MAX ||
        memchr(slu_ecq_head_of(w)->table, -128, sizeof slu_ecq_head_of(w)->table)) {
        few_mul_with(bits, y, y_stride, w, lo, hi, toks, n, false);
        return;
    }
    for (size_t i = 0; i < (w->cols + 127) / 128 * 128; i += 32) {
        __m256i q = _mm256_abs_epi8(load_q(toks[0].q + i));
        _mm256_store_si256((__m256i *)(void *)(magnitudes + i), q);
    }
    toks[0].magnitudes = magnitudes;
    few_mul_with(bits, y, y_stride, w, lo, hi, toks, n, true);
}

/* Rows lo .. hi-1, at most ROWS, of which values[r] are the values, times n tokens. */
ALWAYS_INLINE void decoded_mul(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                               uint32_t hi, const __m256i (*values)[COLS_MAX / 64][2],
                               const struct slu_acts *x, const uint32_t *tok, const int n)
{
    for (uint32_t r = lo; r < hi; r++) {
        struct token toks[TOKENS];
        for (int t = 0; t < n; t++) {
            toks[t] = token_of(x, tok[t]);
        }
        for (size_t i = 0; i < (w->cols + 127) / 128; i++) {
            pair_mul(values[r - lo][2 * i], 4 * i, 0, toks, n, false);
            pair_mul(values[r - lo][2 * i + 1], 4 * i, 1, toks, n, false);
        }
        struct slu_ecq_row row = slu_ecq_row_at(w, r);
        for (int t = 0; t < n; t++) {
            float sum = lanes_sum(_mm256_add_ps(toks[t].acc[0], toks[t].acc[1]));
            ecq_finish(&y[t * y_stride + r], w, &row, sum);
        }
    }
}

ALWAYS_INLINE void many_mul(const int bits, float *y, size_t y_stride, const struct slu_mat *w,
                            uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                            uint32_t n)
{
    __m256i values[ROWS][COLS_MAX / 64][2], table[4];
    for (int i = 0; i < 4; i++) {
        table[i] = table_part(slu_ecq_head_of(w), i);
    }
    for (uint32_t r = lo; r < hi; r += ROWS) {
        uint32_t end = hi - r < ROWS ? hi : r + ROWS;
        for (uint32_t k = r; k < end; k++) {
            struct slu_ecq_row row = slu_ecq_row_at(w, k);
            size_t i = 0;
            for (; i < w->cols / 64; i++) {
                decode_pair(bits, table, &row, i, true, values[k - r][i]);
            }
            if (w->cols % 64) {
                decode_pair(bits, table, &row, i, false, values[k - r][i]);
            }
        }
        for (uint32_t i = 0; i < n; i += TOKENS) {
            uint32_t at[TOKENS], some = slu_ecq_tokens(tok, i, n, at);
            const __m256i(*from)[COLS_MAX / 64][2] = (const void *)values;
            float *out = y + i * y_stride;
            if (some == TOKENS) {
                decoded_mul(out, y_stride, w, r, end, from, x, at, TOKENS);
            } else {
                for (uint32_t k = 0; k < some; k++) {
                    decoded_mul(out + k * y_stride, y_stride, w, r, end, from, x, at + k, 1);
                }
            }
        }
    }
}

#include "kern/ecq.inc"

#define ECQ_MUL(name, bits)                                                                        \
    void slu_avx2_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,      \
                             uint32_t hi, const struct slu_acts *x, const uint32_t *tok,           \
                             uint32_t n)                                                           \
    {                                                                                              \
        slu_avx2_ecq_escapes(y, y_stride, w, lo, hi, x, tok, n);                                   \
        if (n >= TOKENS_MIN && w->cols <= COLS_MAX) {                                              \
            many_mul(bits, y, y_stride, w, lo, hi, x, tok, n);                                     \
            return;                                                                                \
        }                                                                                          \
        ecq_mul(bits, y, y_stride, w, lo, hi, x, tok, n);                                          \
    }

ECQ_MUL(q3e, 3)
ECQ_MUL(q4e, 4)
ECQ_MUL(q5e, 5)
ECQ_MUL(q6e, 6)
