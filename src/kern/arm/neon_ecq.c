/*
 * Products of the q*e formats with NEON and sdot, whose four sums are a group's four lanes: nothing
 * is added across lanes before the row's end. Up to four tokens share a row's decoding. For many
 * tokens four rows are unpacked beforehand, one for each lane of a register: 32 instructions for 4
 * rows, 32 columns and a token, where q4e's rows alone take 52 and the others' more.
 */
#include "kern/arm/load.h"
#include "kern/c/ecq.h"

#define TOKENS           SLU_ECQ_TOKENS
#define PANEL_ROWS       4
#define PANEL_COLS_MAX   4096
#define PANEL_TOKENS_MIN 8

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

ALWAYS_INLINE int8x16x4_t table_of_matrix(const struct slu_mat *w)
{
    const int8_t *table = slu_ecq_head_of(w)->table;
    return (int8x16x4_t){
        {vld1q_s8(table), vld1q_s8(table + 16), vld1q_s8(table + 32), vld1q_s8(table + 48)}};
}

/* All rows times tokens tok[0] .. tok[n-1], n at most TOKENS. */
ALWAYS_INLINE void few_mul(const int bits, float *y, size_t y_stride, const struct slu_mat *w,
                           uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                           const int n)
{
    const int8x16x4_t table = table_of_matrix(w);
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

/* Four rows, unpacked: of each group the columns of lane k, first and second halves. */
struct panel {
    int8x16_t at[PANEL_COLS_MAX / 32][4][2];
};

/* What tokens have summed up, of 4 rows in each of the sixteen lanes. */
struct panel_sums {
    float32x4_t at[TOKENS][16];
};

/* 16 columns of four rows: four of each row side by side. */
ALWAYS_INLINE void put_half(int8x16_t to[4][2], int h, const int8x16_t rows[PANEL_ROWS])
{
    int32x4_t r[PANEL_ROWS];
    for (int i = 0; i < PANEL_ROWS; i++) {
        r[i] = vreinterpretq_s32_s8(rows[i]);
    }
    int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(r[0], r[1]));
    int64x2_t b = vreinterpretq_s64_s32(vtrn2q_s32(r[0], r[1]));
    int64x2_t c = vreinterpretq_s64_s32(vtrn1q_s32(r[2], r[3]));
    int64x2_t d = vreinterpretq_s64_s32(vtrn2q_s32(r[2], r[3]));
    to[0][h] = vreinterpretq_s8_s64(vtrn1q_s64(a, c));
    to[1][h] = vreinterpretq_s8_s64(vtrn1q_s64(b, d));
    to[2][h] = vreinterpretq_s8_s64(vtrn2q_s64(a, c));
    to[3][h] = vreinterpretq_s8_s64(vtrn2q_s64(b, d));
}

/* Rows whose places are in `rows`. */
ALWAYS_INLINE void unpack(const int bits, struct panel *panel, const int8x16x4_t *table,
                          const struct slu_ecq_row rows[PANEL_ROWS], size_t n_groups)
{
    for (size_t g = 0; g < n_groups; g++) {
        int8x16_t first[PANEL_ROWS], second[PANEL_ROWS];
        for (int r = 0; r < PANEL_ROWS; r++) {
            int8x16_t values[2];
            decode_group(bits, table, &rows[r], g, values);
            first[r] = values[0];
            second[r] = values[1];
        }
        put_half(panel->at[g], 0, first);
        put_half(panel->at[g], 1, second);
    }
}

/* Groups k, k + 4, ... times n tokens. */
ALWAYS_INLINE void groups_mul(const int n, const struct panel *panel, size_t k, size_t n_groups,
                              const struct token *toks, struct panel_sums *sums)
{
    float32x4_t acc[TOKENS][4];
    for (int t = 0; t < n; t++) {
        acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = vdupq_n_f32(0);
    }
#define LANE(l)                                                                                    \
    {                                                                                              \
        int32x4_t sum = vdotq_laneq_s32(vdupq_n_s32(0), panel->at[g][l][0], q0, l);                \
        sum = vdotq_laneq_s32(sum, panel->at[g][l][1], q1, l);                                     \
        acc[t][l] = vfmaq_n_f32(acc[t][l], vcvtq_f32_s32(sum), d);                                 \
    }
    for (size_t g = k; g < n_groups; g += 4) {
        for (int t = 0; t < n; t++) {
            const int8_t *q = toks[t].q + slu_acts_at(32 * g);
            int8x16_t q0 = vld1q_s8(q), q1 = vld1q_s8(q + 64);
            float d = toks[t].d[g];
            LANE(0)
            LANE(1)
            LANE(2)
            LANE(3)
        }
    }
#undef LANE
    for (int t = 0; t < n; t++) {
        for (size_t l = 0; l < 4; l++) {
            sums->at[t][4 * k + l] = acc[t][l];
        }
    }
}

/* (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)) of each row, t = lanes 0 to 7 plus 8 to 15. */
ALWAYS_INLINE float32x4_t add_lanes(const float32x4_t lanes[16])
{
    float32x4_t t[8];
    for (int l = 0; l < 8; l++) {
        t[l] = vaddq_f32(lanes[l], lanes[l + 8]);
    }
    float32x4_t even = vaddq_f32(vaddq_f32(t[0], t[4]), vaddq_f32(t[2], t[6]));
    float32x4_t odd = vaddq_f32(vaddq_f32(t[1], t[5]), vaddq_f32(t[3], t[7]));
    return vaddq_f32(even, odd);
}

/* A panel of rows lo .. hi-1 times tokens tok[0] .. tok[n-1], n at most TOKENS. */
ALWAYS_INLINE void panel_mul(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                             uint32_t hi, const struct panel *panel,
                             const struct slu_ecq_row rows[PANEL_ROWS], const struct slu_acts *x,
                             const uint32_t *tok, const int n)
{
    struct token toks[TOKENS];
    struct panel_sums sums;
    for (int t = 0; t < n; t++) {
        toks[t].q = x->q + tok[t] * x->q_stride;
        toks[t].d = x->d + tok[t] * x->g_stride;
    }
    for (size_t k = 0; k < 4; k++) {
        groups_mul(n, panel, k, w->cols / 32, toks, &sums);
    }
    for (int t = 0; t < n; t++) {
        float sum[PANEL_ROWS];
        vst1q_f32(sum, add_lanes(sums.at[t]));
        for (uint32_t r = lo; r < hi; r++) {
            y[(size_t)t * y_stride + r] =
                slu_ecq_finish(w, &rows[r - lo], sum[r - lo], x->x + tok[t] * x->x_stride);
        }
    }
}

/* One copy for all formats. */
static void panel_mul_all(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                          uint32_t hi, const struct panel *panel,
                          const struct slu_ecq_row rows[PANEL_ROWS], const struct slu_acts *x,
                          const uint32_t *tok, uint32_t n)
{
    for (uint32_t i = 0; i < n; i += TOKENS) {
        uint32_t at[TOKENS], some = slu_ecq_tokens(tok, i, n, at);
        float *out = y + i * y_stride;
        if (some == TOKENS) {
            panel_mul(out, y_stride, w, lo, hi, panel, rows, x, at, TOKENS);
            continue;
        }
        for (uint32_t k = 0; k < some; k++) {
            panel_mul(out + k * y_stride, y_stride, w, lo, hi, panel, rows, x, at + k, 1);
        }
    }
}

ALWAYS_INLINE void panels_mul(const int bits, float *y, size_t y_stride, const struct slu_mat *w,
                              uint32_t lo, uint32_t hi, const struct slu_acts *x,
                              const uint32_t *tok, uint32_t n)
{
    struct panel panel;
    const int8x16x4_t table = table_of_matrix(w);
    for (uint32_t r = lo; r < hi; r += PANEL_ROWS) {
        uint32_t end = hi - r < PANEL_ROWS ? hi : r + PANEL_ROWS;
        struct slu_ecq_row rows[PANEL_ROWS];
        for (uint32_t i = 0; i < PANEL_ROWS; i++) {
            rows[i] = slu_ecq_row_at(w, r + i < end ? r + i : end - 1);
        }
        unpack(bits, &panel, &table, rows, w->cols / 32);
        panel_mul_all(y, y_stride, w, r, end, &panel, rows, x, tok, n);
    }
}

#define ECQ_MUL(name, bits)                                                                        \
    void slu_neon_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,      \
                             uint32_t hi, const struct slu_acts *x, const uint32_t *tok,           \
                             uint32_t n)                                                           \
    {                                                                                              \
        if (n >= PANEL_TOKENS_MIN && w->cols <= PANEL_COLS_MAX) {                                  \
            panels_mul(bits, y, y_stride, w, lo, hi, x, tok, n);                                   \
            return;                                                                                \
        }                                                                                          \
        ecq_mul(bits, y, y_stride, w, lo, hi, x, tok, n);                                          \
    }

ECQ_MUL(q3e, 3)
ECQ_MUL(q4e, 4)
ECQ_MUL(q5e, 5)
ECQ_MUL(q6e, 6)
