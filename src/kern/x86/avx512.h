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

#define GEMM_TOKENS_MIN  8   /* fewer don't pay for the unpacking */
#define GEMM_TOKENS_MANY 32  /* so many pass over all of a row's groups, lane by lane */
#define GEMM_TOKENS_MAX  128 /* that pass over an unpacked panel */

/* kern.h's lanes: group g of a row belongs to lane g % SUM_LANES. */
#define SUM_LANES    8
#define LANE_GROUPS  16 /* of a lane in a panel */
#define PANEL_GROUPS (SUM_LANES * LANE_GROUPS)
#define FEW_GROUPS   16 /* that have all lanes unpacked at once */

/* The rows of two or three registers and up to PANEL_GROUPS groups of any format: lane r of
 * register h is row 16h + r. Only the codes of one lane of groups are unpacked at a time, 18 KiB
 * for 2880 columns, which the nearest cache has room for, or all of a panel of few groups. */
struct panel {
    int n_regs;
    /* Columns 4j .. 4j+3, unsigned, of the i-th group unpacked are quad_bytes from
     * i * group_bytes + j * quad_bytes on, without gaps. */
    uint8_t codes[LANE_GROUPS * 8 * 4 * GEMM_ROWS] __attribute__((aligned(64)));
    /* Of group i at its place_of. Panels of three registers have no factors. */
    float scales[PANEL_GROUPS][GEMM_ROWS] __attribute__((aligned(64)));
    float mins[PANEL_GROUPS][GEMM_ROWS] __attribute__((aligned(64)));
    int32_t factors[PANEL_GROUPS][2][2 * GEMM_LANES] __attribute__((aligned(64)));
};

_Static_assert(FEW_GROUPS <= LANE_GROUPS && FEW_GROUPS % SUM_LANES == 0,
               "their codes have room, and each panel of them starts with the first lane");

/* Where group i of a row or a panel is among the tiles, the codes and the scales: groups follow
 * each other, or where one lane is multiplied after the other those of a lane do, and so many
 * places lie between one lane and the next. */
#define NO_LANES 0
ALWAYS_INLINE uint32_t place_of(uint32_t i, uint32_t lane_groups)
{
    return lane_groups == NO_LANES ? i : i % SUM_LANES * lane_groups + i / SUM_LANES;
}

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

/* Tiles of blocks of tokens, those of a block side by side. */
#define TILES_MAX (GEMM_TOKENS_MAX / GEMM_BLOCK * PANEL_GROUPS)

struct tiles {
    uint32_t lane_groups, n_places; /* of a block's groups */
    struct tile at[TILES_MAX];
};

/* Places for so many groups, whichever way. */
ALWAYS_INLINE uint32_t places_of(uint32_t n_groups)
{
    return (n_groups + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
}

/* Tokens that there are tiles for, in rows of so many groups; 0 if these are too many. */
ALWAYS_INLINE uint32_t tiles_tokens(uint32_t n_groups)
{
    uint32_t n = TILES_MAX / places_of(n_groups) * GEMM_BLOCK;
    return n < GEMM_TOKENS_MAX ? n : GEMM_TOKENS_MAX;
}

/* What lanes of a token have summed up to so far. */
typedef float panel_sums[SUM_LANES][GEMM_ROWS] __attribute__((aligned(64)));

/* The kinds of formats, once they are unpacked. PANEL_SHIFT is PANEL_OFFSET with scales that are
 * powers of two: their bits and a tile's shift add up to the bits of the product with d, on units
 * that have nothing else to do. That holds for numbers near enough to 1, SHIFT_LEAST to SHIFT_MOST,
 * and for d of 0, where all of q is 0 and so any finite product does. */
enum panel_kind { PANEL_OFFSET, PANEL_SHIFT, PANEL_MIN, PANEL_HALVED };
#define SHIFT_LEAST 0x1p-60f
#define SHIFT_MOST  0x1p60f

/* Fills tiles with the n_groups groups of n tokens, lane by lane or not; offset is what the values
 * of the weights are too large by. False if the kind is PANEL_SHIFT and they allow for PANEL_OFFSET
 * only. */
bool slu_avx512_tiles_fill(enum panel_kind kind, struct tiles *tiles, uint32_t n_groups,
                           bool is_lane_by_lane, int offset, const struct slu_acts *x,
                           const uint32_t *tok, uint32_t n);

/* Where the sums of n_rows rows of n_groups groups go: those of token i to y[i*y_stride]. */
struct panel_out {
    float *y;
    size_t y_stride;
    uint32_t n_rows, n_groups;
};

/* What is gathered next: `bytes` bytes of each of n_rows rows, `ahead` of where `codes` start. */
struct panel_next {
    const uint8_t *const *codes;
    uint32_t n_rows;
    size_t ahead, bytes;
};

/* The groups of a lane that are unpacked: n of them, the lane's first-th and those after it. */
struct panel_lane {
    uint32_t lane, first, n;
    bool is_last; /* the lane has no more */
};

/* Adds a lane's groups times n tokens to sums, or puts them there if they are its first. The last
 * ones of all lanes have to come in the order of slu_avx512_lane_order: those of its last lane
 * bring what all sum up to to out. Meanwhile memory is asked for what is next. */
extern const uint8_t slu_avx512_lane_order[SUM_LANES];
void slu_avx512_lane_mul(enum panel_kind kind, const struct panel *panel,
                         const struct panel_lane *lane, const struct tiles *tiles, uint32_t n,
                         panel_sums *sums, const struct panel_next *next,
                         const struct panel_out *out);

/* The same for all lanes at once, of a panel of few groups and two registers. `first` is the first
 * group; the last ones of a row bring to out what all sum up to. */
void slu_avx512_few_mul(enum panel_kind kind, const struct panel *panel, uint32_t first,
                        uint32_t n_groups, const struct tiles *tiles, uint32_t n, panel_sums *sums,
                        const struct panel_next *next, const struct panel_out *out);

#endif
