/* Vector operations with AVX-512, those that gain by it. */
#include "kern/x86/avx512.h"

/* Up to 8 numbers, those that are there. */
ALWAYS_INLINE void add8(double *sum, __m512d factor, const float *x, __mmask8 there)
{
    const __m512d shift = _mm512_set1_pd(0x1.8p+20);
    __m512d term = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(there, x));
    /* The product of two floats is exact, so that it is the sum alone that is rounded. */
    term = _mm512_sub_pd(_mm512_fmadd_pd(factor, term, shift), shift);
    term = _mm512_add_pd(_mm512_maskz_loadu_pd(there, sum), term);
    _mm512_mask_storeu_pd(sum, there, term);
}

void slu_avx512_add_grid(double *sum, float a, const float *x, uint32_t n)
{
    const __m512d factor = _mm512_set1_pd(a);
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        add8(sum + i, factor, x + i, 0xff);
    }
    add8(sum + i, factor, x + i, (__mmask8)((1u << (n - i)) - 1));
}
