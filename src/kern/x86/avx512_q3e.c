/*
 * Products of q3e and one token with AVX-512: a row after the other in units of 256 columns, whose
 * codes fill a register. Each byte of codes has two bits of four weights, k = 0 to 3, of which the
 * first two are of their group's first half. Of the four weights' high bits a product of bit
 * matrices makes another byte, and of both bytes two indices to look up, that of weights 0 and 1
 * and that of weights 2 and 3: either weight has a table of its own, which knows where its bits lie
 * and doesn't mind the others. So the lanes are not in the order of kern.h until a row's end.
 *
 * A unit's instructions make a chain of forty cycles, of which fewer fit what the processor looks
 * ahead than it takes to be busy. So they are cut into four stages, and a step does each for
 * another unit: one's codes are loaded, those of the one before are looked up, of the one before
 * that multiplied, and so on, across the ends of rows. The compiler would put a stage's
 * instructions together again; HERE keeps them mixed as they are written. From the cache this wins
 * 4 %, from memory more, since nothing waits for loads.
 *
 * The processor's own prefetching lets go as soon as anything comes between the loads of a row (one
 * thread then has half of what memory gives it). So lines are asked for here, into the second
 * level, some rows ahead.
 */
#include <assert.h>

#include "kern/x86/avx512_ecq.h"

#define HERE(x) __asm__ volatile("" : "+v"(x))

#define STAGES        4
#define AHEAD         6144u /* at least so many bytes of codes, and half as many of high bits */
#define ESCAPES_AHEAD 64u   /* rows, of which a line holds a few */

_Static_assert((ECQ_Q3E_ONE_COLS_MIN + 255) / 256 >= STAGES - 1, "a row's end is one row back");
/* What is loaded past the end of codes and high bits is scales or head. */
_Static_assert(sizeof(struct slu_ecq_head) >= 64, "as long as what a load may run past a plane");

/* Of 256 columns of a token: activations for the weights k of each of eight groups, what sums start
 * from (for k 0 and 2, and for 1 and 3), and the groups' steps. */
struct unit {
    int8_t q[4][64];
    int32_t start[2][16];
    float d[16];
} __attribute__((aligned(64)));

/* What goes from stage to stage, and a row's sums of k 0 and 2, and of 1 and 3. */
struct flow {
    __m512i codes, matrices;
    __m512i values[4];
    __m512i dots[2];
    __m256 sums[2];
};

/* A row, and what follows it some rows on. */
struct place {
    const uint8_t *codes, *high;
    const uint8_t *next_codes, *next_high;
};

static void make_units(struct unit *units, const int8_t *q, const float *d, size_t n_quads)
{
    const __m512i offset = _mm512_set1_epi8((char)-128); /* 128, unsigned */
    const __m512i parts[2] = {_mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14),
                              _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15)};
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 16, 16, 17, 17, 18, 18, 19, 19);
    for (size_t i = 0; i < n_quads; i += 2) {
        struct unit *to = &units[i / 2];
        bool is_whole = i + 1 < n_quads; /* or its second half is zeros */
        for (int p = 0; p < 2; p++) {
            __m512i sum = _mm512_setzero_si512();
            for (int h = 0; h < 2; h++) {
                const int8_t *from = q + 128 * i + 64 * h;
                __m512i by = _mm512_load_si512(from);
                __m512i more = is_whole ? _mm512_load_si512(from + 128) : _mm512_setzero_si512();
                by = _mm512_permutex2var_epi64(by, parts[p], more);
                sum = _mm512_dpbusd_epi32(sum, offset, by);
                _mm512_store_si512(to->q[2 * h + p], by);
            }
            _mm512_store_si512(to->start[p], _mm512_sub_epi32(_mm512_setzero_si512(), sum));
        }
        __m128 steps = _mm_load_ps(d + 4 * i);
        __m128 more = is_whole ? _mm_load_ps(d + 4 * i + 4) : _mm_setzero_ps();
        _mm512_store_ps(to->d, _mm512_permutex2var_ps(_mm512_castps128_ps512(steps), twice,
                                                      _mm512_castps128_ps512(more)));
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

/* First stage, for codes and for high bits. What is read past a row's end, of the row or the plane
 * after it, meets activations of zero. */
ALWAYS_INLINE void load_codes(struct flow *f, const uint8_t *at)
{
    f->codes = _mm512_loadu_si512(at);
    HERE(f->codes);
}

/* A group's word becomes the matrix that makes a byte of each four weights' high bits in find: bit
 * j of its byte k is the bit of byte j that the byte's place says. */
ALWAYS_INLINE void load_high(struct flow *f, const uint8_t *at)
{
    /* Bytes 3, 2, 7 and 6 of eight make bits 4, 5, 0 and 1, where the indices have them. The others
     * mean nothing. */
    const long long first = 0x0203000000010000, step = 0x0404040404040404;
    const __m512i place =
        _mm512_setr_epi64(first, first + step, first + 2 * step, first + 3 * step, first + 4 * step,
                          first + 5 * step, first + 6 * step, first + 7 * step);
    __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)at);
    f->matrices = _mm512_permutexvar_epi8(place, _mm512_castsi256_si512(words));
    HERE(f->matrices);
}

/* Second stage: indices of weights 0 and 1, and of 2 and 3, and what they stand for. */
ALWAYS_INLINE void find(const struct flow *f, __m512i ret[2])
{
    const __m512i unit = _mm512_set1_epi64((long long)0x8040201008040201);
    __m512i high = _mm512_gf2p8affine_epi64_epi8(unit, f->matrices, 0);
    HERE(high);
    __m512i shifted = _mm512_srli_epi16(f->codes, 2);
    HERE(shifted);
    /* mask ? high : codes */
    ret[0] = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x30), high, f->codes, 0xca);
    ret[1] = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x03), high, shifted, 0xca);
}

ALWAYS_INLINE void look_up(struct flow *f, int k, const __m512i index[2], const __m512i tables[4])
{
    f->values[k] = _mm512_permutexvar_epi8(index[k / 2], tables[k]);
    HERE(f->values[k]);
}

/* Third stage. */
ALWAYS_INLINE void dot(struct flow *f, int k, const struct unit *x)
{
    __m512i from = k < 2 ? _mm512_load_si512(x->start[k]) : f->dots[k - 2];
    f->dots[k % 2] = _mm512_dpbusd_epi32(from, f->values[k], _mm512_load_si512(x->q[k]));
    HERE(f->dots[k % 2]);
}

/* Fourth stage, for k = p and p + 2; its first half is in front. */
ALWAYS_INLINE void add(struct flow *f, int p, __m512 dots, const struct unit *x)
{
    __m256 second = _mm512_extractf32x8_ps(dots, 1);
    f->sums[p] = _mm256_fmadd_ps(_mm512_castps512_ps256(dots), _mm256_load_ps(x->d), f->sums[p]);
    f->sums[p] = _mm256_fmadd_ps(second, _mm256_load_ps(x->d + 8), f->sums[p]);
    HERE(f->sums[p]);
}

/* Loads unit i, whose activations are x[0]; the units before it are multiplied and added. */
ALWAYS_INLINE void step(struct flow *f, const struct place *row, size_t i, const struct unit *x,
                        const __m512i tables[4])
{
    __m512i index[2];
    __m512 dots[2];
    _mm_prefetch(row->next_codes + 64 * i, _MM_HINT_T1);
    _mm_prefetch(row->next_high + 32 * i, _MM_HINT_T1);
    dots[0] = _mm512_cvtepi32_ps(f->dots[0]);
    HERE(dots[0]);
    find(f, index);
    dot(f, 0, x - 2);
    dots[1] = _mm512_cvtepi32_ps(f->dots[1]);
    HERE(dots[1]);
    dot(f, 1, x - 2);
    load_codes(f, row->codes + 64 * i);
    look_up(f, 0, index, tables);
    load_high(f, row->high + 32 * i);
    look_up(f, 1, index, tables);
    dot(f, 2, x - 2);
    look_up(f, 2, index, tables);
    add(f, 0, dots[0], x - 3);
    dot(f, 3, x - 2);
    look_up(f, 3, index, tables);
    add(f, 1, dots[1], x - 3);
}

/* kern.h's sixteen lanes, of which 0, 1, 4 and 5 are of k 0 and 2, and so on. */
ALWAYS_INLINE __m512 lanes_of(const __m256 sums[2])
{
    const __m512i order = _mm512_setr_epi32(0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
    return _mm512_permutex2var_ps(_mm512_castps256_ps512(sums[0]), order,
                                  _mm512_castps256_ps512(sums[1]));
}

/* y of rows lo to hi - 1, no more than ECQ_BATCH, from the lanes of their sums. */
static void finish(float *y, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                   const float lanes[ECQ_BATCH][16], const struct slu_acts *x, uint32_t t)
{
    const size_t n = w->at.escapes_row, end = w->rows * n;
    slu_avx2_ecq_escapes(y, 0, w, lo, hi, x, &t, 1);
    size_t ahead = (lo + ESCAPES_AHEAD) * n;
    for (size_t i = 0; i < ECQ_BATCH * n && ahead < end; i += 64, ahead += 64) {
        _mm_prefetch(w->data + w->at.gaps + ahead, _MM_HINT_T1);
        _mm_prefetch(w->data + w->at.values + ahead, _MM_HINT_T1);
    }
    ecq_finish_rows(y + lo, w, lo, hi - lo, ecq_add_lanes(lanes));
}

void slu_avx512_mul_q3e_one(float *y, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                            const struct slu_acts *x, uint32_t t)
{
    const size_t n_units = (w->cols + 255) / 256;
    assert(lo < hi && n_units >= STAGES - 1 && n_units <= ECQ_QUADS_MAX / 2);
    const uint32_t n_ahead = (uint32_t)(AHEAD / w->at.codes_row + 1);
    struct unit room[STAGES - 1 + ECQ_QUADS_MAX / 2], *units = room + STAGES - 1;
    float lanes[ECQ_BATCH][16] __attribute__((aligned(64))) = {{0}};
    __m512i tables[4];
    const __m512i none = _mm512_setzero_si512();
    struct flow f = {none, none, {none, none, none, none}, {none, none}, {{0}, {0}}};
    make_tables(slu_ecq_head_of(w), tables);
    make_units(units, x->q + t * x->q_stride, x->d + t * x->g_stride, (w->cols + 127) / 128);
    /* As a row's end precedes the next row. */
    memcpy(room, units + n_units - (STAGES - 1), (STAGES - 1) * sizeof *units);
    uint32_t done = lo;
    for (uint32_t r = lo;; r++) {
        /* Before the first row comes nothing, whose sums are dropped; after the last, its codes
         * again, which aren't added to anything. */
        struct slu_ecq_row row = slu_ecq_row_at(w, r < hi ? r : hi - 1);
        size_t ahead = r + n_ahead < hi ? n_ahead : 0;
        const struct place place = {row.codes, row.high, row.codes + ahead * w->at.codes_row,
                                    row.high + ahead * w->at.high_row};
        size_t i = 0;
        for (; i < STAGES - 1; i++) {
            step(&f, &place, i, units + i, tables);
        }
        /* The row before is through. */
        _mm512_store_ps(lanes[(r - lo + ECQ_BATCH - 1) % ECQ_BATCH], lanes_of(f.sums));
        f.sums[0] = f.sums[1] = _mm256_setzero_ps();
        if (r - done == ECQ_BATCH || r == hi) {
            finish(y, w, done, r, (const float(*)[16])lanes, x, t);
            done = r;
        }
        if (r == hi) {
            return;
        }
        for (; i < n_units; i++) {
            step(&f, &place, i, units + i, tables);
        }
    }
}
