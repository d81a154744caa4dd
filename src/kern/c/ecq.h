/*
 * What the kernels of the q*e formats share: where a row lies, and the products of its escapes.
 * Private to kern.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_KERN_C_ECQ_H
#define SLU_KERN_C_ECQ_H

#include <math.h>

#include "kern/isa.h"

/* A row of a q*e matrix. */
struct slu_ecq_row {
    const uint8_t *codes, *high;
    const uint8_t *gaps;
    const int8_t *values;
    float scale;
};

static inline const struct slu_ecq_head *slu_ecq_head_of(const struct slu_mat *w)
{
    return (const struct slu_ecq_head *)(const void *)(w->data + w->at.head);
}

static inline struct slu_ecq_row slu_ecq_row_at(const struct slu_mat *w, size_t i)
{
    return (struct slu_ecq_row){
        .codes = w->data + w->at.codes + i * w->at.codes_row,
        .high = w->data + w->at.high + i * w->at.high_row,
        .gaps = w->data + w->at.gaps + i * w->at.escapes_row,
        .values = (const int8_t *)w->data + w->at.values + i * w->at.escapes_row,
        .scale = slu_row_scale(slu_ecq_head_of(w)->unit, w->data[w->at.scales + i]),
    };
}

#define SLU_ECQ_TOKENS 4 /* that share the decoding of a row */

/* Finds token `first` of n and those after it, at most SLU_ECQ_TOKENS; returns how many. */
static inline uint32_t slu_ecq_tokens(const uint32_t *tok, uint32_t first, uint32_t n,
                                      uint32_t ret[SLU_ECQ_TOKENS])
{
    uint32_t some = n - first < SLU_ECQ_TOKENS ? n - first : SLU_ECQ_TOKENS;
    for (uint32_t k = 0; k < some; k++) {
        ret[k] = tok ? tok[first + k] : first + k;
    }
    return some;
}

/* (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)) */
static inline float slu_ecq_tree(const float t[8])
{
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

/* The sum of a row's escapes, in units of the matrix's. x are the token's numbers as they were
 * before they were quantized. */
static inline float slu_ecq_escapes(const struct slu_mat *w, const struct slu_ecq_row *row,
                                    const float *x)
{
    float lanes[8] = {0};
    uint32_t column = 0;
    for (size_t i = 0; i < w->at.escapes_row; i++) {
        column += row->gaps[i];
        if (column >= w->cols) {
            break;
        }
        lanes[i % 8] = fmaf((float)row->values[i], x[column], lanes[i % 8]);
    }
    return slu_ecq_tree(lanes);
}

/* The product of a row from the sum over its codes: the escapes are added, and the scale put on. */
static inline float slu_ecq_finish(const struct slu_mat *w, const struct slu_ecq_row *row,
                                   float sum, const float *x)
{
    if (w->at.escapes_row == 0) {
        return row->scale * sum;
    }
    float e = slu_ecq_escapes(w, row, x);
    return row->scale * fmaf(slu_ecq_head_of(w)->escape, e, sum);
}

void slu_c_mul_ecq(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                   const struct slu_acts *x, const uint32_t *tok, uint32_t n);
/* One row as floats: scale * (table[code] + escape * values), the sum rounded before the product.
 */
void slu_c_row_ecq(float *out, const struct slu_mat *w, uint32_t row);

#endif
