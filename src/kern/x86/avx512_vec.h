/*
 * Matrix-vector products with AVX-512 VNNI. Two rows go side by side, 8 groups of each in a chunk:
 *
 *   64 bytes of codes -> 2 x 64 small integers, the halves of four groups
 *   vpdpbusd with q, of both halves -> 16 int32, four for each group
 *   four such registers, two of each row, added across -> 16 int32, one for each group
 *   less the offset times the groups' sums of q
 *   to float, fma with the products of the two scales -> acc, 8 lanes of each row
 */
#ifndef SLU_KERN_X86_AVX512_VEC_H
#define SLU_KERN_X86_AVX512_VEC_H

#include "kern/x86/avx512.h"

#define TOKENS    4    /* at most, that share the decoding of weights */
#define ROWS_HOT  32   /* rows that stay in the cache while all tokens pass over them */
#define ASK_AHEAD 3072 /* bytes of a row's codes; see docs/benchmarks/kernels.md */

struct token {
    const int8_t *q;
    const float *d, *s;
    const int16_t *sums;
};

/* `each` bytes for each of n groups (4 being all), the rest zero. */
ALWAYS_INLINE __m512i load_groups(const uint8_t *at, uint32_t each, uint32_t n)
{
    if (n == 4 && each == 16) {
        return _mm512_loadu_si512(at);
    }
    return _mm512_maskz_loadu_epi32((__mmask16)((1u << n * each / 4) - 1), at);
}

/* Bit i of a group's word becomes 16 in byte i % 16 of its half of a register. */
ALWAYS_INLINE void add_bits(const uint8_t *high, uint32_t n, __m512i values[2])
{
    const __m512i bit = _mm512_set1_epi64((long long)0x8040201008040201);
    const __m512i lane = _mm512_set_epi32(
        0x0d0d0d0d, 0x0d0d0d0d, 0x0c0c0c0c, 0x0c0c0c0c, 0x09090909, 0x09090909, 0x08080808,
        0x08080808, 0x05050505, 0x05050505, 0x04040404, 0x04040404, 0x01010101, 0x01010101, 0, 0);
    __m512i v = _mm512_broadcast_i32x4(_mm512_castsi512_si128(load_groups(high, 4, n)));
    __m512i second = _mm512_add_epi8(lane, _mm512_set1_epi8(2));
    const __m512i sixteen = _mm512_set1_epi8(16);
    __mmask64 a = _mm512_test_epi8_mask(_mm512_shuffle_epi8(v, lane), bit);
    __mmask64 b = _mm512_test_epi8_mask(_mm512_shuffle_epi8(v, second), bit);
    values[0] = _mm512_mask_add_epi8(values[0], a, values[0], sixteen);
    values[1] = _mm512_mask_add_epi8(values[1], b, values[1], sixteen);
}

/* Bits 2k, 2k+1 of byte j of a group become bits 4, 5 of its weight j + 8k. */
ALWAYS_INLINE void add_pairs(const uint8_t *high, uint32_t n, __m512i values[2])
{
    const __m512i two = _mm512_set1_epi8(3);
    __m512i v = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                         load_groups(high, 8, n));
    __m512i a = _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2));
    __m512i b = _mm512_srlv_epi64(v, _mm512_setr_epi64(4, 6, 4, 6, 4, 6, 4, 6));
    a = _mm512_slli_epi16(_mm512_and_si512(a, two), 4);
    b = _mm512_slli_epi16(_mm512_and_si512(b, two), 4);
    values[0] = _mm512_or_si512(values[0], a);
    values[1] = _mm512_or_si512(values[1], b);
}

/* n groups from g on as unsigned integers in the order of the activations: the first 16 columns of
 * all, and the second. */
ALWAYS_INLINE void decode512(const struct kind k, const struct row *row, size_t g, uint32_t n,
                             __m512i table, __m512i ret[2])
{
    if (k.bits == 8) {
        __m512i a = load_groups(row->codes + 32 * g, 16, n < 2 ? 2 * n : 4);
        __m512i b = n > 2 ? load_groups(row->codes + 32 * g + 64, 16, 2 * n - 4) : a;
        const __m512i shift = _mm512_set1_epi8(-128);
        ret[0] = _mm512_xor_si512(_mm512_shuffle_i32x4(a, b, 0x88), shift);
        ret[1] = _mm512_xor_si512(_mm512_shuffle_i32x4(a, b, 0xdd), shift);
        return;
    }
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i v = load_groups(row->codes + 16 * g, 16, n);
    if (k.has_table) {
        /* The table is there four times over, so that what lies above a nibble doesn't matter. */
        ret[0] = _mm512_permutexvar_epi8(v, table);
        ret[1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), table);
        return;
    }
    ret[0] = _mm512_and_si512(v, nibble);
    ret[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
    if (k.bits == 5) {
        add_bits(row->high + 4 * g, n, ret);
    } else if (k.bits == 6) {
        add_pairs(row->high + 8 * g, n, ret);
    }
}

/* Bytes from two rows' planes, 8 each, the second in the upper half. */
ALWAYS_INLINE __m128i load_bytes2(const uint8_t *a, const uint8_t *b)
{
    return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)(const void *)a),
                              _mm_loadl_epi64((const __m128i *)(const void *)b));
}

ALWAYS_INLINE __m512 load_halves2(const uint8_t *a, const uint8_t *b, uint32_t n)
{
    __mmask8 mask = (__mmask8)((1u << n) - 1);
    __m128i x = n == CHUNK ? _mm_loadu_si128((const __m128i *)(const void *)a)
                           : _mm_maskz_loadu_epi16(mask, a);
    __m128i y = n == CHUNK ? _mm_loadu_si128((const __m128i *)(const void *)b)
                           : _mm_maskz_loadu_epi16(mask, b);
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(x), y, 1));
}

/* One half of each row, in all its lanes. */
ALWAYS_INLINE __m512 load_supers2(const struct row rows[2], size_t i)
{
    uint16_t a, b;
    memcpy(&a, rows[0].supers + 2 * i, sizeof a);
    memcpy(&b, rows[1].supers + 2 * i, sizeof b);
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi16((short)a)),
                                           _mm_set1_epi16((short)b), 1);
    return _mm512_cvtph_ps(both);
}

ALWAYS_INLINE __m512 load_scales2(const struct kind k, const struct row rows[2], size_t g,
                                  uint32_t n)
{
    if (k.scale == SLU_SCALE_F16) {
        return load_halves2(rows[0].scales + 2 * g, rows[1].scales + 2 * g, n);
    }
    if (k.scale == SLU_SCALE_E8M0) {
        /* 2^(e-128), which for e of 0 and 1 is subnormal, and hardly ever there. */
        __m128i e = n == CHUNK ? load_bytes2(rows[0].scales + g, rows[1].scales + g)
                               : _mm_unpacklo_epi64(load_last_e8m0(rows[0].scales, g, n),
                                                    load_last_e8m0(rows[1].scales, g, n));
        const __m128i one = _mm_set1_epi8(1);
        __m512i v = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_subs_epu8(e, one)), 23);
        __mmask16 is_tiny = _mm_cmple_epu8_mask(e, one);
        if (__builtin_expect(is_tiny, 0)) {
            v = _mm512_mask_sllv_epi32(v, is_tiny, _mm512_set1_epi32(1 << 21),
                                       _mm512_cvtepu8_epi32(e));
        }
        return _mm512_castsi512_ps(v);
    }
    __m512 d = load_supers2(rows, g / CHUNK * (k.min == SLU_MIN_NONE ? 1 : 2));
    if (k.is_halved) {
        return d;
    }
    __m128i bytes = load_bytes2(rows[0].scales + g, rows[1].scales + g);
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
}

ALWAYS_INLINE __m512 load_mins2(const struct kind k, const struct row rows[2], size_t g, uint32_t n)
{
    if (k.min == SLU_MIN_F16) {
        return load_halves2(rows[0].mins + 2 * g, rows[1].mins + 2 * g, n);
    }
    __m512 d = load_supers2(rows, g / CHUNK * 2 + 1);
    __m128i bytes = load_bytes2(rows[0].mins + g, rows[1].mins + g);
    d = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
    return _mm512_xor_ps(d, _mm512_set1_ps(-0.0f));
}

/* The 8-bit scales of half h of groups 4i .. 4i+3, as many times as a group has pairs. */
ALWAYS_INLINE __m512i spread_factors(const uint8_t *scales, int i, int h)
{
    __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)scales));
    const __m256i group =
        _mm256_setr_epi64x(0, 0x0202020202020202, 0x0404040404040404, 0x0606060606060606);
    v = _mm256_shuffle_epi8(v, _mm256_add_epi8(group, _mm256_set1_epi8((char)(8 * i + h))));
    return _mm512_cvtepi8_epi16(v);
}

/* The sums of registers 0 to 3 over the four numbers of each group, register by register. */
ALWAYS_INLINE __m512i add_across(const __m512i v[4])
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i a =
        _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    __m512i b =
        _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    a = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    return _mm512_permutexvar_epi32(order, a);
}

/* Takes what the offset makes out of the sums of a chunk. */
ALWAYS_INLINE __m512i less_offset(const struct kind k, const struct row rows[2],
                                  const struct token *token, size_t g, __m512i sums)
{
    /* Rows of sums are whole cache lines: a chunk never runs past them. */
    __m512i pairs = _mm512_broadcast_i64x4(
        _mm256_load_si256((const __m256i *)(const void *)(token->sums + 2 * g)));
    if (!k.is_halved) {
        return _mm512_dpwssd_epi32(sums, pairs, _mm512_set1_epi16((short)-offset_of(k)));
    }
    __m128i a = _mm_loadu_si128((const __m128i *)(const void *)(rows[0].scales + 2 * g));
    __m128i b = _mm_loadu_si128((const __m128i *)(const void *)(rows[1].scales + 2 * g));
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    pairs = _mm512_madd_epi16(pairs, _mm512_cvtepi8_epi16(both));
    return _mm512_sub_epi32(sums, _mm512_slli_epi32(pairs, 5)); /* the offset is 32 */
}

/* Groups g .. g+n-1 of two rows times n_toks tokens. */
ALWAYS_INLINE void chunk(const struct kind k, const int n_toks, const struct row rows[2],
                         const struct token *toks, size_t g, const uint32_t n, __m512i table,
                         __m512 acc[TOKENS])
{
    __m512i values[4][2], factors[4][2];
    for (int i = 0; i < 4; i++) {
        const struct row *row = &rows[i / 2];
        uint32_t from = i % 2 * 4, some = n <= from ? 0 : n - from < 4 ? n - from : 4;
        values[i][0] = values[i][1] = _mm512_setzero_si512();
        if (some) {
            decode512(k, row, g + from, some, table, values[i]);
        }
        for (int h = 0; h < 2 && k.is_halved; h++) {
            factors[i][h] = spread_factors(row->scales + 2 * g, i % 2, h);
        }
    }
    __m512 scales = load_scales2(k, rows, g, n), mins = scales;
    if (k.min != SLU_MIN_NONE) {
        mins = load_mins2(k, rows, g, n);
    }
    __mmask16 mask = (__mmask16)(((1u << n) - 1) * 0x101);
    for (int t = 0; t < n_toks; t++) {
        __m512i v[4];
        for (int i = 0; i < 4; i++) {
            v[i] = _mm512_setzero_si512();
            if ((uint32_t)i % 2 * 4 >= n) {
                continue;
            }
            for (int h = 0; h < 2; h++) {
                const int8_t *at = toks[t].q + 32 * g + i % 2 * 128 + h * 64;
                __m512i q = _mm512_load_si512(at);
                if (k.is_halved) {
                    __m512i pairs = _mm512_maddubs_epi16(values[i][h], q);
                    v[i] = _mm512_dpwssd_epi32(v[i], pairs, factors[i][h]);
                } else {
                    v[i] = _mm512_dpbusd_epi32(v[i], values[i][h], q);
                }
            }
        }
        __m512i sums = add_across(v);
        if (offset_of(k)) {
            sums = less_offset(k, rows, &toks[t], g, sums);
        }
        __m512 d = _mm512_broadcast_f32x8(_mm256_load_ps(toks[t].d + g));
        __m512 products = _mm512_mul_ps(scales, d), integers = _mm512_cvtepi32_ps(sums);
        acc[t] = n == CHUNK ? _mm512_fmadd_ps(integers, products, acc[t])
                            : _mm512_mask3_fmadd_ps(integers, products, acc[t], mask);
        if (k.min != SLU_MIN_NONE) {
            __m512 s = _mm512_broadcast_f32x8(_mm256_load_ps(toks[t].s + g));
            acc[t] = n == CHUNK ? _mm512_fmadd_ps(mins, s, acc[t])
                                : _mm512_mask3_fmadd_ps(mins, s, acc[t], mask);
        }
    }
}

/* The last n groups of two rows, not a whole chunk. A token alone gets code of its own for each n:
 * rows may be shorter than a chunk, as those of a block's down matrix are. */
ALWAYS_INLINE void last_chunk(const struct kind k, const int n_toks, const struct row rows[2],
                              const struct token *toks, size_t g, uint32_t n, __m512i table,
                              __m512 acc[TOKENS])
{
#define LAST(n)                                                                                    \
    case n:                                                                                        \
        chunk(k, 1, rows, toks, g, n, table, acc);                                                 \
        return;
    switch (n_toks == 1 ? n : CHUNK) {
        LAST(1)
        LAST(2)
        LAST(3)
        LAST(4)
        LAST(5)
        LAST(6)
        LAST(7)
    }
#undef LAST
    chunk(k, n_toks, rows, toks, g, n, table, acc);
}

/* Asks for what follows the chunk at group g by ASK_AHEAD bytes, into the second level. */
ALWAYS_INLINE void ask_ahead(const struct row *row, size_t g)
{
    /* Integers, as it may be past the matrix, where there is nothing to point to. */
    uintptr_t codes = (uintptr_t)row->codes + 16 * g + ASK_AHEAD;
    uintptr_t high = (uintptr_t)row->high + 8 * g + ASK_AHEAD / 2;
    _mm_prefetch((const void *)codes, _MM_HINT_T1);
    _mm_prefetch((const void *)(codes + 64), _MM_HINT_T1);
    _mm_prefetch((const void *)high, _MM_HINT_T1);
}

/* Two rows of n_groups groups times n_toks tokens: 8 lanes of the one, then of the other. */
ALWAYS_INLINE void rows_mul(const struct kind k, const int n_toks, const struct row rows[2],
                            size_t n_groups, const struct token *toks, __m512i table,
                            __m512 acc[TOKENS])
{
    for (int t = 0; t < n_toks; t++) {
        acc[t] = _mm512_setzero_ps();
    }
    size_t g = 0;
    for (; g + CHUNK <= n_groups; g += CHUNK) {
        if (k.bits == 6 && n_toks == 1) { /* four streams, which the processor follows no more */
            ask_ahead(&rows[0], g);
            ask_ahead(&rows[1], g);
        }
        chunk(k, n_toks, rows, toks, g, CHUNK, table, acc);
    }
    if (!is_super(k) && g < n_groups) {
        last_chunk(k, n_toks, rows, toks, g, (uint32_t)(n_groups - g), table, acc);
    }
}

/* The sums of lanes of four pairs of rows: those of the first rows, then of the second ones. */
ALWAYS_INLINE __m256 lanes_sums(__m512 a, __m512 b, __m512 c, __m512 d)
{
    __m512 p = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    __m512 q = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
    __m512 u = _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
    u = _mm512_add_ps(u, _mm512_movehdup_ps(u));
    const __m512i order = _mm512_setr_epi32(0, 8, 2, 10, 4, 12, 6, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castps512_ps256(_mm512_permutexvar_ps(order, u));
}

/* Rows lo .. hi-1 times n_toks tokens. The two rows are half of all rows apart, for their streams
 * to run on from row to row; an odd one goes with itself. Four such pairs are added up at once. */
ALWAYS_INLINE void tokens_mul(const struct kind k, const int n_toks, float *y, size_t y_stride,
                              const struct slu_mat *w, uint32_t lo, uint32_t hi,
                              const struct token *toks, __m512i table)
{
    size_t half = ((size_t)hi - lo + 1) / 2, middle = lo + half, n_groups = w->cols / 32;
    const struct slu_mat_layout at = w->at;
    struct row rows[2] = {row_at(w, lo), row_at(w, hi - lo > 1 ? middle : lo)};
    for (size_t row = lo; row < middle; row += 4) {
        __m512 acc[4][TOKENS];
        size_t some = middle - row < 4 ? middle - row : 4;
        size_t others = hi - row - half < 4 ? hi - row - half : 4;
        for (size_t i = 0; i < some; i++) {
            rows[1] = i < others ? rows[1] : rows[0];
            rows_mul(k, n_toks, rows, n_groups, toks, table, acc[i]);
            row_step(&rows[0], &at);
            row_step(&rows[1], &at);
        }
        for (size_t i = some; i < 4; i++) {
            memcpy(acc[i], acc[0], n_toks * sizeof acc[0][0]);
        }
        for (int t = 0; t < n_toks; t++) {
            __m256 sums = lanes_sums(acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
            float *out = y + (size_t)t * y_stride + row;
            store_some(out, some, _mm256_castps256_ps128(sums));
            store_some(out + half, others, _mm256_extractf128_ps(sums, 1));
        }
    }
}

/* Rows lo .. hi-1 times n tokens from tok[0] on, or from the i-th where there is no list. */
ALWAYS_INLINE void tokens_from(const struct kind k, float *y, size_t y_stride,
                               const struct slu_mat *w, uint32_t lo, uint32_t hi,
                               const struct slu_acts *x, const uint32_t *tok, uint32_t i,
                               uint32_t n, __m512i table)
{
    struct token toks[TOKENS];
    for (uint32_t t = 0; t < n; t++) {
        size_t token = tok ? tok[i + t] : i + t;
        toks[t] = (struct token){
            .q = x->q + token * x->q_stride,
            .d = x->d + token * x->g_stride,
            .s = x->s + token * x->g_stride,
            .sums = x->sums + 2 * token * x->g_stride,
        };
    }
    y += i * y_stride;
    if (n == 1) {
        tokens_mul(k, 1, y, y_stride, w, lo, hi, toks, table);
    } else if (n == 2) {
        tokens_mul(k, 2, y, y_stride, w, lo, hi, toks, table);
    } else if (n == 3) {
        tokens_mul(k, 3, y, y_stride, w, lo, hi, toks, table);
    } else {
        tokens_mul(k, 4, y, y_stride, w, lo, hi, toks, table);
    }
}

ALWAYS_INLINE void mul_few(const struct kind k, float *y, size_t y_stride, const struct slu_mat *w,
                           uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                           uint32_t n)
{
    __m512i table = table512_of(k, w);
    /* In one pass over all tokens there is nothing to come back to. */
    uint32_t n_passes = (n + TOKENS - 1) / TOKENS, step = n_passes > 1 ? ROWS_HOT : hi - lo;
    for (uint32_t top = lo; top < hi; top += step) {
        uint32_t end = hi - top < step ? hi : top + step;
        for (uint32_t p = 0, i = 0, some; p < n_passes; p++, i += some) {
            some = (n - i + n_passes - p - 1) / (n_passes - p);
            tokens_from(k, y, y_stride, w, top, end, x, tok, i, some, table);
        }
    }
}

#endif
