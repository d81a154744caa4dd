/*
 * Products of the q*e formats with AVX-512 VNNI. Four groups fill a register, and their sums of
 * eight products the sixteen lanes that kern.h defines, so nothing is added across lanes before the
 * row's end. vpdpbusd wants unsigned weights: the table goes in 128 too large, and what that adds
 * is known beforehand from the activations alone. Those sums, and the activations' steps spread
 * over the lanes, are laid ready once a call for all its rows.
 */
#include "kern/x86/avx512_ecq.h"

#define ROWS   4
#define TOKENS 4

/* Of 128 columns of a token: what sums start from, and the steps. */
struct ready {
    int32_t start[16];
    float d[16];
} __attribute__((aligned(64)));

struct token {
    const int8_t *q;
    const struct ready *ready;
};

static void make_ready(struct ready *ready, const int8_t *q, const float *d, size_t n_quads)
{
    const __m512i offset = _mm512_set1_epi8((char)-128); /* 128, unsigned */
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (size_t i = 0; i < n_quads; i++) {
        __m512i sum =
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, _mm512_load_si512(q + 128 * i));
        sum = _mm512_dpbusd_epi32(sum, offset, _mm512_load_si512(q + 128 * i + 64));
        __m512 steps = _mm512_castps128_ps512(_mm_load_ps(d + 4 * i));
        _mm512_store_si512(ready[i].start, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
        _mm512_store_ps(ready[i].d, _mm512_permutexvar_ps(spread, steps));
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
 * index may be anything, since make_tables repeats the table; of 3 and 5, the highest lies one
 * higher in second halves, and where it lies in the others may be anything. */
ALWAYS_INLINE void decode(const int bits, const __m512i tables[2], const struct slu_ecq_row *row,
                          size_t i, const unsigned n_groups, __m512i ret[2])
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

ALWAYS_INLINE void quad_mul(const int bits, const int n_rows, const int n_toks,
                            const __m512i tables[2], const struct slu_ecq_row *rows,
                            const struct token *toks, size_t i, const unsigned n_groups,
                            __m512 acc[ROWS][TOKENS])
{
    __m512i values[ROWS][2];
    for (int r = 0; r < n_rows; r++) {
        decode(bits, tables, &rows[r], i, n_groups, values[r]);
    }
    for (int t = 0; t < n_toks; t++) {
        __m512i q0 = _mm512_load_si512(toks[t].q + 128 * i);
        __m512i q1 = _mm512_load_si512(toks[t].q + 128 * i + 64);
        __m512i start = _mm512_load_si512(toks[t].ready[i].start);
        __m512 d = _mm512_load_ps(toks[t].ready[i].d);
        if (n_rows > 1) { /* or the compiler loads them again for each row */
            __asm__("" : "+v"(q0), "+v"(q1), "+v"(start), "+v"(d));
        }
        for (int r = 0; r < n_rows; r++) {
            __m512i sum = _mm512_dpbusd_epi32(start, values[r][0], q0);
            sum = _mm512_dpbusd_epi32(sum, values[r][1], q1);
            acc[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), d, acc[r][t]);
        }
    }
}

/* The lanes of n_rows rows, `step` apart from row `first` on, times n_toks tokens. */
ALWAYS_INLINE void tile_mul(const int bits, const int n_rows, const int n_toks,
                            const struct slu_mat *w, size_t first, size_t step,
                            const struct token *toks, const __m512i tables[2],
                            __m512 acc[ROWS][TOKENS])
{
    struct slu_ecq_row rows[ROWS];
    for (int r = 0; r < n_rows; r++) {
        rows[r] = slu_ecq_row_at(w, first + (size_t)r * step);
        for (int t = 0; t < n_toks; t++) {
            acc[r][t] = _mm512_setzero_ps();
        }
    }
    size_t n_quads = w->cols / 128;
    for (size_t i = 0; i < n_quads; i++) {
        quad_mul(bits, n_rows, n_toks, tables, rows, toks, i, 4, acc);
    }
    switch (w->cols / 32 % 4) {
    case 1:
        quad_mul(bits, n_rows, n_toks, tables, rows, toks, n_quads, 1, acc);
        break;
    case 2:
        quad_mul(bits, n_rows, n_toks, tables, rows, toks, n_quads, 2, acc);
        break;
    case 3:
        quad_mul(bits, n_rows, n_toks, tables, rows, toks, n_quads, 3, acc);
        break;
    default:
        break;
    }
}

/* The same rows' products. */
ALWAYS_INLINE void tile_finish(const int n_rows, const int n_toks, float *y, size_t y_stride,
                               const struct slu_mat *w, size_t first, size_t step,
                               __m512 acc[ROWS][TOKENS])
{
    for (int r = 0; r < n_rows; r++) {
        struct slu_ecq_row row = slu_ecq_row_at(w, first + (size_t)r * step);
        for (int t = 0; t < n_toks; t++) {
            __m256 u = _mm256_add_ps(_mm512_castps512_ps256(acc[r][t]),
                                     _mm512_extractf32x8_ps(acc[r][t], 1));
            ecq_finish(&y[(size_t)t * y_stride + first + (size_t)r * step], w, &row, lanes_sum(u));
        }
    }
}

/* A token alone: two places, of which four rows each are finished together. */
ALWAYS_INLINE void rows_mul_one(const int bits, float *y, const struct slu_mat *w, uint32_t lo,
                                uint32_t hi, const struct token *tok, const __m512i tables[2])
{
    float lanes[ECQ_BATCH][16] __attribute__((aligned(64))) = {{0}};
    const size_t half = (hi - lo + 1) / 2, others = hi - lo - half;
    for (size_t i = 0; i < half; i += ECQ_BATCH / 2) {
        size_t some = half - i < ECQ_BATCH / 2 ? half - i : ECQ_BATCH / 2;
        for (size_t k = 0; k < some; k++) {
            __m512 acc[ROWS][TOKENS];
            /* An odd row goes with itself. */
            tile_mul(bits, 2, 1, w, lo + i + k, i + k < others ? half : 0, tok, tables, acc);
            _mm512_store_ps(lanes[k], acc[0][0]);
            _mm512_store_ps(lanes[k + ECQ_BATCH / 2], acc[1][0]);
        }
        __m256 sums = ecq_add_lanes((const float(*)[16])lanes);
        size_t more = others - i < some ? others - i : some;
        ecq_finish_rows(y + lo + i, w, lo + i, some, sums);
        ecq_finish_rows(y + lo + half + i, w, lo + half + i, more,
                        _mm256_permute2f128_ps(sums, sums, 0x01));
    }
}

/* The rows are taken from n_rows places at once, which are as many straight streams to memory. */
ALWAYS_INLINE void rows_mul(const int bits, const int n_rows, const int n_toks, float *y,
                            size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                            const struct token *toks, const __m512i tables[2])
{
    __m512 acc[ROWS][TOKENS];
    size_t step = (hi - lo) / (uint32_t)n_rows;
    for (size_t i = 0; i < step; i++) {
        tile_mul(bits, n_rows, n_toks, w, lo + i, step, toks, tables, acc);
        tile_finish(n_rows, n_toks, y, y_stride, w, lo + i, step, acc);
    }
    for (size_t r = lo + (uint32_t)n_rows * step; r < hi; r++) {
        tile_mul(bits, 1, n_toks, w, r, 0, toks, tables, acc);
        tile_finish(1, n_toks, y, y_stride, w, r, 0, acc);
    }
}

/* What the indices of first and of second halves stand for, 128 too large. Of 3 and 5 bits, halves
 * of the table are there twice, so that one bit of the index isn't looked at. */
ALWAYS_INLINE void make_tables(const int bits, const struct slu_ecq_head *head, __m512i ret[2])
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

ALWAYS_INLINE void ecq_mul(const int bits, float *y, size_t y_stride, const struct slu_mat *w,
                           uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                           uint32_t n)
{
    struct ready ready[TOKENS][ECQ_QUADS_MAX];
    __m512i tables[2];
    make_tables(bits, slu_ecq_head_of(w), tables);
    for (uint32_t i = 0; i < n; i += TOKENS) {
        uint32_t some = n - i < TOKENS ? n - i : TOKENS;
        struct token toks[TOKENS];
        for (uint32_t k = 0; k < some; k++) {
            size_t t = tok ? tok[i + k] : i + k;
            toks[k] = (struct token){.q = x->q + t * x->q_stride, .ready = ready[k]};
            make_ready(ready[k], toks[k].q, x->d + t * x->g_stride, (w->cols + 127) / 128);
        }
        float *out = y + i * y_stride;
        switch (some) {
        case 1:
            rows_mul_one(bits, out, w, lo, hi, toks, tables);
            break;
        case 2:
            rows_mul(bits, 2, 2, out, y_stride, w, lo, hi, toks, tables);
            break;
        case 3:
            rows_mul(bits, 2, 3, out, y_stride, w, lo, hi, toks, tables);
            break;
        default:
            rows_mul(bits, ROWS, TOKENS, out, y_stride, w, lo, hi, toks, tables);
            break;
        }
    }
}

#define ECQ_MUL(name, bits)                                                                        \
    void slu_avx512_mul_##name(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo,    \
                               uint32_t hi, const struct slu_acts *x, const uint32_t *tok,         \
                               uint32_t n)                                                         \
    {                                                                                              \
        if (w->cols > 128 * ECQ_QUADS_MAX) {                                                       \
            slu_avx2_mul_##name(y, y_stride, w, lo, hi, x, tok, n);                                \
            return;                                                                                \
        }                                                                                          \
        if (bits == 3 && n == 1 && lo < hi && w->cols >= ECQ_Q3E_ONE_COLS_MIN) {                   \
            slu_avx512_mul_q3e_one(y, w, lo, hi, x, tok ? *tok : 0);                               \
            return;                                                                                \
        }                                                                                          \
        slu_avx2_ecq_escapes(y, y_stride, w, lo, hi, x, tok, n);                                   \
        ecq_mul(bits, y, y_stride, w, lo, hi, x, tok, n);                                          \
    }

ECQ_MUL(q3e, 3)
ECQ_MUL(q4e, 4)
ECQ_MUL(q5e, 5)
ECQ_MUL(q6e, 6)
