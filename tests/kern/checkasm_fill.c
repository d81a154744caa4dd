#include "tests/kern/checkasm.h"

#include <math.h>
#include <string.h>

static uint64_t rng_state = 1;

void rng_seed(uint64_t seed)
{
    rng_state = 2 * seed + 1; /* never zero */
}

static uint64_t rng(void)
{
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return rng_state * 0x2545f4914f6cdd1dull >> 11;
}

uint32_t below(uint32_t n)
{
    return (uint32_t)(rng() % n);
}

/* Bell-shaped enough. */
float noise(void)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        sum += (float)below(1 << 20) * 0x1p-20f - 0.5f;
    }
    return sum * 1.7f;
}

void fill_halves(uint8_t *plane, size_t bytes, float scale)
{
    for (size_t i = 0; i + 2 <= bytes; i += 2) {
        uint16_t half = slu_f32_to_f16(noise() * scale);
        memcpy(plane + i, &half, sizeof half);
    }
}

void fill_random(uint8_t *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        data[i] = (uint8_t)rng();
    }
}

/* Gaps, as even as can be, of n escapes of which the last is at `column`, or as near as they reach.
 */
static void lead_to(uint8_t *gaps, size_t n, uint32_t column)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t gap = column / (uint32_t)(n - i);
        gaps[i] = (uint8_t)(gap < 255 ? gap : 255);
        column -= gaps[i];
    }
}

static void make_sane_ecq(const struct slu_mat *w, uint8_t *data)
{
    const struct slu_mat_layout *at = &w->at;
    const size_t n = at->escapes_row;
    struct slu_ecq_head *head = (struct slu_ecq_head *)(void *)(data + at->head);
    head->unit = 0.01f;
    head->escape = 48;
    for (size_t i = 0; i < w->rows; i++) {
        data[at->scales + i] = (uint8_t)below(40);
    }
    /* Escapes that reach about the row's end, on average; every other row's last one is where the
     * row ends, or the last that is still in it. */
    uint32_t gaps = n ? 2 * w->cols / (uint32_t)n : 0;
    for (size_t i = 0; i < w->rows * n; i++) {
        data[at->gaps + i] = (uint8_t)below(gaps < 256 ? gaps : 256);
    }
    for (size_t i = 1; i < w->rows; i += 2) {
        lead_to(data + at->gaps + i * n, n, w->cols - below(2));
    }
}

/* Scales and numbers of the size that models have; codes stay as they are. */
void make_sane(const struct slu_mat *w, uint8_t *data)
{
    const struct slu_mat_layout *at = &w->at;
    size_t rows = w->rows;
    if (w->fmt->id == SLU_FMT_F32) {
        for (size_t i = 0; i < rows * w->cols; i++) {
            float value = noise();
            memcpy(data + 4 * i, &value, sizeof value);
        }
    } else if (w->fmt->id == SLU_FMT_F16) {
        fill_halves(data, rows * at->codes_row, 1);
    } else if (w->fmt->id == SLU_FMT_BF16) {
        for (size_t i = 0; i < rows * w->cols; i++) {
            float value = noise();
            memcpy(data + 2 * i, (uint8_t *)&value + 2, 2);
        }
    }
    if (w->fmt->scale == SLU_SCALE_F16) {
        fill_halves(data + at->scales, rows * at->scales_row, 0.01f);
    } else if (w->fmt->scale == SLU_SCALE_E8M0) {
        for (size_t i = 0; i < rows * at->scales_row; i++) {
            data[at->scales + i] = (uint8_t)(120 + below(8));
        }
    }
    if (w->fmt->scale == SLU_SCALE_ROW) {
        make_sane_ecq(w, data);
    }
    if (w->fmt->min == SLU_MIN_F16) {
        fill_halves(data + at->mins, rows * at->mins_row, 0.01f);
    }
    fill_halves(data + at->supers, rows * at->supers_row, 0.001f);
}

/* Scales and halves that are subnormal. */
static void make_tiny(const struct slu_mat *w, uint8_t *data)
{
    uint8_t *end = data + w->at.bytes;
    if (w->fmt->scale == SLU_SCALE_E8M0) {
        for (uint8_t *at = data + w->at.scales; at < end; at++) {
            *at = (uint8_t)below(3);
        }
        return;
    }
    size_t start = w->fmt->super ? w->at.supers : w->fmt->group ? w->at.scales : 0;
    for (uint8_t *at = data + start; at + 2 <= end; at += 2) {
        uint16_t half = (uint16_t)(below(0x400) | below(2) << 15);
        memcpy(at, &half, sizeof half);
    }
}

void fill_weights(const struct slu_mat *w, uint8_t *data, enum weights kind)
{
    memset(data, 0, w->at.bytes);
    switch (kind) {
    case WEIGHTS_ANY:
        fill_random(data, w->at.bytes);
        break;
    case WEIGHTS_ONES:
        memset(data, 0xff, w->at.bytes);
        break;
    case WEIGHTS_ZERO:
        break;
    case WEIGHTS_EXTREME:
        /* The largest sums: codes all lowest or all highest, group after group. */
        for (size_t i = 0; i < w->at.bytes; i++) {
            data[i] = i / 16 % 3 == 0 ? 0xff : i / 16 % 3 == 1 ? 0x80 : 0;
        }
        make_sane(w, data);
        break;
    case WEIGHTS_TINY:
        fill_random(data, w->at.bytes);
        make_tiny(w, data);
        break;
    default:
        fill_random(data, w->at.bytes);
        make_sane(w, data);
        break;
    }
}

void fill_acts(float *x, size_t n, enum acts kind)
{
    static const float odd[] = {0.0f, -0.0f, 1e-45f, -1e-38f, 3e38f, INFINITY, -INFINITY, NAN};
    for (size_t i = 0; i < n; i++) {
        switch (kind) {
        case ACTS_LARGEST:
            x[i] = i / 32 % 2 || below(2) ? 127.0f : -127.0f;
            break;
        case ACTS_SPARSE:
            x[i] = below(40) ? 0 : noise();
            break;
        case ACTS_TINY: /* steps about the least normal number */
            x[i] = noise() * 0x1p-119f;
            break;
        case ACTS_ODD:
            x[i] = below(50) ? noise() * ldexpf(1, (int)(i / 32 % 200) - 140)
                             : odd[below(sizeof odd / sizeof *odd)];
            break;
        default:
            x[i] = noise();
            break;
        }
    }
}
