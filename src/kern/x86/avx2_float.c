/* Float formats, the vector operations of attention and the quantizing of activations, with
 * AVX2. The 32 lanes that kern.h defines are four registers; what is left of a row past a
 * multiple of 32 columns is done lane by lane. */
#include <math.h>

#include "kern/x86/avx2.h"

#define TOKENS   2 /* at most, that share the conversion of weights; more spill, and gain nothing */
#define ROWS_HOT 16 /* rows that stay in the cache while all tokens pass over them */

ALWAYS_INLINE size_t weight_bytes(const enum slu_fmt_id id)
{
    return id == SLU_FMT_F32 ? 4 : 2;
}

/* 8 weights from the i-th on. */
ALWAYS_INLINE __m256 load8(const enum slu_fmt_id id, const uint8_t *w, size_t i)
{
    w += weight_bytes(id) * i;
    if (id == SLU_FMT_F32) {
        return _mm256_loadu_ps((const float *)(const void *)w);
    }
    __m128i half = _mm_loadu_si128((const __m128i *)(const void *)w);
    if (id == SLU_FMT_F16) {
        return _mm256_cvtph_ps(half);
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

ALWAYS_INLINE float load1(const enum slu_fmt_id id, const uint8_t *w, size_t i)
{
    float value;
    uint16_t half;
    w += weight_bytes(id) * i;
    if (id == SLU_FMT_F32) {
        memcpy(&value, w, sizeof value);
        return value;
    }
    memcpy(&half, w, sizeof half);
    if (id == SLU_FMT_F16) {
        return _cvtsh_ss(half);
    }
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One row times n_toks tokens, cols numbers each. */
ALWAYS_INLINE void row_mul(const enum slu_fmt_id id, const int n_toks, float *y, size_t y_stride,
                           const uint8_t *w, const float *const *x, size_t cols)
{
    __m256 acc[TOKENS][4];
    for (int t = 0; t < n_toks; t++) {
        for (int k = 0; k < 4; k++) {
            acc[t][k] = _mm256_setzero_ps();
        }
    }
    size_t i = 0;
    for (; i + 32 <= cols; i += 32) {
        for (size_t k = 0; k < 4; k++) {
            __m256 weights = load8(id, w, i + 8 * k);
            for (int t = 0; t < n_toks; t++) {
                acc[t][k] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x[t] + i + 8 * k), acc[t][k]);
            }
        }
    }
    for (int t = 0; t < n_toks; t++) {
        if (i < cols) {
            float lanes[32];
            for (int k = 0; k < 4; k++) {
                _mm256_storeu_ps(lanes + 8 * k, acc[t][k]);
            }
            for (size_t l = 0; l < cols - i; l++) {
                lanes[l] = fmaf(load1(id, w, i + l), x[t][i + l], lanes[l]);
            }
            for (int k = 0; k < 4; k++) {
                acc[t][k] = _mm256_loadu_ps(lanes + 8 * k);
            }
        }
        y[(size_t)t * y_stride] = lanes_sum(_mm256_add_ps(_mm256_add_ps(acc[t][0], acc[t][1]),
                                                          _mm256_add_ps(acc[t][2], acc[t][3])));
    }
}

ALWAYS_INLINE void mul_float(const enum slu_fmt_id id, float *y, size_t y_stride,
                             const struct slu_mat *w, uint32_t lo, uint32_t hi,
                             const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    for (uint32_t top = lo; top < hi; top += ROWS_HOT) {
        uint32_t end = hi - top < ROWS_HOT ? hi : top + ROWS_HOT;
        for (uint32_t i = 0, some; i < n; i += some) {
            some = n - i >= TOKENS ? TOKENS : 1;
            const float *at[TOKENS];
            for (uint32_t t = 0; t < some; t++) {
                at[t] = x->x + (tok ? tok[i + t] : i + t) * x->x_stride;
            }
            for (uint32_t row = top; row < end; row++) {
                const uint8_t *codes = w->data + w->at.codes + row * w->at.codes_row;
                float *out = y + i * y_stride + row;
                if (some == TOKENS) {
                    row_mul(id, TOKENS, out, y_stride, codes, at, w->cols);
                } else {
                    row_mul(id, 1, out, y_stride, codes, at, w->cols);
                }
            }
        }
    }
}

void slu_avx2_mul_f32(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    mul_float(SLU_FMT_F32, y, y_stride, w, lo, hi, x, tok, n);
}

void slu_avx2_mul_f16(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                      const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    mul_float(SLU_FMT_F16, y, y_stride, w, lo, hi, x, tok, n);
}

void slu_avx2_mul_bf16(float *y, size_t y_stride, const struct slu_mat *w, uint32_t lo, uint32_t hi,
                       const struct slu_acts *x, const uint32_t *tok, uint32_t n)
{
    mul_float(SLU_FMT_BF16, y, y_stride, w, lo, hi, x, tok, n);
}

float slu_avx2_dot_f32(const float *a, const float *b, uint32_t n)
{
    float ret;
    row_mul(SLU_FMT_F32, 1, &ret, 0, (const uint8_t *)b, &a, n);
    return ret;
}

float slu_avx2_dot_f16(const float *a, const uint16_t *b, uint32_t n)
{
    float ret;
    row_mul(SLU_FMT_F16, 1, &ret, 0, (const uint8_t *)b, &a, n);
    return ret;
}

ALWAYS_INLINE void axpy(const enum slu_fmt_id id, float *y, float a, const uint8_t *x, size_t n)
{
    __m256 factor = _mm256_set1_ps(a);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 sum = _mm256_fmadd_ps(factor, load8(id, x, i), _mm256_loadu_ps(y + i));
        _mm256_storeu_ps(y + i, sum);
    }
    for (; i < n; i++) {
        y[i] = fmaf(a, load1(id, x, i), y[i]);
    }
}

void slu_avx2_axpy_f32(float *y, float a, const float *x, uint32_t n)
{
    axpy(SLU_FMT_F32, y, a, (const uint8_t *)x, n);
}

void slu_avx2_axpy_f16(float *y, float a, const uint16_t *x, uint32_t n)
{
    axpy(SLU_FMT_F16, y, a, (const uint8_t *)x, n);
}

void slu_avx2_add_grid(double *sum, float a, const float *x, uint32_t n)
{
    __m256d factor = _mm256_set1_pd(a), shift = _mm256_set1_pd(0x1.8p+20);
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4) {
        /* The product of two floats is exact, so that it is the sum alone that is rounded. */
        __m256d term = _mm256_fmadd_pd(factor, _mm256_cvtps_pd(_mm_loadu_ps(x + i)), shift);
        term = _mm256_sub_pd(term, shift);
        _mm256_storeu_pd(sum + i, _mm256_add_pd(_mm256_loadu_pd(sum + i), term));
    }
    for (; i < n; i++) {
        sum[i] += slu_grid((double)a * (double)x[i]);
    }
}

void slu_avx2_f32_to_f16(uint16_t *out, const float *x, uint32_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(void *)(out + i), half);
    }
    for (; i < n; i++) {
        out[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
    }
}

/* The largest of 8 non-negative int32. */
ALWAYS_INLINE uint32_t largest_of(__m256i v)
{
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return (uint32_t)_mm_cvtsi128_si32(m);
}

ALWAYS_INLINE int32_t sum_of(__m256i v)
{
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(m);
}

/* 32 activations, whose place in q is given, and in the other planes. */
ALWAYS_INLINE void group_quantize(const struct slu_acts *acts, int8_t *q, size_t at, const float *x)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256 v[4];
    /* Magnitudes of floats are ordered as their bits are, NaNs above all. */
    __m256i most = _mm256_setzero_si256();
    for (int k = 0; k < 4; k++) {
        v[k] = _mm256_loadu_ps(x + 8 * k);
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[k]), magnitude));
    }
    float inverse, d = slu_quant_step(largest_of(most), &inverse);
    __m256i code[4];
    for (int k = 0; k < 4; k++) {
        code[k] = _mm256_cvtps_epi32(_mm256_mul_ps(v[k], _mm256_set1_ps(inverse)));
        if (inverse == 0) {
            code[k] = _mm256_setzero_si256(); /* a NaN has no code */
        }
    }
    int32_t first = sum_of(_mm256_add_epi32(code[0], code[1]));
    int32_t second = sum_of(_mm256_add_epi32(code[2], code[3]));
    acts->d[at] = d;
    acts->s[at] = d * (float)(first + second);
    acts->sums[2 * at] = (int16_t)first;
    acts->sums[2 * at + 1] = (int16_t)second;
    /* Packing works within halves: 4 of each register at a time, put in order at the end. */
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]),
                                        _mm256_packs_epi32(code[2], code[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm_store_si128((__m128i *)(void *)q, _mm256_castsi256_si128(packed));
    _mm_store_si128((__m128i *)(void *)(q + 64), _mm256_extracti128_si256(packed, 1));
}

void slu_avx2_quantize(const struct slu_acts *acts, uint32_t lo, uint32_t hi)
{
    size_t n_whole = acts->cols / 32, n_padded = ((size_t)acts->cols + 127) / 128 * 4;
    for (uint32_t t = lo; t < hi; t++) {
        const float *x = acts->x + t * acts->x_stride;
        int8_t *q = acts->q + t * acts->q_stride;
        size_t at = t * acts->g_stride;
        for (size_t g = 0; g < n_whole; g++) {
            group_quantize(acts, q + slu_acts_at(32 * g), at + g, x + 32 * g);
        }
        for (size_t g = n_whole; g < n_padded; g++) {
            float last[32] = {0};
            if (g == n_whole) {
                memcpy(last, x + 32 * g, acts->cols % 32 * sizeof *x);
            }
            group_quantize(acts, q + slu_acts_at(32 * g), at + g, last);
        }
    }
}
