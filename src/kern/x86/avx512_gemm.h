/*
 * What matrix-matrix products with AVX-512 share, whatever the format: panels of rows, one for each
 * lane of two or three registers, and blocks of up to 4 tokens. Only their files may include it:
 * everything here is inlined.
 */
#ifndef SLU_KERN_X86_AVX512_GEMM_H
#define SLU_KERN_X86_AVX512_GEMM_H

#include "kern/x86/avx2.h"

#define GEMM_LANES 16 /* rows in a register */
#define GEMM_REGS  3  /* of a panel's rows, at most */
#define GEMM_ROWS  (GEMM_REGS * GEMM_LANES)
#define GEMM_BLOCK 4 /* tokens that a panel meets at once */

/* Tokens of block b of n tokens start here: blocks are as even as can be, since one of a single
 * token would wait for its own sums. */
ALWAYS_INLINE uint32_t block_start(uint32_t n, uint32_t b)
{
    return b * n / ((n + GEMM_BLOCK - 1) / GEMM_BLOCK);
}

/* sums plus w times 4 activations, which are the same in every lane, for the 2 or 3 registers of a
 * panel: activations are loaded once for all products, of which a processor may do as many at a
 * time as it loads. In assembly, since the compiler would load them all beforehand, and so often
 * spill them. */
ALWAYS_INLINE void dot_quad(const int n_regs, __m512i sums[GEMM_REGS], const __m512i w[GEMM_REGS],
                            const int8_t q[4])
{
    __m512i x;
    if (n_regs == 2) {
        __asm__("vpbroadcastd %5, %2\n\t"
                "vpdpbusd %2, %3, %0\n\t"
                "vpdpbusd %2, %4, %1"
                : "+&v"(sums[0]), "+v"(sums[1]), "=&v"(x)
                : "v"(w[0]), "v"(w[1]), "m"(*(const int8_t(*)[4])q));
    } else {
        __asm__("vpbroadcastd %7, %3\n\t"
                "vpdpbusd %3, %4, %0\n\t"
                "vpdpbusd %3, %5, %1\n\t"
                "vpdpbusd %3, %6, %2"
                : "+&v"(sums[0]), "+&v"(sums[1]), "+v"(sums[2]), "=&v"(x)
                : "v"(w[0]), "v"(w[1]), "v"(w[2]), "m"(*(const int8_t(*)[4])q));
    }
}

/* Integers and sums of a panel's rows, by tokens and registers. */
typedef __m512i panel_ints[GEMM_BLOCK][GEMM_REGS];
typedef __m512 panel_floats[GEMM_BLOCK][GEMM_REGS];

/* Loops over n_toks tokens t and n_regs registers h of a panel's rows, both constant. */
#define EACH_TOKEN(n_toks) _Pragma("GCC unroll 4") for (int t = 0; t < (n_toks); t++)
#define EACH(n_toks, n_regs)                                                                       \
    EACH_TOKEN(n_toks)                                                                             \
    _Pragma("GCC unroll 3") for (int h = 0; h < (n_regs); h++)

/* Calls CASE(n) with a constant, 1 <= n <= GEMM_BLOCK. */
#define GEMM_SWITCH(n, CASE)                                                                       \
    switch (n) {                                                                                   \
        CASE(1)                                                                                    \
        CASE(2)                                                                                    \
        CASE(3)                                                                                    \
        CASE(4)                                                                                    \
    }

/* (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)) */
ALWAYS_INLINE __m512 add_lanes(const __m512 t[8])
{
    __m512 even = _mm512_add_ps(_mm512_add_ps(t[0], t[4]), _mm512_add_ps(t[2], t[6]));
    __m512 odd = _mm512_add_ps(_mm512_add_ps(t[1], t[5]), _mm512_add_ps(t[3], t[7]));
    return _mm512_add_ps(even, odd);
}

/* Rows become columns. */
ALWAYS_INLINE void transpose16(__m512i v[16])
{
    __m512i a[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i p = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        __m512i q = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        __m512i r = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
        __m512i s = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        a[i] = _mm512_unpacklo_epi64(p, r);
        a[i + 1] = _mm512_unpackhi_epi64(p, r);
        a[i + 2] = _mm512_unpacklo_epi64(q, s);
        a[i + 3] = _mm512_unpackhi_epi64(q, s);
    }
    /* a[4i + c] has columns c, c+4, c+8, c+12 of rows 4i .. 4i+3, a quarter each. */
    for (int c = 0; c < 4; c++) {
        __m512i p = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
        __m512i q = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        __m512i r = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        __m512i s = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        v[c] = _mm512_shuffle_i32x4(p, q, 0x88);
        v[8 + c] = _mm512_shuffle_i32x4(p, q, 0xdd);
        v[4 + c] = _mm512_shuffle_i32x4(r, s, 0x88);
        v[12 + c] = _mm512_shuffle_i32x4(r, s, 0xdd);
    }
}

#endif
