/* Quantized products with AVX-512 VNNI: one function for each format, out of the two templates. */
#include "kern/x86/avx512_pack.h"
#include "kern/x86/avx512_vec.h"

/* The lanes of n tokens added up, for n_rows rows. */
static void store_sums(float *y, size_t y_stride, uint32_t n_rows, const struct panel_sums *sums,
                       uint32_t n)
{
    __mmask16 mask = (__mmask16)((1u << n_rows) - 1);
    for (uint32_t i = 0; i < n; i++) {
        __m512 t[8];
        for (int l = 0; l < 8; l++) {
            t[l] = _mm512_load_ps(sums->at[i][l]);
        }
        __m512 a = _mm512_add_ps(_mm512_add_ps(t[0], t[4]), _mm512_add_ps(t[2], t[6]));
        __m512 b = _mm512_add_ps(_mm512_add_ps(t[1], t[5]), _mm512_add_ps(t[3], t[7]));
        _mm512_mask_storeu_ps(y + i * y_stride, mask, _mm512_add_ps(a, b));
    }
}

/* Rows lo .. hi-1, at most 16, times n tokens. */
ALWAYS_INLINE void panel_rows_mul(const struct kind k, float *y, size_t y_stride,
                                  const struct slu_mat *w, size_t lo, size_t hi,
                                  const struct slu_acts *x, const uint32_t *tok, uint32_t n,
                                  __m512i table)
{
    struct panel panel;
    struct panel_sums sums;
    struct panel_rows rows;
    enum panel_kind kind = k.is_halved             ? PANEL_HALVED
                           : k.min == SLU_MIN_NONE ? PANEL_OFFSET
                                                   : PANEL_MIN;
    uint32_t n_groups = w->cols / 32;
    panel_rows_init(&rows, w, lo, hi);
    memset(&sums, 0, n * sizeof sums.at[0]);
    for (uint32_t g = 0; g < n_groups; g += GEMM_GROUPS) {
        uint32_t some = n_groups - g < GEMM_GROUPS ? n_groups - g : GEMM_GROUPS;
        pack(k, &panel, &rows, g, some, table);
        slu_avx512_panel_mul(kind, &sums, &panel, g, some, offset_of(k), x, tok, n);
    }
    store_sums(y + lo, y_stride, (uint32_t)(hi - lo), &sums, n);
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
    for (uint32_t i = 0; i < n; i += GEMM_TOKENS_MAX) {
        uint32_t some = n - i < GEMM_TOKENS_MAX ? n - i : GEMM_TOKENS_MAX;
        struct slu_acts from = *x;
        if (!tok) {
            from.q += i * x->q_stride;
            from.d += i * x->g_stride;
            from.s += i * x->g_stride;
            from.sums += 2 * i * x->g_stride;
        }
        for (size_t row = lo; row < hi; row += GEMM_ROWS) {
            size_t end = hi - row < GEMM_ROWS ? hi : row + GEMM_ROWS;
            panel_rows_mul(k, y + i * y_stride, y_stride, w, row, end, &from, tok ? tok + i : NULL,
                           some, table);
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
