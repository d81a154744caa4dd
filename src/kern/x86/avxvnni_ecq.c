/* Products of the q*e formats with AVX-VNNI. */
#include "kern/x86/avxvnni.h"

ALWAYS_INLINE __m256i dot_quads(const __m256i a[2], const __m256i b[2]);

#include "kern/x86/ecq256.inc"

ALWAYS_INLINE __m256i dot_quads(const __m256i a[2], const __m256i b[2])
{
    return DPBUSD(DPBUSD(_mm256_setzero_si256(), a[0], b[0]), a[1], b[1]);
}

ECQ256_MULS(SLU_VNNI256)
