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

/* Codes and high bits of four groups, from either the row or a copy that zeros make whole. */
struct quad {
    const uint8_t *codes, *high;
};

struct token {
    const int8_t *q;
    const float *d;
    __m256 acc[2];
};

ALWAYS_INLINE __m256i table_part(const struct slu_ecq_head *head, int i)
{
    return _mm256_broadcastsi128_si256(
        _mm_loadu_si128((const __m128i *)(const void *)(head->table + 16 * i)));
}

/* Entries of a table of 16, 32 or 64; high has bits 4 and 5 of the codes. */
ALWAYS_INLINE __m256i look_up(const int bits, const __m256i table[4], __m256i low, __m256i high)
{
    __m256i v = _mm256_shuffle_epi8(table[0], low);
    if (bits < 5) {
        return v;
    }
    __m256i odd = _mm256_slli_epi16(high, 3); /* bit 4 becomes the sign of its byte */
    v = _mm256_blendv_epi8(v, _mm256_shuffle_epi8(table[1], low), odd);
    if (bits == 5) {
        return v;
    }
    __m256i upper = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], low),
                                       _mm256_shuffle_epi8(table[3], low), odd);
    return _mm256_blendv_epi8(v, upper, _mm256_slli_epi16(high, 2));
}

/* Values of groups 2p and 2p + 1: their first halves, and their second ones. */
ALWAYS_INLINE void decode_pair(const int bits, const __m256i table[4], const struct quad *from,
                               int p, __m256i ret[2])
{
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low[2], high[2] = {nibble, nibble};
    if (bits == 3) {
        high_pairs(from->codes + 16 * p, true, low);
        high_bits(from->high + 8 * p, true, high);
        for (int h = 0; h < 2; h++) {
            low[h] = _mm256_srli_epi16(low[h], 4);
            low[h] = _mm256_or_si256(low[h], _mm256_srli_epi16(high[h], 2));
        }
    } else {
        __m256i v = load_pair16(from->codes + 32 * p, true);
        low[0] = _mm256_and_si256(v, nibble);
        low[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    }
    if (bits == 5) {
        high_bits(from->high + 8 * p, true, high);
    } else if (bits == 6) {
        high_pairs(from->high + 16 * p, true, high);
    }
    ret[0] = look_up(bits, table, low[0], high[0]);
    ret[1] = look_up(bits, table, low[1], high[1]);
}

/* Sums of four products; magnitudes are at most 128 and q at most 127, so that two fit 16 bits. */
ALWAYS_INLINE __m256i dot4(__m256i values, __m256i q)
{
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(values), _mm256_sign_epi8(q, values));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

ALWAYS_INLINE __m256i load_q(const int8_t *at)
{
    return _mm256_load_si256((const __m256i *)(const void *)at);
}

/* Groups g and g + 1, which are the 2p-th and the next of their four. */
ALWAYS_INLINE void pair_mul(const __m256i values[2], size_t g, const int p, struct token *toks,
                            const int n)
{
    const __m256i spread[2] = {_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1),
                               _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3)};
    for (int t = 0; t < n; t++) {
        const int8_t *q = toks[t].q + 32 * g + 32 * p;
        __m256i sum = _mm256_add_epi32(dot4(values[0], load_q(q)), dot4(values[1], load_q(q + 64)));
        __m256 d = _mm256_castps128_ps256(_mm_load_ps(toks[t].d + g));
        d = _mm256_permutevar8x32_ps(d, spread[p]);
        toks[t].acc[p] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, toks[t].acc[p]);
    }
}

/* The values of four groups: both halves of the first two, and of the others. */
ALWAYS_INLINE void quad_mul(const __m256i values[2][2], size_t g, struct token *toks, const int n)
{
    pair_mul(values[0], g, 0, toks, n);
    pair_mul(values[1], g, 1, toks, n);
}

/* Quad i of a row, from n_groups on filled up with anything. */
ALWAYS_INLINE void decode_quad(const int bits, const __m256i table[4],
                               const struct slu_ecq_row *row, size_t i, size_t n_groups,
                               __m256i ret[2][2])
{
    const size_t codes_step = bits == 3 ? 32 : 64;
    const size_t high_step = bits == 6 ? 32 : bits == 4 ? 0 : 16;
    struct quad at = {row->codes + i * codes_step, row->high + i * high_step};
    uint8_t codes[64] = {0}, high[32] = {0};
    if (4 * i + 4 > n_groups) {
        memcpy(codes, at.codes, codes_step / 4 * (n_groups - 4 * i));
        memcpy(high, at.high, high_step / 4 * (n_groups - 4 * i));
        at = (struct quad){codes, high};
    }
    for (int p = 0; p < 2; p++) {
        decode_pair(bits, table, &at, p, ret[p]);
    }
}

ALWAYS_INLINE void row_mul(const int bits, const struct slu_mat *w, const struct slu_ecq_row *row,
                           const __m256i table[4], struct token *toks, const int n)
{
    size_t n_groups = w->cols / 32;
    for (size_t i = 0; i < (n_groups + 3) / 4; i++) {
        __m256i values[2][2];
        decode_quad(bits, table, row, i, n_groups, values);
        quad_mul((const __m256i(*)[2])values, 4 * i, toks, n);
    }
}

ALWAYS_INLINE struct token token_of(const struct slu_acts *x, uint32_t t)
{
    return (struct token){.q = x->q + t * x->q_stride,
                          .d = x->d + t * x->g_stride,
                          .acc = {_mm256_setzero_ps(), _mm256_setzero_ps()}};
}

ALWAYS_INLINE void few_mul(const int bits, float *y, size_t y_stride, const struct slu_mat *w,
                           uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                           const int n)
{
    const struct slu_ecq_head *head = slu_ecq_head_of(w);
    __m256i table[4];
    for (int i = 0; i < 4; i++) {
        table[i] = table_part(head, i);
    }
    for (uint32_t r = lo; r < hi; r++) {
        struct slu_ecq_row row = slu_ecq_row_at(w, r);
        struct token toks[TOKENS];
        for (int t = 0; t < n; t++) {
            toks[t] = token_of(x, tok[t]);
        }
        row_mul(bits, w, &row, table, toks, n);
        for (int t = 0; t < n; t++) {
            float sum = lanes_sum(_mm256_add_ps(toks[t].acc[0], toks[t].acc[1]));
            ecq_finish(&y[t * y_stride + r], w, &row, sum);
        }
    }
}

/* Rows lo .. hi-1, at most ROWS, of which values[r] are the values, times n tokens. */
ALWAYS_INLINE void decoded_mul(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                               uint32_t hi, const __m256i (*values)[COLS_MAX / 128][2][2],
                               const struct slu_acts *x, const uint32_t *tok, const int n)
{
    for (uint32_t r = lo; r < hi; r++) {
        struct token toks[TOKENS];
        for (int t = 0; t < n; t++) {
            toks[t] = token_of(x, tok[t]);
        }
        for (size_t i = 0; i < (w->cols + 127) / 128; i++) {
            quad_mul(values[r - lo][i], 4 * i, toks, n);
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
    __m256i values[ROWS][COLS_MAX / 128][2][2], table[4];
    for (int i = 0; i < 4; i++) {
        table[i] = table_part(slu_ecq_head_of(w), i);
    }
    for (uint32_t r = lo; r < hi; r += ROWS) {
        uint32_t end = hi - r < ROWS ? hi : r + ROWS;
        for (uint32_t k = r; k < end; k++) {
            struct slu_ecq_row row = slu_ecq_row_at(w, k);
            for (size_t i = 0; i < (w->cols + 127) / 128; i++) {
                decode_quad(bits, table, &row, i, w->cols / 32, values[k - r][i]);
            }
        }
        for (uint32_t i = 0; i < n; i += TOKENS) {
            uint32_t at[TOKENS], some = slu_ecq_tokens(tok, i, n, at);
            const __m256i(*from)[COLS_MAX / 128][2][2] = (const void *)values;
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
