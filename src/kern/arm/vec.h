/*
 * Matrix-vector products with NEON and its dot products, for a few tokens. A row is walked in
 * chunks of 8 groups, lane g % 8 belonging to group g:
 *
 *   16 bytes of codes -> 2 x 16 small signed integers
 *   sdot with q, of both halves -> 4 int32 of a group
 *   eight of them, added in pairs -> 2 x 4 int32, one for each group
 *   to float, fma with the products of the two scales -> acc
 */
#ifndef SLU_KERN_ARM_VEC_H
#define SLU_KERN_ARM_VEC_H

#include "kern/arm/load.h"

#define TOKENS 3 /* at most, that share the decoding of a group */

struct token {
    const int8_t *q;
    const float *d, *s;
    float *lanes; /* of a panel */
};

ALWAYS_INLINE struct token token_at(const struct slu_acts *x, size_t token)
{
    return (struct token){
        .q = x->q + token * x->q_stride,
        .d = x->d + token * x->g_stride,
        .s = x->s + token * x->g_stride,
    };
}

ALWAYS_INLINE int32x4_t group_dot(const struct kind k, const int8x16_t values[2], const int8_t *q,
                                  const uint8_t *factors)
{
    int32x4_t zero = vdupq_n_s32(0), first = vdotq_s32(zero, values[0], vld1q_s8(q));
    if (!k.is_halved) {
        return vdotq_s32(first, values[1], vld1q_s8(q + 64));
    }
    int32x4_t second = vdotq_s32(zero, values[1], vld1q_s8(q + 64));
    return vmlaq_n_s32(vmulq_n_s32(first, (int8_t)factors[0]), second, (int8_t)factors[1]);
}

/* Groups g .. g+n-1 of a row times n_toks tokens. */
ALWAYS_INLINE void chunk(const struct kind k, const int n_toks, const struct row *row,
                         const struct token *toks, size_t g, const uint32_t n, int8x16_t table,
                         float32x4_t acc[TOKENS][2])
{
    static const uint32_t places[CHUNK] = {0, 1, 2, 3, 4, 5, 6, 7};
    int32x4_t sums[TOKENS][CHUNK];
    for (uint32_t i = 0; i < CHUNK; i++) {
        int8x16_t values[2];
        if (i < n) {
            decode(k, row, g + i, table, values);
        }
        for (int t = 0; t < n_toks; t++) {
            sums[t][i] = vdupq_n_s32(0);
            if (i < n) {
                const uint8_t *factors = k.is_halved ? row->scales + 2 * (g + i) : NULL;
                sums[t][i] = group_dot(k, values, toks[t].q + slu_acts_at(32 * (g + i)), factors);
            }
        }
    }
    float32x4_t scales[2], mins[2];
    load_scales(k, row, g, n, scales);
    if (k.min != SLU_MIN_NONE) {
        load_mins(k, row, g, n, mins);
    }
    for (int t = 0; t < n_toks; t++) {
        for (int h = 0; h < 2; h++) {
            const int32x4_t *s = sums[t] + 4 * h;
            int32x4_t sum = vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3]));
            float32x4_t products = vmulq_f32(scales[h], vld1q_f32(toks[t].d + g + 4 * h));
            float32x4_t out = vfmaq_f32(acc[t][h], vcvtq_f32_s32(sum), products);
            if (k.min != SLU_MIN_NONE) {
                out = vfmaq_f32(out, mins[h], vld1q_f32(toks[t].s + g + 4 * h));
            }
            uint32x4_t is_there = vcltq_u32(vld1q_u32(places + 4 * h), vdupq_n_u32(n));
            acc[t][h] = n == CHUNK ? out : vbslq_f32(is_there, out, acc[t][h]);
        }
    }
}

ALWAYS_INLINE void row_mul(const struct kind k, const int n_toks, float *y, size_t y_stride,
                           const struct slu_mat *w, size_t at, const struct token *toks,
                           int8x16_t table)
{
    struct row row = row_at(w, at);
    float32x4_t acc[TOKENS][2];
    for (int t = 0; t < n_toks; t++) {
        acc[t][0] = acc[t][1] = vdupq_n_f32(0);
    }
    size_t n_groups = w->cols / 32, g = 0;
    for (; g + CHUNK <= n_groups; g += CHUNK) {
        chunk(k, n_toks, &row, toks, g, CHUNK, table, acc);
    }
    if (g < n_groups) {
        chunk(k, n_toks, &row, toks, g, (uint32_t)(n_groups - g), table, acc);
    }
    for (int t = 0; t < n_toks; t++) {
        y[(size_t)t * y_stride + at] = lanes_sum(acc[t][0], acc[t][1]);
    }
}

/* n tokens, at most TOKENS. */
ALWAYS_INLINE void mul_few(const struct kind k, float *y, size_t y_stride, const struct slu_mat *w,
                           uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                           uint32_t n, int8x16_t table)
{
    struct token toks[TOKENS];
    for (uint32_t t = 0; t < n; t++) {
        toks[t] = token_at(x, tok ? tok[t] : t);
    }
    for (size_t row = lo; row < hi; row++) {
        if (n == 1) {
            row_mul(k, 1, y, y_stride, w, row, toks, table);
        } else if (n == 2) {
            row_mul(k, 2, y, y_stride, w, row, toks, table);
        } else {
            row_mul(k, 3, y, y_stride, w, row, toks, table);
        }
    }
}

#endif
