#include "base/cpu.h"

#include <stdbool.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

/* The one mutable global of the library. */
static unsigned cpu_mask = ~0u;

#if defined(__x86_64__) || defined(__i386__)

/* Register names and bit numbers after Intel's Software Developer's Manual, volume 2, CPUID, and
 * volume 1, chapter 14, "Detection of AVX Instructions". Asked of the processor directly because
 * clang 14 has no __builtin_cpu_supports("f16c"). */

/* A processor with AVX is not enough: without an operating system that saves the upper halves of
 * the registers when it switches threads, they are lost, and the instructions fault. */
static bool os_saves_ymm(void)
{
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    const unsigned sse_and_avx = 0x6;
    return (lo & sse_and_avx) == sse_and_avx;
}

static unsigned detect(void)
{
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
        return 0;
    }
    const unsigned needed = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    if ((ecx & needed) != needed || !os_saves_ymm()) {
        return 0;
    }
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_AVX2)) {
        return 0;
    }
    return SLU_CPU_AVX2;
}

#else

static unsigned detect(void)
{
    return 0;
}

#endif

unsigned slu_cpu_flags(void)
{
    return detect() & cpu_mask;
}

void slu_cpu_set_mask(unsigned mask)
{
    cpu_mask = mask;
}
