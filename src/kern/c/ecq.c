/* The q*e formats in plain C: the definition that the other instruction sets are held to. */
#include "kern/c/ecq.h"

/* 32 table entries, by the codes of group g. */
static void group_values(const struct slu_mat *w, const struct slu_ecq_row *row, size_t g,
                         int8_t values[32])
{
    const int8_t *table = slu_ecq_head_of(w)->table;
    unsigned bits = w->fmt->bits;
    for (size_t i = 0; i < 32; i++) {
        unsigned code;
        if (bits == 3) {
            code = row->codes[8 * g + i % 8] >> 2 * (i / 8) & 3;
            code |= (row->high[4 * g + i / 8] >> i % 8 & 1u) << 2;
        } else {
            code = row->codes[16 * g + i % 16] >> (i < 16 ? 0 : 4) & 15;
        }
        if (bits == 5) {
            code |= (row->high[4 * g + i / 8] >> i % 8 & 1u) << 4;
        } else if (bits == 6) {
            code |= (row->high[8 * g + i % 8] >> 2 * (i / 8) & 3u) << 4;
        }
        values[i] = table[code];
    }
}

/* Adds a group to its four lanes; q are its activations' first halves, 64 bytes before its second.
 */
static void group_add(float lanes[4], const int8_t values[32], const int8_t *q, float d)
{
    for (int k = 0; k < 4; k++) {
        int32_t sum = 0;
        for (int i = 4 * k; i < 4 * k + 4; i++) {
            sum += values[i] * q[i] + values[16 + i] * q[64 + i];
        }
        lanes[k] = fmaf((float)sum, d, lanes[k]);
    }
}

static void row_mul(float *y, size_t y_stride, const struct slu_mat *w, uint32_t r,
                    const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    float lanes[SLU_ECQ_TOKENS][16] = {0};
    struct slu_ecq_row row = slu_ecq_row_at(w, r);
    for (size_t g = 0; g < w->cols / 32; g++) {
        int8_t values[32];
        group_values(w, &row, g, values);
        for (uint32_t i = 0; i < n; i++) {
            size_t t = tok[i];
            group_add(&lanes[i][4 * (g % 4)], values, x->q + t * x->q_stride + slu_acts_at(32 * g),
                      x->d[t * x->g_stride + g]);
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        float u[8];
        for (int l = 0; l < 8; l++) {
            u[l] = lanes[i][l] + lanes[i][l + 8];
        }
        y[i * y_stride + r] = slu_ecq_finish(w, &row, slu_ecq_tree(u), x->x + tok[i] * x->x_stride);
    }
}

void slu_c_mul_ecq(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                   const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    for (uint32_t r = lo; r < hi; r++) {
        for (uint32_t i = 0; i < n; i += SLU_ECQ_TOKENS) {
            uint32_t at[SLU_ECQ_TOKENS], some = slu_ecq_tokens(tok, i, n, at);
            row_mul(y + i * y_stride, y_stride, w, r, x, at, some);
        }
    }
}

void slu_c_row_ecq(float *out, const struct slu_mat *w, uint32_t r)
{
    struct slu_ecq_row row = slu_ecq_row_at(w, r);
    for (size_t g = 0; g < w->cols / 32; g++) {
        int8_t values[32];
        group_values(w, &row, g, values);
        for (size_t i = 0; i < 32; i++) {
            out[32 * g + i] = values[i];
        }
    }
    float escape = slu_ecq_head_of(w)->escape;
    uint32_t column = 0;
    for (size_t i = 0; i < w->at.escapes_row; i++) {
        column += row.gaps[i];
        if (column >= w->cols) {
            break;
        }
        out[column] = fmaf(escape, row.values[i], out[column]);
    }
    for (uint32_t i = 0; i < w->cols; i++) {
        out[i] *= row.scale;
    }
}
