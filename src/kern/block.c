#include "kern/block.h"

#include <assert.h>

#define ALIGN   64
#define DIM_MAX ((uint32_t)1 << 24)

static size_t round_up(size_t value, size_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

/* Blocks end at multiples of this, so that neither the groups of the down matrix nor those of its
 * activations depend on where an expert is cut. */
static uint32_t granule_of(const struct slu_bank_shape *shape)
{
    return shape->down->granule > 32 ? shape->down->granule : 32;
}

static bool dims_valid(const struct slu_bank_shape *shape)
{
    return shape->gate && shape->up && shape->down && shape->n_embd && shape->n_ff &&
           shape->n_embd <= DIM_MAX && shape->n_ff <= DIM_MAX &&
           shape->n_embd % shape->gate->granule == 0 && shape->n_embd % shape->up->granule == 0 &&
           shape->n_ff % shape->down->granule == 0;
}

static bool shape_valid(const struct slu_bank_shape *shape)
{
    uint32_t neurons = shape->neurons_a_block;
    return dims_valid(shape) && neurons && neurons <= shape->n_ff &&
           (neurons == shape->n_ff || neurons % granule_of(shape) == 0);
}

uint32_t slu_bank_blocks(const struct slu_bank_shape *shape)
{
    if (!shape->neurons_a_block) {
        return 0;
    }
    return (uint32_t)(((uint64_t)shape->n_ff + shape->neurons_a_block - 1) /
                      shape->neurons_a_block);
}

bool slu_bank_split(struct slu_bank_shape *shape, size_t target_bytes)
{
    if (!dims_valid(shape)) {
        return false;
    }
    struct slu_bank_shape whole = *shape;
    whole.neurons_a_block = shape->n_ff;
    struct slu_block_layout at;
    if (!slu_block_layout(&whole, 0, &at)) {
        return false;
    }
    size_t granule = granule_of(shape), n_ff = shape->n_ff;
    size_t target = target_bytes ? target_bytes : 1;
    size_t n_blocks = at.bytes / target + (at.bytes % target >= target - target / 2);
    n_blocks = n_blocks ? n_blocks : 1;
    size_t neurons = round_up((n_ff + n_blocks - 1) / n_blocks, granule);
    shape->neurons_a_block = (uint32_t)(neurons < n_ff ? neurons : n_ff);
    return true;
}

bool slu_block_layout(const struct slu_bank_shape *shape, uint32_t b,
                      struct slu_block_layout *ret_layout)
{
    if (!shape_valid(shape) || b >= slu_bank_blocks(shape)) {
        return false;
    }
    struct slu_block_layout at = {.lo = b * shape->neurons_a_block};
    uint32_t left = shape->n_ff - at.lo;
    at.n = left < shape->neurons_a_block ? left : shape->neurons_a_block;
    struct slu_mat_layout gate, up, down;
    if (!slu_mat_layout(shape->gate, at.n, shape->n_embd, &gate) ||
        !slu_mat_layout(shape->up, at.n, shape->n_embd, &up) ||
        !slu_mat_layout(shape->down, shape->n_embd, at.n, &down)) {
        return false;
    }
    at.up = gate.bytes;
    at.down = at.up + up.bytes;
    at.bytes = at.down + down.bytes;
    if (shape->has_bias) {
        size_t bias_bytes = round_up(at.n * sizeof(float), ALIGN);
        at.gate_bias = at.bytes;
        at.up_bias = at.gate_bias + bias_bytes;
        at.bytes = at.up_bias + bias_bytes;
        if (at.lo == 0) {
            at.down_bias = at.bytes;
            at.bytes += round_up(shape->n_embd * sizeof(float), ALIGN);
        }
    }
    *ret_layout = at;
    return true;
}

size_t slu_bank_block_bytes(const struct slu_bank_shape *shape)
{
    /* No block has more neurons than the first, and no other has the down bias. */
    struct slu_block_layout at;
    return slu_block_layout(shape, 0, &at) ? at.bytes : 0;
}

/* The scratch of one pass over a block: two rows of floats for each token, then the quantized
 * form of the first. */
struct hidden {
    float *h, *u; /* [n][stride] */
    size_t stride;
    struct slu_acts acts; /* over h */
};

static size_t hidden_stride(uint32_t neurons)
{
    return round_up(neurons, ALIGN / sizeof(float));
}

static void hidden_init(struct hidden *hidden, uint32_t neurons, uint32_t n, void *scratch)
{
    hidden->stride = hidden_stride(neurons);
    hidden->h = scratch;
    hidden->u = hidden->h + n * hidden->stride;
    slu_acts_init(&hidden->acts, n, neurons, hidden->h, hidden->stride,
                  hidden->u + n * hidden->stride);
}

size_t slu_block_scratch_bytes(const struct slu_bank_shape *shape, uint32_t n)
{
    uint32_t some = n < SLU_BLOCK_TOKENS ? n : SLU_BLOCK_TOKENS;
    size_t floats = 2 * some * hidden_stride(shape->neurons_a_block);
    return floats * sizeof(float) + slu_acts_bytes(some, shape->neurons_a_block);
}

void slu_block_mul(const struct slu_kern *kern, const struct slu_bank_shape *shape,
                   const struct slu_block_layout *at, const void *data, enum slu_glu glu,
                   const struct slu_acts *x, const uint32_t *tok, uint32_t n, void *scratch,
                   float *y, size_t y_stride, const struct slu_block_hook *hook)
{
    assert(x->cols == shape->n_embd && at->n <= shape->neurons_a_block);
    const uint8_t *bytes = data;
    const float *gate_bias = NULL, *up_bias = NULL, *down_bias = NULL;
    if (shape->has_bias) {
        gate_bias = (const float *)(const void *)(bytes + at->gate_bias);
        up_bias = (const float *)(const void *)(bytes + at->up_bias);
        if (at->lo == 0) {
            down_bias = (const float *)(const void *)(bytes + at->down_bias);
        }
    }
    struct slu_mat gate, up, down;
    slu_mat_view(&gate, shape->gate, at->n, shape->n_embd, bytes);
    slu_mat_view(&up, shape->up, at->n, shape->n_embd, bytes + at->up);
    slu_mat_view(&down, shape->down, shape->n_embd, at->n, bytes + at->down);

    uint32_t chosen[SLU_BLOCK_TOKENS];
    for (uint32_t i = 0; i < n; i += SLU_BLOCK_TOKENS) {
        float *out = y + i * y_stride;
        uint32_t some = n - i < SLU_BLOCK_TOKENS ? n - i : SLU_BLOCK_TOKENS;
        for (uint32_t t = 0; t < some; t++) {
            chosen[t] = tok ? tok[i + t] : i + t;
        }
        struct hidden hidden;
        hidden_init(&hidden, at->n, some, scratch);
        kern->mul[shape->gate->id](hidden.h, hidden.stride, &gate, 0, at->n, x, chosen, some);
        kern->mul[shape->up->id](hidden.u, hidden.stride, &up, 0, at->n, x, chosen, some);
        if (hook && hook->hidden) {
            hook->hidden(hook->arg, at, hidden.h, hidden.u, hidden.stride, x, chosen, some);
        }
        for (uint32_t t = 0; t < some; t++) {
            kern->glu[glu](hidden.h + t * hidden.stride, hidden.u + t * hidden.stride, gate_bias,
                           up_bias, at->n);
        }
        if (shape->down->group) {
            kern->quantize(&hidden.acts, 0, some);
        }
        kern->mul[shape->down->id](out, y_stride, &down, 0, shape->n_embd, &hidden.acts, NULL,
                                   some);
        if (hook && hook->output) {
            hook->output(hook->arg, at, hidden.h, hidden.stride, out, y_stride, some);
        }
        for (uint32_t t = 0; t < some && down_bias; t++) {
            for (uint32_t e = 0; e < shape->n_embd; e++) {
                out[t * y_stride + e] += down_bias[e];
            }
        }
    }
}
