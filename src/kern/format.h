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
 * Thread safety: everything here is constant.
 */
#ifndef SLU_KERN_FORMAT_H
#define SLU_KERN_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

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
    SLU_FMTS
};

enum slu_scale_kind {
    SLU_SCALE_NONE, /* plain floats */
    SLU_SCALE_F16,
    SLU_SCALE_E8M0,
    SLU_SCALE_U8_SUPER, /* u8 times the super-group's d */
    SLU_SCALE_I8_SUPER, /* i8 times the super-group's d */
};

enum slu_min_kind { SLU_MIN_NONE, SLU_MIN_F16, SLU_MIN_U8_SUPER };

#define SLU_FMT_GROUP_MAX 32

struct slu_fmt {
    enum slu_fmt_id id;
    const char *name; /* as GGUF names it: "Q4_K" */
    uint8_t bits;     /* of a code: 4, 5, 6, 8; 16 or 32 for floats */
    uint8_t group;    /* weights that share a scale: 16 or 32; 0 for floats */
    uint16_t super;   /* weights in a super-group: 256, or 0 */
    enum slu_scale_kind scale;
    enum slu_min_kind min;
    bool is_signed;      /* Q8_0 */
    uint8_t offset;      /* subtracted from the code's value */
    const int8_t *table; /* 16 entries for 4-bit codes, or NULL */
    uint16_t granule;    /* columns come in multiples of this: 1, 32 or 256 */
};

/* NULL if id is not in the family: ids come from files. */
const struct slu_fmt *slu_fmt_get(unsigned id);

/* Where the planes of a rows x cols matrix lie, in bytes from its start. A plane that the format
 * lacks has row bytes 0. */
struct slu_mat_layout {
    size_t codes, high, scales, mins, supers;                     /* offsets */
    size_t codes_row, high_row, scales_row, mins_row, supers_row; /* bytes a row */
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
