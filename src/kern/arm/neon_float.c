/* Float formats, the vector operations of attention and the quantizing of activations, with NEON.
 * The 32 lanes that kern.h defines are eight registers; what is left of a row past a multiple of
 * 32 columns is done lane by lane. */
#include <math.h>

#include "kern/arm/neon.h"

#define TOKENS   2  /* at most, that share the conversion of weights */
#define ROWS_HOT 16 /* rows that stay in the cache while all tokens pass over them */

ALWAYS_INLINE float32x4_t load4(const enum slu_fmt_id id, const uint8_t *w, size_t i)
{
    if (id == SLU_FMT_F32) {
        return vreinterpretq_f32_u8(vld1q_u8(w + 4 * i));
    }
    uint16x4_t half = vreinterpret_u16_u8(vld1_u8(w + 2 * i));
    if (id == SLU_FMT_F16) {
        return vcvt_f32_f16(vreinterpret_f16_u16(half));
    }
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

ALWAYS_INLINE float load1(const enum slu_fmt_id id, const uint8_t *w, size_t i)
{
    float value;
    uint16_t half;
    if (id == SLU_FMT_F32) {
        memcpy(&value, w + 4 * i, sizeof value);
        return value;
    }
    memcpy(&half, w + 2 * i, sizeof half);
    if (id == SLU_FMT_F16) {
        return slu_f16_to_f32(half);
    }
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One row times n_toks tokens, cols numbers each. */
ALWAYS_INLINE void row_mul(const enum slu_fmt_id id, const int n_toks, float *y, size_t y_stride,
                           const uint8_t *w, const float *const *x, size_t cols)
{
    float32x4_t acc[TOKENS][8];
    for (int t = 0; t < n_toks; t++) {
        for (int k = 0; k < 8; k++) {
            acc[t][k] = vdupq_n_f32(0);
        }
    }
    size_t i = 0;
    for (; i + 32 <= cols; i += 32) {
        for (size_t k = 0; k < 8; k++) {
            float32x4_t weights = load4(id, w, i + 4 * k);
            for (int t = 0; t < n_toks; t++) {
                acc[t][k] = vfmaq_f32(acc[t][k], weights, vld1q_f32(x[t] + i + 4 * k));
            }
        }
    }
    for (int t = 0; t < n_toks; t++) {
        if (i < cols) {
            float lanes[32];
            for (int k = 0; k < 8; k++) {
                vst1q_f32(lanes + 4 * k, acc[t][k]);
            }
            for (size_t l = 0; l < cols - i; l++) {
                lanes[l] = fmaf(load1(id, w, i + l), x[t][i + l], lanes[l]);
            }
            for (int k = 0; k < 8; k++) {
                acc[t][k] = vld1q_f32(lanes + 4 * k);
            }
        }
        float32x4_t u[2];
        for (int k = 0; k < 2; k++) {
            u[k] = vaddq_f32(vaddq_f32(acc[t][k], acc[t][2 + k]),
                             vaddq_f32(acc[t][4 + k], acc[t][6 + k]));
        }
        y[(size_t)t * y_stride] = lanes_sum(u[0], u[1]);
    }
}

ALWAYS_INLINE void mul_float(const enum slu_fmt_id id, float *y, size_t y_stride,
                             const struct slu_mat *w, uint32_t lo, uint32_t hi,
                             const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    for (uint32_t top = lo; top < hi; top += ROWS_HOT) {
        uint32_t end = hi - top < ROWS_HOT ? hi : top + ROWS_HOT;
        for (uint32_t i = 0, some; i < n; i += some) {
            some = n - i >= TOKENS ? TOKENS : 1;
            const float *at[TOKENS];
            for (uint32_t t = 0; t < some; t++) {
                at[t] = x->x + (tok ? tok[i + t] : i + t) * x->x_stride;
            }
            for (uint32_t row = top; row < end; row++) {
                const uint8_t *codes = w->data + w->at.codes + row * w->at.codes_row;
                float *out = y + i * y_stride + row;
                if (some == TOKENS) {
                    row_mul(id, TOKENS, out, y_stride, codes, at, w->cols);
                } else {
                    row_mul(id, 1, out, y_stride, codes, at, w->cols);
                }
            }
        }
    }
}

void slu_neon_mul_f32(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    mul_float(SLU_FMT_F32, y, y_stride, w, lo, hi, x, tok, n);
}

void slu_neon_mul_f16(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    mul_float(SLU_FMT_F16, y, y_stride, w, lo, hi, x, tok, n);
}

void slu_neon_mul_bf16(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                       const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    mul_float(SLU_FMT_BF16, y, y_stride, w, lo, hi, x, tok, n);
}

float slu_neon_dot_f32(const float *a, const float *b, uint32_t n)
{
    float ret;
    row_mul(SLU_FMT_F32, 1, &ret, 0, (const uint8_t *)b, &a, n);
    return ret;
}

float slu_neon_dot_f16(const float *a, const uint16_t *b, uint32_t n)
{
    float ret;
    row_mul(SLU_FMT_F16, 1, &ret, 0, (const uint8_t *)b, &a, n);
    return ret;
}

ALWAYS_INLINE void axpy(const enum slu_fmt_id id, float *y, float a, const uint8_t *x, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        vst1q_f32(y + i, vfmaq_n_f32(vld1q_f32(y + i), load4(id, x, i), a));
    }
    for (; i < n; i++) {
        y[i] = fmaf(a, load1(id, x, i), y[i]);
    }
}

void slu_neon_axpy_f32(float *y, float a, const float *x, uint32_t n)
{
    axpy(SLU_FMT_F32, y, a, (const uint8_t *)x, n);
}

void slu_neon_axpy_f16(float *y, float a, const uint16_t *x, uint32_t n)
{
    axpy(SLU_FMT_F16, y, a, (const uint8_t *)x, n);
}

void slu_neon_add_grid(double *sum, float a, const float *x, uint32_t n)
{
    float64x2_t factor = vdupq_n_f64(a), shift = vdupq_n_f64(0x1.8p+20);
    uint32_t i = 0;
    for (; i + 2 <= n; i += 2) {
        float64x2_t term = vmulq_f64(factor, vcvt_f64_f32(vld1_f32(x + i)));
        term = vsubq_f64(vaddq_f64(term, shift), shift);
        vst1q_f64(sum + i, vaddq_f64(vld1q_f64(sum + i), term));
    }
    for (; i < n; i++) {
        sum[i] += slu_grid((double)a * (double)x[i]);
    }
}

void slu_neon_f32_to_f16(uint16_t *out, const float *x, uint32_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
    }
    for (; i < n; i++) {
        out[i] = slu_f32_to_f16(x[i]);
    }
}

/* 32 activations, whose place in q is given, and in the other planes. */
ALWAYS_INLINE void group_quantize(const struct slu_acts *acts, int8_t *q, size_t at, const float *x)
{
    float32x4_t v[8];
    /* Magnitudes of floats are ordered as their bits are, NaNs above all. */
    uint32x4_t most = vdupq_n_u32(0);
    for (int k = 0; k < 8; k++) {
        v[k] = vld1q_f32(x + 4 * k);
        uint32x4_t bits = vandq_u32(vreinterpretq_u32_f32(v[k]), vdupq_n_u32(0x7fffffff));
        most = vmaxq_u32(most, bits);
    }
    float inverse, d = slu_quant_step(vmaxvq_u32(most), &inverse);
    int8x16_t code[2];
    int16_t sums[2];
    for (int h = 0; h < 2; h++) {
        int16x4_t part[4];
        for (int k = 0; k < 4; k++) {
            /* To the nearest even; a NaN becomes zero, and so does anything times zero. */
            int32x4_t wide = vcvtnq_s32_f32(vmulq_n_f32(v[4 * h + k], inverse));
            part[k] = vmovn_s32(inverse == 0 ? vdupq_n_s32(0) : wide);
        }
        int16x8_t low = vcombine_s16(part[0], part[1]), high = vcombine_s16(part[2], part[3]);
        sums[h] = vaddvq_s16(vaddq_s16(low, high));
        code[h] = vcombine_s8(vmovn_s16(low), vmovn_s16(high));
    }
    acts->d[at] = d;
    acts->s[at] = d * (float)(sums[0] + sums[1]);
    acts->sums[2 * at] = sums[0];
    acts->sums[2 * at + 1] = sums[1];
    vst1q_s8(q, code[0]);
    vst1q_s8(q + 64, code[1]);
}

void slu_neon_quantize(const struct slu_acts *acts, uint32_t lo, uint32_t hi)
{
    size_t n_whole = acts->cols / 32, n_padded = ((size_t)acts->cols + 127) / 128 * 4;
    for (uint32_t t = lo; t < hi; t++) {
        const float *x = acts->x + t * acts->x_stride;
        int8_t *q = acts->q + t * acts->q_stride;
        size_t at = t * acts->g_stride;
        for (size_t g = 0; g < n_whole; g++) {
            group_quantize(acts, q + slu_acts_at(32 * g), at + g, x + 32 * g);
        }
        for (size_t g = n_whole; g < n_padded; g++) {
            float last[32] = {0};
            if (g == n_whole) {
                memcpy(last, x + 32 * g, acts->cols % 32 * sizeof *x);
            }
            group_quantize(acts, q + slu_acts_at(32 * g), at + g, last);
        }
    }
}
