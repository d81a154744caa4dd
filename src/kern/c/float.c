/* Float formats and the vector operations of attention in plain C. */
#include <math.h>

#include "kern/isa.h"

#define TOKENS 4 /* that share the conversion of a weight */

static float weight_at(const uint8_t *codes, enum slu_fmt_id id, size_t i)
{
    float value;
    uint16_t half;
    uint32_t bits;
    if (id == SLU_FMT_F32) {
        memcpy(&value, codes + 4 * i, sizeof value);
        return value;
    }
    memcpy(&half, codes + 2 * i, sizeof half);
    if (id == SLU_FMT_F16) {
        return slu_f16_to_f32(half);
    }
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float lanes_sum(const float acc[32])
{
    float u[8];
    for (int l = 0; l < 8; l++) {
        u[l] = (acc[l] + acc[l + 8]) + (acc[l + 16] + acc[l + 24]);
    }
    return ((u[0] + u[4]) + (u[2] + u[6])) + ((u[1] + u[5]) + (u[3] + u[7]));
}

/* One row of numbers times up to TOKENS rows of floats. */
static void row_mul(float *y, size_t y_stride, const uint8_t *codes, enum slu_fmt_id id,
                    uint32_t cols, const float *const *x, uint32_t n)
{
    float acc[TOKENS][32] = {0};
    for (uint32_t i = 0; i < cols; i++) {
        float w = weight_at(codes, id, i);
        for (uint32_t t = 0; t < n; t++) {
            acc[t][i % 32] = fmaf(w, x[t][i], acc[t][i % 32]);
        }
    }
    for (uint32_t t = 0; t < n; t++) {
        y[t * y_stride] = lanes_sum(acc[t]);
    }
}

void slu_c_mul_float(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                     const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    for (uint32_t row = lo; row < hi; row++) {
        const uint8_t *codes = w->data + w->at.codes + row * w->at.codes_row;
        for (uint32_t i = 0; i < n; i += TOKENS) {
            uint32_t some = n - i < TOKENS ? n - i : TOKENS;
            const float *at[TOKENS];
            for (uint32_t k = 0; k < some; k++) {
                at[k] = x->x + (tok ? tok[i + k] : i + k) * x->x_stride;
            }
            row_mul(y + i * y_stride + row, y_stride, codes, w->fmt->id, w->cols, at, some);
        }
    }
}

float slu_c_dot_f32(const float *a, const float *b, uint32_t n)
{
    float ret;
    row_mul(&ret, 0, (const uint8_t *)b, SLU_FMT_F32, n, &a, 1);
    return ret;
}

float slu_c_dot_f16(const float *a, const uint16_t *b, uint32_t n)
{
    float ret;
    row_mul(&ret, 0, (const uint8_t *)b, SLU_FMT_F16, n, &a, 1);
    return ret;
}

void slu_c_axpy_f32(float *y, float a, const float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        y[i] = fmaf(a, x[i], y[i]);
    }
}

void slu_c_axpy_f16(float *y, float a, const uint16_t *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        y[i] = fmaf(a, slu_f16_to_f32(x[i]), y[i]);
    }
}

void slu_c_f32_to_f16(uint16_t *out, const float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        out[i] = slu_f32_to_f16(x[i]);
    }
}

void slu_c_add_grid(double *sum, float a, const float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        sum[i] += slu_grid((double)a * (double)x[i]);
    }
}
