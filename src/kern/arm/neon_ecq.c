/*
 * Products of the q*e formats with NEON and sdot, whose four sums are a group's four lanes: nothing
 * is added across lanes before the row's end. Up to four tokens share a row's decoding.
 */
#include "kern/arm/load.h"
#include "kern/c/ecq.h"

#define TOKENS 4

struct token {
    const int8_t *q;
    const float *d;
    float32x4_t acc[4]; /* of groups g % 4 */
};

ALWAYS_INLINE int8x16_t look_up(const int bits, const int8x16x4_t *table, uint8x16_t index)
{
    if (bits < 5) {
        return vqtbl1q_s8(table->val[0], index);
    }
    if (bits == 5) {
        return vqtbl2q_s8((int8x16x2_t){{table->val[0], table->val[1]}}, index);
    }
    return vqtbl4q_s8(*table, index);
}

/* The values of group g, its first and its second 16 columns. */
ALWAYS_INLINE void decode_group(const int bits, const int8x16x4_t *table,
                                const struct slu_ecq_row *row, size_t g, int8x16_t ret[2])
{
    uint8x16_t index[2];
    if (bits == 3) {
        for (int h = 0; h < 2; h++) {
            index[h] = vorrq_u8(pairs_of_bytes(row->codes + 8 * g, 4 * h),
                                bits_of_bytes(row->high + 4 * g + 2 * h, 4));
        }
    } else {
        uint8x16_t v = vld1q_u8(row->codes + 16 * g);
        index[0] = vandq_u8(v, vdupq_n_u8(15));
        index[1] = vshrq_n_u8(v, 4);
    }
    for (int h = 0; h < 2; h++) {
        if (bits == 5) {
            index[h] = vorrq_u8(index[h], high_bits(row->high + 4 * g + 2 * h));
        } else if (bits == 6) {
            index[h] = vorrq_u8(index[h], high_pairs(row->high + 8 * g, 4 * h));
        }
        ret[h] = look_up(bits, table, index[h]);
    }
}

/* Group g, which is the k-th of its four. */
ALWAYS_INLINE void group_mul(const int bits, const int8x16x4_t *table,
                             const struct slu_ecq_row *row, size_t g, const int k,
                             struct token *toks, const int n)
{
    int8x16_t values[2];
    decode_group(bits, table, row, g, values);
    for (int t = 0; t < n; t++) {
        const int8_t *q = toks[t].q + slu_acts_at(32 * g);
        int32x4_t sum = vdotq_s32(vdupq_n_s32(0), values[0], vld1q_s8(q));
        sum = vdotq_s32(sum, values[1], vld1q_s8(q + 64));
        toks[t].acc[k] = vfmaq_n_f32(toks[t].acc[k], vcvtq_f32_s32(sum), toks[t].d[g]);
    }
}

ALWAYS_INLINE void row_mul(const int bits, const int8x16x4_t *table, const struct slu_ecq_row *row,
                           size_t n_groups, struct token *toks, const int n)
{
    size_t g = 0;
    for (; g + 4 <= n_groups; g += 4) {
        for (int k = 0; k < 4; k++) {
            group_mul(bits, table, row, g + (size_t)k, k, toks, n);
        }
    }
    for (int k = 0; k < 3; k++) {
        if (g + (size_t)k < n_groups) {
            group_mul(bits, table, row, g + (size_t)k, k, toks, n);
        }
    }
}

/* All rows times tokens tok[0] .. tok[n-1], n at most TOKENS. */
ALWAYS_INLINE void few_mul(const int bits, float *y, size_t y_stride, const struct slu_mat *w,
                           uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                           const int n)
{
    int8x16x4_t table;
    for (int i = 0; i < 4; i++) {
        table.val[i] = vld1q_s8(slu_ecq_head_of(w)->table + 16 * i);
    }
    for (uint32_t r = lo; r < hi; r++) {
        struct slu_ecq_row row = slu_ecq_row_at(w, r);
        struct token toks[TOKENS];
        for (int t = 0; t < n; t++) {
            toks[t].q = x->q + tok[t] * x->q_stride;
            toks[t].d = x->d + tok[t] * x->g_stride;
            for (int k = 0; k < 4; k++) {
                toks[t].acc[k] = vdupq_n_f32(0);
            }
        }
        row_mul(bits, &table, &row, w->cols / 32, toks, n);
        for (int t = 0; t < n; t++) {
            const float32x4_t *acc = toks[t].acc;
            float sum = lanes_sum(vaddq_f32(acc[0], acc[2]), vaddq_f32(acc[1], acc[3]));
            y[(size_t)t * y_stride + r] = slu_ecq_finish(w, &row, sum, x->x + tok[t] * x->x_stride);
        }
    }
}

#include "kern/ecq.inc"

#define ECQ_MUL(name, bits)                                                                        \
    void slu_neon_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,      \
                             uint32_t hi, const struct slu_acts *x, const uint32_t *tok,           \
                             uint32_t n)                                                           \
    {                                                                                              \
        ecq_mul(bits, y, y_stride, w, lo, hi, x, tok, n);                                          \
    }

ECQ_MUL(q3e, 3)
ECQ_MUL(q4e, 4)
ECQ_MUL(q5e, 5)
ECQ_MUL(q6e, 6)
