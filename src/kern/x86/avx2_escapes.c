/*
 * Sums of the escapes of q*e rows with AVX2, for AVX-512 too. Columns are added up by the plain
 * registers and the activations there loaded one by one: 8 cycles for eight on a Zen 4, where sums
 * and a gather in the vector units take 16.
 */
#include "kern/x86/avx2.h"
#include "kern/x86/ecq.h"

/* x at the columns of eight escapes, which lie the gaps on from *column; that becomes the last of
 * them. False if it isn't in the row. */
ALWAYS_INLINE bool load_eight(const uint8_t gaps[8], const float *x, size_t cols, size_t *column,
                              __m256 *ret_x)
{
    size_t at[8];
    for (int k = 0; k < 8; k++) {
        at[k] = (k ? at[k - 1] : *column) + gaps[k];
    }
    *column = at[7];
    if (at[7] >= cols) {
        return false;
    }
    __m128 half[2];
    for (int h = 0; h < 2; h++) {
        half[h] = _mm_load_ss(x + at[4 * h]);
        half[h] = _mm_insert_ps(half[h], _mm_load_ss(x + at[4 * h + 1]), 0x10);
        half[h] = _mm_insert_ps(half[h], _mm_load_ss(x + at[4 * h + 2]), 0x20);
        half[h] = _mm_insert_ps(half[h], _mm_load_ss(x + at[4 * h + 3]), 0x30);
    }
    *ret_x = _mm256_set_m128(half[1], half[0]);
    return true;
}

ALWAYS_INLINE __m256 add_eight(__m256 lanes, __m128i values, __m256 x)
{
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)), x, lanes);
}

/* False, and no sum, if the row ends before its n-th escape. */
ALWAYS_INLINE bool sum_row(const uint8_t *gaps, const uint8_t *values, size_t n, const float *x,
                           size_t cols, float *ret_sum)
{
    size_t column = 0, i = 0;
    __m256 lanes = _mm256_setzero_ps(), eight;
    for (; i + 8 <= n; i += 8) {
        if (!load_eight(gaps + i, x, cols, &column, &eight)) {
            return false;
        }
        __m128i by = _mm_loadl_epi64((const __m128i *)(const void *)(values + i));
        lanes = add_eight(lanes, by, eight);
    }
    if (i < n) {
        /* What isn't the row's, but of the values or the head that follow, is made gaps and values
         * of 0: they add 0 times the last column's activation. (If that isn't finite, no product
         * of the token is.) */
        uint64_t words[2], mask = ~(uint64_t)0 >> (64 - 8 * (n - i));
        memcpy(&words[0], gaps + i, 8);
        memcpy(&words[1], values + i, 8);
        uint8_t last[8];
        for (int k = 0; k < 8; k++) {
            last[k] = (uint8_t)((words[0] & mask) >> 8 * k);
        }
        if (!load_eight(last, x, cols, &column, &eight)) {
            return false;
        }
        lanes = add_eight(lanes, _mm_cvtsi64_si128((long long)(words[1] & mask)), eight);
    }
    *ret_sum = lanes_sum(lanes);
    return true;
}

void slu_avx2_ecq_escapes(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                          uint32_t hi, const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    const size_t n_escapes = w->at.escapes_row;
    const uint8_t *gaps = w->data + w->at.gaps, *values = w->data + w->at.values;
    if (n_escapes == 0) {
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        const float *from = x->x + (tok ? tok[i] : i) * x->x_stride;
        for (size_t r = lo; r < hi; r++) {
            float *to = &y[i * y_stride + r];
            size_t at = r * n_escapes;
            if (!sum_row(gaps + at, values + at, n_escapes, from, w->cols, to)) {
                struct slu_ecq_row row = slu_ecq_row_at(w, r);
                *to = slu_ecq_escapes(w, &row, from);
            }
        }
    }
}
