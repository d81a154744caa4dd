/*
 * Quantized products with 256-bit registers, for a few tokens. One template, mul_few, is
 * specialised for each format by a `struct kind` of compile-time constants. The file that includes
 * this defines beforehand
 *
 *   NEEDS_UNSIGNED   1 if dot32 takes unsigned values only; signed ones then come 128 too large
 *   dot32            the sums of four products of 16 columns of two groups, of both halves added
 *   dot16_scaled     the same of one half, times a scale, added to what is there
 *
 * A row is walked in chunks of 8 groups of 32 columns, lane g % 8 belonging to group g:
 *
 *   32 bytes of codes -> 2 x 32 small integers, the halves of two groups
 *   dot32 with q -> 8 int32: four for each group
 *   four such registers, added across -> 8 int32, one for each group
 *   less the offset times the groups' sums of q
 *   to float, fma with the products of the two scales -> acc
 */
#ifndef SLU_KERN_X86_QUANT256_H
#define SLU_KERN_X86_QUANT256_H

#include "kern/x86/load256.h"

#define TOKENS 3 /* at most, that share the decoding of a group */

struct token {
    const int8_t *q;
    const float *d, *s;
    const int16_t *sums;
};

/* What comes on top of all values of a format. */
ALWAYS_INLINE int offset_of(const struct kind k)
{
    return NEEDS_UNSIGNED && k.is_signed ? 128 : k.offset;
}

/* The integer sums of a chunk with one token. */
ALWAYS_INLINE __m256i chunk_sums(const struct kind k, __m256i values[4][2],
                                 const struct token *token, size_t g, uint32_t n, __m256i factors)
{
    __m256i v[4];
    for (int p = 0; p < 4; p++) {
        v[p] = _mm256_setzero_si256();
        if (2 * (uint32_t)p >= n) {
            continue;
        }
        const int8_t *q = token->q + 32 * g + p / 2 * 128 + p % 2 * 32;
        __m256i q0 = _mm256_load_si256((const __m256i *)(const void *)q);
        __m256i q1 = _mm256_load_si256((const __m256i *)(const void *)(q + 64));
        if (k.is_halved) {
            __m256i first = _mm256_set1_epi16((short)(2 * p * 2 + (2 * p * 2 + 1) * 256));
            __m256i second = _mm256_add_epi8(first, _mm256_set1_epi8(2));
            v[p] = dot16_scaled(v[p], values[p][0], q0, _mm256_shuffle_epi8(factors, first));
            v[p] = dot16_scaled(v[p], values[p][1], q1, _mm256_shuffle_epi8(factors, second));
        } else {
            v[p] = dot32(k, values[p], q0, q1);
        }
    }
    __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    return _mm256_permutevar8x32_epi32(sum, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* What the offset makes of the sums of a chunk. */
ALWAYS_INLINE __m256i chunk_offset(const struct kind k, const struct row *row,
                                   const struct token *token, size_t g)
{
    /* Rows of sums are whole cache lines: a chunk never runs past them. */
    __m256i sums = _mm256_load_si256((const __m256i *)(const void *)(token->sums + 2 * g));
    if (k.is_halved) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(row->scales + 2 * g));
        sums = _mm256_madd_epi16(sums, _mm256_cvtepi8_epi16(bytes));
        return _mm256_slli_epi32(sums, 5); /* the offset is 32 */
    }
    return _mm256_madd_epi16(sums, _mm256_set1_epi16((short)offset_of(k)));
}

/* Groups g .. g+n-1 of a row times n_toks tokens. */
ALWAYS_INLINE void chunk(const struct kind k, const int n_toks, const struct row *row,
                         const struct token *toks, size_t g, const uint32_t n, __m256i table,
                         __m256 acc[TOKENS])
{
    __m256i values[4][2];
    for (uint32_t p = 0; p < 4; p++) {
        if (2 * p >= n) {
            values[p][0] = values[p][1] = _mm256_setzero_si256();
            continue;
        }
        decode(k, row, g + 2 * p, 2 * p + 1 < n, table, values[p]);
        if (NEEDS_UNSIGNED && k.is_signed && !k.has_table) {
            values[p][0] = _mm256_xor_si256(values[p][0], _mm256_set1_epi8(-128));
            values[p][1] = _mm256_xor_si256(values[p][1], _mm256_set1_epi8(-128));
        }
    }
    __m256 scales = load_scales(k, row, g, n), mins = scales;
    __m256i factors = k.is_halved ? load_factors(row, g) : table, mask = first_lanes(n);
    if (k.min != SLU_MIN_NONE) {
        mins = load_mins(k, row, g, n);
    }
    for (int t = 0; t < n_toks; t++) {
        __m256i sums = chunk_sums(k, values, &toks[t], g, n, factors);
        if (offset_of(k)) {
            sums = _mm256_sub_epi32(sums, chunk_offset(k, row, &toks[t], g));
        }
        __m256 products = _mm256_mul_ps(scales, _mm256_load_ps(toks[t].d + g));
        __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), products, acc[t]);
        if (k.min != SLU_MIN_NONE) {
            sum = _mm256_fmadd_ps(mins, _mm256_load_ps(toks[t].s + g), sum);
        }
        acc[t] = n == CHUNK ? sum : _mm256_blendv_ps(acc[t], sum, _mm256_castsi256_ps(mask));
    }
}

/* Rows `at` .. at+n_rows-1 times n_toks tokens. */
ALWAYS_INLINE void rows_mul(const struct kind k, const int n_rows, const int n_toks, float *y,
                            size_t y_stride, const struct slu_mat *w, const size_t *at,
                            const struct token *toks, __m256i table)
{
    struct row rows[2];
    __m256 acc[2][TOKENS];
    for (int r = 0; r < n_rows; r++) {
        rows[r] = row_at(w, at[r]);
        for (int t = 0; t < n_toks; t++) {
            acc[r][t] = _mm256_setzero_ps();
        }
    }
    size_t n_groups = w->cols / 32, g = 0;
    for (; g + CHUNK <= n_groups; g += CHUNK) {
        for (int r = 0; r < n_rows; r++) {
            chunk(k, n_toks, &rows[r], toks, g, CHUNK, table, acc[r]);
        }
    }
    if (!is_super(k) && g < n_groups) {
        for (int r = 0; r < n_rows; r++) {
            chunk(k, n_toks, &rows[r], toks, g, (uint32_t)(n_groups - g), table, acc[r]);
        }
    }
    for (int r = 0; r < n_rows; r++) {
        for (int t = 0; t < n_toks; t++) {
            y[(size_t)t * y_stride + at[r]] = lanes_sum(acc[r][t]);
        }
    }
}

/* Rows lo .. hi-1 times n_toks tokens. Rows side by side are half of all rows apart, for their
 * streams to run on from row to row: the processor's prefetcher follows two such streams, but not
 * neighbours that take turns (Q4_0 from memory, Zen 4: 17 GB/s against 9). */
ALWAYS_INLINE void tokens_mul(const struct kind k, const int n_toks, float *y, size_t y_stride,
                              const struct slu_mat *w, uint32_t lo, uint32_t hi,
                              const struct token *toks, __m256i table)
{
    size_t half = (hi - lo) / 2;
    for (size_t row = lo; row < lo + half; row++) {
        const size_t at[2] = {row, row + half};
        rows_mul(k, 2, n_toks, y, y_stride, w, at, toks, table);
    }
    for (size_t row = lo + 2 * half; row < hi; row++) {
        rows_mul(k, 1, n_toks, y, y_stride, w, &row, toks, table);
    }
}

/* n tokens, at most TOKENS. */
ALWAYS_INLINE void mul_few(const struct kind k, float *y, size_t y_stride, const struct slu_mat *w,
                           uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                           uint32_t n, __m256i table)
{
    struct token toks[TOKENS];
    for (uint32_t t = 0; t < n; t++) {
        size_t token = tok ? tok[t] : t;
        toks[t] = (struct token){
            .q = x->q + token * x->q_stride,
            .d = x->d + token * x->g_stride,
            .s = x->s + token * x->g_stride,
            .sums = x->sums + 2 * token * x->g_stride,
        };
    }
    if (n == 1) {
        tokens_mul(k, 1, y, y_stride, w, lo, hi, toks, table);
    } else if (n == 2) {
        tokens_mul(k, 2, y, y_stride, w, lo, hi, toks, table);
    } else {
        tokens_mul(k, 3, y, y_stride, w, lo, hi, toks, table);
    }
}

#endif
