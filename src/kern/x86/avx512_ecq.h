/*
 * What the AVX-512 files of the q*e formats share: eight rows' sums become products at once. Only
 * they may include it, compiled for those instructions: everything here is inlined.
 */
#ifndef SLU_KERN_X86_AVX512_ECQ_H
#define SLU_KERN_X86_AVX512_ECQ_H

#include "kern/x86/avx2.h"
#include "kern/x86/ecq.h"

#define ECQ_BATCH 8 /* rows that are finished together, as many as floats in 256 bits */

/* (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)) of eight rows, t = lanes 0 to 7 plus 8 to 15. */
ALWAYS_INLINE __m256 ecq_add_lanes(const float lanes[ECQ_BATCH][16])
{
    __m256 t[ECQ_BATCH], fours[4], twos[2];
    for (int r = 0; r < 8; r++) {
        t[r] = _mm256_add_ps(_mm256_load_ps(lanes[r]), _mm256_load_ps(lanes[r] + 8));
    }
    for (int r = 0; r < 4; r++) { /* rows r and r + 4 side by side */
        fours[r] = _mm256_add_ps(_mm256_permute2f128_ps(t[r], t[r + 4], 0x20),
                                 _mm256_permute2f128_ps(t[r], t[r + 4], 0x31));
    }
    for (int r = 0; r < 2; r++) {
        __m256d even = _mm256_castps_pd(fours[2 * r]), odd = _mm256_castps_pd(fours[2 * r + 1]);
        twos[r] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(even, odd)),
                                _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd)));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(twos[0], twos[1], 0x88),
                         _mm256_shuffle_ps(twos[0], twos[1], 0xdd));
}

/* slu_row_scale of eight. */
ALWAYS_INLINE __m256 ecq_row_scales(float unit, __m128i bytes)
{
    __m256i e = _mm256_cvtepu8_epi32(bytes);
    __m256i powers = _mm256_sub_epi32(_mm256_set1_epi32(127), _mm256_srli_epi32(e, 4));
    __m256 octaves = _mm256_castsi256_ps(_mm256_slli_epi32(powers, 23));
    __m512 table = _mm512_loadu_ps(slu_row_sixteenths);
    __m256 sixteenths =
        _mm512_castps512_ps256(_mm512_permutexvar_ps(_mm512_castsi256_si512(e), table));
    __mmask8 is_some = _mm256_cmpneq_epi32_mask(e, _mm256_set1_epi32(255));
    __m256 scales = _mm256_mul_ps(_mm256_set1_ps(unit), _mm256_mul_ps(sixteenths, octaves));
    return _mm256_maskz_mov_ps(is_some, scales);
}

/* y of n rows from row `first` on, no more than eight, from the sums over their codes and, in y,
 * over their escapes. */
ALWAYS_INLINE void ecq_finish_rows(float *y, const struct slu_mat *w, size_t first, size_t n,
                                   __m256 sums)
{
    const struct slu_ecq_head *head = slu_ecq_head_of(w);
    const __mmask8 mask = (__mmask8)((1u << n) - 1);
    if (w->at.escapes_row > 0) {
        __m256 escapes = _mm256_maskz_loadu_ps(mask, y);
        sums = _mm256_fmadd_ps(_mm256_set1_ps(head->escape), escapes, sums);
    }
    __m128i e = _mm_maskz_loadu_epi8(mask, w->data + w->at.scales + first);
    _mm256_mask_storeu_ps(y, mask, _mm256_mul_ps(ecq_row_scales(head->unit, e), sums));
}

#endif
