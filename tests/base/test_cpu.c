#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "base/cpu.h"

/* True if the kernel lists a flag for the first processor; the flags are words between spaces. */
static bool kernel_lists(const char *flag)
{
    FILE *file = fopen("/proc/cpuinfo", "r");
    if (!file) {
        return false;
    }
    char line[8192], word[64];
    snprintf(word, sizeof word, " %s ", flag);
    bool found = false;
    while (!found && fgets(line, sizeof line, file)) {
        if (strncmp(line, "flags", 5) == 0 || strncmp(line, "Features", 8) == 0) {
            line[strcspn(line, "\n")] = ' ';
            found = strstr(line, word) != NULL;
        }
    }
    fclose(file);
    return found;
}

/* What is detected is what the operating system says this machine can do. */
Test(cpu, agrees_with_the_kernel)
{
    unsigned expected = 0;
#if defined(__x86_64__) || defined(__i386__)
    if (kernel_lists("avx2") && kernel_lists("fma") && kernel_lists("f16c")) {
        expected = SLU_CPU_AVX2;
        expected |= kernel_lists("avx_vnni") ? SLU_CPU_AVX_VNNI : 0;
        bool has_avx512 = kernel_lists("avx512f") && kernel_lists("avx512bw") &&
                          kernel_lists("avx512dq") && kernel_lists("avx512vl");
        has_avx512 &= kernel_lists("avx512vbmi") && kernel_lists("avx512_vnni");
        expected |= has_avx512 ? SLU_CPU_AVX512 : 0;
    }
#elif defined(__aarch64__)
    if (kernel_lists("asimddp")) {
        expected = SLU_CPU_DOTPROD | (kernel_lists("i8mm") ? SLU_CPU_I8MM : 0);
    }
#else
    (void)kernel_lists;
#endif
    cr_assert_eq(slu_cpu_flags(), expected);
}

/* A mask takes flags away, never adds any, and can be lifted again. */
Test(cpu, mask_only_takes_away)
{
    unsigned all = slu_cpu_flags();
    slu_cpu_set_mask(0);
    cr_assert_eq(slu_cpu_flags(), 0);
    slu_cpu_set_mask(~SLU_CPU_AVX2);
    cr_assert_eq(slu_cpu_flags(), all & ~SLU_CPU_AVX2);
    slu_cpu_set_mask(~0u);
    cr_assert_eq(slu_cpu_flags(), all);
}
