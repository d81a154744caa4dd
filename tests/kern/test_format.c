#include <criterion/criterion.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kern/kern.h"
#include "tests/kern/planes.h"

/* Every half survives the way to float and back; NaNs stay NaNs of the same sign. */
Test(format, halves_round_trip)
{
    for (uint32_t h = 0; h < 65536; h++) {
        uint16_t back = slu_f32_to_f16(slu_f16_to_f32((uint16_t)h));
        bool is_nan = (h & 0x7fff) > 0x7c00;
        cr_assert_eq(back, is_nan ? h | 0x200 : h, "%04x became %04x", h, back);
    }
}

/* Floats are rounded to the nearest half, to the even one from half way. */
Test(format, halves_round_to_even)
{
    for (uint16_t h = 0; h < 0x7bff; h++) {
        float low = slu_f16_to_f32(h), high = slu_f16_to_f32((uint16_t)(h + 1));
        float middle = low + (high - low) / 2;
        uint16_t even = (uint16_t)(h % 2 ? h + 1 : h);
        cr_assert_eq(slu_f32_to_f16(middle), even, "between %04x and the next", h);
        cr_assert_eq(slu_f32_to_f16(-middle), even | 0x8000);
        cr_assert_eq(slu_f32_to_f16(nextafterf(middle, 0)), h);
        cr_assert_eq(slu_f32_to_f16(nextafterf(middle, INFINITY)), h + 1);
    }
}

/* What is too large for a half becomes infinite, from half way to the next power of two on. */
Test(format, halves_overflow)
{
    cr_assert_eq(slu_f32_to_f16(65504.0f), 0x7bff);
    cr_assert_eq(slu_f32_to_f16(nextafterf(65520.0f, 0)), 0x7bff);
    cr_assert_eq(slu_f32_to_f16(65520.0f), 0x7c00);
    cr_assert_eq(slu_f32_to_f16(-INFINITY), 0xfc00);
    cr_assert_eq(slu_f32_to_f16(1e-45f), 0);
    cr_assert_eq(slu_f16_to_f32(0x0001), 0x1p-24f);
}

/* Ids from outside the family get nothing; the others are what they say. */
Test(format, ids)
{
    for (unsigned id = 0; id < SLU_FMTS; id++) {
        cr_assert_eq(slu_fmt_get(id)->id, id);
    }
    cr_assert_null(slu_fmt_get(SLU_FMTS));
    cr_assert_null(slu_fmt_get(~0u));
    cr_assert_str_eq(slu_fmt_get(SLU_FMT_IQ4_NL)->name, "IQ4_NL");
}

/* The planes of a row together take what a row of GGUF blocks takes; only the 6-bit scales and
 * minimums of Q4_K and Q5_K, 12 bytes there, take 16. */
Test(format, bytes_a_row)
{
    static const struct {
        enum slu_fmt_id id;
        uint32_t weights, bytes;
    } blocks[] = {
        {SLU_FMT_F32, 1, 4},      {SLU_FMT_F16, 1, 2},      {SLU_FMT_BF16, 1, 2},
        {SLU_FMT_Q8_0, 32, 34},   {SLU_FMT_Q4_0, 32, 18},   {SLU_FMT_Q4_1, 32, 20},
        {SLU_FMT_Q5_0, 32, 22},   {SLU_FMT_Q5_1, 32, 24},   {SLU_FMT_Q4_K, 256, 148},
        {SLU_FMT_Q5_K, 256, 180}, {SLU_FMT_Q6_K, 256, 210}, {SLU_FMT_IQ4_NL, 32, 18},
        {SLU_FMT_MXFP4, 32, 17},
    };
    cr_assert_eq(sizeof blocks / sizeof *blocks, SLU_FMT_GGUFS);
    for (size_t i = 0; i < SLU_FMT_GGUFS; i++) {
        struct slu_mat_layout at;
        uint32_t cols = 3 * blocks[i].weights;
        cr_assert(slu_mat_layout(slu_fmt_get(blocks[i].id), 5, cols, &at));
        size_t row = at.codes_row + at.high_row + at.scales_row + at.mins_row + at.supers_row;
        cr_assert_eq(row, 3 * blocks[i].bytes, "%s", slu_fmt_get(blocks[i].id)->name);
    }
}

/* Planes follow each other without overlap, each at a multiple of 64 bytes. */
Test(format, planes_are_aligned)
{
    for (unsigned i = 0; i < SLU_FMTS + SLU_FMTS - SLU_FMT_GGUFS; i++) {
        /* The last ones again, with room for escapes. */
        unsigned id = i < SLU_FMTS ? i : (i - SLU_FMTS + SLU_FMT_GGUFS) + 256 * 5;
        const struct slu_fmt *fmt = slu_fmt_get(id);
        for (uint32_t rows = 1; rows < 70; rows += 3) {
            struct slu_mat_layout at;
            cr_assert(slu_mat_layout(fmt, rows, 7 * fmt->granule, &at));
            cr_assert_eq((at.codes | at.high | at.scales | at.mins | at.supers | at.bytes) % 64, 0);
            cr_assert_leq(at.codes + rows * at.codes_row, at.high);
            cr_assert_leq(at.high + rows * at.high_row, at.scales);
            cr_assert_leq(at.scales + rows * at.scales_row, at.mins);
            cr_assert_leq(at.mins + rows * at.mins_row, at.supers);
            cr_assert_leq(at.supers + rows * at.supers_row, at.gaps);
            cr_assert_eq((at.gaps | at.values | at.head) % 64, 0);
            cr_assert_leq(at.gaps + rows * at.escapes_row, at.values);
            cr_assert_leq(at.values + rows * at.escapes_row, at.head);
            cr_assert_leq(at.head, at.bytes);
        }
    }
}

/* Shapes that don't suit the format, or are too large, are refused and change nothing. */
Test(format, refuses_shapes)
{
    const struct slu_fmt *q4_k = slu_fmt_get(SLU_FMT_Q4_K), *f32 = slu_fmt_get(SLU_FMT_F32);
    const struct slu_fmt *q4_0 = slu_fmt_get(SLU_FMT_Q4_0);
    const uint32_t most = (uint32_t)1 << 24;
    struct slu_mat_layout at = {.bytes = 77};
    cr_assert_not(slu_mat_layout(q4_0, 0, 32, &at));
    cr_assert_not(slu_mat_layout(q4_0, 1, 0, &at));
    cr_assert_not(slu_mat_layout(q4_0, 1, 33, &at));
    cr_assert_not(slu_mat_layout(q4_k, 1, 128, &at));
    cr_assert_not(slu_mat_layout(f32, most + 1, 1, &at));
    cr_assert_not(slu_mat_layout(f32, 1, most + 1, &at));
    cr_assert_not(slu_mat_layout(f32, UINT32_MAX, UINT32_MAX, &at));
    cr_assert_not(slu_mat_layout(f32, most, most, &at));
    cr_assert_not(slu_mat_layout(f32, (most >> 3) + 1, most, &at));
    cr_assert_eq(at.bytes, 77);
    cr_assert(slu_mat_layout(f32, most >> 3, most, &at));
    cr_assert_eq(at.bytes, (size_t)1 << 47);
}

/* A row as floats is what its planes mean, weight by weight, in every format. */
Test(format, rows_as_floats)
{
    uint64_t seed = 7;
    const struct slu_kern *kern = slu_kern_get(0);
    for (unsigned i = 0; i < SLU_FMTS + SLU_FMTS - SLU_FMT_GGUFS; i++) {
        struct planes p;
        unsigned id = i < SLU_FMTS ? i : (i - SLU_FMTS + SLU_FMT_GGUFS) + 256 * 6;
        planes_init(&p, id, 3, 512, NULL, &seed);
        float out[512];
        for (uint32_t row = 0; row < 3; row++) {
            kern->row_f32(out, &p.mat, row);
            for (uint32_t c = 0; c < 512; c++) {
                /* The scale, its product and the sum are rounded once each. */
                double bound = 3 * 0x1p-24 * p.magnitude[row * 512 + c];
                cr_assert_leq(fabs(out[c] - p.w[row * 512 + c]), bound, "%s: weight %u",
                              p.mat.fmt->name, c);
            }
        }
        planes_finish(&p);
    }
}

/* All 256 exponents of MXFP4 are exact powers of two, subnormal ones included. */
Test(format, exponents)
{
    struct slu_mat mat;
    struct slu_mat_layout at;
    const struct slu_fmt *fmt = slu_fmt_get(SLU_FMT_MXFP4);
    cr_assert(slu_mat_layout(fmt, 1, 256 * 32, &at));
    uint8_t *data = aligned_alloc(64, at.bytes);
    float *out = malloc(256 * 32 * sizeof *out);
    slu_mat_view(&mat, fmt, 1, 256 * 32, data);
    for (uint32_t e = 0; e < 256; e++) {
        data[at.scales + e] = (uint8_t)e;
        for (uint32_t i = 0; i < 32; i++) {
            planes_put(&mat, data, 0, 32 * e + i, i % 16 == 1 ? 1 : i % 16 == 9 ? 9 : 0);
        }
    }
    slu_kern_get(0)->row_f32(out, &mat, 0);
    for (int e = 0; e < 256; e++) {
        cr_assert_eq(out[32 * e + 1], ldexp(1, e - 128), "exponent %d", e);
        cr_assert_eq(out[32 * e + 25], -ldexp(1, e - 128), "exponent %d", e);
        cr_assert_eq(out[32 * e], 0);
    }
    free(out);
    free(data);
}

/* A number of a pack names a width and a room for escapes, and no other number names anything. */
Test(format, numbers_of_rooms)
{
    unsigned n = 0;
    for (unsigned stored = 0; stored < 1u << 17; stored++) {
        const struct slu_fmt *fmt = slu_fmt_get(stored);
        if (fmt) {
            cr_assert_eq(fmt->stored, stored);
            cr_assert_eq(fmt->id, stored % 256);
            n++;
        }
    }
    cr_assert_eq(n, SLU_FMT_GGUFS + (SLU_FMTS - SLU_FMT_GGUFS) * SLU_ECQ_ROOMS);
    cr_assert_eq(slu_fmt_escapes(slu_fmt_get(SLU_FMT_Q4E), 4096), 0);
    cr_assert_eq(slu_fmt_escapes(slu_fmt_get(SLU_FMT_Q4E + 256), 2880), 6);
    cr_assert_eq(slu_fmt_escapes(slu_fmt_get(SLU_FMT_Q4E + 256 * 7), 32), 1);
}

/* Scales of rows fall by a sixteenth of an octave a step; the last number is none. */
Test(format, scales_of_rows)
{
    for (int e = 0; e < 255; e++) {
        double want = 3 * exp2(-e / 16.0);
        cr_assert_float_eq(slu_row_scale(3, (uint8_t)e), want, 0x1p-23 * want);
    }
    cr_assert_eq(slu_row_scale(3, 255), 0);
}
