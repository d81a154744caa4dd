/*
 * What the AVX-512 files of the q*e formats share: codes become values, and eight rows' sums
 * products at once. Only they may include it, compiled for those instructions: everything here is
 * inlined.
 */
#ifndef SLU_KERN_X86_AVX512_ECQ_H
#define SLU_KERN_X86_AVX512_ECQ_H

#include "kern/x86/avx2.h"
#include "kern/x86/ecq.h"

/* What the indices of first and of second halves stand for, 128 too large. Of 3 and 5 bits, halves
 * of the table are there twice, so that one bit of the index isn't looked at. */
ALWAYS_INLINE void ecq_tables(const int bits, const struct slu_ecq_head *head, __m512i ret[2])
{
    __m512i table = _mm512_loadu_si512(head->table);
    table = _mm512_xor_si512(table, _mm512_set1_epi8((char)-128));
    if (bits < 5) {
        table = _mm512_broadcast_i32x4(_mm512_castsi512_si128(table));
    }
    ret[0] = ret[1] = table;
    if (bits == 3) {
        ret[0] = _mm512_shuffle_epi32(table, 0x44);
        ret[1] = _mm512_shuffle_epi32(table, 0x50);
    } else if (bits == 5) {
        ret[0] = _mm512_shuffle_i64x2(table, table, 0x44);
        ret[1] = _mm512_shuffle_i64x2(table, table, 0x50);
    }
}

/* Byte j of each of four groups of 16 has the high bits of weights j and j + 16, as bits 2 and 3,
 * and as bits 4 and 5. A product of matrices, of which a group's word is one: bit j of its byte k
 * becomes the bit of byte j that the byte's place says. */
ALWAYS_INLINE __m512i high_bits(const uint8_t *at, unsigned n_groups)
{
    /* Bytes 5 to 2 of eight make bits 2 to 5. The others mean nothing. */
    const long long first = 0x0000000200020000, second = first + 0x010101010000;
    const long long step = 0x040404040000;
    const __m512i place =
        _mm512_setr_epi64(first, second, first + step, second + step, first + 2 * step,
                          second + 2 * step, first + 3 * step, second + 3 * step);
    const __m512i unit = _mm512_set1_epi64((long long)0x8040201008040201);
    __m128i words = _mm_maskz_loadu_epi32((__mmask8)((1u << n_groups) - 1), at);
    __m512i matrices = _mm512_permutexvar_epi8(place, _mm512_castsi128_si512(words));
    return _mm512_gf2p8affine_epi64_epi8(unit, matrices, 0);
}

/* Bits 2k, 2k+1 of byte j of each of four groups of 8 bytes, for weights j + 8k: those of first and
 * of second halves, at bits `to` and `to` + 1 of their bytes. */
ALWAYS_INLINE void pairs_of_bytes(const uint8_t *at, unsigned n_groups, const int to,
                                  __m512i ret[2])
{
    const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    const __m128i first = _mm_set_epi64x((long long)MOVE_PAIR(2, to), (long long)MOVE_PAIR(0, to));
    const __m128i second = _mm_set_epi64x((long long)MOVE_PAIR(6, to), (long long)MOVE_PAIR(4, to));
    __m256i bytes = n_groups == 4 ? _mm256_loadu_si256((const __m256i *)(const void *)at)
                                  : _mm256_maskz_loadu_epi64((__mmask8)((1u << n_groups) - 1), at);
    __m512i v = _mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(bytes));
    ret[0] = _mm512_gf2p8affine_epi64_epi8(v, _mm512_broadcast_i32x4(first), 0);
    ret[1] = _mm512_gf2p8affine_epi64_epi8(v, _mm512_broadcast_i32x4(second), 0);
}

/* Quad i of a row, of which n_groups are there, as unsigned values. Of 4 bits, the upper ones of an
 * index may be anything, since ecq_tables repeats the table; of 3 and 5, the highest lies one
 * higher in second halves, and where it lies in the others may be anything. */
ALWAYS_INLINE void ecq_decode(const int bits, const __m512i tables[2],
                              const struct slu_ecq_row *row, size_t i, const unsigned n_groups,
                              __m512i ret[2])
{
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i index[2];
    if (bits == 3) {
        pairs_of_bytes(row->codes + 32 * i, n_groups, 0, index);
    } else {
        const uint8_t *codes = row->codes + 64 * i;
        __mmask64 mask = n_groups == 4 ? ~0ull : (1ull << 16 * n_groups) - 1;
        index[0] = n_groups == 4 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(mask, codes);
        index[1] = _mm512_srli_epi16(index[0], 4);
    }
    if (bits == 3 || bits == 5) { /* the highest bit of high, the rest of index */
        const char highest = bits == 3 ? 4 : 16;
        __m512i high = high_bits(row->high + 16 * i, n_groups);
        for (int h = 0; h < 2; h++) {
            __m512i mask = _mm512_set1_epi8((char)(highest << h));
            index[h] = _mm512_ternarylogic_epi32(mask, high, index[h], 0xca);
        }
    } else if (bits == 6) {
        __m512i high[2];
        pairs_of_bytes(row->high + 32 * i, n_groups, 4, high);
        for (int h = 0; h < 2; h++) { /* nibble ? index : high */
            index[h] = _mm512_ternarylogic_epi32(nibble, index[h], high[h], 0xca);
        }
    }
    for (int h = 0; h < 2; h++) {
        ret[h] = _mm512_permutexvar_epi8(index[h], tables[h]);
    }
}

#define ECQ_BATCH 8 /* rows that are finished together, as many as floats in 256 bits */

/* (t0+t4)+(t2+t6) + ((t1+t5)+(t3+t7)) of eight rows, t = lanes 0 to 7 plus 8 to 15. */
ALWAYS_INLINE __m256 ecq_add_lanes(const float lanes[ECQ_BATCH][16])
{
    __m256 t[ECQ_BATCH], fours[4], twos[2];
    for (int r = 0; r < 8; r++) {
        t[r] = _mm256_add_ps(_mm256_load_ps(lanes[r]), _mm256_load_ps(lanes[r] + 8));
    }
    for (int r = 0; r < 4; r++) { /* rows r and r + 4 side by side */
        fours[r] = _mm256_add_ps(_mm256_permute2f128_ps(t[r], t[r + 4], 0x20),
                                 _mm256_permute2f128_ps(t[r], t[r + 4], 0x31));
    }
    for (int r = 0; r < 2; r++) {
        __m256d even = _mm256_castps_pd(fours[2 * r]), odd = _mm256_castps_pd(fours[2 * r + 1]);
        twos[r] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(even, odd)),
                                _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd)));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(twos[0], twos[1], 0x88),
                         _mm256_shuffle_ps(twos[0], twos[1], 0xdd));
}

/* slu_row_scale of eight. */
ALWAYS_INLINE __m256 ecq_row_scales(float unit, __m128i bytes)
{
    __m256i e = _mm256_cvtepu8_epi32(bytes);
    __m256i powers = _mm256_sub_epi32(_mm256_set1_epi32(127), _mm256_srli_epi32(e, 4));
    __m256 octaves = _mm256_castsi256_ps(_mm256_slli_epi32(powers, 23));
    __m512 table = _mm512_loadu_ps(slu_row_sixteenths);
    __m256 sixteenths =
        _mm512_castps512_ps256(_mm512_permutexvar_ps(_mm512_castsi256_si512(e), table));
    __mmask8 is_some = _mm256_cmpneq_epi32_mask(e, _mm256_set1_epi32(255));
    __m256 scales = _mm256_mul_ps(_mm256_set1_ps(unit), _mm256_mul_ps(sixteenths, octaves));
    return _mm256_maskz_mov_ps(is_some, scales);
}

/* y of n rows from row `first` on, no more than eight, from the sums over their codes and, in y,
 * over their escapes. */
ALWAYS_INLINE void ecq_finish_rows(float *y, const struct slu_mat *w, size_t first, size_t n,
                                   __m256 sums)
{
    const struct slu_ecq_head *head = slu_ecq_head_of(w);
    const __mmask8 mask = (__mmask8)((1u << n) - 1);
    if (w->at.escapes_row > 0) {
        __m256 escapes = _mm256_maskz_loadu_ps(mask, y);
        sums = _mm256_fmadd_ps(_mm256_set1_ps(head->escape), escapes, sums);
    }
    __m128i e = _mm_maskz_loadu_epi8(mask, w->data + w->at.scales + first);
    _mm256_mask_storeu_ps(y, mask, _mm256_mul_ps(ecq_row_scales(head->unit, e), sums));
}

#endif
