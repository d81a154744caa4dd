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

#define GLUE_(a, b, c) a##b##c
#define GLUE(a, b, c)  GLUE_(a, b, c)

#define ECQ_MUL_NAME(name) GLUE(slu_, SLU_VNNI256, _mul_##name)
#define ECQ_MUL_VNNI(name)                                                                         \
    void ECQ_MUL_NAME(name)(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,       \
                            uint32_t hi, const struct slu_acts *x, const uint32_t *tok,            \
                            uint32_t n)
ECQ_MUL_VNNI(q3e);
ECQ_MUL_VNNI(q4e);
ECQ_MUL_VNNI(q5e);
ECQ_MUL_VNNI(q6e);

#endif
