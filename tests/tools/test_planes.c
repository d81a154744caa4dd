#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kern/kern.h"
#include "tools/planes.h"
#include "tools/quantize.h"

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void fill_random(uint8_t *bytes, size_t n, uint64_t seed)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15ull + 1;
    for (size_t i = 0; i < n; i++) {
        bytes[i] = (uint8_t)(next_random(&state) >> 32);
    }
}

static const uint32_t numbers[SLU_FMT_GGUFS] = {
    [SLU_FMT_F32] = 0,    [SLU_FMT_F16] = 1,   [SLU_FMT_BF16] = 30, [SLU_FMT_Q8_0] = 8,
    [SLU_FMT_Q4_0] = 2,   [SLU_FMT_Q4_1] = 3,  [SLU_FMT_Q5_0] = 6,  [SLU_FMT_Q5_1] = 7,
    [SLU_FMT_Q4_K] = 12,  [SLU_FMT_Q5_K] = 13, [SLU_FMT_Q6_K] = 14, [SLU_FMT_IQ4_NL] = 20,
    [SLU_FMT_MXFP4] = 39,
};

/* A matrix with storage of its own. */
static struct slu_planes make_planes(const struct slu_fmt *fmt, uint32_t rows, uint32_t cols)
{
    struct slu_planes planes;
    cr_assert(slu_planes_init(&planes, fmt, rows, cols, NULL));
    planes.data = aligned_alloc(64, planes.at.bytes);
    cr_assert(planes.data);
    memset(planes.data, 0, planes.at.bytes);
    return planes;
}

/* Random bytes of every type come back bit for bit through the planes, whole rows and ranges. */
Test(planes, round_trip)
{
    for (unsigned id = 0; id < SLU_FMT_GGUFS; id++) {
        const struct slu_fmt *fmt;
        cr_assert_eq(slu_planes_fmt(numbers[id], &fmt, NULL), 0);
        cr_assert_eq(fmt->id, id);
        cr_assert_eq(slu_planes_ggml_type(fmt), numbers[id]);
        uint32_t rows = 5, granule = fmt->granule < 32 ? 7 : fmt->granule, cols = 6 * granule;
        size_t row_bytes = slu_planes_row_bytes(fmt, cols);
        uint8_t *src = malloc(rows * row_bytes), *dst = malloc(rows * row_bytes);
        fill_random(src, rows * row_bytes, 100 + id);

        struct slu_planes whole = make_planes(fmt, rows, cols);
        for (uint32_t r = 0; r < rows; r++) {
            slu_planes_import(&whole, r, src + r * row_bytes);
        }
        memset(dst, 0, rows * row_bytes);
        for (uint32_t r = 0; r < rows; r++) {
            slu_planes_export(&whole, r, dst + r * row_bytes);
        }
        cr_assert_arr_eq(src, dst, rows * row_bytes, "%s", fmt->name);

        memset(dst, 0, rows * row_bytes);
        for (uint32_t lo = 0; lo < cols; lo += 2 * granule) {
            struct slu_planes slice = make_planes(fmt, rows, 2 * granule);
            for (uint32_t r = 0; r < rows; r++) {
                slu_planes_import_range(&slice, r, src + r * row_bytes, lo);
                slu_planes_export_range(&slice, r, dst + r * row_bytes, lo);
            }
            free(slice.data);
        }
        cr_assert_arr_eq(src, dst, rows * row_bytes, "%s in slices", fmt->name);
        free(whole.data);
        free(src);
        free(dst);
    }
}

/* Types outside the family are refused by their names, and unknown numbers by number. */
Test(planes, other_types_refused)
{
    static const struct {
        uint32_t type;
        const char *name;
    } others[] = {{9, "Q8_1"},    {10, "Q2_K"}, {11, "Q3_K"},  {16, "IQ2_XXS"},
                  {23, "IQ4_XS"}, {24, "I8"},   {34, "TQ1_0"}, {123456, "123456"}};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        const struct slu_fmt *fmt = NULL;
        struct slu_err err;
        cr_assert_eq(slu_planes_fmt(others[i].type, &fmt, &err), SLU_EUNSUP);
        cr_assert_null(fmt);
        cr_assert(strstr(err.text, others[i].name), "%s", err.text);
    }
}

/* ---- values: GGUF's own definitions, weight by weight ------------------------------------- */

static float half_at(const uint8_t *bytes)
{
    return slu_f16_to_f32((uint16_t)(bytes[0] | bytes[1] << 8));
}

static unsigned nibble(const uint8_t *bytes, unsigned i)
{
    return i < 16 ? bytes[i] & 15 : bytes[i - 16] >> 4;
}

static unsigned fifth(const uint8_t *bytes, unsigned i)
{
    return bytes[i / 8] >> (i % 8) & 1;
}

static void k_scale(const uint8_t *packed, unsigned g, unsigned *ret_scale, unsigned *ret_min)
{
    if (g < 4) {
        *ret_scale = packed[g] & 63;
        *ret_min = packed[g + 4] & 63;
    } else {
        *ret_scale = (packed[g + 4] & 15) | (packed[g - 4] >> 6) << 4;
        *ret_min = (packed[g + 4] >> 4) | (packed[g] >> 6) << 4;
    }
}

static float k_weight(const uint8_t *block, unsigned i, bool five)
{
    unsigned g = i / 32, l = i % 32, scale, min;
    k_scale(block + 4, g, &scale, &min);
    const uint8_t *low = block + (five ? 48 : 16) + 32 * (g / 2);
    unsigned code = g % 2 ? low[l] >> 4 : low[l] & 15;
    if (five) {
        code |= (block[16 + l] >> g & 1u) << 4;
    }
    return half_at(block) * (float)scale * (float)code - half_at(block + 2) * (float)min;
}

static float q6_weight(const uint8_t *block, unsigned i)
{
    unsigned h = i / 128, j = i % 128;
    uint8_t low = block[64 * h + j % 64];
    unsigned code = j < 64 ? low & 15 : low >> 4;
    code |= (block[128 + 32 * h + j % 32] >> (2 * (j / 32)) & 3u) << 4;
    int8_t scale;
    memcpy(&scale, block + 192 + i / 16, 1);
    return half_at(block + 208) * (float)scale * (float)((int)code - 32);
}

static float weight_of(enum slu_fmt_id id, const uint8_t *b, unsigned i)
{
    static const int8_t fp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    static const int8_t nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};
    int8_t q8;
    switch (id) {
    case SLU_FMT_Q8_0:
        memcpy(&q8, b + 2 + i, 1);
        return half_at(b) * q8;
    case SLU_FMT_Q4_0:
        return half_at(b) * (float)((int)nibble(b + 2, i) - 8);
    case SLU_FMT_Q4_1:
        return half_at(b) * (float)nibble(b + 4, i) + half_at(b + 2);
    case SLU_FMT_Q5_0:
        return half_at(b) * (float)((int)(nibble(b + 6, i) | fifth(b + 2, i) << 4) - 16);
    case SLU_FMT_Q5_1:
        return half_at(b) * (float)(nibble(b + 8, i) | fifth(b + 4, i) << 4) + half_at(b + 2);
    case SLU_FMT_Q4_K:
        return k_weight(b, i, false);
    case SLU_FMT_Q5_K:
        return k_weight(b, i, true);
    case SLU_FMT_Q6_K:
        return q6_weight(b, i);
    case SLU_FMT_IQ4_NL:
        return half_at(b) * nl[nibble(b + 2, i)];
    case SLU_FMT_MXFP4:
        return ldexpf(fp4[nibble(b + 1, i)], b[0] - 128);
    default:
        cr_assert_fail("a float format");
        return 0;
    }
}

/* Weights read from the planes are what GGUF's definition of each type gives, and near what was
 * quantized. */
Test(planes, values)
{
    /* Relative to the largest of 256 normal numbers; half a step, and the scale's own rounding. */
    static const float tolerance[SLU_FMT_GGUFS] = {
        [SLU_FMT_Q8_0] = 0.006f, [SLU_FMT_Q4_0] = 0.075f, [SLU_FMT_Q4_1] = 0.07f,
        [SLU_FMT_Q5_0] = 0.035f, [SLU_FMT_Q5_1] = 0.034f, [SLU_FMT_Q4_K] = 0.09f,
        [SLU_FMT_Q5_K] = 0.05f,  [SLU_FMT_Q6_K] = 0.03f,  [SLU_FMT_IQ4_NL] = 0.115f,
        [SLU_FMT_MXFP4] = 0.26f,
    };
    const struct slu_kern *kern = slu_kern_get(0);
    uint64_t state = 42;
    for (unsigned id = SLU_FMT_Q8_0; id < SLU_FMT_GGUFS; id++) {
        const struct slu_fmt *fmt = slu_fmt_get(id);
        enum { N = 512 };
        float x[N], y[N], most = 0;
        for (unsigned i = 0; i < N; i++) {
            float sum = 0;
            for (unsigned k = 0; k < 4; k++) {
                sum += (float)(next_random(&state) >> 40) / (float)(1 << 24) - 0.5f;
            }
            x[i] = sum * 0.03f;
            most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        }
        uint8_t packed[N * 2];
        slu_quantize_row(fmt, x, N, packed);
        struct slu_planes planes = make_planes(fmt, 1, N);
        slu_planes_import(&planes, 0, packed);
        struct slu_mat mat;
        slu_mat_view(&mat, fmt, 1, N, planes.data);
        kern->row_f32(y, &mat, 0);
        unsigned block = fmt->granule;
        size_t block_bytes = slu_planes_row_bytes(fmt, block);
        for (unsigned i = 0; i < N; i++) {
            float w = weight_of(id, packed + i / block * block_bytes, i % block);
            /* Two roundings may come in another order. */
            cr_assert_float_eq(y[i], w, 1e-6f * most, "%s weight %u: %g, not %g", fmt->name, i,
                               (double)y[i], (double)w);
            cr_assert_float_eq(y[i], x[i], tolerance[id] * most, "%s weight %u: %g for %g",
                               fmt->name, i, (double)y[i], (double)x[i]);
        }
        free(planes.data);
    }
}

/* A group of zeros quantizes to zeros in every type, without dividing by them. */
Test(planes, zeros)
{
    const struct slu_kern *kern = slu_kern_get(0);
    for (unsigned id = 0; id < SLU_FMT_GGUFS; id++) {
        const struct slu_fmt *fmt = slu_fmt_get(id);
        float x[256] = {0}, y[256];
        uint8_t packed[256 * 4];
        slu_quantize_row(fmt, x, 256, packed);
        struct slu_planes planes = make_planes(fmt, 1, 256);
        slu_planes_import(&planes, 0, packed);
        struct slu_mat mat;
        slu_mat_view(&mat, fmt, 1, 256, planes.data);
        kern->row_f32(y, &mat, 0);
        for (unsigned i = 0; i < 256; i++) {
            cr_assert_eq(y[i], 0, "%s", fmt->name);
        }
        free(planes.data);
    }
}
