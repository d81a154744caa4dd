/*
 * Sums of the escapes of q*e rows with AVX2, for AVX-512 too. Columns are added up by the plain
 * registers and the activations there loaded one by one: 8 cycles for eight on a Zen 4, where sums
 * and a gather in the vector units take 16.
 */
#include "kern/x86/avx2.h"
#include "kern/x86/ecq.h"

/* The columns of n escapes, which lie the gaps on from `column`; returns the last. */
ALWAYS_INLINE size_t find_columns(const uint8_t *gaps, const int n, size_t column, size_t at[])
{
    for (int k = 0; k < n; k++) {
        column += gaps[k];
        at[k] = column;
    }
    return column;
}

/* x at the first n of four columns, the other lanes being 0. */
ALWAYS_INLINE __m128 load_four(const float *x, const size_t at[4], const int n)
{
    __m128 four = _mm_load_ss(x + at[0]);
    four = n > 1 ? _mm_insert_ps(four, _mm_load_ss(x + at[1]), 0x10) : four;
    four = n > 2 ? _mm_insert_ps(four, _mm_load_ss(x + at[2]), 0x20) : four;
    return n > 3 ? _mm_insert_ps(four, _mm_load_ss(x + at[3]), 0x30) : four;
}

/* Adds the products of the first n of eight values with x at their columns, n being 4 or 8. */
ALWAYS_INLINE __m256 add_eight(__m256 lanes, __m128i values, const float *x, const size_t at[8],
                               const int n)
{
    __m256 by = _mm256_zextps128_ps256(load_four(x, at, 4));
    if (n > 4) {
        by = _mm256_insertf128_ps(by, load_four(x, at + 4, 4), 1);
    }
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)), by, lanes);
}

/* The last escapes of a row, n of eight, with n < 8. What isn't the row's, but of the values or the
 * head that follow, is made values of 0, and gaps of 0, which don't lead out of the row: they add 0
 * times the last column's activation. (If that isn't finite, no product of the token is.) False,
 * and no sum, if the row ends before. */
ALWAYS_INLINE bool add_last(__m256 *lanes, const uint8_t *gaps, const uint8_t *values, size_t n,
                            const float *x, size_t cols, size_t column)
{
    uint64_t words[2], mask = ~(~(uint64_t)0 << 8 * n);
    memcpy(&words[0], gaps, 8);
    memcpy(&words[1], values, 8);
    uint8_t last[8];
    for (int k = 0; k < 8; k++) {
        last[k] = (uint8_t)((words[0] & mask) >> 8 * k);
    }
    __m128i by = _mm_cvtsi64_si128((long long)(words[1] & mask));
    size_t at[8];
    if (n <= 4) {
        if (find_columns(last, 4, column, at) >= cols) {
            return false;
        }
        *lanes = add_eight(*lanes, by, x, at, 4);
    } else {
        if (find_columns(last, 8, column, at) >= cols) {
            return false;
        }
        *lanes = add_eight(*lanes, by, x, at, 8);
    }
    return true;
}

/* False, and no sum, if the row ends before its n-th escape. */
ALWAYS_INLINE bool sum_row(const uint8_t *gaps, const uint8_t *values, size_t n, const float *x,
                           size_t cols, float *ret_sum)
{
    size_t column = 0, i = 0, at[8];
    __m256 lanes = _mm256_setzero_ps();
    for (; i + 8 <= n; i += 8) {
        column = find_columns(gaps + i, 8, column, at);
        if (column >= cols) {
            return false;
        }
        __m128i by = _mm_loadl_epi64((const __m128i *)(const void *)(values + i));
        lanes = add_eight(lanes, by, x, at, 8);
    }
    if (i < n && !add_last(&lanes, gaps + i, values + i, n - i, x, cols, column)) {
        return false;
    }
    *ret_sum = lanes_sum(lanes);
    return true;
}

/* In C, for rows that end before their last escape. */
static float sum_short(const struct slu_mat *w, size_t row, const float *x)
{
    struct slu_ecq_row it = slu_ecq_row_at(w, row);
    return slu_ecq_escapes(w, &it, x);
}

/* The products of n escapes, no more than four, the other lanes being 0; false as above. */
ALWAYS_INLINE bool mul_few(const uint8_t *gaps, const uint8_t *values, const int n, const float *x,
                           size_t cols, __m128 *ret)
{
    size_t at[4];
    if (find_columns(gaps, n, 0, at) >= cols) {
        *ret = _mm_setzero_ps();
        return false;
    }
    uint32_t word; /* beyond the last row's values there is the head */
    memcpy(&word, values, sizeof word);
    __m128i integers = _mm_cvtepi8_epi32(_mm_cvtsi32_si128((int)word));
    *ret = _mm_fmadd_ps(_mm_cvtepi32_ps(integers), load_four(x, at, n), _mm_setzero_ps());
    return true;
}

/* y of rows from lo on, as many fours as there are before hi, of n escapes each: one row's alone
 * are too few to be worth a sum across lanes. Returns the first row that is left. */
ALWAYS_INLINE size_t sum_fours(float *y, const struct slu_mat *w, size_t lo, size_t hi, const int n,
                               const float *x)
{
    const uint8_t *gaps = w->data + w->at.gaps, *values = w->data + w->at.values;
    size_t row = lo;
    for (; row + 4 <= hi; row += 4) {
        __m128 t[4];
        bool are_whole = true;
        for (size_t k = 0; k < 4; k++) {
            size_t at = (row + k) * (size_t)n;
            are_whole &= mul_few(gaps + at, values + at, n, x, w->cols, &t[k]);
        }
        /* (t0+t2) and (t1+t3) of each two rows */
        __m128 a = _mm_add_ps(_mm_movelh_ps(t[0], t[1]), _mm_movehl_ps(t[1], t[0]));
        __m128 b = _mm_add_ps(_mm_movelh_ps(t[2], t[3]), _mm_movehl_ps(t[3], t[2]));
        __m128 sums = _mm_add_ps(_mm_shuffle_ps(a, b, 0x88), _mm_shuffle_ps(a, b, 0xdd));
        _mm_storeu_ps(y + row, sums);
        for (size_t k = 0; k < 4 && !are_whole; k++) {
            y[row + k] = sum_short(w, row + k, x);
        }
    }
    return row;
}

/* The same where rows have no more than four; otherwise none are done. */
static size_t sum_narrow(float *y, const struct slu_mat *w, size_t lo, size_t hi, const float *x)
{
    switch (w->at.escapes_row) {
    case 1:
        return sum_fours(y, w, lo, hi, 1, x);
    case 2:
        return sum_fours(y, w, lo, hi, 2, x);
    case 3:
        return sum_fours(y, w, lo, hi, 3, x);
    case 4:
        return sum_fours(y, w, lo, hi, 4, x);
    default:
        return lo;
    }
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
        float *out = y + i * y_stride;
        for (size_t r = sum_narrow(out, w, lo, hi, from); r < hi; r++) {
            size_t at = r * n_escapes;
            if (!sum_row(gaps + at, values + at, n_escapes, from, w->cols, &out[r])) {
                out[r] = sum_short(w, r, from);
            }
        }
    }
}
