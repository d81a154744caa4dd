/* Accumulators are many enough to hide an instruction's latency. An empty asm statement for each
 * keeps the compiler from working sums out by itself. */
#include "kern/peak.h"

#include <string.h>

typedef uint64_t words __attribute__((vector_size(16)));

/* Everywhere; a compiler's vectors of 16 bytes. */
static uint64_t read_plain(const char *at, size_t part_bytes, unsigned n_streams)
{
    words sums[4] = {{0}};
    for (size_t i = 0; i < part_bytes; i += 64) {
        for (unsigned s = 0; s < n_streams; s++) {
            const words *from = (const words *)(const void *)(at + s * part_bytes + i);
            for (int k = 0; k < 4; k++) {
                sums[k] ^= from[k];
            }
        }
    }
    words sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    return sum[0] ^ sum[1];
}

#if defined(__x86_64__)
#include <immintrin.h>

#define CHAINS 8

__attribute__((target("avx2"))) static uint64_t macs_avx2(uint64_t rounds)
{
    __m256i sums[CHAINS], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
    const __m256i ones = _mm256_set1_epi16(1);
    memset(sums, 0, sizeof sums);
    for (uint64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 8
        for (int c = 0; c < CHAINS; c++) {
            __asm__ volatile("" : "+x"(a)); /* or all chains would share one product */
            __m256i pairs = _mm256_maddubs_epi16(a, b);
            sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(pairs, ones));
            __asm__ volatile("" : "+x"(sums[c]));
        }
    }
    return 32 * CHAINS * rounds;
}

/* In assembly, since compilers know the instruction's shorter encoding by different names. */
__attribute__((target("avx2"))) static uint64_t macs_avxvnni(uint64_t rounds)
{
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0,
            s7 = s0;
    const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
    for (uint64_t i = 0; i < rounds; i++) {
        __asm__ volatile("%{vex%} vpdpbusd %9, %8, %0\n\t%{vex%} vpdpbusd %9, %8, %1\n\t"
                         "%{vex%} vpdpbusd %9, %8, %2\n\t%{vex%} vpdpbusd %9, %8, %3\n\t"
                         "%{vex%} vpdpbusd %9, %8, %4\n\t%{vex%} vpdpbusd %9, %8, %5\n\t"
                         "%{vex%} vpdpbusd %9, %8, %6\n\t%{vex%} vpdpbusd %9, %8, %7"
                         : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6),
                           "+x"(s7)
                         : "x"(a), "x"(b));
    }
    return 32 * 8 * rounds;
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) static uint64_t
macs_avx512(uint64_t rounds)
{
    __m512i sums[CHAINS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
    memset(sums, 0, sizeof sums);
    for (uint64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 8
        for (int c = 0; c < CHAINS; c++) {
            sums[c] = _mm512_dpbusd_epi32(sums[c], a, b);
            __asm__ volatile("" : "+v"(sums[c]));
        }
    }
    return 64 * CHAINS * rounds;
}

__attribute__((target("avx2"))) static uint64_t read_avx2(const char *at, size_t part_bytes,
                                                          unsigned n_streams)
{
    __m256i sums[4];
    memset(sums, 0, sizeof sums);
    for (size_t i = 0; i < part_bytes; i += 128) {
        for (unsigned s = 0; s < n_streams; s++) {
            const __m256i *from = (const __m256i *)(const void *)(at + s * part_bytes + i);
            for (int k = 0; k < 4; k++) {
                sums[k] = _mm256_xor_si256(sums[k], _mm256_load_si256(from + k));
            }
        }
    }
    uint64_t sum[4];
    memcpy(sum, sums, sizeof sum);
    for (int k = 1; k < 4; k++) {
        uint64_t more[4];
        memcpy(more, &sums[k], sizeof more);
        sum[0] ^= more[0] ^ more[1] ^ more[2] ^ more[3];
    }
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

uint64_t slu_peak_macs(const char *kernels, uint64_t rounds)
{
    if (strcmp(kernels, "avx512") == 0) {
        return macs_avx512(rounds);
    }
    if (strcmp(kernels, "avxvnni") == 0) {
        return macs_avxvnni(rounds);
    }
    return strcmp(kernels, "avx2") == 0 ? macs_avx2(rounds) : 0;
}

uint64_t slu_peak_read(const char *kernels, const void *data, size_t bytes, unsigned n_streams)
{
    return strncmp(kernels, "avx", 3) == 0 ? read_avx2(data, bytes / n_streams, n_streams)
                                           : read_plain(data, bytes / n_streams, n_streams);
}

#else

#if defined(__aarch64__)
#include <arm_neon.h>

#define CHAINS 8

__attribute__((target("arch=armv8.2-a+dotprod"))) static uint64_t macs_dotprod(uint64_t rounds)
{
    int32x4_t sums[CHAINS];
    const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-5);
    memset(sums, 0, sizeof sums);
    for (uint64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 8
        for (int c = 0; c < CHAINS; c++) {
            sums[c] = vdotq_s32(sums[c], a, b);
            __asm__ volatile("" : "+w"(sums[c]));
        }
    }
    return 16 * CHAINS * rounds;
}

__attribute__((target("arch=armv8.2-a+i8mm"))) static uint64_t macs_i8mm(uint64_t rounds)
{
    int32x4_t sums[CHAINS];
    const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-5);
    memset(sums, 0, sizeof sums);
    for (uint64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 8
        for (int c = 0; c < CHAINS; c++) {
            sums[c] = vmmlaq_s32(sums[c], a, b);
            __asm__ volatile("" : "+w"(sums[c]));
        }
    }
    return 32 * CHAINS * rounds;
}

uint64_t slu_peak_macs(const char *kernels, uint64_t rounds)
{
    if (strcmp(kernels, "i8mm") == 0) {
        return macs_i8mm(rounds);
    }
    return strcmp(kernels, "dotprod") == 0 ? macs_dotprod(rounds) : 0;
}

#else

uint64_t slu_peak_macs(const char *kernels, uint64_t rounds)
{
    (void)kernels;
    (void)rounds;
    return 0;
}

#endif

uint64_t slu_peak_read(const char *kernels, const void *data, size_t bytes, unsigned n_streams)
{
    (void)kernels;
    return read_plain(data, bytes / n_streams, n_streams);
}
#endif
