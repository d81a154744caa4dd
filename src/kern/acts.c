#include "kern/kern.h"

#define ALIGN 64

static size_t round_up(size_t value, size_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

/* Strides are whole cache lines, so that every row of every plane is aligned. */
static size_t q_stride(uint32_t cols)
{
    return round_up(cols, 128);
}

static size_t g_stride(uint32_t cols)
{
    return round_up(((size_t)cols + 31) / 32, ALIGN / sizeof(float));
}

size_t slu_acts_bytes(uint32_t n, uint32_t cols)
{
    size_t group = 2 * sizeof(float) + 2 * sizeof(int16_t);
    return n * (q_stride(cols) + g_stride(cols) * group);
}

void slu_acts_init(struct slu_acts *acts, uint32_t n, uint32_t cols, const float *x,
                   size_t x_stride, void *buffer)
{
    *acts = (struct slu_acts){
        .n = n,
        .cols = cols,
        .x = x,
        .x_stride = x_stride,
        .q_stride = q_stride(cols),
        .g_stride = g_stride(cols),
    };
    acts->q = buffer;
    acts->d = (float *)(void *)(acts->q + n * acts->q_stride);
    acts->s = acts->d + n * acts->g_stride;
    acts->sums = (int16_t *)(void *)(acts->s + n * acts->g_stride);
}
