/*
 * Unpacking of weights into panels, 32 or 48 rows side by side, for matrix-matrix products: what
 * codes cost is paid once for all tokens, and so are scales.
 */
#ifndef SLU_KERN_X86_AVX512_PACK_H
#define SLU_KERN_X86_AVX512_PACK_H

#include "kern/x86/avx512.h"

/* 16 bytes of each of 16 rows, `offset` from where they start -> 4 bytes of all rows, 4 times. */
ALWAYS_INLINE void load_quads(const uint8_t *const rows[GEMM_LANES], size_t offset, __m512i ret[4])
{
    __m512i v[4];
    for (int i = 0; i < 4; i++) {
        const __m128i *at[4];
        for (int l = 0; l < 4; l++) {
            at[l] = (const __m128i *)(const void *)(rows[4 * l + i] + offset);
        }
        v[i] = _mm512_castsi128_si512(_mm_loadu_si128(at[0]));
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128(at[1]), 1);
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128(at[2]), 2);
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128(at[3]), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    ret[0] = _mm512_unpacklo_epi64(a, c);
    ret[1] = _mm512_unpackhi_epi64(a, c);
    ret[2] = _mm512_unpacklo_epi64(b, d);
    ret[3] = _mm512_unpackhi_epi64(b, d);
}

/* 4 bytes of each of 16 rows. */
ALWAYS_INLINE __m512i load_words(const uint8_t *const rows[GEMM_LANES], size_t offset)
{
    int32_t words[GEMM_LANES];
    for (int r = 0; r < GEMM_LANES; r++) {
        memcpy(&words[r], rows[r] + offset, sizeof words[r]);
    }
    return _mm512_setr_epi32(words[0], words[1], words[2], words[3], words[4], words[5], words[6],
                             words[7], words[8], words[9], words[10], words[11], words[12],
                             words[13], words[14], words[15]);
}

/* Where the planes of a panel's rows start; past the last row they repeat it. */
struct panel_rows {
    struct row rows[GEMM_ROWS];
    const uint8_t *codes[GEMM_ROWS], *high[GEMM_ROWS];
};

ALWAYS_INLINE void panel_rows_init(struct panel_rows *p, const struct slu_mat *w, size_t lo,
                                   size_t hi, size_t n)
{
    for (size_t r = 0; r < n; r++) {
        p->rows[r] = row_at(w, lo + r < hi ? lo + r : hi - 1);
        p->codes[r] = p->rows[r].codes;
        p->high[r] = p->rows[r].high;
    }
}

/* Of a group's codes, less what 5 and 6 bits have elsewhere. */
ALWAYS_INLINE size_t bytes_of(const struct kind k)
{
    return k.bits == 8 ? 32 : 16;
}

/* The codes of group g of the 16 rows of register h. */
ALWAYS_INLINE void pack_codes(const struct kind k, const int n_regs, uint8_t *codes,
                              const struct panel_rows *p, size_t h, size_t g, __m512i table)
{
    uint8_t *out = codes + 4 * GEMM_LANES * h;
    const uint8_t *const *rows = p->codes + GEMM_LANES * h;
    const uint8_t *const *high_rows = p->high + GEMM_LANES * h;
    __m512i quads[4];
    if (k.bits == 8) {
        const __m512i shift = _mm512_set1_epi8(-128);
        for (size_t half = 0; half < 2; half++) {
            load_quads(rows, bytes_of(k) * g + 16 * half, quads);
            for (size_t j = 0; j < 4; j++) {
                _mm512_store_si512(out + (4 * half + j) * quad_bytes(n_regs),
                                   _mm512_xor_si512(quads[j], shift));
            }
        }
        return;
    }
    /* Five bits: 16 numbers of 4 bits, each bit in a byte of its own. */
    const __m512i bits = _mm512_setr_epi32(0, 0x10, 0x1000, 0x1010, 0x100000, 0x100010, 0x101000,
                                           0x101010, 0x10000000, 0x10000010, 0x10001000, 0x10001010,
                                           0x10100000, 0x10100010, 0x10101000, 0x10101010);
    const __m512i nibble = _mm512_set1_epi8(15), two = _mm512_set1_epi8(3);
    __m512i high[2];
    if (k.bits == 5) {
        high[0] = load_words(high_rows, 4 * g);
    } else if (k.bits == 6) {
        high[0] = load_words(high_rows, 8 * g);
        high[1] = load_words(high_rows, 8 * g + 4);
    }
    load_quads(rows, bytes_of(k) * g, quads);
    for (int j = 0; j < 8; j++) {
        __m512i v = j < 4 ? quads[j] : _mm512_srli_epi16(quads[j - 4], 4);
        if (k.has_table) {
            /* Four times over: what lies above a nibble doesn't matter. */
            _mm512_store_si512(out + (size_t)j * quad_bytes(n_regs),
                               _mm512_permutexvar_epi8(v, table));
            continue;
        }
        v = _mm512_and_si512(v, nibble);
        if (k.bits == 5) {
            __m512i four = _mm512_srl_epi32(high[0], _mm_cvtsi32_si128(4 * j));
            v = _mm512_or_si512(v, _mm512_permutexvar_epi32(four, bits));
        } else if (k.bits == 6) {
            __m512i four = _mm512_srl_epi32(high[j % 2], _mm_cvtsi32_si128(2 * (j / 2)));
            v = _mm512_or_si512(v, _mm512_slli_epi16(_mm512_and_si512(four, two), 4));
        }
        _mm512_store_si512(out + (size_t)j * quad_bytes(n_regs), v);
    }
}

enum plane { PLANE_SCALES, PLANE_MINS, PLANE_FACTORS };

/* 16 numbers of a plane of one row, n of them there: floats, or pairs of 8-bit scales. */
ALWAYS_INLINE __m512i load_plane(const struct kind k, const enum plane plane, const struct row *row,
                                 size_t g, uint32_t n)
{
    if (plane == PLANE_FACTORS) {
        __m256i pairs = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), row->scales + 2 * g);
        return _mm512_cvtepu16_epi32(pairs);
    }
    uint32_t first = n < CHUNK ? n : CHUNK;
    __m256 low, high = _mm256_setzero_ps();
    if (plane == PLANE_SCALES) {
        low = load_scales(k, row, g, first);
        high = n > CHUNK ? load_scales(k, row, g + CHUNK, n - CHUNK) : high;
    } else {
        low = load_mins(k, row, g, first);
        high = n > CHUNK ? load_mins(k, row, g + CHUNK, n - CHUNK) : high;
    }
    return _mm512_castps_si512(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
}

/* Groups g .. g+n-1 of a plane of the 16 rows of register h, n at most 16. */
ALWAYS_INLINE void pack_plane(const struct kind k, const enum plane plane, struct panel *panel,
                              const struct panel_rows *p, size_t h, size_t g, uint32_t n)
{
    const size_t at = GEMM_LANES * h;
    __m512i v[GEMM_LANES];
    for (size_t r = 0; r < GEMM_LANES; r++) {
        v[r] = n == 16 ? load_plane(k, plane, &p->rows[at + r], g, 16)
                       : load_plane(k, plane, &p->rows[at + r], g, n);
    }
    transpose16(v);
    for (uint32_t j = 0; j < n; j++) {
        if (plane == PLANE_SCALES) {
            _mm512_store_si512(panel->scales[j] + at, v[j]);
        } else if (plane == PLANE_MINS) {
            _mm512_store_si512(panel->mins[j] + at, v[j]);
        } else {
            __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(v[j], 24), 24);
            __m512i second = _mm512_srai_epi32(_mm512_slli_epi32(v[j], 16), 24);
            _mm512_store_si512(panel->factors[j][0] + at, first);
            _mm512_store_si512(panel->factors[j][1] + at, second);
        }
    }
}

_Static_assert(GEMM_GROUPS == 16, "what pack_plane takes at once");

/* Groups g .. g+n-1. */
ALWAYS_INLINE void pack(const struct kind k, const int n_regs, struct panel *panel,
                        const struct panel_rows *p, size_t g, uint32_t n, __m512i table)
{
    for (size_t h = 0; h < (size_t)n_regs; h++) {
        for (uint32_t i = 0; i < n; i++) {
            pack_codes(k, n_regs, panel->codes + i * group_bytes(n_regs), p, h, g + i, table);
        }
        pack_plane(k, PLANE_SCALES, panel, p, h, g, n);
        if (k.min != SLU_MIN_NONE) {
            pack_plane(k, PLANE_MINS, panel, p, h, g, n);
        }
        if (k.is_halved) {
            pack_plane(k, PLANE_FACTORS, panel, p, h, g, n);
        }
    }
}

#endif
