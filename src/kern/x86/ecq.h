/*
 * Products of the q*e formats with x86's instruction sets.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_KERN_X86_ECQ_H
#define SLU_KERN_X86_ECQ_H

#include "kern/c/ecq.h"
#include "kern/x86/avx2.h"

#define ECQ_MUL_DECLARE(isa, name)                                                                 \
    void slu_##isa##_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,   \
                                uint32_t hi, const struct slu_acts *x, const uint32_t *tok,        \
                                uint32_t n);
ECQ_MUL_DECLARE(avx2, q3e)
ECQ_MUL_DECLARE(avx2, q4e)
ECQ_MUL_DECLARE(avx2, q5e)
ECQ_MUL_DECLARE(avx2, q6e)
ECQ_MUL_DECLARE(avx512, q3e)
ECQ_MUL_DECLARE(avx512, q4e)
ECQ_MUL_DECLARE(avx512, q5e)
ECQ_MUL_DECLARE(avx512, q6e)

#define ECQ_QUADS_MAX 128u /* of 128 columns; wider matrices are AVX2's */

/* y[lo .. hi-1] = the rows of a q3e matrix that isn't wider, times token t. */
void slu_avx512_mul_q3e_one(float *y, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                            const struct slu_acts *x, size_t t);

/* vgf2p8affineqb's matrices, of which byte 7 - i makes bit i: one that takes bit `from` of a byte
 * to bit `to`, and the next bits too, two in all, with nothing else in the byte. */
#define MOVE_BIT(from, to)  (1ull << (8 * (7 - (to)) + (from)))
#define MOVE_PAIR(from, to) (MOVE_BIT(from, to) | MOVE_BIT((from) + 1, (to) + 1))

/* slu_ecq_finish, with eight escapes at a time: their columns are sums of gaps up to each. What is
 * read past the end of a row's gaps and values lies in the planes that follow, and is masked. */
ALWAYS_INLINE float ecq_finish(const struct slu_mat *w, const struct slu_ecq_row *row, float sum,
                               const float *x)
{
    size_t n = w->at.escapes_row;
    if (n == 0) {
        return row->scale * sum;
    }
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i cols = _mm256_set1_epi32((int)w->cols);
    __m256i before = _mm256_setzero_si256();
    __m256 lanes = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += 8) {
        __m128i gaps = _mm_loadl_epi64((const __m128i *)(const void *)(row->gaps + i));
        __m128i values = _mm_loadl_epi64((const __m128i *)(const void *)(row->values + i));
        __m128i at = _mm_cvtepu8_epi16(gaps);
        at = _mm_add_epi16(at, _mm_slli_si128(at, 2));
        at = _mm_add_epi16(at, _mm_slli_si128(at, 4));
        at = _mm_add_epi16(at, _mm_slli_si128(at, 8));
        __m256i column = _mm256_add_epi32(before, _mm256_cvtepu16_epi32(at));
        before = _mm256_add_epi32(before,
                                  _mm256_broadcastd_epi32(_mm_sad_epu8(gaps, _mm_setzero_si128())));
        __m256i mask = _mm256_and_si256(_mm256_cmpgt_epi32(cols, column),
                                        _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n - i)), lane));
        __m256 there = _mm256_castsi256_ps(mask);
        __m256 from = _mm256_mask_i32gather_ps(_mm256_setzero_ps(), x, column, there, 4);
        __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values));
        lanes = _mm256_blendv_ps(lanes, _mm256_fmadd_ps(value, from, lanes), there);
    }
    return row->scale * fmaf(slu_ecq_head_of(w)->escape, lanes_sum(lanes), sum);
}

#endif
