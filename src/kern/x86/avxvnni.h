/*
 * What the AVX-VNNI files share. They are built a second time for their test, as vl256, with the
 * longer encoding that AVX-512 VL has of the same instructions, as few machines have both.
 */
#ifndef SLU_KERN_X86_AVXVNNI_H
#define SLU_KERN_X86_AVXVNNI_H

#include "kern/x86/avx2.h"
#include "kern/x86/ecq.h"

#ifndef SLU_VNNI256
#define SLU_VNNI256 avxvnni
#define DPBUSD(...) _mm256_dpbusd_avx_epi32(__VA_ARGS__)
#define DPWSSD(...) _mm256_dpwssd_avx_epi32(__VA_ARGS__)
#else
#define DPBUSD(...) _mm256_dpbusd_epi32(__VA_ARGS__)
#define DPWSSD(...) _mm256_dpwssd_epi32(__VA_ARGS__)
#endif

ECQ_MUL_DECLARE(SLU_VNNI256);

#endif
