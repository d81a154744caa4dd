/*
 * Products of q3e and one token with AVX-512: two rows at a time, side by side in a register, since
 * a quad of groups has but 32 bytes of codes. Each byte of codes has two bits of four weights, k =
 * 0 to 3, of which the first two are of their group's first half. Of the four weights' high bits a
 * product of bit matrices makes another byte, and of both bytes two indices to look up, that of
 * weights 0 and 1 and that of weights 2 and 3: either weight has a table of its own, which knows
 * where its bits lie and doesn't mind the others. So the lanes are not in the order of kern.h until
 * a row's end.
 */
#include "kern/x86/avx2.h"
#include "kern/x86/ecq.h"

/* Of 128 columns of a token: activations for the weights k of each of four groups, what sums start
 * from (for k 0 and 2, and for 1 and 3), and the groups' steps. */
struct ready {
    int8_t q[4][64];
    int32_t start[2][16];
    float d[16];
} __attribute__((aligned(64)));

static void make_ready(struct ready *ready, const int8_t *q, const float *d, size_t n_quads)
{
    const __m512i offset = _mm512_set1_epi8((char)-128); /* 128, unsigned */
    const __m512i parts[2] = {_mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6),
                              _mm512_setr_epi64(1, 3, 5, 7, 1, 3, 5, 7)};
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3);
    for (size_t i = 0; i < n_quads; i++) {
        struct ready *to = &ready[i];
        for (int p = 0; p < 2; p++) {
            __m512i sum = _mm512_setzero_si512();
            for (int h = 0; h < 2; h++) {
                __m512i half = _mm512_load_si512(q + 128 * i + 64 * h);
                half = _mm512_permutexvar_epi64(parts[p], half);
                sum = _mm512_dpbusd_epi32(sum, offset, half);
                _mm512_store_si512(to->q[2 * h + p], half);
            }
            _mm512_store_si512(to->start[p], _mm512_sub_epi32(_mm512_setzero_si512(), sum));
        }
        __m512 steps = _mm512_castps128_ps512(_mm_load_ps(d + 4 * i));
        _mm512_store_ps(to->d, _mm512_permutexvar_ps(twice, steps));
    }
}

/* Where the bits of weight k's code lie in its index. */
static const struct {
    int low, high; /* two, and one */
} index_bits[4] = {{0, 4}, {2, 5}, {2, 0}, {4, 1}};

/* What each index stands for, 128 too large. */
static void make_tables(const struct slu_ecq_head *head, __m512i ret[4])
{
    uint8_t all[64];
    for (int i = 0; i < 64; i++) {
        all[i] = (uint8_t)i;
    }
    __m512i values = _mm512_loadu_si512(head->table);
    values = _mm512_xor_si512(values, _mm512_set1_epi8((char)-128));
    for (int k = 0; k < 4; k++) {
        long long move =
            (long long)(MOVE_PAIR(index_bits[k].low, 0) | MOVE_BIT(index_bits[k].high, 2));
        __m512i codes =
            _mm512_gf2p8affine_epi64_epi8(_mm512_loadu_si512(all), _mm512_set1_epi64(move), 0);
        ret[k] = _mm512_permutexvar_epi8(codes, values);
    }
}

/* The high bits of four groups of either row, a byte for each four weights: of k 0 to 3 at bits 4,
 * 5, 0 and 1, where the indices have them. A product of matrices, of which a group's word is one:
 * bit j of its byte k becomes the bit of byte j that the byte's place says. */
ALWAYS_INLINE __m512i high_bits(__m256i words)
{
    /* Bytes 3, 2, 7 and 6 of eight make bits 4, 5, 0 and 1. The others mean nothing. */
    const long long first = 0x0203000000010000, step = 0x0404040404040404;
    const __m512i place =
        _mm512_setr_epi64(first, first + step, first + 2 * step, first + 3 * step, first + 4 * step,
                          first + 5 * step, first + 6 * step, first + 7 * step);
    const __m512i unit = _mm512_set1_epi64((long long)0x8040201008040201);
    __m512i matrices = _mm512_permutexvar_epi8(place, _mm512_castsi256_si512(words));
    return _mm512_gf2p8affine_epi64_epi8(unit, matrices, 0);
}

/* Quad i of two rows, of which n_groups are there: indices of weights 0 and 1, and of 2 and 3. */
ALWAYS_INLINE void find(const struct slu_ecq_row rows[2], size_t i, const unsigned n_groups,
                        __m512i ret[2])
{
    const __mmask8 n = (__mmask8)((1u << n_groups) - 1);
    __m256i codes[2];
    __m128i words[2];
    for (int r = 0; r < 2; r++) {
        codes[r] = _mm256_maskz_loadu_epi64(n, rows[r].codes + 32 * i);
        words[r] = _mm_maskz_loadu_epi32(n, rows[r].high + 16 * i);
    }
    __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(codes[0]), codes[1], 1);
    __m512i high =
        high_bits(_mm256_inserti128_si256(_mm256_castsi128_si256(words[0]), words[1], 1));
    /* mask ? high : codes */
    ret[0] = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x30), high, v, 0xca);
    ret[1] = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x03), high, _mm512_srli_epi16(v, 2), 0xca);
}

/* The products of a quad. Groups that aren't there have a step of 0. */
ALWAYS_INLINE void quad_mul(const __m512i tables[4], const __m512i index[2], const struct ready *x,
                            __m512 acc[2])
{
    const __m512i values[4] = {
        _mm512_permutexvar_epi8(index[0], tables[0]), _mm512_permutexvar_epi8(index[0], tables[1]),
        _mm512_permutexvar_epi8(index[1], tables[2]), _mm512_permutexvar_epi8(index[1], tables[3])};
    __m512 d = _mm512_load_ps(x->d);
    for (int k = 0; k < 2; k++) {
        __m512i sum = _mm512_load_si512(x->start[k]);
        sum = _mm512_dpbusd_epi32(sum, values[k], _mm512_load_si512(x->q[k]));
        sum = _mm512_dpbusd_epi32(sum, values[k + 2], _mm512_load_si512(x->q[k + 2]));
        acc[k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), d, acc[k]);
    }
}

/* A quad's indices are found while the one before it is multiplied: one after the other they make a
 * chain longer than what the processor looks ahead. */
ALWAYS_INLINE void quads_mul(const __m512i tables[4], const struct slu_ecq_row rows[2],
                             const struct ready *ready, size_t n_quads, __m512 acc[2])
{
    __m512i index[2];
    if (n_quads == 0) {
        return;
    }
    find(rows, 0, 4, index);
    for (size_t i = 0; i + 1 < n_quads; i++) {
        __m512i next[2];
        find(rows, i + 1, 4, next);
        quad_mul(tables, index, &ready[i], acc);
        index[0] = next[0];
        index[1] = next[1];
    }
    quad_mul(tables, index, &ready[n_quads - 1], acc);
}

/* Two rows, which may be the same. */
ALWAYS_INLINE void pair_mul(float *y, const struct slu_mat *w, size_t first, size_t second,
                            const struct ready *ready, const __m512i tables[4])
{
    const struct slu_ecq_row rows[2] = {slu_ecq_row_at(w, first), slu_ecq_row_at(w, second)};
    __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    size_t n_quads = w->cols / 128;
    quads_mul(tables, rows, ready, n_quads, acc);
    if (w->cols % 128) {
        __m512i index[2];
        find(rows, n_quads, w->cols / 32 % 4, index);
        quad_mul(tables, index, &ready[n_quads], acc);
    }
    /* Groups 0 and 1, then 2 and 3, each as k 0 (and 2) and k 1 (and 3), are kern.h's lanes. */
    const __m512i order = _mm512_setr_epi32(0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
    for (int r = 0; r < (first == second ? 1 : 2); r++) {
        __m512i at = _mm512_add_epi32(order, _mm512_set1_epi32(8 * r));
        __m512 lanes = _mm512_permutex2var_ps(acc[0], at, acc[1]);
        __m256 u = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
        ecq_finish(&y[r ? second : first], w, &rows[r], lanes_sum(u));
    }
}

/* The rows are taken from two places at once, which are as many straight streams to memory. */
void slu_avx512_mul_q3e_one(float *y, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                            const struct slu_acts *x, size_t t)
{
    struct ready ready[ECQ_QUADS_MAX];
    __m512i tables[4];
    uint32_t half = (hi - lo + 1) / 2;
    make_tables(slu_ecq_head_of(w), tables);
    make_ready(ready, x->q + t * x->q_stride, x->d + t * x->g_stride, (w->cols + 127) / 128);
    for (uint32_t r = lo; r < lo + half; r++) {
        uint32_t other = r + half < hi ? r + half : r;
        pair_mul(y, w, r, other, ready, tables);
    }
}
