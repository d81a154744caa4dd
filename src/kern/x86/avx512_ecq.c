/*
 * Products of the q*e formats with AVX-512 VNNI. Four groups fill a register, and their sums of
 * eight products the sixteen lanes that kern.h defines, so nothing is added across lanes before the
 * row's end. vpdpbusd wants unsigned weights: the table goes in 128 too large, and what that adds
 * is known beforehand from the activations alone. Those sums, and the activations' steps spread
 * over the lanes, are laid ready once a call for all its rows. For many tokens there are panels
 * (avx512_ecq_panel.c).
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

ALWAYS_INLINE void quad_mul(const int bits, const int n_rows, const int n_toks,
                            const __m512i tables[2], const struct slu_ecq_row *rows,
                            const struct token *toks, size_t i, const unsigned n_groups,
                            __m512 acc[ROWS][TOKENS])
{
    __m512i values[ROWS][2];
    for (int r = 0; r < n_rows; r++) {
        ecq_decode(bits, tables, &rows[r], i, n_groups, values[r]);
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

ALWAYS_INLINE void ecq_mul(const int bits, float *y, size_t y_stride, const struct slu_mat *w,
                           uint32_t lo, uint32_t hi, const struct slu_acts *x, const uint32_t *tok,
                           uint32_t n)
{
    struct ready ready[TOKENS][ECQ_QUADS_MAX];
    __m512i tables[2];
    ecq_tables(bits, slu_ecq_head_of(w), tables);
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

/* Whether to unpack panels of rows for n tokens. Four bits are found so easily that rows, four with
 * four tokens, are as fast; but their sums across lanes tell where rows are short. */
ALWAYS_INLINE bool panels_pay(const int bits, uint32_t cols, uint32_t n)
{
    return bits == 4 ? n >= 16 && cols < 1024 : n >= 12;
}

/* Escapes first, whatever the way. */
ALWAYS_INLINE void ecq_mul_tokens(const int bits, float *y, size_t y_stride,
                                  const struct slu_mat *w, uint32_t lo, uint32_t hi,
                                  const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    if (n >= ECQ_ESCAPE_TOKENS_MIN && w->cols <= ECQ_ESCAPE_COLS_MAX) {
        slu_avx512_ecq_escapes(y, y_stride, w, lo, hi, x, tok, n);
    } else {
        slu_avx2_ecq_escapes(y, y_stride, w, lo, hi, x, tok, n);
    }
    if (panels_pay(bits, w->cols, n)) {
        slu_avx512_ecq_panels(y, y_stride, w, lo, hi, x, tok, n);
    } else {
        ecq_mul(bits, y, y_stride, w, lo, hi, x, tok, n);
    }
}

#define ECQ_MUL(name, bits)                                                                        \
    ECQ_MUL_OF(avx512, name)                                                                       \
    {                                                                                              \
        if (w->cols > 128 * ECQ_QUADS_MAX) {                                                       \
            slu_avx2_mul_##name(y, y_stride, w, lo, hi, x, tok, n);                                \
            return;                                                                                \
        }                                                                                          \
        if (bits == 3 && n == 1 && lo < hi && w->cols >= ECQ_Q3E_ONE_COLS_MIN) {                   \
            slu_avx512_mul_q3e_one(y, w, lo, hi, x, tok ? *tok : 0);                               \
            return;                                                                                \
        }                                                                                          \
        ecq_mul_tokens(bits, y, y_stride, w, lo, hi, x, tok, n);                                   \
    }

ECQ_MUL(q3e, 3)
ECQ_MUL(q4e, 4)
ECQ_MUL(q5e, 5)
ECQ_MUL(q6e, 6)
