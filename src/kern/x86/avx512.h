/*
 * What the AVX-512 files share: the kernels of theirs, and the decoding of codes four groups at a
 * time. Only they may include it: everything here is inlined.
 */
#ifndef SLU_KERN_X86_AVX512_H
#define SLU_KERN_X86_AVX512_H

#include "kern/x86/avx512_gemm.h"
#include "kern/x86/load256.h"

#define QUANT_MUL_DECLARE512(name)                                                                 \
    void slu_avx512_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,    \
                               uint32_t hi, const struct slu_acts *x, const uint32_t *tok,         \
                               uint32_t n);
QUANT_MUL_DECLARE512(q8_0)
QUANT_MUL_DECLARE512(q4_0)
QUANT_MUL_DECLARE512(q4_1)
QUANT_MUL_DECLARE512(q5_0)
QUANT_MUL_DECLARE512(q5_1)
QUANT_MUL_DECLARE512(q4_k)
QUANT_MUL_DECLARE512(q5_k)
QUANT_MUL_DECLARE512(q6_k)
QUANT_MUL_DECLARE512(iq4_nl)
QUANT_MUL_DECLARE512(mxfp4)

void slu_avx512_add_grid(double *sum, float a, const float *x, uint32_t n);
void slu_avx512_attn_mul(const struct slu_attn_mul *mul);
void slu_avx512_attn_floats(float *out, const struct slu_attn_mat *m, uint32_t k, uint32_t n);
float slu_avx512_attn_weigh(float *x, uint32_t n, float *high, float *sum);
void slu_avx512_attn_silu(float *h, const float *u, const float *gate_bias, const float *up_bias,
                          uint32_t n);
void slu_avx512_attn_oai(float *h, const float *u, const float *gate_bias, const float *up_bias,
                         uint32_t n);

/* vpdpbusd multiplies unsigned with signed bytes: signed weights come 128 too large. */
ALWAYS_INLINE int offset_of(const struct kind k)
{
    return k.is_signed ? 128 : k.offset;
}

/* The table of a format, unsigned, in every 16 bytes. */
ALWAYS_INLINE __m512i table512_of(const struct kind k, const struct slu_mat *w)
{
    if (!k.has_table) {
        return _mm512_setzero_si512();
    }
    __m128i table = _mm_loadu_si128((const __m128i *)(const void *)w->fmt->table);
    return _mm512_broadcast_i32x4(k.is_signed ? _mm_xor_si128(table, _mm_set1_epi8(-128)) : table);
}

#define GEMM_GROUPS      16  /* of a panel, unpacked at once */
#define GEMM_TOKENS_MIN  8   /* fewer don't pay for the unpacking */
#define GEMM_TOKENS_MANY 32  /* so many are worth panels of three registers */
#define GEMM_TOKENS_MAX  128 /* that pass over an unpacked panel */

/* The rows of two or three registers and up to 16 groups of any format, unpacked: lane r of
 * register h is row 16h + r. */
struct panel {
    int n_regs;
    /* Columns 4j .. 4j+3 of group g, unsigned, are quad_bytes from g * group_bytes + j * quad_bytes
     * on: without gaps, for a panel is most of what the nearest cache holds. */
    uint8_t codes[GEMM_GROUPS * 8 * 4 * GEMM_ROWS] __attribute__((aligned(64)));
    float scales[GEMM_GROUPS][GEMM_ROWS] __attribute__((aligned(64)));
    float mins[GEMM_GROUPS][GEMM_ROWS] __attribute__((aligned(64)));
    int32_t factors[GEMM_GROUPS][2][GEMM_ROWS] __attribute__((aligned(64)));
};

/* A group of GEMM_BLOCK tokens' activations, side by side, so that all of them are found from one
 * address: columns 4j .. 4j+3 of token t are q[j][t]. Integers start from minus the offset times
 * the sum of q, or of a half of it. */
struct tile {
    int8_t q[8][GEMM_BLOCK][4];
    float d[GEMM_BLOCK];
    union {
        float s[GEMM_BLOCK];
        int32_t shift[GEMM_BLOCK]; /* PANEL_SHIFT: d's bits less those of 1, or 0 if d is 0 */
    };
    int32_t start[2][GEMM_BLOCK];
} __attribute__((aligned(64)));

_Static_assert(sizeof(struct tile) == 8 * 4 * GEMM_BLOCK + 64, "what follows q fills a register");

/* Bytes of a panel's codes for 4 columns, and for a group. */
ALWAYS_INLINE size_t quad_bytes(const int n_regs)
{
    return (size_t)4 * GEMM_LANES * (size_t)n_regs;
}

ALWAYS_INLINE size_t group_bytes(const int n_regs)
{
    return 8 * quad_bytes(n_regs);
}

#define TILE_GROUPS 128 /* of the tiles that are kept while rows pass over them */
#define TILE_BLOCKS (GEMM_TOKENS_MAX / GEMM_BLOCK)

struct tiles {
    struct tile at[TILE_BLOCKS][TILE_GROUPS];
};

/* What tokens have summed up: sums[token][lane][row]. Lanes that no group has reached yet are
 * anything. */
struct panel_sums {
    float at[GEMM_TOKENS_MAX][8][GEMM_ROWS] __attribute__((aligned(64)));
};

/* The kinds of formats, once they are unpacked. PANEL_SHIFT is PANEL_OFFSET with scales that are
 * powers of two: their bits and a tile's shift add up to the bits of the product with d, on units
 * that have nothing else to do. That holds for numbers near enough to 1, SHIFT_LEAST to SHIFT_MOST,
 * and for d of 0, where all of q is 0 and so any finite product does. */
enum panel_kind { PANEL_OFFSET, PANEL_SHIFT, PANEL_MIN, PANEL_HALVED };
#define SHIFT_LEAST 0x1p-60f
#define SHIFT_MOST  0x1p60f

/* Fills tiles with groups first .. first+n_groups-1 of n tokens; offset is what the values of the
 * weights are too large by. False if the kind is PANEL_SHIFT and they allow for PANEL_OFFSET
 * only. */
bool slu_avx512_tiles_fill(enum panel_kind kind, struct tiles *tiles, uint32_t first,
                           uint32_t n_groups, int offset, const struct slu_acts *x,
                           const uint32_t *tok, uint32_t n);

/* Where the sums of n_rows rows go: those of token i to y[i*y_stride]. */
struct panel_out {
    float *y;
    size_t y_stride;
    uint32_t n_rows;
};

/* What is unpacked next: `bytes` bytes of each row, `ahead` of where its codes start. */
struct panel_next {
    const uint8_t *const *codes; /* n_rows of them */
    uint32_t n_rows;
    size_t ahead, bytes;
};

/* Adds groups first .. first+n_groups-1, the panel's, times n tokens to sums. tiles begin with
 * group first / TILE_GROUPS * TILE_GROUPS. With the last groups comes where the sums go; before
 * that out is NULL. Meanwhile it asks memory for what is next. */
void slu_avx512_panel_mul(enum panel_kind kind, struct panel_sums *sums, const struct panel *panel,
                          uint32_t first, uint32_t n_groups, const struct tiles *tiles, uint32_t n,
                          const struct panel_next *next, const struct panel_out *out);

#endif
