/*
 * The weight format family. Every quantized format is the same four things: codes of b bits (a
 * nibble plane, and a plane of high bits where b > 4), a scale per group of weights, optionally a
 * minimum per group, and a table from codes to small integers. Each GGUF type is a point in that
 * family, so importing it moves bits and rounds nothing.
 *
 * A weight of group g in super-group s is
 *
 *     w = scale(g, s) * (value(code) - offset) + min(g, s)
 *
 * with value(code) the table's entry, or the code itself where there is no table (read as signed
 * where `is_signed`).
 *
 * A matrix of r rows and c columns is stored plane after plane, each plane starting at a multiple
 * of 64 bytes, rows tightly packed within a plane:
 *
 *   codes   F32, F16, BF16: the numbers as they are, little-endian.
 *           b == 8: one byte a weight. b < 8: c/2 bytes a row; byte j of a group of 32 holds
 *           weight j in its low nibble and weight j + 16 in its high one.
 *   high    b == 5: 4 bytes for 32 weights, bit i of the little-endian word belongs to weight i.
 *           b == 6: 8 bytes for 32 weights; bits 2k, 2k+1 of byte j belong to weight j + 8k.
 *   scales  one per group: f16, E8M0 (2^(e-128), as the MXFP4 table holds doubled values), or an
 *           8-bit integer to be multiplied by the super-group's f16 `d`.
 *   mins    one per group: f16 (added), or an unsigned 8-bit integer m: min = -(dmin * m).
 *   supers  per super-group of 256: f16 d, then, where there are minimums, f16 dmin.
 *
 * The q*e formats, which this project's own quantizer makes for an entropy coder to shrink, have
 * one scale a row, a table of their own for every matrix, and outliers kept apart:
 *
 *   codes   b == 3: 8 bytes for 32 weights with bits 0 and 1 of the codes, laid out as the high
 *           plane of b == 6; else as above.
 *   high    b == 3: bit 2 of the codes, laid out as for b == 5.
 *   scales  a byte e for each row: slu_row_scale(unit, e).
 *   gaps    n bytes a row, and
 *   values  n signed bytes a row: the row's n escapes, n = slu_fmt_escapes. Escape i lies gaps[i]
 *           columns on from the one before it, the first from column 0, and adds
 *           scale * (escape * values[i]) to the weight. A value of 0 adds nothing, and is how gaps
 *           over 255 are bridged and what is left of a row is filled. An escape past the last
 *           column ends the row's list.
 *   head    once a matrix: struct slu_ecq_head.
 *
 * so that a weight is scale * table[code], and what escapes add.
 *
 * Thread safety: everything here is constant.
 */
#ifndef SLU_KERN_FORMAT_H
#define SLU_KERN_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Values are stored in packs: append only. */
enum slu_fmt_id {
    SLU_FMT_F32 = 0,
    SLU_FMT_F16 = 1,
    SLU_FMT_BF16 = 2,
    SLU_FMT_Q8_0 = 3,
    SLU_FMT_Q4_0 = 4,
    SLU_FMT_Q4_1 = 5,
    SLU_FMT_Q5_0 = 6,
    SLU_FMT_Q5_1 = 7,
    SLU_FMT_Q4_K = 8,
    SLU_FMT_Q5_K = 9,
    SLU_FMT_Q6_K = 10,
    SLU_FMT_IQ4_NL = 11,
    SLU_FMT_MXFP4 = 12,
    SLU_FMT_Q3E = 13,
    SLU_FMT_Q4E = 14,
    SLU_FMT_Q5E = 15,
    SLU_FMT_Q6E = 16,
    SLU_FMTS
};

#define SLU_FMT_GGUFS SLU_FMT_Q3E /* formats below it are types of GGUF; others are made here */

enum slu_scale_kind {
    SLU_SCALE_NONE, /* plain floats */
    SLU_SCALE_F16,
    SLU_SCALE_E8M0,
    SLU_SCALE_U8_SUPER, /* u8 times the super-group's d */
    SLU_SCALE_I8_SUPER, /* i8 times the super-group's d */
    SLU_SCALE_ROW,      /* one for a row: the q*e formats */
};

enum slu_min_kind { SLU_MIN_NONE, SLU_MIN_F16, SLU_MIN_U8_SUPER };

#define SLU_FMT_GROUP_MAX 32

struct slu_fmt {
    enum slu_fmt_id id;
    const char *name; /* as GGUF names it: "Q4_K" */
    uint8_t bits;     /* of a code: 3, 4, 5, 6, 8; 16 or 32 for floats */
    uint8_t group;    /* weights that share a scale: 16 or 32 (q*e too); 0 for floats */
    uint16_t super;   /* weights in a super-group: 256, or 0 */
    enum slu_scale_kind scale;
    enum slu_min_kind min;
    bool is_signed;      /* Q8_0 */
    uint8_t offset;      /* subtracted from the code's value */
    const int8_t *table; /* 16 entries for 4-bit codes, or NULL; q*e have theirs in the matrix */
    uint16_t granule;    /* columns come in multiples of this: 1, 32 or 256 */
    uint8_t escapes;     /* q*e: escapes for 1024 columns */
    uint16_t stored;     /* its number in packs: id + 256 * v for the v-th room for escapes */
};

/* A format by its number in packs, which for those without escapes is the id. NULL if the number is
 * not in the family: numbers come from files. */
const struct slu_fmt *slu_fmt_get(unsigned stored);

/* How many rooms for escapes the q*e formats come with: v is from 0, which has none, to one less.
 */
#define SLU_ECQ_ROOMS 8u

/* Escapes of a row of so many columns. */
static inline uint32_t slu_fmt_escapes(const struct slu_fmt *fmt, uint32_t cols)
{
    return (uint32_t)(((uint64_t)cols * fmt->escapes + 1023) / 1024);
}

/* What a matrix of a q*e format has once. */
struct slu_ecq_head {
    int8_t table[64]; /* by code; those that codes of b bits don't reach are 0 */
    float unit;       /* the largest scale that a row can have */
    float escape;     /* what an escape's value counts in */
    uint8_t reserved[56];
};

_Static_assert(sizeof(struct slu_ecq_head) == 128, "as in packs");

/* 2^(-i/16), for slu_row_scale and its like of eight rows. */
static const float slu_row_sixteenths[16] = {
    1.0f,         0.957603276f, 0.917004049f, 0.878126085f, 0.840896428f, 0.805245161f,
    0.771105409f, 0.738413095f, 0.707106769f, 0.677127779f, 0.648419797f, 0.620928884f,
    0.594603539f, 0.56939429f,  0.545253873f, 0.522136867f,
};

/* The scale of a row: unit * 2^(-e/16), the sixteenths rounded to float, and 0 for e of 255. */
static inline float slu_row_scale(float unit, uint8_t e)
{
    if (e == 255) {
        return 0;
    }
    uint32_t power = (uint32_t)(127 - e / 16) << 23; /* 2^-(e/16), whole octaves */
    float octaves;
    memcpy(&octaves, &power, sizeof octaves);
    return unit * (slu_row_sixteenths[e % 16] * octaves);
}

/* Where the planes of a rows x cols matrix lie, in bytes from its start. A plane that the format
 * lacks has row bytes 0. */
struct slu_mat_layout {
    size_t codes, high, scales, mins, supers;                     /* offsets */
    size_t gaps, values, head;                                    /* offsets; q*e only */
    size_t codes_row, high_row, scales_row, mins_row, supers_row; /* bytes a row */
    size_t escapes_row;                                           /* of gaps, and of values */
    size_t bytes;                                                 /* multiple of 64 */
};

/* False if cols is not a multiple of the format's granule, if rows or cols is 0 or over 2^24, or
 * if the size overflows 2^47 bytes. */
bool slu_mat_layout(const struct slu_fmt *fmt, uint32_t rows, uint32_t cols,
                    struct slu_mat_layout *ret_layout);

/* A view of a matrix; owns nothing. `data` is at least 64-byte aligned. */
struct slu_mat {
    const struct slu_fmt *fmt;
    uint32_t rows, cols;
    const uint8_t *data;
    struct slu_mat_layout at;
};

/* Asserts that the layout is valid. */
void slu_mat_view(struct slu_mat *mat, const struct slu_fmt *fmt, uint32_t rows, uint32_t cols,
                  const void *data);

/* A view of matrix i of a stack whose first matrix is *mat: they lie at.bytes apart. */
static inline struct slu_mat slu_mat_nth(const struct slu_mat *mat, uint32_t i)
{
    struct slu_mat view = *mat;
    view.data += (size_t)i * mat->at.bytes;
    return view;
}

float slu_f16_to_f32(uint16_t bits);
uint16_t slu_f32_to_f16(float value); /* round to nearest even */

#endif
