/*
 * What matrix-matrix products with AVX-512 share, whatever the format: panels of 16 rows, one for
 * each lane, and blocks of tokens. Only their files may include it: everything here is inlined.
 */
#ifndef SLU_KERN_X86_AVX512_GEMM_H
#define SLU_KERN_X86_AVX512_GEMM_H

#include "kern/x86/avx2.h"

#define GEMM_ROWS  16 /* of a panel */
#define GEMM_BLOCK 8  /* tokens that a panel meets at once */

/* Tokens of block b of n tokens start here: blocks are as even as can be, since one of a single
 * token would wait for its own sums. */
ALWAYS_INLINE uint32_t block_start(uint32_t n, uint32_t b)
{
    return b * n / ((n + GEMM_BLOCK - 1) / GEMM_BLOCK);
}

/* sums plus w times 4 activations, which are the same in every lane. In assembly, since the
 * compiler would load them on their own. */
ALWAYS_INLINE __m512i dot_quad(__m512i sums, __m512i w, const int8_t q[4])
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(w), "m"(*(const int8_t(*)[4])q));
    return sums;
}

/* Calls CASE(n) with a constant, 1 <= n <= GEMM_BLOCK. */
#define GEMM_SWITCH(n, CASE)                                                                       \
    switch (n) {                                                                                   \
        CASE(1)                                                                                    \
        CASE(2)                                                                                    \
        CASE(3)                                                                                    \
        CASE(4)                                                                                    \
        CASE(5)                                                                                    \
        CASE(6)                                                                                    \
        CASE(7)                                                                                    \
        CASE(8)                                                                                    \
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
