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
    for (int k = 0; k < n; k++) {
        at[k] = (k ? at[k - 1] : 0) + gaps[k];
    }
    if (at[n - 1] >= cols) {
        *ret = _mm_setzero_ps();
        return false;
    }
    __m128 by = _mm_load_ss(x + at[0]);
    by = n > 1 ? _mm_insert_ps(by, _mm_load_ss(x + at[1]), 0x10) : by;
    by = n > 2 ? _mm_insert_ps(by, _mm_load_ss(x + at[2]), 0x20) : by;
    by = n > 3 ? _mm_insert_ps(by, _mm_load_ss(x + at[3]), 0x30) : by;
    uint32_t word; /* beyond the last row's values there is the head */
    memcpy(&word, values, sizeof word);
    __m128i integers = _mm_cvtepi8_epi32(_mm_cvtsi32_si128((int)word));
    *ret = _mm_fmadd_ps(_mm_cvtepi32_ps(integers), by, _mm_setzero_ps());
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
