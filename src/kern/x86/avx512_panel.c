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
 * of rows.
 */
#include "kern/x86/avx512_pack.h"

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

/* Group i of a panel with n_toks tokens: 32 integers each. */
ALWAYS_INLINE void dots(const enum panel_kind kind, const int n_toks, const int n_regs,
                        const struct panel *panel, uint32_t i, const struct tile *tile,
                        panel_ints sums)
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
        __m512i low = _mm512_load_si512(panel->factors[i][0] + GEMM_LANES * h);
        __m512i high = _mm512_load_si512(panel->factors[i][1] + GEMM_LANES * h);
        sums[t][h] = _mm512_add_epi32(_mm512_mullo_epi32(sums[t][h], low),
                                      _mm512_mullo_epi32(second[t][h], high));
    }
}

ALWAYS_INLINE __m512 shifted(__m512 powers_of_two, int32_t shift)
{
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(powers_of_two), _mm512_set1_epi32(shift)));
}

/* Group i of a panel with n_toks tokens, added to their sums. */
ALWAYS_INLINE void group_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                             const struct panel *panel, uint32_t i, const struct tile *tile,
                             panel_floats acc)
{
    panel_ints sums;
    dots(kind, n_toks, n_regs, panel, i, tile, sums);
    EACH(n_toks, n_regs)
    {
        __m512 scales = _mm512_load_ps(panel->scales[i] + GEMM_LANES * h);
        __m512 products = kind == PANEL_SHIFT ? shifted(scales, tile->shift[t])
                                              : _mm512_mul_ps(scales, _mm512_set1_ps(tile->d[t]));
        acc[t][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][h]), products, acc[t][h]);
        if (kind == PANEL_MIN) {
            __m512 mins = _mm512_load_ps(panel->mins[i] + GEMM_LANES * h);
            acc[t][h] = _mm512_fmadd_ps(mins, _mm512_set1_ps(tile->s[t]), acc[t][h]);
        }
    }
}

/* The groups of one lane after those of another, so that what they add up to stays in registers. */
ALWAYS_INLINE void block_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                             const struct panel *panel, uint32_t first, uint32_t n_groups,
                             const struct tile *tiles, float (*sums)[8][GEMM_ROWS])
{
    for (uint32_t from = 0; from < 8 && from < n_groups; from++) {
        float(*lane)[8][GEMM_ROWS] = (void *)sums[0][(first + from) % 8];
        panel_floats acc;
        EACH(n_toks, n_regs)
        {
            acc[t][h] = first + from < 8 ? _mm512_setzero_ps()
                                         : _mm512_load_ps(lane[t][0] + GEMM_LANES * h);
        }
        for (uint32_t i = from; i < n_groups; i += 8) {
            group_mul(kind, n_toks, n_regs, panel, i, tiles + i, acc);
        }
        EACH(n_toks, n_regs)
        {
            _mm512_store_ps(lane[t][0] + GEMM_LANES * h, acc[t][h]);
        }
    }
}

/* sums = what lane l of n_groups groups sums up to. */
ALWAYS_INLINE void lane_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                            const struct panel *panel, uint32_t l, uint32_t n_groups,
                            const struct tile *tiles, panel_floats sums)
{
    EACH(n_toks, n_regs)
    {
        sums[t][h] = _mm512_setzero_ps();
    }
    for (uint32_t i = l; i < n_groups; i += 8) {
        group_mul(kind, n_toks, n_regs, panel, i, tiles + i, sums);
    }
}

/* sums = (t[l]+t[l+4]) + (t[l+2]+t[l+6]) of the lanes. */
ALWAYS_INLINE void four_lanes_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                                  const struct panel *panel, uint32_t l, uint32_t n_groups,
                                  const struct tile *tiles, panel_floats sums)
{
    panel_floats lane, others;
    lane_mul(kind, n_toks, n_regs, panel, l, n_groups, tiles, sums);
    lane_mul(kind, n_toks, n_regs, panel, l + 4, n_groups, tiles, lane);
    EACH(n_toks, n_regs)
    {
        sums[t][h] = _mm512_add_ps(sums[t][h], lane[t][h]);
    }
    lane_mul(kind, n_toks, n_regs, panel, l + 2, n_groups, tiles, others);
    lane_mul(kind, n_toks, n_regs, panel, l + 6, n_groups, tiles, lane);
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

/* block_mul and store_sums of rows that are one panel wide, whose lanes then need not wait in
 * memory for other panels: from token `first` on. */
ALWAYS_INLINE void narrow_mul(const enum panel_kind kind, const int n_toks, const int n_regs,
                              const struct panel *panel, uint32_t n_groups,
                              const struct tile *tiles, uint32_t first, const struct panel_out *out)
{
    panel_floats even, odd;
    four_lanes_mul(kind, n_toks, n_regs, panel, 0, n_groups, tiles, even);
    four_lanes_mul(kind, n_toks, n_regs, panel, 1, n_groups, tiles, odd);
    EACH(n_toks, n_regs)
    {
        store_rows(out, first + (uint32_t)t, h, _mm512_add_ps(even[t][h], odd[t][h]));
    }
}

/* The lanes of tokens first .. end-1 added up; n_lanes of them are there. */
static void store_sums(const struct panel_out *out, const struct panel_sums *sums, uint32_t n_lanes,
                       uint32_t first, uint32_t end)
{
    for (uint32_t i = first; i < end; i++) {
        for (int h = 0; GEMM_LANES * h < (int)out->n_rows; h++) {
            __m512 t[8];
            for (uint32_t l = 0; l < 8; l++) {
                t[l] = l < n_lanes ? _mm512_load_ps(sums->at[i][l] + GEMM_LANES * h)
                                   : _mm512_setzero_ps();
            }
            store_rows(out, i, h, add_lanes(t));
        }
    }
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

ALWAYS_INLINE void panel_mul(const enum panel_kind kind, const int n_regs, struct panel_sums *sums,
                             const struct panel *panel, uint32_t first, uint32_t n_groups,
                             const struct tiles *tiles, uint32_t n, const struct panel_next *next,
                             const struct panel_out *out)
{
#define BLOCK_MUL(n_toks)                                                                          \
    case n_toks:                                                                                   \
        if (is_narrow) {                                                                           \
            narrow_mul(kind, n_toks, n_regs, panel, n_groups, tile, start, out);                   \
        } else {                                                                                   \
            block_mul(kind, n_toks, n_regs, panel, first, n_groups, tile, sums->at + start);       \
        }                                                                                          \
        break;
    uint32_t n_blocks = (n + GEMM_BLOCK - 1) / GEMM_BLOCK;
    const bool is_narrow = n_regs == 2 && first == 0 && out;
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint32_t start = block_start(n, b), end = block_start(n, b + 1);
        const struct tile *tile = &tiles->at[b][first % TILE_GROUPS];
        ask_for(next, next->n_rows * b / n_blocks, next->n_rows * (b + 1) / n_blocks);
        GEMM_SWITCH(end - start, BLOCK_MUL)
        if (out && !is_narrow) {
            store_sums(out, sums, first + n_groups, start, end);
        }
    }
#undef BLOCK_MUL
}

/* Functions of their own, since in a common one the loops' variables are spilled. */
#define PANEL_MUL(kind, n_regs)                                                                    \
    static __attribute__((noinline)) void mul_##kind##_##n_regs(                                   \
        struct panel_sums *sums, const struct panel *panel, uint32_t first, uint32_t n_groups,     \
        const struct tiles *tiles, uint32_t n, const struct panel_next *next,                      \
        const struct panel_out *out)                                                               \
    {                                                                                              \
        panel_mul(kind, n_regs, sums, panel, first, n_groups, tiles, n, next, out);                \
    }

PANEL_MUL(PANEL_OFFSET, 2)
PANEL_MUL(PANEL_OFFSET, 3)
PANEL_MUL(PANEL_SHIFT, 2)
PANEL_MUL(PANEL_SHIFT, 3)
PANEL_MUL(PANEL_MIN, 2)
PANEL_MUL(PANEL_HALVED, 2)

void slu_avx512_panel_mul(enum panel_kind kind, struct panel_sums *sums, const struct panel *panel,
                          uint32_t first, uint32_t n_groups, const struct tiles *tiles, uint32_t n,
                          const struct panel_next *next, const struct panel_out *out)
{
    const bool is_high = panel->n_regs == 3;
    if (kind == PANEL_OFFSET) {
        (is_high ? mul_PANEL_OFFSET_3 : mul_PANEL_OFFSET_2)(sums, panel, first, n_groups, tiles, n,
                                                            next, out);
    } else if (kind == PANEL_SHIFT) {
        (is_high ? mul_PANEL_SHIFT_3 : mul_PANEL_SHIFT_2)(sums, panel, first, n_groups, tiles, n,
                                                          next, out);
    } else if (kind == PANEL_MIN) {
        mul_PANEL_MIN_2(sums, panel, first, n_groups, tiles, n, next, out);
    } else {
        mul_PANEL_HALVED_2(sums, panel, first, n_groups, tiles, n, next, out);
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
static bool tile_fill(enum panel_kind kind, struct tile *tiles, uint32_t first, uint32_t n_groups,
                      int offset, const struct slu_acts *x, const uint32_t *tok, uint32_t start,
                      uint32_t some)
{
    size_t tokens[GEMM_BLOCK];
    const int8_t *q[GEMM_BLOCK];
    for (uint32_t t = 0; t < GEMM_BLOCK; t++) {
        size_t i = start + (t < some ? t : some - 1);
        tokens[t] = tok ? tok[i] : i;
        q[t] = x->q + tokens[t] * x->q_stride;
    }
    for (uint32_t i = 0; i < n_groups; i++) {
        size_t at = slu_acts_at(32 * (size_t)(first + i));
        fill_half(tiles[i].q, q, at);
        fill_half(tiles[i].q + 4, q, at + 64);
    }
    bool is_kind = true;
    for (uint32_t i = 0; i < n_groups; i += 16) {
        __m512i v[4 * GEMM_BLOCK]; /* the lines of a tile after q */
        for (int t = 0; t < GEMM_BLOCK; t++) {
            /* Rows of d, s and sums are whole cache lines. */
            size_t at = tokens[t] * x->g_stride + first + i;
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
            _mm512_store_si512(tiles[i + j].d, v[j]);
        }
    }
    return is_kind;
}

bool slu_avx512_tiles_fill(enum panel_kind kind, struct tiles *tiles, uint32_t first,
                           uint32_t n_groups, int offset, const struct slu_acts *x,
                           const uint32_t *tok, uint32_t n)
{
    uint32_t n_blocks = (n + GEMM_BLOCK - 1) / GEMM_BLOCK;
    bool is_kind = true;
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint32_t start = block_start(n, b), some = block_start(n, b + 1) - start;
        is_kind &= tile_fill(kind, tiles->at[b], first, n_groups, offset, x, tok, start, some);
    }
    return is_kind;
}
