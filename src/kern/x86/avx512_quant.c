/* Quantized products with AVX-512 VNNI: one function for each format, out of the two templates. */
#include "base/pool.h"
#include "kern/x86/avx512_pack.h"
#include "kern/x86/avx512_vec.h"

_Static_assert(sizeof(struct tiles) + sizeof(struct panel) + sizeof(struct panel_sums) +
                       sizeof(struct panel_rows) <=
                   SLU_STACK_BYTES / 2,
               "what a product keeps on its stack");

ALWAYS_INLINE enum panel_kind kind_of(const struct kind k)
{
    return k.is_halved                 ? PANEL_HALVED
           : k.min != SLU_MIN_NONE     ? PANEL_MIN
           : k.scale == SLU_SCALE_E8M0 ? PANEL_SHIFT
                                       : PANEL_OFFSET;
}

/* The tokens of a product and their tiles. */
struct operand {
    const struct slu_acts *x;
    const uint32_t *tok;
    uint32_t n;
    struct tiles *tiles; /* filled beforehand if all groups fit */
    bool has_kind;       /* what slu_avx512_tiles_fill returned */
};

ALWAYS_INLINE void fill_tiles(const struct kind k, struct operand *to, uint32_t g,
                              uint32_t n_groups)
{
    uint32_t some = n_groups - g < TILE_GROUPS ? n_groups - g : TILE_GROUPS;
    to->has_kind =
        slu_avx512_tiles_fill(kind_of(k), to->tiles, g, some, offset_of(k), to->x, to->tok, to->n);
}

/* The kind of a panel's product with the tiles. */
ALWAYS_INLINE enum panel_kind kind_with(const struct kind k, const struct panel *panel,
                                        uint32_t n_groups, const struct operand *to)
{
    if (kind_of(k) != PANEL_SHIFT) {
        return kind_of(k);
    }
    __m512 least = _mm512_set1_ps(1), most = least;
    for (uint32_t i = 0; i < n_groups; i++) {
        for (int h = 0; h < panel->n_regs; h++) {
            __m512 scales = _mm512_load_ps(panel->scales[i] + GEMM_LANES * h);
            least = _mm512_min_ps(least, scales);
            most = _mm512_max_ps(most, scales);
        }
    }
    bool is_near =
        _mm512_reduce_min_ps(least) >= SHIFT_LEAST && _mm512_reduce_max_ps(most) <= SHIFT_MOST;
    return to->has_kind && is_near ? PANEL_SHIFT : PANEL_OFFSET;
}

/* Whether panels of three registers are any good: with minimums or halves registers run out. */
ALWAYS_INLINE bool has_high_panels(const struct kind k)
{
    return kind_of(k) == PANEL_OFFSET || kind_of(k) == PANEL_SHIFT;
}

/* Rows of the next panel, of so many that are left. The more there are, the fewer loads of
 * activations a product takes; but where the lanes' sums stay in registers these run out, and few
 * tokens don't make up for a first cache that is full of weights. A last panel has two registers at
 * least: what would leave it one takes only two itself. */
ALWAYS_INLINE size_t rows_of(const struct kind k, uint32_t n_groups, uint32_t n, size_t left)
{
    const size_t two = 2 * GEMM_LANES, rest = left % GEMM_ROWS;
    if (!has_high_panels(k) || n_groups <= GEMM_GROUPS || n < GEMM_TOKENS_MANY ||
        (rest > 0 && rest <= GEMM_LANES)) {
        return left < two ? left : two;
    }
    return left < GEMM_ROWS ? left : GEMM_ROWS;
}

/* Rows lo .. hi-1, at most GEMM_ROWS, times all tokens. */
ALWAYS_INLINE void panel_rows_mul(const struct kind k, float *y, size_t y_stride,
                                  const struct slu_mat *w, size_t lo, size_t hi, struct operand *to,
                                  __m512i table)
{
    struct panel panel;
    struct panel_sums sums;
    struct panel_rows rows;
    uint32_t n_groups = w->cols / 32;
    const struct panel_out out = {y + lo, y_stride, (uint32_t)(hi - lo)};
    panel.n_regs = hi - lo > 2 * GEMM_LANES ? 3 : 2;
    const uint32_t n_rows = GEMM_LANES * (uint32_t)panel.n_regs;
    panel_rows_init(&rows, w, lo, hi, n_rows);
    for (uint32_t g = 0; g < n_groups; g += GEMM_GROUPS) {
        uint32_t some = n_groups - g < GEMM_GROUPS ? n_groups - g : GEMM_GROUPS;
        if (n_groups > TILE_GROUPS && g % TILE_GROUPS == 0) {
            fill_tiles(k, to, g, n_groups);
        }
        if (has_high_panels(k) && panel.n_regs == 3) {
            pack(k, 3, &panel, &rows, g, some, table);
        } else {
            pack(k, 2, &panel, &rows, g, some, table);
        }
        bool is_last = g + some == n_groups;
        uint32_t after = is_last ? n_groups : n_groups - g - some;
        const struct panel_next next = {
            .codes = rows.codes,
            .n_rows = n_rows,
            .ahead = is_last ? n_rows * w->at.codes_row : (g + some) * bytes_of(k),
            .bytes = (after < GEMM_GROUPS ? after : GEMM_GROUPS) * bytes_of(k),
        };
        slu_avx512_panel_mul(kind_with(k, &panel, some, to), &sums, &panel, g, some, to->tiles,
                             to->n, &next, is_last ? &out : NULL);
    }
}

ALWAYS_INLINE void mul_quant(const struct kind k, float *y, size_t y_stride,
                             const struct slu_mat *w, uint32_t lo, uint32_t hi,
                             const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    if (n < GEMM_TOKENS_MIN) {
        mul_few(k, y, y_stride, w, lo, hi, x, tok, n);
        return;
    }
    __m512i table = table512_of(k, w);
    struct tiles tiles;
    for (uint32_t i = 0; i < n; i += GEMM_TOKENS_MAX) {
        uint32_t some = n - i < GEMM_TOKENS_MAX ? n - i : GEMM_TOKENS_MAX;
        struct slu_acts from = *x;
        if (!tok) {
            from.q += i * x->q_stride;
            from.d += i * x->g_stride;
            from.s += i * x->g_stride;
            from.sums += 2 * i * x->g_stride;
        }
        struct operand to = {&from, tok ? tok + i : NULL, some, &tiles, false};
        if (w->cols / 32 <= TILE_GROUPS) {
            fill_tiles(k, &to, 0, w->cols / 32);
        }
        for (size_t row = lo; row < hi;) {
            size_t end = row + rows_of(k, w->cols / 32, some, hi - row);
            panel_rows_mul(k, y + i * y_stride, y_stride, w, row, end, &to, table);
            row = end;
        }
    }
}

#define QUANT_MUL(name, ...)                                                                       \
    void slu_avx512_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,    \
                               uint32_t hi, const struct slu_acts *x, const uint32_t *tok,         \
                               uint32_t n)                                                         \
    {                                                                                              \
        mul_quant((struct kind){__VA_ARGS__}, y, y_stride, w, lo, hi, x, tok, n);                  \
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
