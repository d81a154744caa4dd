/*
 * Quantized weights in 256-bit registers: the codes of two groups, and the scales and minimums of
 * eight. Only the files of an instruction set may include it: everything here is inlined.
 */
#ifndef SLU_KERN_X86_LOAD256_H
#define SLU_KERN_X86_LOAD256_H

#include "kern/x86/avx2.h"

#define CHUNK 8 /* groups */

/* A format. All of it is known at compile time. */
struct kind {
    uint8_t bits;
    bool has_table;
    bool is_signed; /* values may be negative; no offset then */
    bool is_halved; /* two 8-bit scales for 32 columns, of a super-group */
    uint8_t offset; /* subtracted from the value */
    enum slu_scale_kind scale;
    enum slu_min_kind min;
};

/* Where a row of weights lies. */
struct row {
    const uint8_t *codes, *high, *scales, *mins, *supers;
};

ALWAYS_INLINE struct row row_at(const struct slu_mat *w, size_t i)
{
    return (struct row){
        .codes = w->data + w->at.codes + i * w->at.codes_row,
        .high = w->data + w->at.high + i * w->at.high_row,
        .scales = w->data + w->at.scales + i * w->at.scales_row,
        .mins = w->data + w->at.mins + i * w->at.mins_row,
        .supers = w->data + w->at.supers + i * w->at.supers_row,
    };
}

/* Moves on to the next row. */
ALWAYS_INLINE void row_step(struct row *row, const struct slu_mat_layout *at)
{
    row->codes += at->codes_row;
    row->high += at->high_row;
    row->scales += at->scales_row;
    row->mins += at->mins_row;
    row->supers += at->supers_row;
}

ALWAYS_INLINE bool is_super(const struct kind k)
{
    return k.scale == SLU_SCALE_U8_SUPER || k.scale == SLU_SCALE_I8_SUPER;
}

ALWAYS_INLINE __m256i table_of(const struct kind k, const struct slu_mat *w)
{
    return k.has_table ? _mm256_broadcastsi128_si256(
                             _mm_loadu_si128((const __m128i *)(const void *)w->fmt->table))
                       : _mm256_setzero_si256();
}

/* bytes of each of two groups, or of the first alone, which leaves the second's half zero. */
ALWAYS_INLINE __m256i load_pair16(const uint8_t *at, bool is_pair)
{
    return is_pair ? _mm256_loadu_si256((const __m256i *)(const void *)at)
                   : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)at));
}

ALWAYS_INLINE __m128i load_pair8(const uint8_t *at, bool is_pair)
{
    return is_pair ? _mm_loadu_si128((const __m128i *)(const void *)at)
                   : _mm_loadl_epi64((const __m128i *)(const void *)at);
}

/* All bits of byte i % 16 of a group's half of a register are bit i of its word. */
ALWAYS_INLINE void bit_masks(const uint8_t *high, bool is_pair, __m256i ret[2])
{
    uint64_t word = 0;
    memcpy(&word, high, is_pair ? 8 : 4);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i first =
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0404040404040404, 0x0505050505050505);
    const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi8(2));
    __m256i v = _mm256_set1_epi64x((long long)word);
    __m256i a = _mm256_and_si256(_mm256_shuffle_epi8(v, first), bit);
    __m256i b = _mm256_and_si256(_mm256_shuffle_epi8(v, second), bit);
    ret[0] = _mm256_cmpeq_epi8(a, bit);
    ret[1] = _mm256_cmpeq_epi8(b, bit);
}

/* Bit i of a group's word becomes 16 in byte i % 16 of its half of a register. */
ALWAYS_INLINE void high_bits(const uint8_t *high, bool is_pair, __m256i ret[2])
{
    bit_masks(high, is_pair, ret);
    ret[0] = _mm256_and_si256(ret[0], _mm256_set1_epi8(16));
    ret[1] = _mm256_and_si256(ret[1], _mm256_set1_epi8(16));
}

/* Bits 2k, 2k+1 of byte j of a group become bits 0, 1 of its weight j + 8k; those above are
 * anything. */
ALWAYS_INLINE void low_pairs(const uint8_t *pairs, bool is_pair, __m256i ret[2])
{
    __m256i v = _mm256_castsi128_si256(load_pair8(pairs, is_pair));
    v = _mm256_permute4x64_epi64(v, _MM_SHUFFLE(1, 1, 0, 0));
    ret[0] = _mm256_srlv_epi64(v, _mm256_setr_epi64x(0, 2, 0, 2));
    ret[1] = _mm256_srlv_epi64(v, _mm256_setr_epi64x(4, 6, 4, 6));
}

/* Bits 2k, 2k+1 of byte j of a group become bits 4, 5 of its weight j + 8k. */
ALWAYS_INLINE void high_pairs(const uint8_t *high, bool is_pair, __m256i ret[2])
{
    const __m256i two = _mm256_set1_epi8(3);
    low_pairs(high, is_pair, ret);
    ret[0] = _mm256_slli_epi16(_mm256_and_si256(ret[0], two), 4);
    ret[1] = _mm256_slli_epi16(_mm256_and_si256(ret[1], two), 4);
}

/* |q| of a row of activations, up to where they end as zeros. */
ALWAYS_INLINE void load_magnitudes(uint8_t *ret, const int8_t *q, size_t cols)
{
    for (size_t i = 0; i < (cols + 127) / 128 * 128; i += 32) {
        __m256i v = _mm256_load_si256((const __m256i *)(const void *)(q + i));
        _mm256_store_si256((__m256i *)(void *)(ret + i), _mm256_abs_epi8(v));
    }
}

/* Groups g and g + 1 as integers, in the order of the activations: the first 16 columns of both,
 * and the second. Without is_pair group g + 1 isn't touched, and its half is anything. */
ALWAYS_INLINE void decode(const struct kind k, const struct row *row, size_t g, bool is_pair,
                          __m256i table, __m256i ret[2])
{
    if (k.bits == 8) {
        const __m256i *at = (const __m256i *)(const void *)(row->codes + 32 * g);
        __m256i a = _mm256_loadu_si256(at), b = is_pair ? _mm256_loadu_si256(at + 1) : a;
        ret[0] = _mm256_permute2x128_si256(a, b, 0x20);
        ret[1] = _mm256_permute2x128_si256(a, b, 0x31);
        return;
    }
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i v = load_pair16(row->codes + 16 * g, is_pair);
    ret[0] = _mm256_and_si256(v, nibble);
    ret[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    if (k.bits > 4) {
        __m256i high[2];
        if (k.bits == 5) {
            high_bits(row->high + 4 * g, is_pair, high);
        } else {
            high_pairs(row->high + 8 * g, is_pair, high);
        }
        ret[0] = _mm256_or_si256(ret[0], high[0]);
        ret[1] = _mm256_or_si256(ret[1], high[1]);
    }
    if (k.has_table) {
        ret[0] = _mm256_shuffle_epi8(table, ret[0]);
        ret[1] = _mm256_shuffle_epi8(table, ret[1]);
    }
}

/* Where rows end amid a chunk, the last n numbers of a plane's row are loaded together with what
 * lies before them, which is there always (an earlier row, or the codes), and moved down: what lies
 * behind them may not be there. Loads of a variable length would wait for a store. */
ALWAYS_INLINE __m128i load_last_halves(const uint8_t *plane, size_t g, uint32_t n)
{
    static const uint8_t order[32] = {0,    1,    2,    3,    4,    5,    6,    7,
                                      8,    9,    10,   11,   12,   13,   14,   15,
                                      0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80,
                                      0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80};
    const uint8_t *at = plane + 2 * (g + n) - 16;
    __m128i v = _mm_loadu_si128((const __m128i *)(const void *)at);
    const void *from = order + 16 - 2 * n;
    return _mm_shuffle_epi8(v, _mm_loadu_si128((const __m128i *)from));
}

/* Bytes of 128 follow, which stand for the scale 1: a subnormal one would be slow to multiply. */
ALWAYS_INLINE __m128i load_last_e8m0(const uint8_t *plane, size_t g, uint32_t n)
{
    __m128i v = _mm_loadl_epi64((const __m128i *)(const void *)(plane + g + n - 8));
    v = _mm_srl_epi64(v, _mm_cvtsi32_si128((int)(64 - 8 * n)));
    __m128i ones = _mm_sll_epi64(_mm_set1_epi8((char)128), _mm_cvtsi32_si128((int)(8 * n)));
    return _mm_or_si128(v, ones);
}

/* n halves from group g on, the last of a row where they aren't a whole chunk. */
ALWAYS_INLINE __m256 load_halves(const uint8_t *plane, size_t g, uint32_t n)
{
    if (n == CHUNK) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(plane + 2 * g)));
    }
    return _mm256_cvtph_ps(load_last_halves(plane, g, n));
}

/* 2^(e-128), which for e of 0 and 1 is subnormal: there alone the second number is the larger. */
ALWAYS_INLINE __m256 load_e8m0(const uint8_t *plane, size_t g, uint32_t n)
{
    __m128i bytes = n == CHUNK ? _mm_loadl_epi64((const __m128i *)(const void *)(plane + g))
                               : load_last_e8m0(plane, g, n);
    __m256i e = _mm256_cvtepu8_epi32(bytes);
    __m256i normal = _mm256_sub_epi32(_mm256_slli_epi32(e, 23), _mm256_set1_epi32(1 << 23));
    __m256i subnormal = _mm256_add_epi32(_mm256_slli_epi32(e, 21), _mm256_set1_epi32(1 << 21));
    return _mm256_castsi256_ps(_mm256_max_epi32(normal, subnormal));
}

ALWAYS_INLINE float super_at(const uint8_t *supers, size_t i)
{
    uint16_t bits;
    memcpy(&bits, supers + 2 * i, sizeof bits);
    return _cvtsh_ss(bits);
}

/* A byte for each group of a super-group, times its d or dmin. */
ALWAYS_INLINE __m256 load_bytes(const uint8_t *plane, size_t g, float d)
{
    __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(plane + g));
    return _mm256_mul_ps(_mm256_set1_ps(d), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
}

/* The scales of a chunk, which is a super-group where there are such. */
ALWAYS_INLINE __m256 load_scales(const struct kind k, const struct row *row, size_t g, uint32_t n)
{
    if (k.scale == SLU_SCALE_F16) {
        return load_halves(row->scales, g, n);
    }
    if (k.scale == SLU_SCALE_E8M0) {
        return load_e8m0(row->scales, g, n);
    }
    float d = super_at(row->supers, g / CHUNK * (k.min == SLU_MIN_NONE ? 1 : 2));
    return k.is_halved ? _mm256_set1_ps(d) : load_bytes(row->scales, g, d);
}

/* What the sums of activations are multiplied with. */
ALWAYS_INLINE __m256 load_mins(const struct kind k, const struct row *row, size_t g, uint32_t n)
{
    if (k.min == SLU_MIN_F16) {
        return load_halves(row->mins, g, n);
    }
    __m256 mins = load_bytes(row->mins, g, super_at(row->supers, g / CHUNK * 2 + 1));
    return _mm256_xor_ps(_mm256_set1_ps(-0.0f), mins);
}

/* The 8-bit scales of a chunk's halves: those of its even groups, and those of its odd ones. */
ALWAYS_INLINE __m256i load_factors(const struct row *row, size_t g)
{
    const __m128i apart = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(row->scales + 2 * g));
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, apart));
}

ALWAYS_INLINE __m256i first_lanes(uint32_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* The first n of four numbers; what follows them may not be there. AVX-512's masked store won't do:
 * gcc 12 merges it with the extraction of v into a vextractf32x4, which faults on what is masked.
 */
ALWAYS_INLINE void store_some(float *y, size_t n, __m128 v)
{
    if (n == 4) {
        _mm_storeu_ps(y, v);
        return;
    }
    _mm_maskstore_ps(y, _mm256_castsi256_si128(first_lanes((uint32_t)n)), v);
}

#endif
