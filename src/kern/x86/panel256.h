/*
 * Matrix-matrix products with 256-bit registers. 16 rows lie across the lanes of two registers:
 * weights are unpacked once into a panel, 16 rows by up to 32 groups, and multiplied with all
 * tokens, 4 at a time. For each group and token
 *
 *   panel_dots: 16 rows by 32 columns, with 4 bytes of q in every lane -> 2 x 8 int32
 *   to float; fma with the rows' scales times the token's -> 2 x 8 floats of lane g % 8
 *
 * Loads are what is short: two registers of rows share a load of q, four tokens one of weights.
 *
 * The file that includes this defines, besides what quant256.h asks for,
 *
 *   panel_dots    the integer sums of a group
 */
#ifndef SLU_KERN_X86_PANEL256_H
#define SLU_KERN_X86_PANEL256_H

#include "kern/x86/quant256.h"

#define PANEL_ROWS   16
#define PANEL_GROUPS 32
#define PANEL_TOKENS 64 /* that pass over an unpacked panel */
#define BLOCK        4  /* tokens that pass over a group together */

/* What is left of a format once it is unpacked. */
enum panel_kind {
    PANEL_OFFSET, /* unsigned, with an offset to be taken out */
    PANEL_SIGNED,
    PANEL_MIN,
    PANEL_HALVED, /* with two 8-bit scales for a group, and an offset of 32 */
};

struct panel {
    /* codes[g][j] holds columns 4j .. 4j+3 of group g. */
    uint8_t codes[PANEL_GROUPS][8][4 * PANEL_ROWS] __attribute__((aligned(32)));
    float scales[PANEL_GROUPS][PANEL_ROWS] __attribute__((aligned(32)));
    float mins[PANEL_GROUPS][PANEL_ROWS] __attribute__((aligned(32)));
    uint32_t factors[PANEL_GROUPS][PANEL_ROWS] __attribute__((aligned(32))); /* two int16 */
};

/* What tokens have summed up: at[token][lane][row]. */
struct panel_sums {
    float at[PANEL_TOKENS][8][PANEL_ROWS] __attribute__((aligned(32)));
};

struct panel_token {
    const int8_t *q;
    const float *d, *s;
    const int16_t *sums;
    float *lanes; /* [8][PANEL_ROWS] */
};

/* 4 activations, or the sums of a group, in every lane. */
ALWAYS_INLINE __m256i load_quad(const void *at)
{
    int32_t quad;
    memcpy(&quad, at, sizeof quad);
    return _mm256_set1_epi32(quad);
}

ALWAYS_INLINE __m256i load_rows(const void *plane, int v)
{
    return _mm256_load_si256((const __m256i *)plane + v);
}

/* `at` is where the group lies in the tokens' q; ret comes as zeros. */
ALWAYS_INLINE void panel_dots(const enum panel_kind kind, const int n_toks,
                              const uint8_t codes[8][4 * PANEL_ROWS],
                              const struct panel_token *toks, size_t at, const __m256i factors[2],
                              __m256i ret[2][BLOCK]);

/* Group i of a panel, g of its rows, times n_toks tokens. */
ALWAYS_INLINE void group_mul(const enum panel_kind kind, const int n_toks,
                             const struct panel *panel, uint32_t i, size_t g, int offset,
                             const struct panel_token *toks)
{
    __m256i sums[2][BLOCK], factors[2];
    factors[0] = factors[1] = _mm256_set1_epi16((short)offset);
    if (kind == PANEL_HALVED) {
        factors[0] = load_rows(panel->factors[i], 0);
        factors[1] = load_rows(panel->factors[i], 1);
    }
    for (int t = 0; t < n_toks; t++) {
        sums[0][t] = sums[1][t] = _mm256_setzero_si256();
    }
    panel_dots(kind, n_toks, panel->codes[i], toks, slu_acts_at(32 * g), factors, sums);
    for (int v = 0; v < 2; v++) {
        __m256 scales = _mm256_load_ps(panel->scales[i] + 8 * v);
        for (int t = 0; t < n_toks; t++) {
            __m256i sum = sums[v][t];
            if (kind == PANEL_HALVED || kind == PANEL_OFFSET) {
                __m256i excess = _mm256_madd_epi16(load_quad(toks[t].sums + 2 * g), factors[v]);
                excess = kind == PANEL_HALVED ? _mm256_slli_epi32(excess, 5) : excess;
                sum = _mm256_sub_epi32(sum, excess);
            }
            float *lane = toks[t].lanes + g % 8 * PANEL_ROWS + 8 * v;
            __m256 products = _mm256_mul_ps(scales, _mm256_broadcast_ss(toks[t].d + g));
            __m256 acc = _mm256_load_ps(lane);
            acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), products, acc);
            if (kind == PANEL_MIN) {
                __m256 mins = _mm256_load_ps(panel->mins[i] + 8 * v);
                acc = _mm256_fmadd_ps(mins, _mm256_broadcast_ss(toks[t].s + g), acc);
            }
            _mm256_store_ps(lane, acc);
        }
    }
}

ALWAYS_INLINE void block_mul(const enum panel_kind kind, const int n_toks,
                             const struct panel *panel, uint32_t first, uint32_t n_groups,
                             int offset, const struct panel_token *toks)
{
    for (uint32_t i = 0; i < n_groups; i++) {
        group_mul(kind, n_toks, panel, i, first + i, offset, toks);
    }
}

/* Adds groups first .. first+n_groups-1, the panel's, times n tokens to sums. */
ALWAYS_INLINE void panel_mul(const enum panel_kind kind, struct panel_sums *sums,
                             const struct panel *panel, uint32_t first, uint32_t n_groups,
                             int offset, const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    struct panel_token toks[BLOCK];
    for (uint32_t i = 0; i < n; i += BLOCK) {
        uint32_t some = n - i < BLOCK ? n - i : BLOCK;
        for (uint32_t t = 0; t < some; t++) {
            size_t token = tok ? tok[i + t] : i + t;
            toks[t] = (struct panel_token){
                .q = x->q + token * x->q_stride,
                .d = x->d + token * x->g_stride,
                .s = x->s + token * x->g_stride,
                .sums = x->sums + 2 * token * x->g_stride,
                .lanes = sums->at[i + t][0],
            };
        }
        if (some == 4) {
            block_mul(kind, 4, panel, first, n_groups, offset, toks);
        } else if (some == 3) {
            block_mul(kind, 3, panel, first, n_groups, offset, toks);
        } else if (some == 2) {
            block_mul(kind, 2, panel, first, n_groups, offset, toks);
        } else {
            block_mul(kind, 1, panel, first, n_groups, offset, toks);
        }
    }
}

/* One copy for all formats. */
static void panel_mul_any(enum panel_kind kind, struct panel_sums *sums, const struct panel *panel,
                          uint32_t first, uint32_t n_groups, int offset, const struct slu_acts *x,
                          const uint32_t *tok, uint32_t n)
{
    if (kind == PANEL_OFFSET) {
        panel_mul(PANEL_OFFSET, sums, panel, first, n_groups, offset, x, tok, n);
    } else if (kind == PANEL_MIN) {
        panel_mul(PANEL_MIN, sums, panel, first, n_groups, offset, x, tok, n);
    } else if (kind == PANEL_HALVED) {
        panel_mul(PANEL_HALVED, sums, panel, first, n_groups, offset, x, tok, n);
    } else if (!NEEDS_UNSIGNED) {
        panel_mul(PANEL_SIGNED, sums, panel, first, n_groups, offset, x, tok, n);
    }
}

/* The lanes of n tokens added up, for n_rows rows. */
static void panel_store(float *y, size_t y_stride, uint32_t n_rows, const struct panel_sums *sums,
                        uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t v = 0; 8 * v < n_rows; v++) {
            __m256 t[8];
            for (int l = 0; l < 8; l++) {
                t[l] = _mm256_load_ps(sums->at[i][l] + 8 * v);
            }
            __m256 a = _mm256_add_ps(_mm256_add_ps(t[0], t[4]), _mm256_add_ps(t[2], t[6]));
            __m256 b = _mm256_add_ps(_mm256_add_ps(t[1], t[5]), _mm256_add_ps(t[3], t[7]));
            _mm256_maskstore_ps(y + i * y_stride + 8 * v, first_lanes(n_rows - 8 * v),
                                _mm256_add_ps(a, b));
        }
    }
}

#endif
