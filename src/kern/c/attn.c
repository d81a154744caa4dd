/* Attention in plain C, in the order of arithmetic that attn.h defines. */
#include <math.h>

#include "kern/isa.h"

#define COLS 16 /* summed up side by side */

void slu_c_attn_mul(const struct slu_attn_mul *m)
{
    for (size_t col = 0; col < m->n; col += COLS) {
        size_t n = m->n - col < COLS ? m->n - col : COLS;
        for (size_t row = 0; row < m->rows; row++) {
            float *c = m->c + row * m->c_stride + col;
            const float *a = m->a + row * m->a_stride;
            float acc[COLS];
            for (size_t j = 0; j < n; j++) {
                acc[j] = m->factor ? c[j] * m->factor[row] : 0;
            }
            for (size_t k = 0; k < m->k; k++) {
                for (size_t j = 0; j < n; j++) {
                    acc[j] = fmaf(a[k], slu_attn_at(&m->b, k, col + j), acc[j]);
                }
            }
            memcpy(c, acc, n * sizeof *c);
        }
    }
}

void slu_c_attn_floats(float *out, const struct slu_attn_mat *m, uint32_t k, uint32_t n)
{
    for (size_t i = 0; i < k; i++) {
        for (size_t j = 0; j < n; j++) {
            out[i * n + j] = slu_attn_at(m, i, j);
        }
    }
}

float slu_c_attn_weigh(float *x, uint32_t n, float *high, float *sum)
{
    float most = -INFINITY, shrink = 1, lanes[32] = {0}, u[8];
    for (uint32_t i = 0; i < n; i++) {
        most = x[i] > most ? x[i] : most; /* passes over NaNs, whose exponential is one too */
    }
    if (most > *high) {
        shrink = slu_exp(*high - most);
        *sum *= shrink;
        *high = most;
    }
    for (uint32_t i = 0; i < n; i++) {
        x[i] = slu_exp(x[i] - *high);
        lanes[i % 32] += x[i];
    }
    for (int l = 0; l < 8; l++) {
        u[l] = (lanes[l] + lanes[l + 8]) + (lanes[l + 16] + lanes[l + 24]);
    }
    *sum += ((u[0] + u[4]) + (u[2] + u[6])) + ((u[1] + u[5]) + (u[3] + u[7]));
    return shrink;
}

void slu_c_attn_silu(float *h, const float *u, const float *gate_bias, const float *up_bias,
                     uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        h[i] = slu_silu(gate_bias ? h[i] + gate_bias[i] : h[i], up_bias ? u[i] + up_bias[i] : u[i]);
    }
}

void slu_c_attn_oai(float *h, const float *u, const float *gate_bias, const float *up_bias,
                    uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        h[i] = slu_oai(gate_bias ? h[i] + gate_bias[i] : h[i], up_bias ? u[i] + up_bias[i] : u[i]);
    }
}
