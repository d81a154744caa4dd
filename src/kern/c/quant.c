/* Quantized formats in plain C: the definition that the other instruction sets are held to. One
 * function decodes a group of 32 weights of any format; all else is arithmetic in a fixed order. */
#include <math.h>

#include "kern/c/ecq.h"

#define TOKENS 4 /* that share the decoding of a group */

/* 32 weights: value(code) - offset, what the two halves of their integer sum are multiplied with,
 * and the scales and the minimum of the whole. */
struct group {
    int16_t value[32];
    int32_t factor[2];
    float scale;
    float min;
};

static float f16_at(const uint8_t *plane, size_t i)
{
    uint16_t bits;
    memcpy(&bits, plane + 2 * i, sizeof bits);
    return slu_f16_to_f32(bits);
}

static float e8m0(uint8_t e)
{
    /* Exact throughout: 2^-128 is subnormal, 2^127 finite. */
    return ldexpf(1.0f, (int)e - 128);
}

static void group_values(const struct slu_mat *w, uint32_t row, uint32_t g, struct group *out)
{
    const struct slu_fmt *fmt = w->fmt;
    const uint8_t *codes = w->data + w->at.codes + row * w->at.codes_row;
    const uint8_t *high = w->data + w->at.high + row * w->at.high_row;
    for (int i = 0; i < 32; i++) {
        int code;
        if (fmt->bits == 8) {
            code = codes[32 * (size_t)g + i];
            out->value[i] = (int16_t)(fmt->is_signed && code > 127 ? code - 256 : code);
            continue;
        }
        code = codes[16 * (size_t)g + i % 16] >> (i < 16 ? 0 : 4) & 15;
        if (fmt->bits == 5) {
            code |= (high[4 * (size_t)g + i / 8] >> i % 8 & 1) << 4;
        } else if (fmt->bits == 6) {
            code |= (high[8 * (size_t)g + i % 8] >> 2 * (i / 8) & 3) << 4;
        }
        code = fmt->table ? fmt->table[code] : code;
        out->value[i] = (int16_t)(code - fmt->offset);
    }
}

static void group_scales(const struct slu_mat *w, uint32_t row, uint32_t g, struct group *out)
{
    const struct slu_fmt *fmt = w->fmt;
    const uint8_t *scales = w->data + w->at.scales + row * w->at.scales_row;
    const uint8_t *mins = w->data + w->at.mins + row * w->at.mins_row;
    const uint8_t *supers = w->data + w->at.supers + row * w->at.supers_row;
    size_t super = fmt->super ? g / (fmt->super / 32) : 0;
    size_t supers_each = fmt->min == SLU_MIN_NONE ? 1 : 2;
    out->factor[0] = out->factor[1] = 1;
    out->scale = 1;
    switch (fmt->scale) {
    case SLU_SCALE_NONE:
    case SLU_SCALE_ROW:
        break;
    case SLU_SCALE_F16:
        out->scale = f16_at(scales, g);
        break;
    case SLU_SCALE_E8M0:
        out->scale = e8m0(scales[g]);
        break;
    case SLU_SCALE_U8_SUPER:
        out->scale = f16_at(supers, super * supers_each) * (float)scales[g];
        break;
    case SLU_SCALE_I8_SUPER: /* two for a group */
        out->scale = f16_at(supers, super * supers_each);
        out->factor[0] = (int8_t)scales[2 * (size_t)g];
        out->factor[1] = (int8_t)scales[2 * (size_t)g + 1];
        break;
    }
    out->min = 0;
    if (fmt->min == SLU_MIN_F16) {
        out->min = f16_at(mins, g);
    } else if (fmt->min == SLU_MIN_U8_SUPER) {
        out->min = -(f16_at(supers, super * supers_each + 1) * (float)mins[g]);
    }
}

/* The integer sum of a group; q are its activations' first halves, 64 bytes before its second. */
static int32_t group_dot(const struct group *group, const int8_t *q)
{
    int32_t half[2] = {0};
    for (int i = 0; i < 32; i++) {
        half[i / 16] += group->value[i] * q[i / 16 * 64 + i % 16];
    }
    return group->factor[0] * half[0] + group->factor[1] * half[1];
}

static float lanes_sum(const float t[8])
{
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

/* One row times up to TOKENS tokens. */
static void row_mul(float *y, size_t y_stride, const struct slu_mat *w, uint32_t row,
                    const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    float acc[TOKENS][8] = {0};
    struct group group;
    for (uint32_t g = 0; g < w->cols / 32; g++) {
        group_values(w, row, g, &group);
        group_scales(w, row, g, &group);
        for (uint32_t i = 0; i < n; i++) {
            size_t t = tok[i], at = t * x->g_stride + g;
            int32_t sum = group_dot(&group, x->q + t * x->q_stride + slu_acts_at(32 * (size_t)g));
            float *lane = &acc[i][g % 8];
            *lane = fmaf((float)sum, group.scale * x->d[at], *lane);
            if (w->fmt->min != SLU_MIN_NONE) {
                *lane = fmaf(group.min, x->s[at], *lane);
            }
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        y[i * y_stride + row] = lanes_sum(acc[i]);
    }
}

void slu_c_mul_quant(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                     const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    for (uint32_t row = lo; row < hi; row++) {
        for (uint32_t i = 0; i < n; i += TOKENS) {
            uint32_t some = n - i < TOKENS ? n - i : TOKENS;
            uint32_t at[TOKENS];
            for (uint32_t k = 0; k < some; k++) {
                at[k] = tok ? tok[i + k] : i + k;
            }
            row_mul(y + i * y_stride, y_stride, w, row, x, at, some);
        }
    }
}

/* Group g of a token's activations, of which n are given and the rest zero. */
static void group_quantize(const struct slu_acts *acts, uint32_t t, size_t g, uint32_t n)
{
    const float *x = acts->x + t * acts->x_stride + 32 * g;
    int8_t *q = acts->q + t * acts->q_stride + slu_acts_at(32 * g);
    size_t at = t * acts->g_stride + g;
    uint32_t largest = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float inverse;
    acts->d[at] = slu_quant_step(largest, &inverse);
    memset(q, 0, 16);
    memset(q + 64, 0, 16);
    int16_t sum[2] = {0};
    /* Without an inverse all codes are zero, and NaNs aren't converted. */
    for (uint32_t i = 0; i < n && inverse != 0; i++) {
        int8_t code = (int8_t)lrintf(x[i] * inverse);
        q[i / 16 * 64 + i % 16] = code;
        sum[i / 16] = (int16_t)(sum[i / 16] + code);
    }
    acts->s[at] = acts->d[at] * (float)(sum[0] + sum[1]);
    memcpy(acts->sums + 2 * at, sum, sizeof sum);
}

void slu_c_quantize(const struct slu_acts *acts, uint32_t lo, uint32_t hi)
{
    size_t n_groups = ((size_t)acts->cols + 31) / 32, n_whole = (n_groups + 3) / 4 * 4;
    for (uint32_t t = lo; t < hi; t++) {
        for (size_t g = 0; g < n_whole; g++) {
            size_t left = g < n_groups ? acts->cols - 32 * g : 0;
            group_quantize(acts, t, g, left < 32 ? (uint32_t)left : 32);
        }
    }
}

static void row_floats(float *out, const struct slu_mat *w, uint32_t row)
{
    const uint8_t *codes = w->data + w->at.codes + row * w->at.codes_row;
    for (uint32_t i = 0; i < w->cols; i++) {
        if (w->fmt->id == SLU_FMT_F32) {
            memcpy(&out[i], codes + 4 * (size_t)i, sizeof out[i]);
        } else if (w->fmt->id == SLU_FMT_F16) {
            out[i] = f16_at(codes, i);
        } else {
            uint32_t bits = (uint32_t)codes[2 * (size_t)i] << 16;
            bits |= (uint32_t)codes[2 * (size_t)i + 1] << 24;
            memcpy(&out[i], &bits, sizeof bits);
        }
    }
}

void slu_c_row_f32(float *out, const struct slu_mat *w, uint32_t row)
{
    if (!w->fmt->group) {
        row_floats(out, w, row);
        return;
    }
    if (w->fmt->scale == SLU_SCALE_ROW) {
        slu_c_row_ecq(out, w, row);
        return;
    }
    struct group group;
    for (uint32_t g = 0; g < w->cols / 32; g++) {
        group_values(w, row, g, &group);
        group_scales(w, row, g, &group);
        for (int i = 0; i < 32; i++) {
            float scale = group.scale * (float)group.factor[i / 16];
            float v = scale * (float)group.value[i];
            out[32 * (size_t)g + i] = w->fmt->min == SLU_MIN_NONE ? v : v + group.min;
        }
    }
}
