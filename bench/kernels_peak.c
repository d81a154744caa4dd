/* The accumulators are many enough to hide the latency of the instruction, and nothing is loaded.
 * An empty asm statement for each of them keeps the compiler from doing the sums itself. */
#include "bench/kernels_peak.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define CHAINS 10

__attribute__((target("avx2"))) static double avx2(uint64_t rounds)
{
    __m256i acc[CHAINS], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int c = 0; c < CHAINS; c++) {
        acc[c] = _mm256_setzero_si256();
    }
    for (uint64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 10
        for (int c = 0; c < CHAINS; c++) {
            __asm__ volatile("" : "+x"(a));
            __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones);
            acc[c] = _mm256_add_epi32(acc[c], pairs);
            __asm__ volatile("" : "+x"(acc[c]));
        }
    }
    return 32.0 * CHAINS * (double)rounds;
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) static double
avx512(uint64_t rounds)
{
    __m512i acc[CHAINS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
    for (int c = 0; c < CHAINS; c++) {
        acc[c] = _mm512_setzero_si512();
    }
    for (uint64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 10
        for (int c = 0; c < CHAINS; c++) {
            acc[c] = _mm512_dpbusd_epi32(acc[c], a, b);
            __asm__ volatile("" : "+v"(acc[c]));
        }
    }
    return 64.0 * CHAINS * (double)rounds;
}

#define VEX_DOT(c) "%{vex%} vpdpbusd %[b], %[a], %[acc" #c "]\n\t"

/* In assembly, since compilers know the short encoding by different names. */
__attribute__((target("avx2"))) static double avx_vnni(uint64_t rounds)
{
    __m256i acc[8], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
    for (int c = 0; c < 8; c++) {
        acc[c] = _mm256_setzero_si256();
    }
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile(
            VEX_DOT(0) VEX_DOT(1) VEX_DOT(2) VEX_DOT(3) VEX_DOT(4) VEX_DOT(5) VEX_DOT(6) VEX_DOT(7)
            : [acc0] "+x"(acc[0]), [acc1] "+x"(acc[1]), [acc2] "+x"(acc[2]), [acc3] "+x"(acc[3]),
              [acc4] "+x"(acc[4]), [acc5] "+x"(acc[5]), [acc6] "+x"(acc[6]), [acc7] "+x"(acc[7])
            : [a] "x"(a), [b] "x"(b));
    }
    return 32.0 * 8 * (double)rounds;
}

double peak_run(const char *name, uint64_t rounds)
{
    if (strcmp(name, "avx512") == 0) {
        return avx512(rounds);
    }
    if (strcmp(name, "avxvnni") == 0) {
        return avx_vnni(rounds);
    }
    return strcmp(name, "avx2") == 0 ? avx2(rounds) : 0;
}

#elif defined(__aarch64__)
#include <arm_neon.h>

#define CHAINS 12

__attribute__((target("arch=armv8.2-a+dotprod"))) static double dotprod(uint64_t rounds)
{
    int32x4_t acc[CHAINS];
    int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-5);
    for (int c = 0; c < CHAINS; c++) {
        acc[c] = vdupq_n_s32(0);
    }
    for (uint64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) {
            acc[c] = vdotq_s32(acc[c], a, b);
            __asm__ volatile("" : "+w"(acc[c]));
        }
    }
    return 16.0 * CHAINS * (double)rounds;
}

__attribute__((target("arch=armv8.2-a+i8mm"))) static double i8mm(uint64_t rounds)
{
    int32x4_t acc[CHAINS];
    int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-5);
    for (int c = 0; c < CHAINS; c++) {
        acc[c] = vdupq_n_s32(0);
    }
    for (uint64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) {
            acc[c] = vmmlaq_s32(acc[c], a, b);
            __asm__ volatile("" : "+w"(acc[c]));
        }
    }
    return 32.0 * CHAINS * (double)rounds;
}

double peak_run(const char *name, uint64_t rounds)
{
    if (strcmp(name, "i8mm") == 0) {
        return i8mm(rounds);
    }
    return strcmp(name, "dotprod") == 0 ? dotprod(rounds) : 0;
}

#else

double peak_run(const char *name, uint64_t rounds)
{
    (void)name;
    (void)rounds;
    return 0;
}
#endif
