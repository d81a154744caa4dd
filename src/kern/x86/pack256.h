/*
 * Unpacking of weights into panels, 16 rows side by side: what codes cost is paid once for all
 * tokens, and so are scales. With it, products for any number of tokens.
 */
#ifndef SLU_KERN_X86_PACK256_H
#define SLU_KERN_X86_PACK256_H

#include "kern/x86/panel256.h"

ALWAYS_INLINE __m256i load_two(const uint8_t *a, const uint8_t *b)
{
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)a)),
        _mm_loadu_si128((const __m128i *)(const void *)b), 1);
}

/* 16 bytes of each of 8 rows, given where they start -> 4 bytes of all rows, 4 times. */
ALWAYS_INLINE void load_quads(const uint8_t *const rows[8], size_t offset, __m256i ret[4])
{
    __m256i v[4];
    for (int i = 0; i < 4; i++) {
        v[i] = load_two(rows[i] + offset, rows[4 + i] + offset);
    }
    __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    ret[0] = _mm256_unpacklo_epi64(a, c);
    ret[1] = _mm256_unpackhi_epi64(a, c);
    ret[2] = _mm256_unpacklo_epi64(b, d);
    ret[3] = _mm256_unpackhi_epi64(b, d);
}

/* 4 bytes of each of 8 rows. */
ALWAYS_INLINE __m256i load_words(const uint8_t *const rows[8], size_t offset)
{
    int32_t w[8];
    for (int r = 0; r < 8; r++) {
        memcpy(&w[r], rows[r] + offset, sizeof w[r]);
    }
    return _mm256_setr_epi32(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]);
}

/* Where the planes of a panel's rows start; past the last row they repeat it. */
struct panel_rows {
    struct row rows[PANEL_ROWS];
    const uint8_t *codes[PANEL_ROWS], *high[PANEL_ROWS];
};

ALWAYS_INLINE void panel_rows_init(struct panel_rows *p, const struct slu_mat *w, size_t lo,
                                   size_t hi)
{
    for (size_t r = 0; r < PANEL_ROWS; r++) {
        p->rows[r] = row_at(w, lo + r < hi ? lo + r : hi - 1);
        p->codes[r] = p->rows[r].codes;
        p->high[r] = p->rows[r].high;
    }
}

/* The high bits of columns 4j .. 4j+3, in the place that they have in a byte. */
ALWAYS_INLINE __m256i high_quad(const struct kind k, const __m256i high[2], int j)
{
    if (k.bits == 6) {
        __m256i v = _mm256_srl_epi32(high[j % 2], _mm_cvtsi32_si128(2 * (j / 2)));
        return _mm256_slli_epi16(_mm256_and_si256(v, _mm256_set1_epi8(3)), 4);
    }
    /* A byte for two quads, four times; then a bit of it in each. */
    const __m256i byte = _mm256_add_epi8(_mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0,
                                                          0x0c0c0c0c, 0x08080808, 0x04040404, 0),
                                         _mm256_set1_epi8((char)(j / 2)));
    const __m256i bit = _mm256_set1_epi32(j % 2 ? (int)0x80402010 : 0x08040201);
    __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(high[0], byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(16));
}

ALWAYS_INLINE void store_rows(void *plane, int v, __m256i rows)
{
    _mm256_store_si256((__m256i *)plane + v, rows);
}

/* The codes of group g of rows 8v .. 8v+7. */
ALWAYS_INLINE void pack_codes(const struct kind k, uint8_t out[8][4 * PANEL_ROWS],
                              const struct panel_rows *p, int v, size_t g, __m256i table)
{
    const uint8_t *const *codes = p->codes + 8 * v, *const *high_at = p->high + 8 * v;
    const __m256i shift = _mm256_set1_epi8(NEEDS_UNSIGNED ? -128 : 0);
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i quads[4], high[2] = {nibble, nibble};
    if (k.bits == 8) {
        for (size_t h = 0; h < 2; h++) {
            load_quads(codes, 32 * g + 16 * h, quads);
            for (size_t j = 0; j < 4; j++) {
                store_rows(out[4 * h + j], v, _mm256_xor_si256(quads[j], shift));
            }
        }
        return;
    }
    if (k.bits == 5) {
        high[0] = load_words(high_at, 4 * g);
    } else if (k.bits == 6) {
        high[0] = load_words(high_at, 8 * g);
        high[1] = load_words(high_at, 8 * g + 4);
    }
    load_quads(codes, 16 * g, quads);
    for (int j = 0; j < 8; j++) {
        __m256i quad = j < 4 ? quads[j] : _mm256_srli_epi16(quads[j - 4], 4);
        quad = _mm256_and_si256(quad, nibble);
        quad = k.bits > 4 ? _mm256_or_si256(quad, high_quad(k, high, j)) : quad;
        quad = k.has_table ? _mm256_shuffle_epi8(table, quad) : quad;
        store_rows(out[j], v, quad);
    }
}

/* Rows become columns. */
ALWAYS_INLINE void transpose8(__m256i v[8])
{
    __m256i a[8];
    for (int i = 0; i < 8; i += 4) {
        __m256i p = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        __m256i q = _mm256_unpackhi_epi32(v[i], v[i + 1]);
        __m256i r = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]);
        __m256i s = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
        a[i] = _mm256_unpacklo_epi64(p, r);
        a[i + 1] = _mm256_unpackhi_epi64(p, r);
        a[i + 2] = _mm256_unpacklo_epi64(q, s);
        a[i + 3] = _mm256_unpackhi_epi64(q, s);
    }
    for (int c = 0; c < 4; c++) {
        v[c] = _mm256_permute2x128_si256(a[c], a[4 + c], 0x20);
        v[4 + c] = _mm256_permute2x128_si256(a[c], a[4 + c], 0x31);
    }
}

/* Groups g .. g+n-1 of the scales and minimums of rows 8v .. 8v+7, n at most 8. */
ALWAYS_INLINE void pack_scales(const struct kind k, struct panel *panel, uint32_t i,
                               const struct panel_rows *p, int v, size_t g, uint32_t n)
{
    const struct row *rows = p->rows + 8 * v;
    __m256i t[8];
    for (int r = 0; r < 8; r++) {
        t[r] = _mm256_castps_si256(load_scales(k, &rows[r], g, n));
    }
    transpose8(t);
    for (uint32_t j = 0; j < n; j++) {
        store_rows(panel->scales[i + j], v, t[j]);
    }
    if (k.min != SLU_MIN_NONE) {
        for (int r = 0; r < 8; r++) {
            t[r] = _mm256_castps_si256(load_mins(k, &rows[r], g, n));
        }
        transpose8(t);
        for (uint32_t j = 0; j < n; j++) {
            store_rows(panel->mins[i + j], v, t[j]);
        }
    }
    if (k.is_halved) {
        for (int r = 0; r < 8; r++) {
            const void *at = rows[r].scales + 2 * g;
            t[r] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at));
        }
        transpose8(t);
        for (uint32_t j = 0; j < n; j++) {
            store_rows(panel->factors[i + j], v, t[j]);
        }
    }
}

/* Groups g .. g+n-1. */
ALWAYS_INLINE void pack(const struct kind k, struct panel *panel, const struct panel_rows *p,
                        size_t g, uint32_t n, __m256i table)
{
    for (int v = 0; v < 2; v++) {
        for (uint32_t i = 0; i < n; i++) {
            pack_codes(k, panel->codes[i], p, v, g + i, table);
        }
        for (uint32_t i = 0; i < n; i += CHUNK) {
            if (n - i >= CHUNK) {
                pack_scales(k, panel, i, p, v, g + i, CHUNK);
            } else {
                pack_scales(k, panel, i, p, v, g + i, n - i);
            }
        }
    }
}

/* Rows lo .. hi-1, at most 16, times n tokens. */
ALWAYS_INLINE void panel_rows_mul(const struct kind k, float *y, size_t y_stride,
                                  const struct slu_mat *w, size_t lo, size_t hi,
                                  const struct slu_acts *x, const uint32_t *tok, uint32_t n,
                                  __m256i table)
{
    struct panel panel;
    struct panel_sums sums;
    struct panel_rows rows;
    enum panel_kind kind = PANEL_OFFSET;
    if (k.is_halved) {
        kind = PANEL_HALVED;
    } else if (k.min != SLU_MIN_NONE) {
        kind = PANEL_MIN;
    } else if (k.is_signed && !NEEDS_UNSIGNED) {
        kind = PANEL_SIGNED;
    }
    uint32_t n_groups = w->cols / 32;
    panel_rows_init(&rows, w, lo, hi);
    memset(&sums, 0, n * sizeof sums.at[0]);
    for (uint32_t g = 0; g < n_groups; g += PANEL_GROUPS) {
        uint32_t some = n_groups - g < PANEL_GROUPS ? n_groups - g : PANEL_GROUPS;
        pack(k, &panel, &rows, g, some, table);
        panel_mul_any(kind, &sums, &panel, g, some, offset_of(k), x, tok, n);
    }
    panel_store(y + lo, y_stride, (uint32_t)(hi - lo), &sums, n);
}

ALWAYS_INLINE void mul_quant(const struct kind k, float *y, size_t y_stride,
                             const struct slu_mat *w, uint32_t lo, uint32_t hi,
                             const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    __m256i table = table_of(k, w);
    if (NEEDS_UNSIGNED && k.is_signed) {
        table = _mm256_xor_si256(table, _mm256_set1_epi8(-128));
    }
    if (n <= TOKENS) {
        mul_few(k, y, y_stride, w, lo, hi, x, tok, n, table);
        return;
    }
    for (uint32_t i = 0; i < n; i += PANEL_TOKENS) {
        uint32_t some = n - i < PANEL_TOKENS ? n - i : PANEL_TOKENS;
        struct slu_acts from = *x;
        if (!tok) {
            from.q += i * x->q_stride;
            from.d += i * x->g_stride;
            from.s += i * x->g_stride;
            from.sums += 2 * i * x->g_stride;
        }
        for (size_t row = lo; row < hi; row += PANEL_ROWS) {
            size_t end = hi - row < PANEL_ROWS ? hi : row + PANEL_ROWS;
            panel_rows_mul(k, y + i * y_stride, y_stride, w, row, end, &from, tok ? tok + i : NULL,
                           some, table);
        }
    }
}

#endif
