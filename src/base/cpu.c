#include "base/cpu.h"

#include <stdbool.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

/* The one mutable global of the library. */
static unsigned cpu_mask = ~0u;

#if defined(__x86_64__) || defined(__i386__)

/* Register names and bit numbers after Intel's Software Developer's Manual, volume 2, CPUID, and
 * volume 1, chapter 14, "Detection of AVX Instructions". Asked of the processor directly because
 * clang 14 has no __builtin_cpu_supports("f16c"). */

/* A processor with AVX is not enough: without an operating system that saves the upper halves of
 * the registers when it switches threads, they are lost, and the instructions fault. The same goes
 * for AVX-512's mask registers and its longer and further ones. */
#define SAVES_YMM 0x6u
#define SAVES_ZMM 0xe6u

static bool os_saves(unsigned what)
{
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (lo & what) == what;
}

static unsigned detect(void)
{
    unsigned eax, ebx, ecx, edx, flags = SLU_CPU_AVX2;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
        return 0;
    }
    const unsigned needed = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    if ((ecx & needed) != needed || !os_saves(SAVES_YMM)) {
        return 0;
    }
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_AVX2)) {
        return 0;
    }
    unsigned n_leaves = eax;
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    const unsigned more = bit_AVX512VBMI | bit_AVX512VNNI | bit_GFNI;
    if ((ebx & avx512) == avx512 && (ecx & more) == more && os_saves(SAVES_ZMM)) {
        flags |= SLU_CPU_AVX512;
    }
    if (n_leaves >= 1) {
        __cpuid_count(7, 1, eax, ebx, ecx, edx);
        flags |= eax & bit_AVXVNNI ? SLU_CPU_AVX_VNNI : 0;
    }
    return flags;
}

#elif defined(__aarch64__)

/* What Linux says that the processor has and that it saves. */
static unsigned detect(void)
{
    if (!(getauxval(AT_HWCAP) & HWCAP_ASIMDDP)) {
        return 0;
    }
    return SLU_CPU_DOTPROD | (getauxval(AT_HWCAP2) & HWCAP2_I8MM ? SLU_CPU_I8MM : 0);
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
