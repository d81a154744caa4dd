/*
 * Matrix-matrix products with AVX-512 VNNI, the part that is the same for all formats: an unpacked
 * panel of two or three registers of 16 rows, times blocks of up to 4 tokens. For each group, token
 * and register
 *
 *   8 times vpdpbusd: 16 rows by 4 columns, with 4 bytes of q in every lane -> 16 int32
 *   to float; fma with the rows' scales times the token's -> 16 floats of lane g % 8
 *
 * so that all but 4 of 12 instructions or so multiply bytes. The offset is where the integers start
 * from. Weights stay in registers for the tokens of a block, and activations for all registers
 * of rows. Of many tokens and groups, one of kern.h's lanes is multiplied with all tokens before
 * the next; of few, a block of tokens with all lanes.
 */
#include <assert.h>

#include "kern/x86/avx512.h"

/* Half `half` of a group with n_toks tokens, added to sums. Tokens take turns, so that none waits
 * for its own sum. */
ALWAYS_INLINE void dot_half(const int n_toks, const int n_regs, const uint8_t *codes,
                            const struct tile *tile, size_t half, panel_ints sums)
{
    for (size_t j = 4 * half; j < 4 * half + 4; j++) {
        __m512i w[GEMM_REGS];
        for (int h = 0; h < n_regs; h++) {
            w[h] = _mm512_load_si512(codes + j * quad_bytes(n_regs) + 64 * h);
        }
        EACH_TOKEN(n_toks)
        {
            dot_quad(n_regs, sums[t], w, tile->q[j][t]);
        }
    }
}

ALWAYS_INLINE void dot_start(const int n_toks, const int n_regs, const int32_t start[GEMM_BLOCK],
                             panel_ints sums)
{
    EACH(n_toks, n_regs)
    {
        sums[t][h] = _mm512_set1_epi32(start[t]);
    }
}

/* A group with n_toks tokens: 32 integers each. Its codes are the i-th that are unpacked, its
 * scales and the like at `place`. */
ALWAYS_INLINE void dots(const enum panel_kind kind, const int n_toks, const int n_regs,
                        const struct panel *panel, uint32_t i, uint32_t place,
                        const struct tile *tile, panel_ints sums)
{
    static const int32_t zeros[GEMM_BLOCK];
    const uint8_t *codes = panel->codes + i * group_bytes(n_regs);
    dot_start(n_toks, n_regs, kind == PANEL_MIN ? zeros : tile->start[0], sums);
    dot_half(n_toks, n_regs, codes, tile, 0, sums);
    if (kind != PANEL_HALVED) {
        dot_half(n_toks, n_regs, codes, tile, 1, sums);
        return;
    }
    panel_ints second;
    dot_start(n_toks, n_regs, tile->start[1], second);
    dot_half(n_toks, n_regs, codes, tile, 1, second);
    EACH(n_toks, n_regs)
    {
        __m512i low = _mm512_load_si512(panel->factors[place][0] + GEMM_LANES * h);
        __m512i high = _mm512_load_si512(panel->factors[place][1] + GEMM_LANES * h);
        sums[t][h] = _mm512_add_epi32(_mm512_mullo_epi32(sums[t][h], low),
                                      _mm512_mullo_epi32(second[t][h], high));
    }
}

ALWAYS_INLINE __m512 shifted(__m512 powers_of_two, int32_t shift)
{
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(powers_of_two), _mm512_set1_epi32(shift)));
}

/* The same, added to the tokens' sums. */
ALWAYS_INLINE void group_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                             const struct panel *panel, uint32_t i, uint32_t place,
                             const struct tile *tile, panel_floats acc)
{
    panel_ints sums;
    dots(kind, n_toks, n_regs, panel, i, place, tile, sums);
    EACH(n_toks, n_regs)
    {
        __m512 scales = _mm512_load_ps(panel->scales[place] + GEMM_LANES * h);
        __m512 products = kind == PANEL_SHIFT ? shifted(scales, tile->shift[t])
                                              : _mm512_mul_ps(scales, _mm512_set1_ps(tile->d[t]));
        acc[t][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][h]), products, acc[t][h]);
        if (kind == PANEL_MIN) {
            __m512 mins = _mm512_load_ps(panel->mins[place] + GEMM_LANES * h);
            acc[t][h] = _mm512_fmadd_ps(mins, _mm512_set1_ps(tile->s[t]), acc[t][h]);
        }
    }
}

/* acc = what lane l holds of the tokens, or nothing yet. */
ALWAYS_INLINE void lane_start(const int n_toks, const int n_regs, bool is_first, panel_sums *sums,
                              uint32_t l, panel_floats acc)
{
    EACH(n_toks, n_regs)
    {
        acc[t][h] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(sums[t][l] + GEMM_LANES * h);
    }
}

/* acc = what lane l holds of the tokens, plus acc. */
ALWAYS_INLINE void lane_add(const int n_toks, const int n_regs, panel_sums *sums, uint32_t l,
                            panel_floats acc)
{
    EACH(n_toks, n_regs)
    {
        acc[t][h] = _mm512_add_ps(_mm512_load_ps(sums[t][l] + GEMM_LANES * h), acc[t][h]);
    }
}

ALWAYS_INLINE void lane_store(const int n_toks, const int n_regs, panel_sums *sums, uint32_t l,
                              panel_floats acc)
{
    EACH(n_toks, n_regs)
    {
        _mm512_store_ps(sums[t][l] + GEMM_LANES * h, acc[t][h]);
    }
}

/* Lane l of a panel of few groups, added to acc. */
ALWAYS_INLINE void few_lane_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                                const struct panel *panel, uint32_t l, uint32_t n_groups,
                                const struct tile *tiles, panel_floats acc)
{
    for (uint32_t i = l; i < n_groups; i += SUM_LANES) {
        group_mul(kind, n_toks, n_regs, panel, i, i, tiles + i, acc);
    }
}

/* The same for all lanes, whose sums these are. */
ALWAYS_INLINE void few_block_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                                 const struct panel *panel, uint32_t first, uint32_t n_groups,
                                 const struct tile *tiles, panel_sums *sums)
{
    for (uint32_t l = 0; l < SUM_LANES && l < n_groups; l++) {
        panel_floats acc;
        lane_start(n_toks, n_regs, first == 0, sums, l, acc);
        few_lane_mul(kind, n_toks, n_regs, panel, l, n_groups, tiles, acc);
        lane_store(n_toks, n_regs, sums, l, acc);
    }
}

/* sums = what lane l sums up to, of rows that have few groups. */
ALWAYS_INLINE void narrow_lane_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                                   const struct panel *panel, uint32_t l, uint32_t n_groups,
                                   const struct tile *tiles, panel_floats sums)
{
    EACH(n_toks, n_regs)
    {
        sums[t][h] = _mm512_setzero_ps();
    }
    few_lane_mul(kind, n_toks, n_regs, panel, l, n_groups, tiles, sums);
}

/* sums = (t[l]+t[l+4]) + (t[l+2]+t[l+6]) of the lanes. */
ALWAYS_INLINE void four_lanes_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                                  const struct panel *panel, uint32_t l, uint32_t n_groups,
                                  const struct tile *tiles, panel_floats sums)
{
    panel_floats lane, others;
    narrow_lane_mul(kind, n_toks, n_regs, panel, l, n_groups, tiles, sums);
    narrow_lane_mul(kind, n_toks, n_regs, panel, l + 4, n_groups, tiles, lane);
    EACH(n_toks, n_regs)
    {
        sums[t][h] = _mm512_add_ps(sums[t][h], lane[t][h]);
    }
    narrow_lane_mul(kind, n_toks, n_regs, panel, l + 2, n_groups, tiles, others);
    narrow_lane_mul(kind, n_toks, n_regs, panel, l + 6, n_groups, tiles, lane);
    EACH(n_toks, n_regs)
    {
        sums[t][h] = _mm512_add_ps(sums[t][h], _mm512_add_ps(others[t][h], lane[t][h]));
    }
}

/* Rows 16h .. 16h+15 of a panel, those of them that are there, for a token. */
ALWAYS_INLINE void store_rows(const struct panel_out *out, uint32_t token, int h, __m512 sums)
{
    __mmask16 mask = (__mmask16)((((uint64_t)1 << out->n_rows) - 1) >> (GEMM_LANES * h));
    _mm512_mask_storeu_ps(out->y + token * out->y_stride + GEMM_LANES * h, mask, sums);
}

/* All of such rows times a block of tokens, from token `first` on: the lanes' sums stay in
 * registers. */
ALWAYS_INLINE void narrow_block_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                                    const struct panel *panel, uint32_t n_groups,
                                    const struct tile *tiles, uint32_t first,
                                    const struct panel_out *out)
{
    panel_floats even, odd;
    four_lanes_mul(kind, n_toks, n_regs, panel, 0, n_groups, tiles, even);
    four_lanes_mul(kind, n_toks, n_regs, panel, 1, n_groups, tiles, odd);
    EACH(n_toks, n_regs)
    {
        store_rows(out, first + (uint32_t)t, h, _mm512_add_ps(even[t][h], odd[t][h]));
    }
}

const uint8_t slu_avx512_lane_order[SUM_LANES] = {0, 4, 2, 6, 1, 5, 3, 7};

/* The lanes of tokens first .. end-1 added up. */
static void store_sums(const struct panel_out *out, panel_sums *sums, uint32_t first, uint32_t end)
{
    for (uint32_t i = first; i < end; i++) {
        for (int h = 0; GEMM_LANES * h < (int)out->n_rows; h++) {
            __m512 t[SUM_LANES];
            for (uint32_t l = 0; l < SUM_LANES; l++) {
                t[l] = _mm512_load_ps(sums[i][l] + GEMM_LANES * h);
            }
            store_rows(out, i, h, add_lanes(t));
        }
    }
}

/* All of lane l, acc, joins the lanes before it: (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)). */
ALWAYS_INLINE void lane_join(const int n_toks, const int n_regs, panel_sums *sums, uint32_t l,
                             panel_floats acc, uint32_t first, const struct panel_out *out)
{
    if (l < 4) {
        lane_store(n_toks, n_regs, sums, l, acc);
        return;
    }
    lane_add(n_toks, n_regs, sums, l - 4, acc);
    if (l < 6) {
        lane_store(n_toks, n_regs, sums, l - 4, acc);
        return;
    }
    lane_add(n_toks, n_regs, sums, l - 6, acc);
    if (l == 6) {
        lane_store(n_toks, n_regs, sums, 0, acc);
        return;
    }
    lane_add(n_toks, n_regs, sums, 0, acc);
    EACH(n_toks, n_regs)
    {
        store_rows(out, first + (uint32_t)t, h, acc[t][h]);
    }
}

/* A lane's groups times a block of tokens, whose sums these are, from token `first` on. */
ALWAYS_INLINE void lane_block_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                                  const struct panel *panel, const struct panel_lane *lane,
                                  const struct tile *tiles, panel_sums *sums, uint32_t first,
                                  const struct panel_out *out)
{
    panel_floats acc;
    lane_start(n_toks, n_regs, lane->first == 0, sums, lane->lane, acc);
    const uint32_t place = lane->lane * LANE_GROUPS;
    for (uint32_t i = 0; i < lane->n; i++) {
        group_mul(kind, n_toks, n_regs, panel, i, place + i, tiles + i, acc);
    }
    if (lane->is_last) {
        lane_join(n_toks, n_regs, sums, lane->lane, acc, first, out);
    } else {
        lane_store(n_toks, n_regs, sums, lane->lane, acc);
    }
}

/* The tiles of block b. */
ALWAYS_INLINE const struct tile *tiles_at(const struct tiles *tiles, uint32_t b)
{
    return tiles->at + (size_t)b * tiles->n_places;
}

/* Codes of this many bytes a row and panel go to the nearest cache beside the panel in use. */
#define NEAR_BYTES 256

/* Asks for the codes of rows lo .. hi-1: so many rows are more than a processor foresees, and all
 * of them at once more than it can wait for. After the last panel they are nobody's, or another
 * thread's; to ask is harmless. */
ALWAYS_INLINE void ask_for(const struct panel_next *next, uint32_t lo, uint32_t hi)
{
    for (uint32_t r = lo; r < hi; r++) {
        uintptr_t start = (uintptr_t)next->codes[r] + next->ahead, end = start + next->bytes;
        for (uintptr_t line = start & ~(uintptr_t)63; line < end; line += 64) {
            if (next->bytes <= NEAR_BYTES) {
                _mm_prefetch((const char *)line, _MM_HINT_T0);
            } else {
                _mm_prefetch((const char *)line, _MM_HINT_T1);
            }
        }
    }
}

/* slu_avx512_lane_mul. */
ALWAYS_INLINE void lane_mul(const enum panel_kind kind, const int n_regs, const struct panel *panel,
                            const struct panel_lane *lane, const struct tiles *tiles, uint32_t n,
                            panel_sums *sums, const struct panel_next *next,
                            const struct panel_out *out)
{
#define BLOCK_MUL(n_toks)                                                                          \
    case n_toks:                                                                                   \
        lane_block_mul(kind, n_toks, n_regs, panel, lane, tile, sums + start, start, out);         \
        break;
    uint32_t n_blocks = (n + GEMM_BLOCK - 1) / GEMM_BLOCK;
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint32_t start = block_start(n, b), end = block_start(n, b + 1);
        const struct tile *tile =
            tiles_at(tiles, b) + lane->lane * (size_t)tiles->lane_groups + lane->first;
        ask_for(next, next->n_rows * b / n_blocks, next->n_rows * (b + 1) / n_blocks);
        GEMM_SWITCH(end - start, BLOCK_MUL)
    }
#undef BLOCK_MUL
}

/* slu_avx512_few_mul. */
ALWAYS_INLINE void few_mul(const enum panel_kind kind, const struct panel *panel, uint32_t first,
                           uint32_t n_groups, const struct tiles *tiles, uint32_t n,
                           panel_sums *sums, const struct panel_next *next,
                           const struct panel_out *out)
{
#define BLOCK_MUL(n_toks)                                                                          \
    case n_toks:                                                                                   \
        if (n_groups == out->n_groups) {                                                           \
            narrow_block_mul(kind, n_toks, 2, panel, n_groups, tile, start, out);                  \
        } else {                                                                                   \
            few_block_mul(kind, n_toks, 2, panel, first, n_groups, tile, sums + start);            \
        }                                                                                          \
        break;
    uint32_t n_blocks = (n + GEMM_BLOCK - 1) / GEMM_BLOCK;
    const bool is_end = first + n_groups == out->n_groups && first > 0;
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint32_t start = block_start(n, b), end = block_start(n, b + 1);
        const struct tile *tile = tiles_at(tiles, b) + first;
        ask_for(next, next->n_rows * b / n_blocks, next->n_rows * (b + 1) / n_blocks);
        GEMM_SWITCH(end - start, BLOCK_MUL)
        if (is_end) {
            store_sums(out, sums, start, end);
        }
    }
#undef BLOCK_MUL
}

/* Functions of their own, since in a common one the loops' variables are spilled. */
#define FEW_MUL(kind)                                                                              \
    static __attribute__((noinline)) void few_##kind(                                              \
        const struct panel *panel, uint32_t first, uint32_t n_groups, const struct tiles *tiles,   \
        uint32_t n, panel_sums *sums, const struct panel_next *next, const struct panel_out *out)  \
    {                                                                                              \
        few_mul(kind, panel, first, n_groups, tiles, n, sums, next, out);                          \
    }
#define LANE_MUL(kind, n_regs)                                                                     \
    static __attribute__((noinline)) void lane_##kind##_##n_regs(                                  \
        const struct panel *panel, const struct panel_lane *lane, const struct tiles *tiles,       \
        uint32_t n, panel_sums *sums, const struct panel_next *next, const struct panel_out *out)  \
    {                                                                                              \
        lane_mul(kind, n_regs, panel, lane, tiles, n, sums, next, out);                            \
    }

FEW_MUL(PANEL_OFFSET)
FEW_MUL(PANEL_SHIFT)
FEW_MUL(PANEL_MIN)
FEW_MUL(PANEL_HALVED)
LANE_MUL(PANEL_OFFSET, 2)
LANE_MUL(PANEL_OFFSET, 3)
LANE_MUL(PANEL_SHIFT, 2)
LANE_MUL(PANEL_SHIFT, 3)
LANE_MUL(PANEL_MIN, 2)
LANE_MUL(PANEL_MIN, 3)
LANE_MUL(PANEL_HALVED, 2)

void slu_avx512_few_mul(enum panel_kind kind, const struct panel *panel, uint32_t first,
                        uint32_t n_groups, const struct tiles *tiles, uint32_t n, panel_sums *sums,
                        const struct panel_next *next, const struct panel_out *out)
{
    assert(panel->n_regs == 2 && n_groups <= FEW_GROUPS && tiles->lane_groups == NO_LANES);
    switch (kind) {
    case PANEL_OFFSET:
        few_PANEL_OFFSET(panel, first, n_groups, tiles, n, sums, next, out);
        break;
    case PANEL_SHIFT:
        few_PANEL_SHIFT(panel, first, n_groups, tiles, n, sums, next, out);
        break;
    case PANEL_MIN:
        few_PANEL_MIN(panel, first, n_groups, tiles, n, sums, next, out);
        break;
    case PANEL_HALVED:
        few_PANEL_HALVED(panel, first, n_groups, tiles, n, sums, next, out);
        break;
    }
}

void slu_avx512_lane_mul(enum panel_kind kind, const struct panel *panel,
                         const struct panel_lane *lane, const struct tiles *tiles, uint32_t n,
                         panel_sums *sums, const struct panel_next *next,
                         const struct panel_out *out)
{
    const bool is_high = panel->n_regs == 3;
    assert(lane->n <= LANE_GROUPS && tiles->lane_groups != NO_LANES);
    assert(!is_high || kind != PANEL_HALVED);
    switch (kind) {
    case PANEL_OFFSET:
        (is_high ? lane_PANEL_OFFSET_3 : lane_PANEL_OFFSET_2)(panel, lane, tiles, n, sums, next,
                                                              out);
        break;
    case PANEL_SHIFT:
        (is_high ? lane_PANEL_SHIFT_3 : lane_PANEL_SHIFT_2)(panel, lane, tiles, n, sums, next, out);
        break;
    case PANEL_MIN:
        (is_high ? lane_PANEL_MIN_3 : lane_PANEL_MIN_2)(panel, lane, tiles, n, sums, next, out);
        break;
    case PANEL_HALVED:
        lane_PANEL_HALVED_2(panel, lane, tiles, n, sums, next, out);
        break;
    }
}

/* 16 bytes of each of 4 tokens -> columns 4j .. 4j+3 of all of them, for 4 j. */
ALWAYS_INLINE void fill_half(int8_t (*out)[GEMM_BLOCK][4], const int8_t *const q[GEMM_BLOCK],
                             size_t at)
{
    __m128i v[GEMM_BLOCK];
    for (int t = 0; t < GEMM_BLOCK; t++) {
        v[t] = _mm_load_si128((const __m128i *)(const void *)(q[t] + at));
    }
    __m128i a = _mm_unpacklo_epi32(v[0], v[1]), b = _mm_unpackhi_epi32(v[0], v[1]);
    __m128i c = _mm_unpacklo_epi32(v[2], v[3]), d = _mm_unpackhi_epi32(v[2], v[3]);
    _mm_store_si128((__m128i *)(void *)out[0], _mm_unpacklo_epi64(a, c));
    _mm_store_si128((__m128i *)(void *)out[1], _mm_unpackhi_epi64(a, c));
    _mm_store_si128((__m128i *)(void *)out[2], _mm_unpacklo_epi64(b, d));
    _mm_store_si128((__m128i *)(void *)out[3], _mm_unpackhi_epi64(b, d));
}

/* Where the integers of 16 groups of a token start from. */
ALWAYS_INLINE void make_start(const enum panel_kind kind, const int16_t *sums, int offset,
                              __m512i *ret_first, __m512i *ret_second)
{
    /* Rows of sums are whole cache lines. */
    __m512i pairs = _mm512_load_si512(sums);
    *ret_second = _mm512_setzero_si512();
    if (kind == PANEL_HALVED) {
        const __m512i factor = _mm512_set1_epi32(-offset);
        __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16);
        *ret_first = _mm512_mullo_epi32(low, factor);
        *ret_second = _mm512_mullo_epi32(_mm512_srai_epi32(pairs, 16), factor);
    } else {
        *ret_first = _mm512_madd_epi16(pairs, _mm512_set1_epi16((short)-offset));
    }
}

/* The shifts of 16 groups of a token, n of them there. False if the d of one is out of range. */
ALWAYS_INLINE bool make_shift(__m512i d, uint32_t n, __m512i *ret)
{
    const __m512i one = _mm512_castps_si512(_mm512_set1_ps(1));
    const __m512i least = _mm512_castps_si512(_mm512_set1_ps(SHIFT_LEAST));
    const __m512i most = _mm512_castps_si512(_mm512_set1_ps(SHIFT_MOST));
    __mmask16 there = (__mmask16)(n < 16 ? (1u << n) - 1 : 0xffff);
    __mmask16 some = _mm512_mask_test_epi32_mask(there, d, d);
    *ret = _mm512_maskz_sub_epi32(some, d, one);
    return _mm512_mask_cmpgt_epu32_mask(some, _mm512_sub_epi32(d, least),
                                        _mm512_sub_epi32(most, least)) == 0;
}

/* A block of some tokens, of which the last stands for those that are missing. */
static bool tile_fill(enum panel_kind kind, struct tile *tiles, uint32_t n_groups,
                      uint32_t lane_groups, int offset, const struct slu_acts *x,
                      const uint32_t *tok, uint32_t start, uint32_t some)
{
    size_t tokens[GEMM_BLOCK];
    const int8_t *q[GEMM_BLOCK];
    for (uint32_t t = 0; t < GEMM_BLOCK; t++) {
        size_t i = start + (t < some ? t : some - 1);
        tokens[t] = tok ? tok[i] : i;
        q[t] = x->q + tokens[t] * x->q_stride;
    }
    for (uint32_t i = 0; i < n_groups; i++) {
        struct tile *tile = tiles + place_of(i, lane_groups);
        size_t at = slu_acts_at(32 * (size_t)i);
        fill_half(tile->q, q, at);
        fill_half(tile->q + 4, q, at + 64);
    }
    bool is_kind = true;
    for (uint32_t i = 0; i < n_groups; i += 16) {
        __m512i v[4 * GEMM_BLOCK]; /* the lines of a tile after q */
        for (int t = 0; t < GEMM_BLOCK; t++) {
            /* Rows of d, s and sums are whole cache lines. */
            size_t at = tokens[t] * x->g_stride + i;
            v[t] = _mm512_load_si512(x->d + at);
            if (kind == PANEL_SHIFT) {
                is_kind &= make_shift(v[t], n_groups - i, &v[GEMM_BLOCK + t]);
            } else {
                v[GEMM_BLOCK + t] = _mm512_load_si512(x->s + at);
            }
            make_start(kind, x->sums + 2 * at, offset, &v[2 * GEMM_BLOCK + t],
                       &v[3 * GEMM_BLOCK + t]);
        }
        transpose16(v);
        for (uint32_t j = 0; j < 16 && i + j < n_groups; j++) {
            _mm512_store_si512(tiles[place_of(i + j, lane_groups)].d, v[j]);
        }
    }
    return is_kind;
}

bool slu_avx512_tiles_fill(enum panel_kind kind, struct tiles *tiles, uint32_t n_groups,
                           bool is_lane_by_lane, int offset, const struct slu_acts *x,
                           const uint32_t *tok, uint32_t n)
{
    uint32_t n_blocks = (n + GEMM_BLOCK - 1) / GEMM_BLOCK;
    bool is_kind = true;
    tiles->n_places = places_of(n_groups);
    tiles->lane_groups = is_lane_by_lane ? tiles->n_places / SUM_LANES : NO_LANES;
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint32_t start = block_start(n, b), some = block_start(n, b + 1) - start;
        struct tile *block = tiles->at + (size_t)b * tiles->n_places;
        is_kind &=
            tile_fill(kind, block, n_groups, tiles->lane_groups, offset, x, tok, start, some);
    }
    return is_kind;
}
