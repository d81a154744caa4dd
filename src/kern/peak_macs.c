/* The loops are in assembly, or a compiler would keep the accumulators in memory, or do the sums
 * itself. They are many enough to hide the latency of the instruction; nothing is loaded. */
#include "kern/peak.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define ACC(c) [acc##c] "+v"(acc[c])

#define AVX2_STEP(c)                                                                               \
    "vpmaddubsw %[b], %[a], %[tmp" #c "]\n\t"                                                      \
    "vpmaddwd %[ones], %[tmp" #c "], %[tmp" #c "]\n\t"                                             \
    "vpaddd %[tmp" #c "], %[acc" #c "], %[acc" #c "]\n\t"
#define TMP(c) [tmp##c] "=&x"(tmp[c])

__attribute__((target("avx2"))) static uint64_t avx2(uint64_t rounds)
{
    __m256i acc[6] = {0}, tmp[6], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
    __m256i ones = _mm256_set1_epi16(1);
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile(AVX2_STEP(0) AVX2_STEP(1) AVX2_STEP(2) AVX2_STEP(3) AVX2_STEP(4)
                             AVX2_STEP(5)
                         : ACC(0), ACC(1), ACC(2), ACC(3), ACC(4), ACC(5), TMP(0), TMP(1), TMP(2),
                           TMP(3), TMP(4), TMP(5)
                         : [a] "x"(a), [b] "x"(b), [ones] "x"(ones));
    }
    return UINT64_C(32) * 6 * rounds;
}

#define EVEX_DOT(c) "vpdpbusd %[b], %[a], %[acc" #c "]\n\t"

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) static uint64_t
avx512(uint64_t rounds)
{
    __m512i acc[12] = {0}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile(EVEX_DOT(0) EVEX_DOT(1) EVEX_DOT(2) EVEX_DOT(3) EVEX_DOT(4) EVEX_DOT(5)
                             EVEX_DOT(6) EVEX_DOT(7) EVEX_DOT(8) EVEX_DOT(9) EVEX_DOT(10)
                                 EVEX_DOT(11)
                         : ACC(0), ACC(1), ACC(2), ACC(3), ACC(4), ACC(5), ACC(6), ACC(7), ACC(8),
                           ACC(9), ACC(10), ACC(11)
                         : [a] "v"(a), [b] "v"(b));
    }
    return UINT64_C(64) * 12 * rounds;
}

#define VEX_DOT(c) "%{vex%} vpdpbusd %[b], %[a], %[acc" #c "]\n\t"

__attribute__((target("avx2"))) static uint64_t avxvnni(uint64_t rounds)
{
    __m256i acc[12] = {0}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile(VEX_DOT(0) VEX_DOT(1) VEX_DOT(2) VEX_DOT(3) VEX_DOT(4) VEX_DOT(5)
                             VEX_DOT(6) VEX_DOT(7) VEX_DOT(8) VEX_DOT(9) VEX_DOT(10) VEX_DOT(11)
                         : ACC(0), ACC(1), ACC(2), ACC(3), ACC(4), ACC(5), ACC(6), ACC(7), ACC(8),
                           ACC(9), ACC(10), ACC(11)
                         : [a] "x"(a), [b] "x"(b));
    }
    return UINT64_C(32) * 12 * rounds;
}

uint64_t slu_peak_macs(const char *kernels, uint64_t rounds)
{
    if (strcmp(kernels, "avx512") == 0) {
        return avx512(rounds);
    }
    if (strcmp(kernels, "avxvnni") == 0) {
        return avxvnni(rounds);
    }
    return strcmp(kernels, "avx2") == 0 ? avx2(rounds) : 0;
}

#elif defined(__aarch64__)
#include <arm_neon.h>

#define ACC(c) [acc##c] "+w"(acc[c])
#define TWELVE                                                                                     \
    ACC(0), ACC(1), ACC(2), ACC(3), ACC(4), ACC(5), ACC(6), ACC(7), ACC(8), ACC(9), ACC(10), ACC(11)
#define SDOT(c)  "sdot %[acc" #c "].4s, %[a].16b, %[b].16b\n\t"
#define SMMLA(c) "smmla %[acc" #c "].4s, %[a].16b, %[b].16b\n\t"

__attribute__((target("arch=armv8.2-a+dotprod"))) static uint64_t dotprod(uint64_t rounds)
{
    int32x4_t acc[12] = {0};
    int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-5);
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile(SDOT(0) SDOT(1) SDOT(2) SDOT(3) SDOT(4) SDOT(5) SDOT(6) SDOT(7) SDOT(8)
                             SDOT(9) SDOT(10) SDOT(11)
                         : TWELVE
                         : [a] "w"(a), [b] "w"(b));
    }
    return UINT64_C(16) * 12 * rounds;
}

__attribute__((target("arch=armv8.2-a+i8mm"))) static uint64_t i8mm(uint64_t rounds)
{
    int32x4_t acc[12] = {0};
    int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-5);
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile(SMMLA(0) SMMLA(1) SMMLA(2) SMMLA(3) SMMLA(4) SMMLA(5) SMMLA(6) SMMLA(7)
                             SMMLA(8) SMMLA(9) SMMLA(10) SMMLA(11)
                         : TWELVE
                         : [a] "w"(a), [b] "w"(b));
    }
    return UINT64_C(32) * 12 * rounds;
}

uint64_t slu_peak_macs(const char *kernels, uint64_t rounds)
{
    if (strcmp(kernels, "i8mm") == 0) {
        return i8mm(rounds);
    }
    return strcmp(kernels, "dotprod") == 0 ? dotprod(rounds) : 0;
}

#else

uint64_t slu_peak_macs(const char *kernels, uint64_t rounds)
{
    (void)kernels;
    (void)rounds;
    return 0;
}
#endif
