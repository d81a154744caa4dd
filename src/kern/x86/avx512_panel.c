/*
 * Matrix-matrix products with AVX-512 VNNI, the part that is the same for all formats: an unpacked
 * panel of 16 rows times blocks of up to 8 tokens. For each group and token
 *
 *   8 times vpdpbusd: 16 rows by 4 columns, with 4 bytes of q in every lane -> 16 int32
 *   to float; fma with the rows' scales times the token's -> 16 floats of lane g % 8
 *
 * so that all but 4 of 12 instructions or so multiply bytes. The offset is where the integers start
 * from. Weights stay in registers for the tokens of a block.
 */
#include "kern/x86/avx512.h"

#define BLOCK 8 /* tokens */

struct token {
    const int8_t *q;
    const float *d, *s;
    float *sums; /* [8][GEMM_ROWS] */
    const int32_t *start;
};

/* 4 activations in every lane. */
ALWAYS_INLINE __m512i load_quad(const int8_t *q)
{
    int32_t quad;
    memcpy(&quad, q, sizeof quad);
    return _mm512_set1_epi32(quad);
}

/* Half h of a group with n_toks tokens, added to sums. Tokens take turns, so that none waits for
 * its own sum. */
ALWAYS_INLINE void dot_half(const int n_toks, const uint8_t codes[8][4 * GEMM_ROWS],
                            const struct token *toks, size_t at, size_t h, __m512i sums[BLOCK])
{
    for (size_t j = 0; j < 4; j++) {
        __m512i w = _mm512_load_si512(codes[4 * h + j]);
#pragma GCC unroll 8
        for (int t = 0; t < n_toks; t++) {
            sums[t] = _mm512_dpbusd_epi32(sums[t], w, load_quad(toks[t].q + at + 64 * h + 4 * j));
        }
    }
}

/* Group i of a panel with n_toks tokens: 16 integers each. */
ALWAYS_INLINE void dots(const enum panel_kind kind, const int n_toks, const struct panel *panel,
                        uint32_t i, const struct token *toks, size_t at, __m512i sums[BLOCK])
{
    const uint8_t(*codes)[4 * GEMM_ROWS] = panel->codes[i];
    for (int t = 0; t < n_toks; t++) {
        sums[t] = kind == PANEL_MIN
                      ? _mm512_setzero_si512()
                      : _mm512_set1_epi32(toks[t].start[kind == PANEL_HALVED ? 2 * i : i]);
    }
    dot_half(n_toks, codes, toks, at, 0, sums);
    if (kind != PANEL_HALVED) {
        dot_half(n_toks, codes, toks, at, 1, sums);
        return;
    }
    __m512i second[BLOCK], low = _mm512_load_si512(panel->factors[i][0]);
    __m512i high = _mm512_load_si512(panel->factors[i][1]);
    for (int t = 0; t < n_toks; t++) {
        second[t] = _mm512_set1_epi32(toks[t].start[2 * i + 1]);
    }
    dot_half(n_toks, codes, toks, at, 1, second);
    for (int t = 0; t < n_toks; t++) {
        sums[t] =
            _mm512_add_epi32(_mm512_mullo_epi32(sums[t], low), _mm512_mullo_epi32(second[t], high));
    }
}

ALWAYS_INLINE void block_mul(const enum panel_kind kind, const int n_toks,
                             const struct panel *panel, uint32_t first, uint32_t n_groups,
                             const struct token *toks)
{
    for (uint32_t i = 0; i < n_groups; i++) {
        size_t g = first + i;
        __m512i sums[BLOCK];
        dots(kind, n_toks, panel, i, toks, slu_acts_at(32 * g), sums);
        __m512 scales = _mm512_load_ps(panel->scales[i]);
#pragma GCC unroll 8
        for (int t = 0; t < n_toks; t++) {
            float *lane = toks[t].sums + g % 8 * GEMM_ROWS;
            __m512 products = _mm512_mul_ps(scales, _mm512_set1_ps(toks[t].d[g]));
            __m512 acc = _mm512_load_ps(lane);
            acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), products, acc);
            if (kind == PANEL_MIN) {
                acc = _mm512_fmadd_ps(_mm512_load_ps(panel->mins[i]), _mm512_set1_ps(toks[t].s[g]),
                                      acc);
            }
            _mm512_store_ps(lane, acc);
        }
    }
}

/* Where the integers of each group, or half, start from. */
ALWAYS_INLINE void make_start(const enum panel_kind kind, int32_t *start, const int16_t *sums,
                              uint32_t n_groups, int offset)
{
    for (uint32_t i = 0; i < n_groups; i += 16) {
        /* Rows of sums are whole cache lines. */
        __m512i pairs = _mm512_load_si512(sums + 2 * i);
        if (kind == PANEL_HALVED) {
            const __m512i factor = _mm512_set1_epi32(-offset);
            __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(pairs));
            __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(pairs, 1));
            _mm512_store_si512(start + 2 * i, _mm512_mullo_epi32(low, factor));
            _mm512_store_si512(start + 2 * i + 16, _mm512_mullo_epi32(high, factor));
        } else {
            const __m512i factor = _mm512_set1_epi16((short)-offset);
            _mm512_store_si512(start + i, _mm512_madd_epi16(pairs, factor));
        }
    }
}

ALWAYS_INLINE void panel_mul(const enum panel_kind kind, struct panel_sums *sums,
                             const struct panel *panel, uint32_t first, uint32_t n_groups,
                             int offset, const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    int32_t start[BLOCK][2 * GEMM_GROUPS] __attribute__((aligned(64)));
    struct token toks[BLOCK];
    /* Blocks as even as can be: one of a single token would wait for its own sums. */
    uint32_t n_blocks = (n + BLOCK - 1) / BLOCK;
    for (uint32_t b = 0, i = 0; b < n_blocks; b++) {
        uint32_t some = (n - i + n_blocks - b - 1) / (n_blocks - b);
        for (uint32_t t = 0; t < some; t++, i++) {
            size_t token = tok ? tok[i] : i;
            toks[t] = (struct token){
                .q = x->q + token * x->q_stride,
                .d = x->d + token * x->g_stride,
                .s = x->s + token * x->g_stride,
                .sums = sums->at[i][0],
                .start = start[t],
            };
            if (kind != PANEL_MIN) {
                make_start(kind, start[t], x->sums + 2 * (token * x->g_stride + first), n_groups,
                           offset);
            }
        }
        switch (some) {
        case 1:
            block_mul(kind, 1, panel, first, n_groups, toks);
            break;
        case 2:
            block_mul(kind, 2, panel, first, n_groups, toks);
            break;
        case 3:
            block_mul(kind, 3, panel, first, n_groups, toks);
            break;
        case 4:
            block_mul(kind, 4, panel, first, n_groups, toks);
            break;
        case 5:
            block_mul(kind, 5, panel, first, n_groups, toks);
            break;
        case 6:
            block_mul(kind, 6, panel, first, n_groups, toks);
            break;
        case 7:
            block_mul(kind, 7, panel, first, n_groups, toks);
            break;
        default:
            block_mul(kind, 8, panel, first, n_groups, toks);
            break;
        }
    }
}

void slu_avx512_panel_mul(enum panel_kind kind, struct panel_sums *sums, const struct panel *panel,
                          uint32_t first, uint32_t n_groups, int offset, const struct slu_acts *x,
                          const uint32_t *tok, uint32_t n)
{
    if (kind == PANEL_OFFSET) {
        panel_mul(PANEL_OFFSET, sums, panel, first, n_groups, offset, x, tok, n);
    } else if (kind == PANEL_MIN) {
        panel_mul(PANEL_MIN, sums, panel, first, n_groups, offset, x, tok, n);
    } else {
        panel_mul(PANEL_HALVED, sums, panel, first, n_groups, offset, x, tok, n);
    }
}
