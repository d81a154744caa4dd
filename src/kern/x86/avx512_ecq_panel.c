/*
 * Matrix-matrix products of the q*e formats with AVX-512 VNNI: 32 rows are unpacked at once, one
 * for each lane of two registers, and multiplied with blocks of up to 4 tokens. kern.h's sixteen
 * lanes of a row are pairs of registers here. For each register, 128 columns and a token
 *
 *   twice vpdpbusd: 16 rows by 4 columns, with 4 bytes of q in every lane -> 16 int32
 *   to float; fma with the group's step
 *
 * so that two of three instructions on the busiest units multiply bytes, and a third of their peak
 * is out of reach. The formats have to have it so: a row alone is fastest with such lanes.
 */
#include <assert.h>

#include "base/pool.h"
#include "kern/x86/avx512_ecq.h"
#include "kern/x86/avx512_gemm.h"

#define LANES      16
#define REGS       2
#define ROWS       (REGS * GEMM_LANES)
#define QUADS      4  /* of 128 columns, unpacked at once */
#define TILE_PARTS 8  /* of QUADS: of the tiles that are kept while rows pass over them */
#define TOKENS_MAX 64 /* that pass over an unpacked panel */
#define BLOCKS_MAX (TOKENS_MAX / GEMM_BLOCK)

/* codes[lane][quad]: of both halves of the lane's group, 4 columns of all rows, unsigned. */
struct panel {
    uint8_t codes[LANES][QUADS][2][4 * ROWS] __attribute__((aligned(64)));
};

/* The same of GEMM_BLOCK tokens, what their sums start from, and their groups' steps. */
struct tile {
    int8_t q[2][GEMM_BLOCK][4];
    int32_t start[GEMM_BLOCK];
    float d[GEMM_BLOCK];
} __attribute__((aligned(64)));

_Static_assert(sizeof(struct tile) == 64, "fill_quad stores one as a register");

struct tiles {
    struct tile at[BLOCKS_MAX][TILE_PARTS][LANES][QUADS];
};

/* sums[token][lane][row] */
struct sums {
    float at[TOKENS_MAX][LANES][ROWS] __attribute__((aligned(64)));
};

_Static_assert(sizeof(struct tiles) + sizeof(struct panel) + sizeof(struct sums) <=
                   SLU_STACK_BYTES / 2,
               "what a product keeps on its stack");

struct operand {
    const struct slu_acts *x;
    const uint32_t *tok;
    uint32_t n;
};

ALWAYS_INLINE size_t token_at(const struct operand *to, size_t i)
{
    return to->tok ? to->tok[i] : i;
}

/* Quad i of the tokens of a block, of which the last stands for those that are missing. */
ALWAYS_INLINE void fill_quad(struct tile (*tiles)[QUADS], const int8_t *const q[GEMM_BLOCK],
                             const float *const d[GEMM_BLOCK], size_t i)
{
    const __m512i offset = _mm512_set1_epi8((char)-128); /* 128, unsigned */
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m512i v[4 * GEMM_BLOCK]; /* of a lane's tile, which is a column of them */
    for (size_t t = 0; t < GEMM_BLOCK; t++) {
        __m512i first = _mm512_load_si512(q[t] + 128 * i);
        __m512i second = _mm512_load_si512(q[t] + 128 * i + 64);
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, first);
        sum = _mm512_dpbusd_epi32(sum, offset, second);
        __m512i steps = _mm512_castsi128_si512(_mm_castps_si128(_mm_load_ps(d[t] + 4 * i)));
        v[t] = first;
        v[GEMM_BLOCK + t] = second;
        v[2 * GEMM_BLOCK + t] = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
        v[3 * GEMM_BLOCK + t] = _mm512_permutexvar_epi32(spread, steps);
    }
    transpose16(v);
    for (size_t l = 0; l < LANES; l++) {
        _mm512_store_si512(tiles[l], v[l]);
    }
}

/* Quads first .. first+n_quads-1 of all tokens. */
static void fill_tiles(struct tiles *tiles, const struct operand *to, size_t first, size_t n_quads)
{
    uint32_t n_blocks = (to->n + GEMM_BLOCK - 1) / GEMM_BLOCK;
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint32_t start = block_start(to->n, b), some = block_start(to->n, b + 1) - start;
        const int8_t *q[GEMM_BLOCK];
        const float *d[GEMM_BLOCK];
        for (uint32_t t = 0; t < GEMM_BLOCK; t++) {
            size_t token = token_at(to, start + (t < some ? t : some - 1));
            q[t] = to->x->q + token * to->x->q_stride;
            d[t] = to->x->d + token * to->x->g_stride;
        }
        for (size_t i = 0; i < n_quads; i++) {
            struct tile(*part)[QUADS] = tiles->at[b][i / QUADS];
            fill_quad((struct tile(*)[QUADS])(void *)&part[0][i % QUADS], q, d, first + i);
        }
    }
}

/* Quads first .. first+n_quads-1 of the rows of a panel; of groups that the last of a matrix
 * doesn't have, nothing is read, and whatever their values are meets activations of zero. */
ALWAYS_INLINE void unpack(const int bits, struct panel *panel, const struct slu_ecq_row *rows,
                          const __m512i tables[2], size_t first, size_t n_quads, size_t n_groups)
{
    for (size_t at = 0; at < ROWS; at += GEMM_LANES) {
        for (size_t i = 0; i < n_quads; i++) {
            size_t there = n_groups - 4 * (first + i);
            __m512i v[2][GEMM_LANES];
            for (size_t r = 0; r < GEMM_LANES; r++) {
                __m512i halves[2];
                ecq_decode(bits, tables, &rows[at + r], first + i, there < 4 ? (unsigned)there : 4,
                           halves);
                v[0][r] = halves[0];
                v[1][r] = halves[1];
            }
            for (int half = 0; half < 2; half++) {
                transpose16(v[half]);
                for (size_t l = 0; l < LANES; l++) {
                    _mm512_store_si512(panel->codes[l][i][half] + 4 * at, v[half][l]);
                }
            }
        }
    }
}

/* n quads of a lane times n_toks tokens, added to sums or, at first, in their place. */
ALWAYS_INLINE void lane_mul(const int n_toks, bool is_first, const uint8_t (*codes)[2][4 * ROWS],
                            const struct tile *tiles, size_t n, size_t lane,
                            float (*sums)[LANES][ROWS])
{
    panel_floats acc;
    EACH(n_toks, REGS)
    {
        acc[t][h] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(sums[t][lane] + GEMM_LANES * h);
    }
    for (size_t i = 0; i < n; i++) {
        const struct tile *tile = tiles + i;
        panel_ints dots;
        EACH(n_toks, REGS)
        {
            dots[t][h] = _mm512_set1_epi32(tile->start[t]);
        }
        for (int half = 0; half < 2; half++) {
            const __m512i w[GEMM_REGS] = {_mm512_load_si512(codes[i][half]),
                                          _mm512_load_si512(codes[i][half] + 64)};
            EACH_TOKEN(n_toks)
            {
                dot_quad(REGS, dots[t], w, tile->q[half][t]);
            }
        }
        EACH(n_toks, REGS)
        {
            acc[t][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][h]), _mm512_set1_ps(tile->d[t]),
                                        acc[t][h]);
        }
    }
    EACH(n_toks, REGS)
    {
        _mm512_store_ps(sums[t][lane] + GEMM_LANES * h, acc[t][h]);
    }
}

/* What a panel is of: quads first .. first+n_quads-1 of a matrix with n_groups groups. */
struct part {
    size_t first, n_quads, n_groups;
};

ALWAYS_INLINE void block_mul(const int n_toks, const struct panel *panel, const struct part *part,
                             const struct tile (*tiles)[QUADS], float (*sums)[LANES][ROWS])
{
    for (size_t l = 0; l < LANES; l++) {
        size_t n = part->n_quads, last = part->first + n - 1;
        /* Zeros would come of a quad that has no group for the lane: it is left out to save time.
         */
        n -= 4 * last + l / 4 >= part->n_groups;
        lane_mul(n_toks, part->first == 0, panel->codes[l], tiles[l], n, l, sums);
    }
}

/* Where the products of rows lo .. hi-1 go, at most 32. */
struct out {
    float *y;
    size_t y_stride, lo, hi;
    const struct slu_mat *w;
};

/* The products of the rows with tokens first .. first+n-1, from the sums over their codes and, in
 * y, over their escapes. */
static void finish(const struct out *out, const float (*sums)[LANES][ROWS], uint32_t first,
                   uint32_t n)
{
    const struct slu_mat *w = out->w;
    const struct slu_ecq_head *head = slu_ecq_head_of(w);
    const __m512 escape = _mm512_set1_ps(head->escape);
    for (size_t at = 0; at < out->hi - out->lo; at += GEMM_LANES) {
        size_t lo = out->lo + at, some = out->hi - lo;
        const __mmask16 mask = some < GEMM_LANES ? (__mmask16)((1u << some) - 1) : 0xffff;
        __m128i e = _mm_maskz_loadu_epi8(mask, w->data + w->at.scales + lo);
        __m512 scales = _mm512_castps256_ps512(ecq_row_scales(head->unit, e));
        scales = _mm512_insertf32x8(scales, ecq_row_scales(head->unit, _mm_srli_si128(e, 8)), 1);
        for (uint32_t i = 0; i < n; i++) {
            __m512 t[8];
            for (int l = 0; l < 8; l++) {
                t[l] = _mm512_add_ps(_mm512_load_ps(sums[i][l] + at),
                                     _mm512_load_ps(sums[i][l + 8] + at));
            }
            __m512 sum = add_lanes(t);
            float *y = out->y + (first + i) * out->y_stride + lo;
            if (w->at.escapes_row > 0) {
                sum = _mm512_fmadd_ps(escape, _mm512_maskz_loadu_ps(mask, y), sum);
            }
            _mm512_mask_storeu_ps(y, mask, _mm512_mul_ps(scales, sum));
        }
    }
}

static void panel_mul(const struct panel *panel, const struct part *part, const struct tiles *tiles,
                      uint32_t n, struct sums *sums, const struct out *out)
{
#define BLOCK_MUL(n_toks)                                                                          \
    case n_toks:                                                                                   \
        block_mul(n_toks, panel, part, tile, at);                                                  \
        break;
    uint32_t n_blocks = (n + GEMM_BLOCK - 1) / GEMM_BLOCK;
    const bool is_last = 4 * (part->first + part->n_quads) >= part->n_groups;
    const bool is_narrow = part->first == 0 && is_last;
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint32_t start = block_start(n, b), end = block_start(n, b + 1);
        const struct tile(*tile)[QUADS] = tiles->at[b][part->first / QUADS % TILE_PARTS];
        /* What need not wait for other parts stays near. */
        float(*at)[LANES][ROWS] = sums->at + (is_narrow ? 0 : start);
        GEMM_SWITCH(end - start, BLOCK_MUL)
        if (is_last) {
            finish(out, at, start, end - start);
        }
    }
#undef BLOCK_MUL
}

/* Rows lo .. hi-1, at most 32, times all tokens. */
ALWAYS_INLINE void panel_rows_mul(const int bits, float *y, size_t y_stride,
                                  const struct slu_mat *w, size_t lo, size_t hi,
                                  const struct operand *to, struct tiles *tiles,
                                  const __m512i tables[2])
{
    struct panel panel;
    struct sums sums;
    struct slu_ecq_row rows[ROWS];
    const struct out out = {y, y_stride, lo, hi, w};
    for (size_t r = 0; r < ROWS; r++) {
        size_t row = lo + r < hi ? lo + r : hi - 1;
        rows[r].codes = w->data + w->at.codes + row * w->at.codes_row;
        rows[r].high = w->data + w->at.high + row * w->at.high_row;
    }
    const size_t n_groups = w->cols / 32, n_quads = (n_groups + 3) / 4;
    for (size_t i = 0; i < n_quads; i += QUADS) {
        const struct part part = {i, n_quads - i < QUADS ? n_quads - i : QUADS, n_groups};
        if (n_quads > TILE_PARTS * QUADS && i % (TILE_PARTS * QUADS) == 0) {
            size_t some = n_quads - i < TILE_PARTS * QUADS ? n_quads - i : TILE_PARTS * QUADS;
            fill_tiles(tiles, to, i, some);
        }
        unpack(bits, &panel, rows, tables, i, part.n_quads, n_groups);
        panel_mul(&panel, &part, tiles, to->n, &sums, &out);
    }
}

/* The products, with the sums over escapes in y. */
ALWAYS_INLINE void panels_mul(const int bits, float *y, size_t y_stride, const struct slu_mat *w,
                              uint32_t lo, uint32_t hi, const struct slu_acts *x,
                              const uint32_t *tok, uint32_t n)
{
    const size_t n_quads = (w->cols + 127) / 128;
    struct tiles tiles;
    __m512i tables[2];
    ecq_tables(bits, slu_ecq_head_of(w), tables);
    for (uint32_t i = 0; i < n; i += TOKENS_MAX) {
        struct slu_acts from = *x;
        if (!tok) {
            from.q += i * x->q_stride;
            from.d += i * x->g_stride;
        }
        struct operand to = {&from, tok ? tok + i : NULL, n - i < TOKENS_MAX ? n - i : TOKENS_MAX};
        if (n_quads <= TILE_PARTS * QUADS) {
            fill_tiles(&tiles, &to, 0, n_quads);
        }
        for (size_t row = lo; row < hi; row += ROWS) {
            size_t end = hi - row < ROWS ? hi : row + ROWS;
            panel_rows_mul(bits, y + i * y_stride, y_stride, w, row, end, &to, &tiles, tables);
        }
    }
}

void slu_avx512_ecq_panels(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                           uint32_t hi, const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    switch (w->fmt->bits) {
    case 3:
        panels_mul(3, y, y_stride, w, lo, hi, x, tok, n);
        break;
    case 4:
        panels_mul(4, y, y_stride, w, lo, hi, x, tok, n);
        break;
    case 5:
        panels_mul(5, y, y_stride, w, lo, hi, x, tok, n);
        break;
    default:
        assert(w->fmt->bits == 6);
        panels_mul(6, y, y_stride, w, lo, hi, x, tok, n);
        break;
    }
}
