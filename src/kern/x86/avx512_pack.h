/*
 * Unpacking of weights into panels, 32 or 48 rows side by side, for matrix-matrix products: what
 * codes cost is paid once for all tokens, and so are scales. For many tokens codes are first
 * gathered, 4 bytes of each row side by side but no larger than they are, which the second cache
 * has room for up to some 100 groups, and unpacked lane by lane, which the nearest has.
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

/* Registers that hold a group's codes of 16 rows as they are. */
#define LINES_MAX 8
ALWAYS_INLINE int lines_of(const struct kind k)
{
    return k.bits;
}

/* The codes of group g of the 16 rows of register h, side by side: each lane has 4 bytes of a row
 * in lines 0 to 3, or 0 to 7, and then what 5 and 6 bits have elsewhere. */
ALWAYS_INLINE void gather(const struct kind k, const struct panel_rows *p, size_t h, size_t g,
                          __m512i lines[LINES_MAX])
{
    const uint8_t *const *rows = p->codes + GEMM_LANES * h;
    const uint8_t *const *high_rows = p->high + GEMM_LANES * h;
    load_quads(rows, bytes_of(k) * g, lines);
    if (k.bits == 8) {
        load_quads(rows, bytes_of(k) * g + 16, lines + 4);
    } else if (k.bits == 5) {
        lines[4] = load_words(high_rows, 4 * g);
    } else if (k.bits == 6) {
        lines[4] = load_words(high_rows, 8 * g);
        lines[5] = load_words(high_rows, 8 * g + 4);
    }
}

/* The codes of columns 4j .. 4j+3, out of a group's lines. */
ALWAYS_INLINE __m512i unpack_quad(const struct kind k, const __m512i lines[LINES_MAX], int j,
                                  __m512i table)
{
    if (k.bits == 8) {
        return _mm512_xor_si512(lines[j], _mm512_set1_epi8(-128));
    }
    __m512i v = j < 4 ? lines[j] : _mm512_srli_epi16(lines[j - 4], 4);
    if (k.has_table) {
        /* Four times over: what lies above a nibble doesn't matter. */
        return _mm512_permutexvar_epi8(v, table);
    }
    v = _mm512_and_si512(v, _mm512_set1_epi8(15));
    if (k.bits == 5) {
        /* 16 numbers of 4 bits, each bit in a byte of its own. */
        const __m512i bits = _mm512_setr_epi32(
            0, 0x10, 0x1000, 0x1010, 0x100000, 0x100010, 0x101000, 0x101010, 0x10000000, 0x10000010,
            0x10001000, 0x10001010, 0x10100000, 0x10100010, 0x10101000, 0x10101010);
        __m512i four = _mm512_srl_epi32(lines[4], _mm_cvtsi32_si128(4 * j));
        return _mm512_or_si512(v, _mm512_permutexvar_epi32(four, bits));
    }
    if (k.bits == 6) {
        __m512i four = _mm512_srl_epi32(lines[4 + j % 2], _mm_cvtsi32_si128(2 * (j / 2)));
        four = _mm512_and_si512(four, _mm512_set1_epi8(3));
        return _mm512_or_si512(v, _mm512_slli_epi16(four, 4));
    }
    return v;
}

/* A group's lines of register h into its codes. */
ALWAYS_INLINE void unpack(const struct kind k, const int n_regs, uint8_t *codes, size_t h,
                          const __m512i lines[LINES_MAX], __m512i table)
{
    for (int j = 0; j < 8; j++) {
        _mm512_store_si512(codes + (size_t)j * quad_bytes(n_regs) + 4 * GEMM_LANES * h,
                           unpack_quad(k, lines, j, table));
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

/* The codes of a panel as they are gathered, where they have less than 8 bits. */
#define GATHERED_LINES 6
struct gathered {
    uint8_t at[PANEL_GROUPS * GEMM_REGS * GATHERED_LINES * 64] __attribute__((aligned(64)));
};

/* Those of the group at `place` in the rows of register h. */
ALWAYS_INLINE size_t gathered_at(const struct kind k, const int n_regs, uint32_t place, size_t h)
{
    return (place * (size_t)n_regs + h) * (size_t)lines_of(k) * 64;
}

/* What a panel is made of, and in. */
struct panel_work {
    struct panel_rows rows;
    struct gathered gathered;
    struct panel panel;
};

/* 16 groups of a plane of the 16 rows of register h, n of them there: those that are a panel's i-th
 * and a row's g-th, and so on. */
ALWAYS_INLINE void pack_plane(const struct kind k, const enum plane plane, struct panel_work *work,
                              const uint32_t lane_groups, size_t h, size_t g, uint32_t i,
                              uint32_t n)
{
    const struct row *rows = work->rows.rows + GEMM_LANES * h;
    struct panel *panel = &work->panel;
    const size_t at = GEMM_LANES * h;
    __m512i v[GEMM_LANES];
    for (size_t r = 0; r < GEMM_LANES; r++) {
        v[r] =
            n == 16 ? load_plane(k, plane, &rows[r], g, 16) : load_plane(k, plane, &rows[r], g, n);
    }
    transpose16(v);
    for (uint32_t j = 0; j < n; j++) {
        const uint32_t place = place_of(i + j, lane_groups);
        if (plane == PLANE_SCALES) {
            _mm512_store_si512(panel->scales[place] + at, v[j]);
        } else if (plane == PLANE_MINS) {
            _mm512_store_si512(panel->mins[place] + at, v[j]);
        } else {
            __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(v[j], 24), 24);
            __m512i second = _mm512_srai_epi32(_mm512_slli_epi32(v[j], 16), 24);
            _mm512_store_si512(panel->factors[place][0] + at, first);
            _mm512_store_si512(panel->factors[place][1] + at, second);
        }
    }
}

/* Scales and the like of a panel's n groups, of which the first is a row's g-th. */
ALWAYS_INLINE void pack_scales(const struct kind k, const int n_regs, struct panel_work *work,
                               const uint32_t lane_groups, size_t g, uint32_t n)
{
    for (size_t h = 0; h < (size_t)n_regs; h++) {
        for (uint32_t i = 0; i < n; i += 16) {
            const uint32_t some = n - i < 16 ? n - i : 16;
            pack_plane(k, PLANE_SCALES, work, lane_groups, h, g + i, i, some);
            if (k.min != SLU_MIN_NONE) {
                pack_plane(k, PLANE_MINS, work, lane_groups, h, g + i, i, some);
            }
            if (k.is_halved) {
                pack_plane(k, PLANE_FACTORS, work, lane_groups, h, g + i, i, some);
            }
        }
    }
}

/* The codes of groups g .. g+n-1, which are few, in two registers of rows. */
ALWAYS_INLINE void unpack_few(const struct kind k, struct panel_work *work, size_t g, uint32_t n,
                              __m512i table)
{
    for (size_t h = 0; h < 2; h++) {
        for (uint32_t i = 0; i < n; i++) {
            __m512i lines[LINES_MAX];
            gather(k, &work->rows, h, g + i, lines);
            unpack(k, 2, work->panel.codes + i * group_bytes(2), h, lines, table);
        }
    }
}

/* The codes of groups g .. g+n-1, before those of a lane are unpacked: rows are walked but once.
 * Bytes, which are more to store and less to unpack, are gathered when their lane is. */
ALWAYS_INLINE void gather_all(const struct kind k, const int n_regs, struct panel_work *work,
                              size_t g, uint32_t n)
{
    for (size_t h = 0; h < (size_t)n_regs && k.bits < 8; h++) {
        for (uint32_t i = 0; i < n; i++) {
            __m512i lines[LINES_MAX];
            gather(k, &work->rows, h, g + i, lines);
            size_t at = gathered_at(k, n_regs, place_of(i, LANE_GROUPS), h);
            for (int j = 0; j < lines_of(k); j++) {
                _mm512_store_si512(work->gathered.at + at + 64 * j, lines[j]);
            }
        }
    }
}

/* The codes of lane l's n groups of those from g on. */
ALWAYS_INLINE void unpack_lane(const struct kind k, const int n_regs, struct panel_work *work,
                               size_t g, uint32_t l, uint32_t n, __m512i table)
{
    for (uint32_t i = 0; i < n; i++) {
        for (size_t h = 0; h < (size_t)n_regs; h++) {
            __m512i lines[LINES_MAX];
            size_t at = gathered_at(k, n_regs, l * LANE_GROUPS + i, h);
            if (k.bits == 8) {
                gather(k, &work->rows, h, g + l + SUM_LANES * i, lines);
            }
            for (int j = 0; j < lines_of(k) && k.bits < 8; j++) {
                lines[j] = _mm512_load_si512(work->gathered.at + at + 64 * j);
            }
            unpack(k, n_regs, work->panel.codes + i * group_bytes(n_regs), h, lines, table);
        }
    }
}

#endif
