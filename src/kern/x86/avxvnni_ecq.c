/* Products of the q*e formats with AVX-VNNI. */
#include "kern/x86/avxvnni.h"

ALWAYS_INLINE __m256i dot_quads(const __m256i a[2], const __m256i b[2]);

#include "kern/x86/ecq256.inc"

ALWAYS_INLINE __m256i dot_quads(const __m256i a[2], const __m256i b[2])
{
    return DPBUSD(DPBUSD(_mm256_setzero_si256(), a[0], b[0]), a[1], b[1]);
}

#define ECQ_MUL(name, bits)                                                                        \
    ECQ_MUL_VNNI(name)                                                                             \
    {                                                                                              \
        mul_ecq(bits, y, y_stride, w, lo, hi, x, tok, n);                                          \
    }

ECQ_MUL(q3e, 3)
ECQ_MUL(q4e, 4)
ECQ_MUL(q5e, 5)
ECQ_MUL(q6e, 6)
