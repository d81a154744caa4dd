#include "tests/kern/planes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

uint32_t test_below(uint64_t *seed, uint32_t n)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((*seed >> 33) % n);
}

float test_noise(uint64_t *seed)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        sum += (float)test_below(seed, 1 << 20) * 0x1p-20f - 0.5f;
    }
    return sum * 1.75f;
}

void planes_put(const struct slu_mat *mat, uint8_t *data, uint32_t row, uint32_t i, unsigned code)
{
    const struct slu_mat_layout *at = &mat->at;
    uint32_t group = i / 32, within = i % 32;
    if (mat->fmt->bits == 3) {
        unsigned k = within / 8, j = within % 8;
        uint8_t *low = data + at->codes + row * at->codes_row + group * 8 + j;
        uint8_t *one = data + at->high + row * at->high_row + group * 4 + within / 8;
        *low = (uint8_t)((*low & ~(3u << 2 * k)) | (code & 3) << 2 * k);
        *one = (uint8_t)((*one & ~(1u << j)) | (code >> 2) << j);
        return;
    }
    if (mat->fmt->bits == 8) {
        data[at->codes + row * at->codes_row + i] = (uint8_t)code;
        return;
    }
    uint8_t *codes = data + at->codes + row * at->codes_row + group * 16;
    if (within < 16) {
        codes[within] = (uint8_t)((codes[within] & 0xf0) | (code & 15));
    } else {
        codes[within - 16] = (uint8_t)((codes[within - 16] & 0x0f) | (code & 15) << 4);
    }
    uint8_t *high = data + at->high + row * at->high_row;
    if (mat->fmt->bits == 5) {
        uint32_t word;
        memcpy(&word, high + group * 4, 4);
        word = (word & ~(1u << within)) | (code >> 4) << within;
        memcpy(high + group * 4, &word, 4);
    } else if (mat->fmt->bits == 6) {
        unsigned k = within / 8, j = within % 8;
        uint8_t *byte = high + group * 8 + j;
        *byte = (uint8_t)((*byte & ~(3u << 2 * k)) | (code >> 4) << 2 * k);
    }
}

int planes_value(const struct slu_fmt *fmt, unsigned code)
{
    static const int mxfp4[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    static const int iq4_nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};
    switch (fmt->id) {
    case SLU_FMT_MXFP4:
        return code < 8 ? mxfp4[code] : -mxfp4[code - 8];
    case SLU_FMT_IQ4_NL:
        return iq4_nl[code];
    case SLU_FMT_Q8_0:
        return (int8_t)code;
    case SLU_FMT_Q4_0:
        return (int)code - 8;
    case SLU_FMT_Q5_0:
        return (int)code - 16;
    case SLU_FMT_Q6_K:
        return (int)code - 32;
    default:
        return (int)code;
    }
}

/* Stores a number as f16; returns what has been stored. */
static double put_half(uint8_t *at, float value)
{
    uint16_t half = slu_f32_to_f16(value);
    memcpy(at, &half, sizeof half);
    return slu_f16_to_f32(half);
}

/* Writes the scale and minimum of a group, given its super-group's numbers. */
static void put_scales(struct planes *p, uint32_t row, uint32_t g, const double super[2],
                       uint64_t *seed, double *ret_scale, double *ret_min)
{
    const struct slu_mat_layout *at = &p->mat.at;
    uint8_t *scale = p->data + at->scales + row * at->scales_row;
    uint8_t *min = p->data + at->mins + row * at->mins_row;
    switch (p->mat.fmt->scale) {
    case SLU_SCALE_F16:
        *ret_scale = put_half(scale + 2 * g, 0.02f * test_noise(seed));
        break;
    case SLU_SCALE_E8M0:
        scale[g] = (uint8_t)(115 + test_below(seed, 12));
        *ret_scale = ldexp(1, scale[g] - 128);
        break;
    case SLU_SCALE_I8_SUPER:
        scale[g] = (uint8_t)test_below(seed, 256);
        *ret_scale = super[0] * (int8_t)scale[g];
        break;
    default:
        scale[g] = (uint8_t)test_below(seed, 64);
        *ret_scale = super[0] * scale[g];
        break;
    }
    *ret_min = 0;
    if (p->mat.fmt->min == SLU_MIN_F16) {
        *ret_min = put_half(min + 2 * g, 0.1f * test_noise(seed));
    } else if (p->mat.fmt->min == SLU_MIN_U8_SUPER) {
        min[g] = (uint8_t)test_below(seed, 64);
        *ret_min = -(super[1] * min[g]);
    }
}

static void fill_quant(struct planes *p, uint32_t row, uint64_t *seed)
{
    const struct slu_fmt *fmt = p->mat.fmt;
    uint8_t *supers = p->data + p->mat.at.supers + row * p->mat.at.supers_row;
    uint32_t cols = p->mat.cols, code_max = 1u << fmt->bits;
    double super[2] = {0}, scale = 0, min = 0;
    for (uint32_t i = 0; i < cols; i++) {
        if (fmt->super && i % fmt->super == 0) {
            super[0] = put_half(supers, 0.001f * test_noise(seed));
            supers += 2;
            if (fmt->min != SLU_MIN_NONE) {
                super[1] = put_half(supers, 0.001f * test_noise(seed));
                supers += 2;
            }
        }
        if (i % fmt->group == 0) {
            put_scales(p, row, i / fmt->group, super, seed, &scale, &min);
        }
        unsigned code = test_below(seed, code_max);
        planes_put(&p->mat, p->data, row, i, code);
        double value = planes_value(fmt, code);
        p->w[row * cols + i] = scale * value + min;
        /* An offset is at most 16 steps. */
        p->magnitude[row * cols + i] = fabs(scale) * (fabs(value) + 32) + fabs(min);
    }
}

/* Scales of 0.02 down to 0.0004, tables of any bytes, and escapes, some of which lie past the end
 * of their row. */
static void fill_ecq(struct planes *p, uint32_t row, uint64_t *seed)
{
    const struct slu_mat_layout *at = &p->mat.at;
    struct slu_ecq_head *head = (struct slu_ecq_head *)(void *)(p->data + at->head);
    uint32_t cols = p->mat.cols, n_codes = 1u << p->mat.fmt->bits;
    if (row == 0) {
        head->unit = 0.02f;
        head->escape = 48;
        for (uint32_t i = 0; i < n_codes; i++) {
            head->table[i] = (int8_t)test_below(seed, 256);
        }
    }
    uint8_t e = (uint8_t)test_below(seed, 90);
    p->data[at->scales + row] = e;
    double scale = (double)0.02f * exp2(-e / 16.0);
    for (uint32_t i = 0; i < cols; i++) {
        unsigned code = test_below(seed, n_codes);
        planes_put(&p->mat, p->data, row, i, code);
        p->w[row * cols + i] = scale * head->table[code];
        /* The sixteenths of scales are rounded, and escapes use the numbers before they are. */
        p->magnitude[row * cols + i] = scale * (fabs((double)head->table[code]) + 32);
    }
    uint32_t column = 0;
    for (size_t i = 0; i < at->escapes_row; i++) {
        uint8_t gap = (uint8_t)test_below(seed, 256);
        int8_t value = (int8_t)test_below(seed, 256);
        p->data[at->gaps + row * at->escapes_row + i] = gap;
        p->data[at->values + row * at->escapes_row + i] = (uint8_t)value;
        column += gap;
        if (column < cols) {
            p->w[row * cols + column] += scale * 48 * value;
            p->magnitude[row * cols + column] += scale * 48 * fabs((double)value);
        }
    }
}

static void fill_float(struct planes *p, uint32_t row, uint64_t *seed)
{
    uint8_t *codes = p->data + row * p->mat.at.codes_row;
    for (uint32_t i = 0; i < p->mat.cols; i++) {
        float value = 0.1f * test_noise(seed);
        if (p->mat.fmt->id == SLU_FMT_F16) {
            value = (float)put_half(codes + 2 * i, value);
        } else if (p->mat.fmt->id == SLU_FMT_BF16) {
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            bits &= 0xffff0000;
            memcpy(&value, &bits, sizeof bits);
            uint16_t half = (uint16_t)(bits >> 16);
            memcpy(codes + 2 * i, &half, sizeof half);
        } else {
            memcpy(codes + 4 * i, &value, sizeof value);
        }
        p->w[row * p->mat.cols + i] = value;
        p->magnitude[row * p->mat.cols + i] = fabs(value);
    }
}

void planes_init(struct planes *planes, unsigned id, uint32_t rows, uint32_t cols, uint8_t *data,
                 uint64_t *seed)
{
    struct slu_mat_layout at;
    const struct slu_fmt *fmt = slu_fmt_get(id);
    *planes = (struct planes){0};
    if (!slu_mat_layout(fmt, rows, cols, &at)) {
        abort();
    }
    planes->data = data ? data : aligned_alloc(64, at.bytes);
    memset(planes->data, 0, at.bytes);
    slu_mat_view(&planes->mat, fmt, rows, cols, planes->data);
    planes->w = calloc((size_t)rows * cols, sizeof(double));
    planes->magnitude = calloc((size_t)rows * cols, sizeof(double));
    for (uint32_t row = 0; row < rows; row++) {
        if (fmt->scale == SLU_SCALE_ROW) {
            fill_ecq(planes, row, seed);
        } else if (fmt->group) {
            fill_quant(planes, row, seed);
        } else {
            fill_float(planes, row, seed);
        }
    }
    if (data) {
        planes->data = NULL;
    }
}

void planes_finish(struct planes *planes)
{
    free(planes->data);
    free(planes->w);
    free(planes->magnitude);
}
