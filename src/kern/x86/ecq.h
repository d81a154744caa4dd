/*
 * Products of the q*e formats with x86's instruction sets.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_KERN_X86_ECQ_H
#define SLU_KERN_X86_ECQ_H

#include "kern/c/ecq.h"

#define ECQ_MUL_DECLARE(isa, name)                                                                 \
    void slu_##isa##_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,   \
                                uint32_t hi, const struct slu_acts *x, const uint32_t *tok,        \
                                uint32_t n);
ECQ_MUL_DECLARE(avx2, q3e)
ECQ_MUL_DECLARE(avx2, q4e)
ECQ_MUL_DECLARE(avx2, q5e)
ECQ_MUL_DECLARE(avx2, q6e)
ECQ_MUL_DECLARE(avx512, q3e)
ECQ_MUL_DECLARE(avx512, q4e)
ECQ_MUL_DECLARE(avx512, q5e)
ECQ_MUL_DECLARE(avx512, q6e)

#endif
