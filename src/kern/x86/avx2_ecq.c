/* Products of the q*e formats with AVX2. */
#include "kern/x86/avx2.h"

ALWAYS_INLINE __m256i dot_quads(const __m256i a[2], const __m256i b[2]);

#include "kern/x86/ecq256.inc"

/* maddubs's sums of two fit 16 bits, two of them may not. */
ALWAYS_INLINE __m256i dot_quads(const __m256i a[2], const __m256i b[2])
{
    const __m256i ones = _mm256_set1_epi16(1);
    return _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(a[0], b[0]), ones),
                            _mm256_madd_epi16(_mm256_maddubs_epi16(a[1], b[1]), ones));
}

ECQ256_MULS(avx2)
