/*
 * Products of the q*e formats with x86's instruction sets.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_KERN_X86_ECQ_H
#define SLU_KERN_X86_ECQ_H

#include "kern/c/ecq.h"
#include "kern/x86/avx2.h"

/* The product of a format with an instruction set, which may be a macro: its name, and its head. */
#define ECQ_MUL_NAME_(isa, name) slu_##isa##_mul_##name
#define ECQ_MUL_NAME(isa, name)  ECQ_MUL_NAME_(isa, name)
#define ECQ_MUL_OF(isa, name)                                                                      \
    void ECQ_MUL_NAME(isa, name)(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,  \
                                 uint32_t hi, const struct slu_acts *x, const uint32_t *tok,       \
                                 uint32_t n)
#define ECQ_MUL_DECLARE(isa)                                                                       \
    ECQ_MUL_OF(isa, q3e);                                                                          \
    ECQ_MUL_OF(isa, q4e);                                                                          \
    ECQ_MUL_OF(isa, q5e);                                                                          \
    ECQ_MUL_OF(isa, q6e)
ECQ_MUL_DECLARE(avx2);
ECQ_MUL_DECLARE(avx512);

#define ECQ_QUADS_MAX 128u /* of 128 columns; wider matrices are AVX2's */

/* y[lo .. hi-1] = the rows of a q3e matrix, lo < hi, times token t, escapes included. Matrices are
 * no wider than the above, and not so narrow that a row's last units weren't through the pipeline
 * before the end of the next. */
#define ECQ_Q3E_ONE_COLS_MIN 544u
void slu_avx512_mul_q3e_one(float *y, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                            const struct slu_acts *x, uint32_t t);

/* y[i*y_stride + r] = row r, lo <= r < hi, times token (tok ? tok[i] : i), to which the sums over
 * escapes in y are added. Rows are unpacked first, which takes many tokens to pay. */
void slu_avx512_ecq_panels(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                           uint32_t hi, const struct slu_acts *x, const uint32_t *tok, uint32_t n);

/* vgf2p8affineqb's matrices, of which byte 7 - i makes bit i: one that takes bit `from` of a byte
 * to bit `to`, and the next bits too, two in all, with nothing else in the byte. */
#define MOVE_BIT(from, to)  (1ull << (8 * (7 - (to)) + (from)))
#define MOVE_PAIR(from, to) (MOVE_BIT(from, to) | MOVE_BIT((from) + 1, (to) + 1))

/* y[i*y_stride + r] = slu_ecq_escapes of row r, lo <= r < hi, for token (tok ? tok[i] : i); nothing
 * is written where there is no room for escapes. For many rows at a time, before their codes, as
 * both want all registers and straight streams to memory. */
void slu_avx2_ecq_escapes(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                          uint32_t hi, const struct slu_acts *x, const uint32_t *tok, uint32_t n);

/* The same for many tokens, which are laid side by side first, of matrices that are no wider than
 * this. */
#define ECQ_ESCAPE_COLS_MAX   4096u
#define ECQ_ESCAPE_TOKENS_MIN 8
void slu_avx512_ecq_escapes(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,
                            uint32_t hi, const struct slu_acts *x, const uint32_t *tok, uint32_t n);

/* *y = the product of a row from the sum over its codes and, in *y, that of its escapes. */
ALWAYS_INLINE void ecq_finish(float *y, const struct slu_mat *w, const struct slu_ecq_row *row,
                              float sum)
{
    *y = row->scale * (w->at.escapes_row ? fmaf(slu_ecq_head_of(w)->escape, *y, sum) : sum);
}

#endif
