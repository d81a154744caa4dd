/*
 * Sums of the escapes of q*e rows for many tokens, with AVX-512: 16 tokens lie side by side, so
 * that an escape is found once for all of them and costs one fma.
 */
#include "kern/x86/avx512_ecq.h"
#include "kern/x86/avx512_gemm.h"

#define TOKENS 16

/* Of up to 16 tokens, of which the last stands for those that are missing. */
struct columns {
    float at[ECQ_ESCAPE_COLS_MAX][TOKENS] __attribute__((aligned(64)));
};

static void fill(struct columns *columns, uint32_t cols, const struct slu_acts *x,
                 const uint32_t *tok, uint32_t first, uint32_t n)
{
    const float *from[TOKENS];
    for (uint32_t t = 0; t < TOKENS; t++) {
        size_t i = first + (t < n ? t : n - 1);
        from[t] = x->x + (tok ? tok[i] : i) * x->x_stride;
    }
    for (size_t c = 0; c < cols; c += 16) {
        __m512i v[TOKENS];
        for (int t = 0; t < TOKENS; t++) {
            v[t] = _mm512_loadu_si512(from[t] + c);
        }
        transpose16(v);
        for (size_t i = 0; i < 16; i++) {
            _mm512_store_si512(columns->at[c + i], v[i]);
        }
    }
}

/* slu_ecq_escapes of all tokens. */
ALWAYS_INLINE __m512 sum_row(const uint8_t *gaps, const int8_t *values, size_t n,
                             const struct columns *columns, size_t cols)
{
    __m512 t[8];
    for (int k = 0; k < 8; k++) {
        t[k] = _mm512_setzero_ps();
    }
    size_t column = 0;
    for (size_t i = 0; column < cols; i += 8) {
#pragma GCC unroll 8
        for (size_t k = 0; k < 8; k++) {
            column += i + k < n ? gaps[i + k] : cols;
            if (column >= cols) {
                break; /* that was the last, or the row ends before it */
            }
            __m512 by = _mm512_set1_ps((float)values[i + k]);
            t[k] = _mm512_fmadd_ps(by, _mm512_load_ps(columns->at[column]), t[k]);
        }
    }
    return add_lanes(t);
}

void slu_avx512_ecq_escapes(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                            uint32_t hi, const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    const size_t n_escapes = w->at.escapes_row;
    const uint8_t *gaps = w->data + w->at.gaps;
    const int8_t *values = (const int8_t *)w->data + w->at.values;
    struct columns columns;
    for (uint32_t i = 0; i < n && n_escapes > 0; i += TOKENS) {
        uint32_t some = n - i < TOKENS ? n - i : TOKENS;
        fill(&columns, w->cols, x, tok, i, some);
        for (size_t row = lo; row < hi; row += GEMM_LANES) {
            size_t end = hi - row < GEMM_LANES ? hi : row + GEMM_LANES;
            __m512i sums[GEMM_LANES];
            for (size_t r = 0; r < GEMM_LANES; r++) {
                size_t at = (row + r < end ? row + r : end - 1) * n_escapes;
                sums[r] = _mm512_castps_si512(
                    sum_row(gaps + at, values + at, n_escapes, &columns, w->cols));
            }
            transpose16(sums);
            const __mmask16 mask = (__mmask16)((1u << (end - row)) - 1);
            for (size_t t = 0; t < some; t++) {
                _mm512_mask_storeu_ps(y + (i + t) * y_stride + row, mask,
                                      _mm512_castsi512_ps(sums[t]));
            }
        }
    }
}
