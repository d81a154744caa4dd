/* Quantized products with AVX-512 VNNI: one function for each format, out of the templates for few
 * tokens, for few groups of many tokens, and for all of a row's. */
#include <assert.h>

#include "base/pool.h"
#include "kern/x86/avx512_pack.h"
#include "kern/x86/avx512_vec.h"

_Static_assert(sizeof(struct tiles) + sizeof(struct panel_work) +
                       sizeof(panel_sums[GEMM_TOKENS_MAX]) <=
                   SLU_STACK_BYTES * 3 / 4,
               "what a product keeps on its stack");

ALWAYS_INLINE enum panel_kind kind_of(const struct kind k)
{
    return k.is_halved                 ? PANEL_HALVED
           : k.min != SLU_MIN_NONE     ? PANEL_MIN
           : k.scale == SLU_SCALE_E8M0 ? PANEL_SHIFT
                                       : PANEL_OFFSET;
}

/* The tokens of a product. */
struct operand {
    uint32_t n;
    bool has_kind; /* what slu_avx512_tiles_fill returned */
    struct tiles tiles;
};

/* The kind of a panel's product with the tiles. */
ALWAYS_INLINE enum panel_kind kind_with(const struct kind k, const struct panel *panel,
                                        const uint32_t lane_groups, uint32_t n_groups,
                                        const struct operand *x)
{
    if (kind_of(k) != PANEL_SHIFT) {
        return kind_of(k);
    }
    __m512 least = _mm512_set1_ps(1), most = least;
    for (uint32_t i = 0; i < n_groups; i++) {
        const float *at = panel->scales[place_of(i, lane_groups)];
        for (int h = 0; h < panel->n_regs; h++) {
            __m512 scales = _mm512_load_ps(at + GEMM_LANES * h);
            least = _mm512_min_ps(least, scales);
            most = _mm512_max_ps(most, scales);
        }
    }
    bool is_near =
        _mm512_reduce_min_ps(least) >= SHIFT_LEAST && _mm512_reduce_max_ps(most) <= SHIFT_MOST;
    return x->has_kind && is_near ? PANEL_SHIFT : PANEL_OFFSET;
}

/* Whether there are groups and tokens enough for one lane to be multiplied after the other. */
ALWAYS_INLINE bool is_lane_by_lane(uint32_t n_groups, uint32_t n_tokens)
{
    return n_groups > FEW_GROUPS && n_tokens >= GEMM_TOKENS_MANY;
}

/* Whether panels of three registers are any good: with halves registers run out. */
ALWAYS_INLINE bool has_high_panels(const struct kind k)
{
    return kind_of(k) != PANEL_HALVED;
}

/* Rows of the next panel, of so many that are left. The more there are, the fewer loads of
 * activations a product takes; but where the lanes' sums stay in registers these run out, and few
 * tokens don't make up for a first cache that is full of weights. A last panel has two registers at
 * least: what would leave it one takes only two itself. */
ALWAYS_INLINE size_t rows_of(const struct kind k, uint32_t n_groups, uint32_t n, size_t left)
{
    const size_t two = 2 * GEMM_LANES, rest = left % GEMM_ROWS;
    if (!has_high_panels(k) || !is_lane_by_lane(n_groups, n) || (rest > 0 && rest <= GEMM_LANES)) {
        return left < two ? left : two;
    }
    return left < GEMM_ROWS ? left : GEMM_ROWS;
}

/* What is gathered after groups g .. g+n-1 of the rows of a panel, row_bytes apart, of which `step`
 * are at once. */
ALWAYS_INLINE struct panel_next next_of(const struct kind k, const struct panel_work *work,
                                        uint32_t n_rows, uint32_t g, uint32_t n, uint32_t n_groups,
                                        uint32_t step, size_t row_bytes)
{
    const bool is_last = g + n == n_groups;
    const uint32_t left = is_last ? n_groups : n_groups - g - n;
    return (struct panel_next){
        .codes = work->rows.codes,
        .n_rows = n_rows,
        .ahead = is_last ? n_rows * row_bytes : (g + n) * bytes_of(k),
        .bytes = (left < step ? left : step) * bytes_of(k),
    };
}

/* The rows of a panel times all tokens, few groups at a time: there is either no more of them, or
 * few tokens, which don't make up for gathering, and whose sums stay near. */
ALWAYS_INLINE void few_rows_mul(const struct kind k, struct panel_work *work, size_t row_bytes,
                                const struct operand *x, const struct panel_out *out, __m512i table)
{
    panel_sums sums[GEMM_TOKENS_MANY];
    const uint32_t n_groups = out->n_groups;
    assert(n_groups <= FEW_GROUPS || x->n < GEMM_TOKENS_MANY);
    for (uint32_t g = 0, n; g < n_groups; g += n) {
        n = n_groups - g < FEW_GROUPS ? n_groups - g : FEW_GROUPS;
        const struct panel_next next =
            next_of(k, work, 2 * GEMM_LANES, g, n, n_groups, FEW_GROUPS, row_bytes);
        pack_scales(k, 2, work, NO_LANES, g, n);
        unpack_few(k, work, g, n, table);
        slu_avx512_few_mul(kind_with(k, &work->panel, NO_LANES, n, x), &work->panel, g, n,
                           &x->tiles, x->n, sums, &next, out);
    }
}

/* The same with many tokens, lane by lane. */
ALWAYS_INLINE void wide_rows_mul(const struct kind k, const int n_regs, struct panel_work *work,
                                 size_t row_bytes, const struct operand *x,
                                 const struct panel_out *out, __m512i table)
{
    panel_sums sums[GEMM_TOKENS_MAX];
    const uint32_t n_rows = GEMM_LANES * (uint32_t)n_regs, n_groups = out->n_groups;
    for (uint32_t g = 0, n; g < n_groups; g += n) {
        n = n_groups - g < PANEL_GROUPS ? n_groups - g : PANEL_GROUPS;
        struct panel_next next = next_of(k, work, n_rows, g, n, n_groups, PANEL_GROUPS, row_bytes);
        next.n_rows /= SUM_LANES; /* with each lane */
        pack_scales(k, n_regs, work, LANE_GROUPS, g, n);
        gather_all(k, n_regs, work, g, n);
        const enum panel_kind kind = kind_with(k, &work->panel, LANE_GROUPS, n, x);
        for (uint32_t i = 0; i < SUM_LANES; i++, next.codes += next.n_rows) {
            const uint32_t l = slu_avx512_lane_order[i];
            const struct panel_lane lane = {l, g / SUM_LANES, (n + SUM_LANES - 1 - l) / SUM_LANES,
                                            g + n == n_groups};
            unpack_lane(k, n_regs, work, g, l, lane.n, table);
            slu_avx512_lane_mul(kind, &work->panel, &lane, &x->tiles, x->n, sums, &next, out);
        }
    }
}

/* A format's few_rows_mul and wide_rows_mul: functions of their own, since what is inlined here is
 * much already. */
typedef void (*rows_mul_fn)(struct panel_work *work, size_t row_bytes, const struct operand *x,
                            const struct panel_out *out, __m512i table);

/* Rows lo .. hi-1, at most GEMM_ROWS, times all tokens. */
ALWAYS_INLINE void panel_rows_mul(const rows_mul_fn few_mul, const rows_mul_fn wide_mul, float *y,
                                  size_t y_stride, const struct slu_mat *w, size_t lo, size_t hi,
                                  const struct operand *x, __m512i table)
{
    struct panel_work work;
    const struct panel_out out = {y + lo, y_stride, (uint32_t)(hi - lo), w->cols / 32};
    work.panel.n_regs = hi - lo > 2 * GEMM_LANES ? 3 : 2;
    panel_rows_init(&work.rows, w, lo, hi, GEMM_LANES * (size_t)work.panel.n_regs);
    (is_lane_by_lane(out.n_groups, x->n) ? wide_mul : few_mul)(&work, w->at.codes_row, x, &out,
                                                               table);
}

ALWAYS_INLINE void mul_quant(const struct kind k, const rows_mul_fn few_mul,
                             const rows_mul_fn wide_mul, float *y, size_t y_stride,
                             const struct slu_mat *w, uint32_t lo, uint32_t hi,
                             const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    const uint32_t n_groups = w->cols / 32, most = tiles_tokens(n_groups);
    if (n < GEMM_TOKENS_MIN || most < GEMM_TOKENS_MIN) {
        mul_few(k, y, y_stride, w, lo, hi, x, tok, n);
        return;
    }
    const __m512i table = table512_of(k, w);
    struct operand operand;
    const uint32_t n_passes = (n + most - 1) / most;
    for (uint32_t p = 0, i = 0; p < n_passes; p++, i += operand.n) {
        operand.n = (n - i + n_passes - p - 1) / (n_passes - p);
        struct slu_acts from = *x;
        if (!tok) {
            from.q += i * x->q_stride;
            from.d += i * x->g_stride;
            from.s += i * x->g_stride;
            from.sums += 2 * i * x->g_stride;
        }
        operand.has_kind = slu_avx512_tiles_fill(kind_of(k), &operand.tiles, n_groups,
                                                 is_lane_by_lane(n_groups, operand.n), offset_of(k),
                                                 &from, tok ? tok + i : NULL, operand.n);
        for (size_t row = lo; row < hi;) {
            size_t end = row + rows_of(k, n_groups, operand.n, hi - row);
            panel_rows_mul(few_mul, wide_mul, y + i * y_stride, y_stride, w, row, end, &operand,
                           table);
            row = end;
        }
    }
}

#define QUANT_MUL(name, ...)                                                                       \
    static __attribute__((noinline)) void few_##name(struct panel_work *work, size_t row_bytes,    \
                                                     const struct operand *x,                      \
                                                     const struct panel_out *out, __m512i table)   \
    {                                                                                              \
        few_rows_mul((struct kind){__VA_ARGS__}, work, row_bytes, x, out, table);                  \
    }                                                                                              \
    static __attribute__((noinline)) void wide_##name(struct panel_work *work, size_t row_bytes,   \
                                                      const struct operand *x,                     \
                                                      const struct panel_out *out, __m512i table)  \
    {                                                                                              \
        const struct kind k = {__VA_ARGS__};                                                       \
        if (has_high_panels(k) && work->panel.n_regs == 3) {                                       \
            wide_rows_mul(k, 3, work, row_bytes, x, out, table);                                   \
        } else {                                                                                   \
            wide_rows_mul(k, 2, work, row_bytes, x, out, table);                                   \
        }                                                                                          \
    }                                                                                              \
    void slu_avx512_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,    \
                               uint32_t hi, const struct slu_acts *x, const uint32_t *tok,         \
                               uint32_t n)                                                         \
    {                                                                                              \
        mul_quant((struct kind){__VA_ARGS__}, few_##name, wide_##name, y, y_stride, w, lo, hi, x,  \
                  tok, n);                                                                         \
    }

QUANT_MUL(q8_0, .bits = 8, .is_signed = true, .scale = SLU_SCALE_F16)
QUANT_MUL(q4_0, .bits = 4, .offset = 8, .scale = SLU_SCALE_F16)
QUANT_MUL(q4_1, .bits = 4, .scale = SLU_SCALE_F16, .min = SLU_MIN_F16)
QUANT_MUL(q5_0, .bits = 5, .offset = 16, .scale = SLU_SCALE_F16)
QUANT_MUL(q5_1, .bits = 5, .scale = SLU_SCALE_F16, .min = SLU_MIN_F16)
QUANT_MUL(q4_k, .bits = 4, .scale = SLU_SCALE_U8_SUPER, .min = SLU_MIN_U8_SUPER)
QUANT_MUL(q5_k, .bits = 5, .scale = SLU_SCALE_U8_SUPER, .min = SLU_MIN_U8_SUPER)
QUANT_MUL(q6_k, .bits = 6, .is_halved = true, .offset = 32, .scale = SLU_SCALE_I8_SUPER)
QUANT_MUL(iq4_nl, .bits = 4, .has_table = true, .is_signed = true, .scale = SLU_SCALE_F16)
QUANT_MUL(mxfp4, .bits = 4, .has_table = true, .offset = 12, .scale = SLU_SCALE_E8M0)
