/*
 * Quantized products with AVX2. One template, mul_quant, is specialised for each format by a
 * `struct kind` of compile-time constants.
 *
 * A row is walked in chunks of 8 groups of 32 columns, so that scales are converted and biases
 * summed 8 at a time, lane g % 8 belonging to group g. Within a chunk each group takes one pass:
 *
 *   16 or 32 bytes of codes -> 32 small integers in the order of the columns
 *   maddubs with q, madd with ones -> 8 int32, lane l holding columns 4l .. 4l+3
 *   to float, fma with the broadcast product of the two scales -> acc
 *
 * maddubs wants its first operand unsigned: signed values go in by magnitude, with their sign moved
 * to q. Its int16 sums of two don't saturate: 2 * 128 * 127 < 2^15, for q is never -128.
 */
#include "kern/x86/avx2.h"

#define CHUNK    8  /* groups */
#define TOKENS   4  /* at most, that share the decoding of a group */
#define ROWS     2  /* at most, side by side: a single chain of fma is bound by its latency */
#define ROWS_HOT 16 /* rows that stay in the cache while all tokens pass over them */

/* All of it known at compile time. */
struct kind {
    uint8_t bits;
    bool has_table;
    bool is_signed;   /* values may be negative */
    bool is_halved;   /* two scales for 32 columns */
    uint8_t subtract; /* from the code */
    float offset;     /* folded into the bias lanes */
    enum slu_scale_kind scale;
    enum slu_min_kind min;
};

/* Where a row of weights lies. */
struct row {
    const uint8_t *codes, *high, *scales, *mins, *supers;
};

struct token {
    const int8_t *q;
    const float *d, *s;
};

ALWAYS_INLINE bool is_super(const struct kind k)
{
    return k.scale == SLU_SCALE_U8_SUPER || k.scale == SLU_SCALE_I8_SUPER;
}

ALWAYS_INLINE bool has_bias(const struct kind k)
{
    return k.offset != 0 || k.min != SLU_MIN_NONE;
}

/* Bit i of the word becomes 16 in byte i. */
ALWAYS_INLINE __m256i high_bit(const uint8_t *high)
{
    uint32_t word;
    memcpy(&word, high, sizeof word);
    const __m256i spread =
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32((int)word), spread);
    v = _mm256_cmpeq_epi8(_mm256_and_si256(v, bit), bit);
    return _mm256_and_si256(v, _mm256_set1_epi8(16));
}

/* Bits 2k, 2k+1 of byte j become bits 4, 5 of byte j + 8k. */
ALWAYS_INLINE __m256i high_pair(const uint8_t *high)
{
    long long word;
    memcpy(&word, high, sizeof word);
    __m256i v = _mm256_srlv_epi64(_mm256_set1_epi64x(word), _mm256_setr_epi64x(0, 2, 4, 6));
    return _mm256_slli_epi16(_mm256_and_si256(v, _mm256_set1_epi8(3)), 4);
}

/* Group g of a row as 32 integers. */
ALWAYS_INLINE __m256i decode(const struct kind k, const struct row *row, size_t g, __m256i table)
{
    if (k.bits == 8) {
        return _mm256_loadu_si256((const __m256i *)(row->codes + 32 * g));
    }
    /* Low nibbles to the low half, high ones to the high half. */
    __m256i v = _mm256_broadcastsi128_si256(
        _mm_loadu_si128((const __m128i *)(const void *)(row->codes + 16 * g)));
    v = _mm256_srlv_epi32(v, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    v = _mm256_and_si256(v, _mm256_set1_epi8(15));
    if (k.bits == 5) {
        v = _mm256_or_si256(v, high_bit(row->high + 4 * g));
    } else if (k.bits == 6) {
        v = _mm256_or_si256(v, high_pair(row->high + 8 * g));
    }
    if (k.has_table) {
        v = _mm256_shuffle_epi8(table, v);
    }
    return k.subtract ? _mm256_sub_epi8(v, _mm256_set1_epi8((char)k.subtract)) : v;
}

/* n halves from group g on; what lies past the end of the plane isn't touched. */
ALWAYS_INLINE __m256 load_halves(const uint8_t *plane, size_t g, uint32_t n)
{
    if (n == CHUNK) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(plane + 2 * g)));
    }
    uint16_t some[CHUNK] = {0};
    memcpy(some, plane + 2 * g, 2 * n);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)some));
}

/* 2^(e-128), which for e of 0 and 1 is subnormal. */
ALWAYS_INLINE __m256 load_e8m0(const uint8_t *plane, size_t g, uint32_t n)
{
    long long word = 0;
    memcpy(&word, plane + g, n);
    const __m256i one = _mm256_set1_epi32(1);
    __m256i e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(word));
    __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, one), 23);
    __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(1 << 21), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(subnormal, normal, _mm256_cmpgt_epi32(e, one)));
}

ALWAYS_INLINE float super_at(const uint8_t *supers, size_t i)
{
    uint16_t bits;
    memcpy(&bits, supers + 2 * i, sizeof bits);
    return _cvtsh_ss(bits);
}

/* The scales of a chunk; with two for 32 columns, those of groups 0-3 and of groups 4-7. */
ALWAYS_INLINE void load_scales(const struct kind k, const struct row *row, size_t g, uint32_t n,
                               __m256 ret_scales[2])
{
    if (k.scale == SLU_SCALE_F16) {
        ret_scales[0] = load_halves(row->scales, g, n);
        return;
    }
    if (k.scale == SLU_SCALE_E8M0) {
        ret_scales[0] = load_e8m0(row->scales, g, n);
        return;
    }
    /* A chunk is a super-group. */
    __m256 d = _mm256_set1_ps(super_at(row->supers, g / CHUNK * (k.min == SLU_MIN_NONE ? 1 : 2)));
    const uint8_t *scales = row->scales + (k.is_halved ? 2 : 1) * g;
    for (int i = 0; i < (k.is_halved ? 2 : 1); i++) {
        __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(scales + CHUNK * i));
        __m256i wide = k.scale == SLU_SCALE_U8_SUPER ? _mm256_cvtepu8_epi32(bytes)
                                                     : _mm256_cvtepi8_epi32(bytes);
        ret_scales[i] = _mm256_mul_ps(d, _mm256_cvtepi32_ps(wide));
    }
}

/* What the bias lanes multiply the sums of activations with. */
ALWAYS_INLINE __m256 load_mins(const struct kind k, const struct row *row, size_t g, uint32_t n,
                               __m256 scales)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    if (k.min == SLU_MIN_F16) {
        return load_halves(row->mins, g, n);
    }
    if (k.min == SLU_MIN_NONE) {
        return _mm256_xor_ps(sign, _mm256_mul_ps(_mm256_set1_ps(k.offset), scales));
    }
    __m256 dmin = _mm256_set1_ps(super_at(row->supers, g / CHUNK * 2 + 1));
    __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(row->mins + g));
    __m256 mins = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    return _mm256_xor_ps(sign, _mm256_mul_ps(dmin, mins));
}

ALWAYS_INLINE __m256i first_lanes(uint32_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Multiplies the scales of a chunk of one row and one token into `ret_products`, one for each
 * group or two, and adds up the bias lanes. */
ALWAYS_INLINE __m256 scale_chunk(const struct kind k, const __m256 scales[2], __m256 mins,
                                 const struct token *token, size_t g, uint32_t n, __m256 bias,
                                 float *ret_products)
{
    __m256i mask = first_lanes(n);
    __m256 d = n == CHUNK ? _mm256_loadu_ps(token->d + g) : _mm256_maskload_ps(token->d + g, mask);
    if (k.is_halved) {
        /* Each step serves two scales. */
        __m256 low = _mm256_permutevar8x32_ps(d, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
        __m256 high = _mm256_permutevar8x32_ps(d, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
        _mm256_store_ps(ret_products, _mm256_mul_ps(scales[0], low));
        _mm256_store_ps(ret_products + 8, _mm256_mul_ps(scales[1], high));
    } else {
        _mm256_store_ps(ret_products, _mm256_mul_ps(scales[0], d));
    }
    if (!has_bias(k)) {
        return bias;
    }
    if (n == CHUNK) {
        return _mm256_fmadd_ps(mins, _mm256_loadu_ps(token->s + g), bias);
    }
    __m256 sum = _mm256_fmadd_ps(mins, _mm256_maskload_ps(token->s + g, mask), bias);
    return _mm256_blendv_ps(bias, sum, _mm256_castsi256_ps(mask));
}

/* The product of scales for each lane of group i of the chunk. */
ALWAYS_INLINE __m256 spread_scale(const struct kind k, const float *products, uint32_t i)
{
    if (!k.is_halved) {
        return _mm256_broadcast_ss(products + i);
    }
    double pair;
    memcpy(&pair, products + 2 * i, sizeof pair);
    return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(pair)),
                                _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}

/* Sums of four products each. */
ALWAYS_INLINE __m256i dot4(const struct kind k, __m256i values, __m256i magnitudes, __m256i q)
{
    __m256i pairs = k.is_signed ? _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(q, values))
                                : _mm256_maddubs_epi16(values, q);
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

/* Groups g .. g+n-1 of n_rows rows times n_toks tokens. */
ALWAYS_INLINE void chunk(const struct kind k, const int n_rows, const int n_toks,
                         const struct row *rows, const struct token *toks, size_t g,
                         const uint32_t n, __m256i table, __m256 acc[ROWS][TOKENS],
                         __m256 bias[ROWS][TOKENS])
{
    float products[ROWS][TOKENS][2 * CHUNK] __attribute__((aligned(32)));
    for (int r = 0; r < n_rows; r++) {
        __m256 scales[2], mins = _mm256_setzero_ps();
        load_scales(k, &rows[r], g, n, scales);
        if (has_bias(k)) {
            mins = load_mins(k, &rows[r], g, n, scales[0]);
        }
        for (int t = 0; t < n_toks; t++) {
            bias[r][t] = scale_chunk(k, scales, mins, &toks[t], g, n, bias[r][t], products[r][t]);
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        for (int r = 0; r < n_rows; r++) {
            __m256i values = decode(k, &rows[r], g + i, table);
            __m256i magnitudes = k.is_signed ? _mm256_abs_epi8(values) : values;
            for (int t = 0; t < n_toks; t++) {
                __m256i q = _mm256_loadu_si256((const __m256i *)(toks[t].q + 32 * (g + i)));
                __m256 sums = _mm256_cvtepi32_ps(dot4(k, values, magnitudes, q));
                acc[r][t] = _mm256_fmadd_ps(sums, spread_scale(k, products[r][t], i), acc[r][t]);
            }
        }
    }
}

/* Rows `at` .. at+n_rows-1 times n_toks tokens. */
ALWAYS_INLINE void rows_mul(const struct kind k, const int n_rows, const int n_toks, float *y,
                            size_t y_stride, const struct slu_mat *w, const size_t *at,
                            const struct token *toks, __m256i table)
{
    struct row rows[ROWS];
    __m256 acc[ROWS][TOKENS], bias[ROWS][TOKENS];
    for (int r = 0; r < n_rows; r++) {
        size_t row = at[r];
        rows[r].codes = w->data + w->at.codes + row * w->at.codes_row;
        rows[r].high = w->data + w->at.high + row * w->at.high_row;
        rows[r].scales = w->data + w->at.scales + row * w->at.scales_row;
        rows[r].mins = w->data + w->at.mins + row * w->at.mins_row;
        rows[r].supers = w->data + w->at.supers + row * w->at.supers_row;
        for (int t = 0; t < n_toks; t++) {
            acc[r][t] = bias[r][t] = _mm256_setzero_ps();
        }
    }
    size_t n_groups = w->cols / 32, g = 0;
    for (; g + CHUNK <= n_groups; g += CHUNK) {
        chunk(k, n_rows, n_toks, rows, toks, g, CHUNK, table, acc, bias);
    }
    if (!is_super(k) && g < n_groups) {
        chunk(k, n_rows, n_toks, rows, toks, g, (uint32_t)(n_groups - g), table, acc, bias);
    }
    for (int r = 0; r < n_rows; r++) {
        for (int t = 0; t < n_toks; t++) {
            y[(size_t)t * y_stride + at[r]] = lanes_sum(_mm256_add_ps(acc[r][t], bias[r][t]));
        }
    }
}

/* Rows lo .. hi-1 times as many of the n tokens from i on as one pass takes; returns how many. */
ALWAYS_INLINE uint32_t tokens_mul(const struct kind k, float *y, size_t y_stride,
                                  const struct slu_mat *w, uint32_t lo, uint32_t hi,
                                  const struct slu_acts *x, const uint32_t *tok, uint32_t i,
                                  uint32_t n, __m256i table)
{
    uint32_t some = n - i >= 4 ? 4 : n - i >= 2 ? 2 : 1;
    struct token toks[TOKENS];
    for (uint32_t t = 0; t < some; t++) {
        size_t token = tok ? tok[i + t] : i + t;
        toks[t].q = x->q + token * x->q_stride;
        toks[t].d = x->d + token * x->g_stride;
        toks[t].s = x->s + token * x->g_stride;
    }
    y += i * y_stride;
    /* Rows side by side are half of all rows apart, for their streams to run on from row to row:
     * the processor's prefetcher follows two such streams, but not neighbours that take turns
     * (Q4_0 from memory, Zen 4: 17 GB/s against 9). Four tokens are enough chains. */
    size_t half = some == 4 ? 0 : (hi - lo) / 2;
    for (size_t row = lo; row < lo + half; row++) {
        const size_t at[ROWS] = {row, row + half};
        if (some == 2) {
            rows_mul(k, 2, 2, y, y_stride, w, at, toks, table);
        } else {
            rows_mul(k, 2, 1, y, y_stride, w, at, toks, table);
        }
    }
    for (size_t row = lo + 2 * half; row < hi; row++) {
        if (some == 4) {
            rows_mul(k, 1, 4, y, y_stride, w, &row, toks, table);
        } else if (some == 2) {
            rows_mul(k, 1, 2, y, y_stride, w, &row, toks, table);
        } else {
            rows_mul(k, 1, 1, y, y_stride, w, &row, toks, table);
        }
    }
    return some;
}

ALWAYS_INLINE void mul_quant(const struct kind k, float *y, size_t y_stride,
                             const struct slu_mat *w, uint32_t lo, uint32_t hi,
                             const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    __m256i table = _mm256_setzero_si256();
    if (k.has_table) {
        table = _mm256_broadcastsi128_si256(
            _mm_loadu_si128((const __m128i *)(const void *)w->fmt->table));
    }
    /* In one pass over all tokens there is nothing to come back to. */
    uint32_t step = n > TOKENS ? ROWS_HOT : hi - lo;
    for (uint32_t top = lo; top < hi; top += step) {
        uint32_t end = hi - top < step ? hi : top + step;
        for (uint32_t i = 0; i < n;) {
            i += tokens_mul(k, y, y_stride, w, top, end, x, tok, i, n, table);
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
QUANT_MUL(q6_k, .bits = 6, .is_signed = true, .is_halved = true, .subtract = 32,
          .scale = SLU_SCALE_I8_SUPER)
QUANT_MUL(iq4_nl, .bits = 4, .has_table = true, .is_signed = true, .scale = SLU_SCALE_F16)
QUANT_MUL(mxfp4, .bits = 4, .has_table = true, .offset = 12, .scale = SLU_SCALE_E8M0)
