/* Quantized formats in plain C: the definition that the other instruction sets are held to. One
 * function decodes a group of 32 weights of any format; all else is arithmetic in a fixed order. */
#include <math.h>

#include "kern/isa.h"

#define TOKENS 4 /* that share the decoding of a group */

/* 32 weights: value(code), the scales of the two halves, and the minimum. */
struct group {
    int16_t value[32];
    float scale[2];
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
        out->value[i] = fmt->table ? fmt->table[code] : (int16_t)code;
    }
}

static void group_scales(const struct slu_mat *w, uint32_t row, uint32_t g, struct group *out)
{
    const struct slu_fmt *fmt = w->fmt;
    const uint8_t *scales = w->data + w->at.scales + row * w->at.scales_row;
    const uint8_t *mins = w->data + w->at.mins + row * w->at.mins_row;
    const uint8_t *supers = w->data + w->at.supers + row * w->at.supers_row;
    size_t halves = 32 / fmt->group, super = fmt->super ? g / (fmt->super / 32) : 0;
    size_t supers_each = fmt->min == SLU_MIN_NONE ? 1 : 2;
    for (size_t i = 0; i < 2; i++) {
        size_t at = g * halves + (halves == 2 ? i : 0);
        switch (fmt->scale) {
        case SLU_SCALE_NONE:
            out->scale[i] = 1;
            break;
        case SLU_SCALE_F16:
            out->scale[i] = f16_at(scales, at);
            break;
        case SLU_SCALE_E8M0:
            out->scale[i] = e8m0(scales[at]);
            break;
        case SLU_SCALE_U8_SUPER:
            out->scale[i] = f16_at(supers, super * supers_each) * (float)scales[at];
            break;
        case SLU_SCALE_I8_SUPER:
            out->scale[i] = f16_at(supers, super * supers_each) * (float)(int8_t)scales[at];
            break;
        }
    }
    out->min = 0;
    if (fmt->min == SLU_MIN_F16) {
        out->min = f16_at(mins, g);
    } else if (fmt->min == SLU_MIN_U8_SUPER) {
        out->min = -(f16_at(supers, super * supers_each + 1) * (float)mins[g]);
    }
}

/* The second set of lanes: what one token has summed up so far. */
struct lanes {
    float acc[8], bias[8];
};

static void group_mul(struct lanes *lanes, const struct group *group, const int8_t *q, float d)
{
    for (int l = 0; l < 8; l++) {
        int32_t sum = 0;
        for (int j = 4 * l; j < 4 * l + 4; j++) {
            sum += group->value[j] * q[j];
        }
        lanes->acc[l] = fmaf((float)sum, group->scale[l / 4] * d, lanes->acc[l]);
    }
}

static float lanes_sum(const struct lanes *lanes)
{
    float t[8];
    for (int i = 0; i < 8; i++) {
        t[i] = lanes->acc[i] + lanes->bias[i];
    }
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

/* One row times up to TOKENS tokens. */
static void row_mul(float *y, size_t y_stride, const struct slu_mat *w, uint32_t row,
                    const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    const struct slu_fmt *fmt = w->fmt;
    /* The sums of activations are over 32 columns: an offset under a narrower scale can't use
     * them, and goes into the integers. */
    int subtract = fmt->group == 32 ? 0 : fmt->offset;
    float offset = fmt->group == 32 ? fmt->offset : 0;
    struct lanes lanes[TOKENS] = {0};
    struct group group;
    for (uint32_t g = 0; g < w->cols / 32; g++) {
        group_values(w, row, g, &group);
        group_scales(w, row, g, &group);
        for (int i = 0; i < 32; i++) {
            group.value[i] = (int16_t)(group.value[i] - subtract);
        }
        bool has_bias = offset != 0 || fmt->min != SLU_MIN_NONE;
        float m = fmt->min == SLU_MIN_NONE ? -(offset * group.scale[0]) : group.min;
        for (uint32_t i = 0; i < n; i++) {
            size_t t = tok[i];
            float *bias = &lanes[i].bias[g % 8];
            group_mul(&lanes[i], &group, x->q + t * x->q_stride + 32 * (size_t)g,
                      x->d[t * x->g_stride + g]);
            if (has_bias) {
                *bias = fmaf(m, x->s[t * x->g_stride + g], *bias);
            }
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        y[i * y_stride + row] = lanes_sum(&lanes[i]);
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

/* One group of 32 activations, n of them given and the rest zero. */
static void group_quantize(int8_t *q, float *d, float *s, const float *x, uint32_t n)
{
    uint32_t largest = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float inverse;
    *d = slu_quant_step(largest, &inverse);
    memset(q, 0, 32);
    int32_t sum = 0;
    /* Without an inverse all codes are zero, and NaNs aren't converted. */
    for (uint32_t i = 0; i < n && inverse != 0; i++) {
        q[i] = (int8_t)lrintf(x[i] * inverse);
        sum += q[i];
    }
    *s = *d * (float)sum;
}

void slu_c_quantize(int8_t *q, float *d, float *s, const float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i += 32) {
        group_quantize(q + i, d + i / 32, s + i / 32, x + i, n - i < 32 ? n - i : 32);
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
    struct group group;
    for (uint32_t g = 0; g < w->cols / 32; g++) {
        group_values(w, row, g, &group);
        group_scales(w, row, g, &group);
        for (int i = 0; i < 32; i++) {
            float v = group.scale[i / 16] * (float)(group.value[i] - w->fmt->offset);
            out[32 * (size_t)g + i] = w->fmt->min == SLU_MIN_NONE ? v : v + group.min;
        }
    }
}
