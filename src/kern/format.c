#include "kern/format.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#define DIM_MAX       ((uint32_t)1 << 24)
#define MAT_BYTES_MAX ((uint64_t)1 << 47)
#define PLANE_ALIGN   64

static const int8_t iq4_nl_table[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                        1,    13,   25,  38,  53,  69,  89,  113};

/* The doubled E2M1 values plus 12, so that kernels see unsigned codes. */
static const int8_t mxfp4_table[16] = {12 + 0, 12 + 1, 12 + 2, 12 + 3, 12 + 4, 12 + 6, 12 + 8, 24,
                                       12 - 0, 12 - 1, 12 - 2, 12 - 3, 12 - 4, 12 - 6, 12 - 8, 0};

static const struct slu_fmt formats[SLU_FMT_GGUFS] = {
    [SLU_FMT_F32] =
        {.id = SLU_FMT_F32, .stored = SLU_FMT_F32, .name = "F32", .bits = 32, .granule = 1},
    [SLU_FMT_F16] =
        {.id = SLU_FMT_F16, .stored = SLU_FMT_F16, .name = "F16", .bits = 16, .granule = 1},
    [SLU_FMT_BF16] =
        {.id = SLU_FMT_BF16, .stored = SLU_FMT_BF16, .name = "BF16", .bits = 16, .granule = 1},
    [SLU_FMT_Q8_0] = {.id = SLU_FMT_Q8_0,
                      .stored = SLU_FMT_Q8_0,
                      .name = "Q8_0",
                      .bits = 8,
                      .group = 32,
                      .scale = SLU_SCALE_F16,
                      .is_signed = true,
                      .granule = 32},
    [SLU_FMT_Q4_0] = {.id = SLU_FMT_Q4_0,
                      .stored = SLU_FMT_Q4_0,
                      .name = "Q4_0",
                      .bits = 4,
                      .group = 32,
                      .scale = SLU_SCALE_F16,
                      .offset = 8,
                      .granule = 32},
    [SLU_FMT_Q4_1] = {.id = SLU_FMT_Q4_1,
                      .stored = SLU_FMT_Q4_1,
                      .name = "Q4_1",
                      .bits = 4,
                      .group = 32,
                      .scale = SLU_SCALE_F16,
                      .min = SLU_MIN_F16,
                      .granule = 32},
    [SLU_FMT_Q5_0] = {.id = SLU_FMT_Q5_0,
                      .stored = SLU_FMT_Q5_0,
                      .name = "Q5_0",
                      .bits = 5,
                      .group = 32,
                      .scale = SLU_SCALE_F16,
                      .offset = 16,
                      .granule = 32},
    [SLU_FMT_Q5_1] = {.id = SLU_FMT_Q5_1,
                      .stored = SLU_FMT_Q5_1,
                      .name = "Q5_1",
                      .bits = 5,
                      .group = 32,
                      .scale = SLU_SCALE_F16,
                      .min = SLU_MIN_F16,
                      .granule = 32},
    [SLU_FMT_Q4_K] = {.id = SLU_FMT_Q4_K,
                      .stored = SLU_FMT_Q4_K,
                      .name = "Q4_K",
                      .bits = 4,
                      .group = 32,
                      .super = 256,
                      .scale = SLU_SCALE_U8_SUPER,
                      .min = SLU_MIN_U8_SUPER,
                      .granule = 256},
    [SLU_FMT_Q5_K] = {.id = SLU_FMT_Q5_K,
                      .stored = SLU_FMT_Q5_K,
                      .name = "Q5_K",
                      .bits = 5,
                      .group = 32,
                      .super = 256,
                      .scale = SLU_SCALE_U8_SUPER,
                      .min = SLU_MIN_U8_SUPER,
                      .granule = 256},
    [SLU_FMT_Q6_K] = {.id = SLU_FMT_Q6_K,
                      .stored = SLU_FMT_Q6_K,
                      .name = "Q6_K",
                      .bits = 6,
                      .group = 16,
                      .super = 256,
                      .scale = SLU_SCALE_I8_SUPER,
                      .offset = 32,
                      .granule = 256},
    [SLU_FMT_IQ4_NL] = {.id = SLU_FMT_IQ4_NL,
                        .stored = SLU_FMT_IQ4_NL,
                        .name = "IQ4_NL",
                        .bits = 4,
                        .group = 32,
                        .scale = SLU_SCALE_F16,
                        .table = iq4_nl_table,
                        .granule = 32},
    [SLU_FMT_MXFP4] = {.id = SLU_FMT_MXFP4,
                       .stored = SLU_FMT_MXFP4,
                       .name = "MXFP4",
                       .bits = 4,
                       .group = 32,
                       .scale = SLU_SCALE_E8M0,
                       .offset = 12,
                       .table = mxfp4_table,
                       .granule = 32},
};

/* One width of codes with every room for escapes: 0 to 24 for 1024 columns. */
#define ECQ_FMT(fmt_id, fmt_name, fmt_bits, v, n)                                                  \
    {                                                                                              \
        .id = (fmt_id), .name = (fmt_name), .bits = (fmt_bits), .group = 32,                       \
        .scale = SLU_SCALE_ROW, .granule = 32, .escapes = (n), .stored = (fmt_id) + 256 * (v)      \
    }
#define ECQ_FMTS(id, name, bits)                                                                   \
    {                                                                                              \
        ECQ_FMT(id, name, bits, 0, 0), ECQ_FMT(id, name "+2", bits, 1, 2),                         \
            ECQ_FMT(id, name "+4", bits, 2, 4), ECQ_FMT(id, name "+6", bits, 3, 6),                \
            ECQ_FMT(id, name "+8", bits, 4, 8), ECQ_FMT(id, name "+12", bits, 5, 12),              \
            ECQ_FMT(id, name "+16", bits, 6, 16), ECQ_FMT(id, name "+24", bits, 7, 24)             \
    }

static const struct slu_fmt ecq_formats[SLU_FMTS - SLU_FMT_GGUFS][SLU_ECQ_ROOMS] = {
    ECQ_FMTS(SLU_FMT_Q3E, "q3e", 3),
    ECQ_FMTS(SLU_FMT_Q4E, "q4e", 4),
    ECQ_FMTS(SLU_FMT_Q5E, "q5e", 5),
    ECQ_FMTS(SLU_FMT_Q6E, "q6e", 6),
};

const struct slu_fmt *slu_fmt_get(unsigned stored)
{
    unsigned id = stored & 255, room = stored >> 8;
    if (id >= SLU_FMT_GGUFS && id < SLU_FMTS && room < SLU_ECQ_ROOMS) {
        return &ecq_formats[id - SLU_FMT_GGUFS][room];
    }
    return stored < SLU_FMT_GGUFS ? &formats[stored] : NULL;
}

/* Appends a plane of `row` bytes for each of `rows` rows; returns its offset. */
static uint64_t plane_add(uint64_t *end, uint64_t row, uint32_t rows)
{
    uint64_t at = *end;
    *end = (at + row * rows + PLANE_ALIGN - 1) / PLANE_ALIGN * PLANE_ALIGN;
    return at;
}

static uint64_t high_row(const struct slu_fmt *fmt, uint32_t cols)
{
    return fmt->bits == 5 || fmt->bits == 3 ? cols / 32 * 4 : fmt->bits == 6 ? cols / 32 * 8 : 0;
}

static uint64_t scales_row(const struct slu_fmt *fmt, uint32_t cols)
{
    switch (fmt->scale) {
    case SLU_SCALE_NONE:
        return 0;
    case SLU_SCALE_F16:
        return (uint64_t)(cols / fmt->group) * 2;
    case SLU_SCALE_ROW:
        return 1;
    case SLU_SCALE_E8M0:
    case SLU_SCALE_U8_SUPER:
    case SLU_SCALE_I8_SUPER:
        break;
    }
    return cols / fmt->group;
}

static uint64_t mins_row(const struct slu_fmt *fmt, uint32_t cols)
{
    switch (fmt->min) {
    case SLU_MIN_NONE:
        return 0;
    case SLU_MIN_F16:
        return (uint64_t)(cols / fmt->group) * 2;
    case SLU_MIN_U8_SUPER:
        break;
    }
    return cols / fmt->group;
}

static uint64_t supers_row(const struct slu_fmt *fmt, uint32_t cols)
{
    if (!fmt->super) {
        return 0;
    }
    return (uint64_t)(cols / fmt->super) * (fmt->min == SLU_MIN_NONE ? 2 : 4);
}

bool slu_mat_layout(const struct slu_fmt *fmt, uint32_t rows, uint32_t cols,
                    struct slu_mat_layout *ret_layout)
{
    if (!rows || !cols || rows > DIM_MAX || cols > DIM_MAX || cols % fmt->granule) {
        return false;
    }
    /* Dimensions of 24 bits and at most 8 bytes a weight in all: 64 bits don't overflow. */
    uint64_t codes = (uint64_t)cols * fmt->bits / 8;
    if (fmt->bits < 8) {
        codes = fmt->bits == 3 ? cols / 4 : cols / 2;
    }
    uint64_t high = high_row(fmt, cols), scales = scales_row(fmt, cols);
    uint64_t mins = mins_row(fmt, cols), supers = supers_row(fmt, cols);
    uint64_t escapes = slu_fmt_escapes(fmt, cols);
    bool is_ecq = fmt->scale == SLU_SCALE_ROW;
    uint64_t end = 0, at[8];
    at[0] = plane_add(&end, codes, rows);
    at[1] = plane_add(&end, high, rows);
    at[2] = plane_add(&end, scales, rows);
    at[3] = plane_add(&end, mins, rows);
    at[4] = plane_add(&end, supers, rows);
    at[5] = plane_add(&end, escapes, rows);
    at[6] = plane_add(&end, escapes, rows);
    at[7] = plane_add(&end, is_ecq ? sizeof(struct slu_ecq_head) : 0, 1);
    if (end > MAT_BYTES_MAX || (size_t)end != end) {
        return false;
    }
    *ret_layout = (struct slu_mat_layout){
        .codes = (size_t)at[0],
        .high = (size_t)at[1],
        .scales = (size_t)at[2],
        .mins = (size_t)at[3],
        .supers = (size_t)at[4],
        .gaps = (size_t)at[5],
        .values = (size_t)at[6],
        .head = (size_t)at[7],
        .codes_row = (size_t)codes,
        .high_row = (size_t)high,
        .scales_row = (size_t)scales,
        .mins_row = (size_t)mins,
        .supers_row = (size_t)supers,
        .escapes_row = (size_t)escapes,
        .bytes = (size_t)end,
    };
    return true;
}

void slu_mat_view(struct slu_mat *mat, const struct slu_fmt *fmt, uint32_t rows, uint32_t cols,
                  const void *data)
{
    struct slu_mat_layout at = {0};
    bool valid = slu_mat_layout(fmt, rows, cols, &at);
    assert(valid);
    (void)valid;
    *mat = (struct slu_mat){.fmt = fmt, .rows = rows, .cols = cols, .data = data, .at = at};
}

float slu_f16_to_f32(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
    uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    uint32_t out;
    float value;
    if (exponent == 0) {
        value = (float)mantissa * 0x1p-24f;
        memcpy(&out, &value, sizeof out);
        out |= sign;
    } else if (exponent == 31) {
        /* NaNs are made quiet, as F16C does. */
        out = sign | 0x7f800000 | (mantissa ? 0x400000 | mantissa << 13 : 0);
    } else {
        out = sign | (exponent + 112) << 23 | mantissa << 13;
    }
    memcpy(&value, &out, sizeof value);
    return value;
}

uint16_t slu_f32_to_f16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t out;
    if (magnitude > 0x7f800000) {
        out = 0x7e00 | (magnitude >> 13 & 0x3ff);
    } else if (magnitude >= 0x477ff000) {
        /* From 65520 on, half way between the largest number and the next power of two. */
        out = 0x7c00;
    } else if (magnitude >= 0x38800000) {
        out = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else if (magnitude >= 0x33000000) {
        /* A subnormal: the mantissa in units of 2^-24. */
        uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
        uint32_t shift = 126 - (magnitude >> 23);
        out = (mantissa + ((uint32_t)1 << (shift - 1)) - 1 + (mantissa >> shift & 1)) >> shift;
    } else {
        out = 0;
    }
    return (uint16_t)(sign | out);
}
