#include <criterion/criterion.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "kern/block.h"
#include "tests/kern/planes.h"

static struct slu_bank_shape shape_of(uint32_t n_embd, uint32_t n_ff, enum slu_fmt_id gate,
                                      enum slu_fmt_id down, bool has_bias)
{
    return (struct slu_bank_shape){
        .n_embd = n_embd,
        .n_ff = n_ff,
        .gate = slu_fmt_get(gate),
        .up = slu_fmt_get(gate),
        .down = slu_fmt_get(down),
        .has_bias = has_bias,
    };
}

/* Blocks cover the neurons once, come near the wanted size and differ little from each other. */
Test(block, splits_evenly)
{
    static const size_t targets[] = {1, 100000, 1 << 20, 2 << 20, SIZE_MAX};
    struct slu_bank_shape shape = shape_of(2880, 2880, SLU_FMT_MXFP4, SLU_FMT_MXFP4, true);
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
        cr_assert(slu_bank_split(&shape, targets[i]));
        cr_assert_eq(shape.neurons_a_block % 32, 0);
        uint32_t n = slu_bank_blocks(&shape), neurons = 0;
        for (uint32_t b = 0; b < n; b++) {
            struct slu_block_layout at;
            cr_assert(slu_block_layout(&shape, b, &at));
            cr_assert_eq(at.lo, neurons);
            cr_assert(at.n == shape.neurons_a_block || b == n - 1);
            cr_assert_leq(at.bytes, slu_bank_block_bytes(&shape));
            neurons += at.n;
        }
        cr_assert_eq(neurons, 2880);
        cr_assert_lt(n * shape.neurons_a_block - 2880, 32 * n);
    }
    cr_assert(slu_bank_split(&shape, 1));
    cr_assert_eq(shape.neurons_a_block, 32);
    cr_assert(slu_bank_split(&shape, SIZE_MAX));
    cr_assert_eq(shape.neurons_a_block, 2880);
    cr_assert(slu_bank_split(&shape, 1 << 20));
    cr_assert_gt(slu_bank_block_bytes(&shape), 800 << 10);
    cr_assert_lt(slu_bank_block_bytes(&shape), 1300 << 10);
}

/* Blocks end where groups end: at multiples of 256 for K-quants, of 32 for all others. */
Test(block, splits_at_groups)
{
    struct slu_bank_shape k = shape_of(512, 768, SLU_FMT_Q4_K, SLU_FMT_Q6_K, false);
    cr_assert(slu_bank_split(&k, 1));
    cr_assert_eq(k.neurons_a_block, 256);
    struct slu_bank_shape floats = shape_of(50, 100, SLU_FMT_F32, SLU_FMT_F32, false);
    cr_assert(slu_bank_split(&floats, 1));
    cr_assert_eq(floats.neurons_a_block, 32);
    cr_assert_eq(slu_bank_blocks(&floats), 4);
    struct slu_block_layout at;
    cr_assert(slu_block_layout(&floats, 3, &at));
    cr_assert_eq(at.n, 4);
    struct slu_bank_shape tiny = shape_of(8, 8, SLU_FMT_F16, SLU_FMT_F16, false);
    cr_assert(slu_bank_split(&tiny, 1));
    cr_assert_eq(tiny.neurons_a_block, 8);
    cr_assert(slu_block_layout(&tiny, 0, &at));
}

/* Parts are aligned and apart; only the first block carries the bias of the down matrix. */
Test(block, layout)
{
    struct slu_bank_shape shape = shape_of(96, 160, SLU_FMT_Q4_0, SLU_FMT_Q5_1, true);
    shape.neurons_a_block = 64;
    for (uint32_t b = 0; b < 3; b++) {
        struct slu_block_layout at;
        struct slu_mat_layout gate, down;
        cr_assert(slu_block_layout(&shape, b, &at));
        cr_assert(slu_mat_layout(shape.gate, at.n, 96, &gate));
        cr_assert(slu_mat_layout(shape.down, 96, at.n, &down));
        cr_assert_eq(at.gate, 0);
        cr_assert_eq(at.up, gate.bytes);
        cr_assert_eq(at.down, 2 * gate.bytes);
        cr_assert_eq(at.gate_bias, at.down + down.bytes);
        cr_assert_eq(at.up_bias, at.gate_bias + (at.n * 4 + 63) / 64 * 64);
        size_t end = at.up_bias + (at.n * 4 + 63) / 64 * 64;
        cr_assert_eq(at.down_bias, b ? 0 : end);
        cr_assert_eq(at.bytes, b ? end : end + 96 * 4);
    }
}

/* Shapes from a broken file are refused. */
Test(block, refuses_shapes)
{
    struct slu_block_layout at;
    struct slu_bank_shape good = shape_of(96, 160, SLU_FMT_Q4_0, SLU_FMT_Q4_0, false), bad;
    good.neurons_a_block = 64;
    cr_assert(slu_block_layout(&good, 0, &at));
    cr_assert_not(slu_block_layout(&good, 3, &at));
    cr_assert_not(slu_block_layout(&good, UINT32_MAX, &at));
    static const uint32_t neurons[] = {0, 1, 48, 161, 192, UINT32_MAX};
    for (size_t i = 0; i < sizeof neurons / sizeof *neurons; i++) {
        bad = good;
        bad.neurons_a_block = neurons[i];
        cr_assert_not(slu_block_layout(&bad, 0, &at), "%u neurons", neurons[i]);
        cr_assert_eq(slu_bank_block_bytes(&bad), 0);
    }
    bad = good;
    bad.n_embd = 97;
    cr_assert_not(slu_block_layout(&bad, 0, &at));
    cr_assert_not(slu_bank_split(&bad, 1 << 20));
    bad.n_embd = 0;
    cr_assert_not(slu_bank_split(&bad, 1 << 20));
    bad = good;
    bad.n_ff = 100;
    cr_assert_not(slu_bank_split(&bad, 1 << 20));
    bad.n_ff = 0;
    cr_assert_not(slu_bank_split(&bad, 1 << 20));
    bad = good;
    bad.up = NULL;
    cr_assert_not(slu_bank_split(&bad, 1 << 20));
    bad = shape_of(1 << 24, 1 << 24, SLU_FMT_F32, SLU_FMT_F32, false);
    cr_assert_not(slu_bank_split(&bad, 1 << 20));
}

/* An expert as float64 numbers, and its blocks. */
struct expert {
    struct slu_bank_shape shape;
    double *gate, *up, *down; /* [n_ff][n_embd] twice, [n_ff][n_embd] */
    float *gate_bias, *up_bias, *down_bias;
    uint8_t **blocks;
    uint32_t n_blocks;
};

/* The columns of a block's down matrix are rows here: block after block fits together. */
static void make_block(struct expert *e, uint32_t b, uint64_t *seed)
{
    struct slu_block_layout at;
    cr_assert(slu_block_layout(&e->shape, b, &at));
    size_t n_embd = e->shape.n_embd;
    uint8_t *data = aligned_alloc(64, at.bytes);
    memset(data, 0, at.bytes);
    struct planes gate, up, down;
    planes_init(&gate, e->shape.gate->id, at.n, e->shape.n_embd, data, seed);
    planes_init(&up, e->shape.up->id, at.n, e->shape.n_embd, data + at.up, seed);
    planes_init(&down, e->shape.down->id, e->shape.n_embd, at.n, data + at.down, seed);
    memcpy(e->gate + at.lo * n_embd, gate.w, at.n * n_embd * sizeof(double));
    memcpy(e->up + at.lo * n_embd, up.w, at.n * n_embd * sizeof(double));
    for (size_t i = 0; i < n_embd; i++) {
        for (size_t k = 0; k < at.n; k++) {
            e->down[(at.lo + k) * n_embd + i] = down.w[i * at.n + k];
        }
    }
    if (e->shape.has_bias) {
        memcpy(data + at.gate_bias, e->gate_bias + at.lo, at.n * sizeof(float));
        memcpy(data + at.up_bias, e->up_bias + at.lo, at.n * sizeof(float));
        if (b == 0) {
            memcpy(data + at.down_bias, e->down_bias, n_embd * sizeof(float));
        }
    }
    planes_finish(&gate);
    planes_finish(&up);
    planes_finish(&down);
    e->blocks[b] = data;
}

static float *noises(size_t n, float scale, uint64_t *seed)
{
    float *ret = malloc(n * sizeof *ret);
    for (size_t i = 0; i < n; i++) {
        ret[i] = scale * test_noise(seed);
    }
    return ret;
}

static void expert_init(struct expert *e, const struct slu_bank_shape *shape, uint64_t *seed)
{
    size_t n = (size_t)shape->n_embd * shape->n_ff;
    *e = (struct expert){.shape = *shape, .n_blocks = slu_bank_blocks(shape)};
    e->gate = calloc(n, sizeof(double));
    e->up = calloc(n, sizeof(double));
    e->down = calloc(n, sizeof(double));
    e->gate_bias = noises(shape->n_ff, 0.3f, seed);
    e->up_bias = noises(shape->n_ff, 0.3f, seed);
    e->down_bias = noises(shape->n_embd, 0.3f, seed);
    e->blocks = calloc(e->n_blocks, sizeof *e->blocks);
    for (uint32_t b = 0; b < e->n_blocks; b++) {
        make_block(e, b, seed);
    }
}

static void expert_finish(struct expert *e)
{
    for (uint32_t b = 0; b < e->n_blocks; b++) {
        free(e->blocks[b]);
    }
    free(e->blocks);
    free(e->gate);
    free(e->up);
    free(e->down);
    free(e->gate_bias);
    free(e->up_bias);
    free(e->down_bias);
}

static double sigmoid(double v)
{
    return 1 / (1 + exp(-v));
}

/* The expert's output for one token, in float64. */
static void expert_double(const struct expert *e, enum slu_glu glu, const float *x, double *y)
{
    size_t n_embd = e->shape.n_embd;
    for (size_t i = 0; i < n_embd; i++) {
        y[i] = e->shape.has_bias ? e->down_bias[i] : 0;
    }
    for (size_t k = 0; k < e->shape.n_ff; k++) {
        double g = e->shape.has_bias ? e->gate_bias[k] : 0, h;
        double u = e->shape.has_bias ? e->up_bias[k] : 0;
        for (size_t i = 0; i < n_embd; i++) {
            g += e->gate[k * n_embd + i] * x[i];
            u += e->up[k * n_embd + i] * x[i];
        }
        if (glu == SLU_GLU_OAI) {
            g = g > 7 ? 7 : g;
            u = u > 7 ? 7 : u < -7 ? -7 : u;
            h = g * sigmoid(1.702 * g) * (u + 1);
        } else {
            h = g * sigmoid(g) * u;
        }
        for (size_t i = 0; i < n_embd; i++) {
            y[i] += h * e->down[k * n_embd + i];
        }
    }
}

/* Sums up all blocks for n tokens; y is [n][n_embd]. */
static void expert_mul(const struct expert *e, const struct slu_kern *kern, enum slu_glu glu,
                       const struct slu_acts *x, const uint32_t *tok, uint32_t n, float *y)
{
    size_t n_embd = e->shape.n_embd;
    void *scratch = aligned_alloc(64, slu_block_scratch_bytes(&e->shape, n));
    float *part = malloc(n * (n_embd + 3) * sizeof *part);
    memset(y, 0, n * n_embd * sizeof *y);
    for (uint32_t b = 0; b < e->n_blocks; b++) {
        struct slu_block_layout at;
        cr_assert(slu_block_layout(&e->shape, b, &at));
        slu_block_mul(kern, &e->shape, &at, e->blocks[b], glu, x, tok, n, scratch, part, n_embd + 3,
                      NULL);
        for (size_t t = 0; t < n; t++) {
            for (size_t i = 0; i < n_embd; i++) {
                y[t * n_embd + i] += part[t * (n_embd + 3) + i];
            }
        }
    }
    free(scratch);
    free(part);
}

static void acts_make(struct slu_acts *acts, uint32_t n, uint32_t cols, uint64_t *seed)
{
    const struct slu_kern *kern = slu_kern_get(0);
    float *x = noises((size_t)n * cols, 1, seed);
    slu_acts_init(acts, n, cols, x, cols, aligned_alloc(64, slu_acts_bytes(n, cols)));
    kern->quantize(acts, 0, n);
}

static void acts_free(struct slu_acts *acts)
{
    free((void *)(uintptr_t)acts->x);
    free(acts->q);
}

/* Root mean squares: of the difference, relative to that of what is wanted. */
static double difference(const float *got, const double *want, size_t n)
{
    double error = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    return sqrt(error / size);
}

static void check_expert(struct slu_bank_shape shape, uint32_t neurons, enum slu_glu glu,
                         double bound)
{
    enum { N = 3 };
    uint64_t seed = 11 + shape.n_embd + neurons;
    struct expert e;
    struct slu_acts acts;
    shape.neurons_a_block = neurons;
    expert_init(&e, &shape, &seed);
    acts_make(&acts, N, shape.n_embd, &seed);
    float *y = malloc(N * shape.n_embd * sizeof *y);
    double *want = malloc(shape.n_embd * sizeof *want);
    expert_mul(&e, slu_kern_get(slu_cpu_flags()), glu, &acts, NULL, N, y);
    for (size_t t = 0; t < N; t++) {
        expert_double(&e, glu, acts.x + t * acts.x_stride, want);
        double off = difference(y + t * shape.n_embd, want, shape.n_embd);
        cr_assert_leq(off, bound, "%s, %s: off by %g", shape.gate->name, shape.down->name, off);
    }
    free(y);
    free(want);
    acts_free(&acts);
    expert_finish(&e);
}

/* A float expert's blocks add up to the expert in float64, with biases and both activations. */
Test(block, float_expert_in_double)
{
    for (int has_bias = 0; has_bias < 2; has_bias++) {
        struct slu_bank_shape shape = shape_of(50, 100, SLU_FMT_F32, SLU_FMT_F16, (bool)has_bias);
        check_expert(shape, 32, SLU_GLU_SILU, 1e-6);
        check_expert(shape, 100, SLU_GLU_SILU, 1e-6);
        check_expert(shape, 64, SLU_GLU_OAI, 1e-6);
    }
}

/* A quantized one comes as near as activations of 8 bits allow. A step is 1/127 of a group's
 * largest number, 3 to 6 standard deviations: rounding is .7 to 1.4 percent of each number, three
 * times over, and more where minimums make large terms cancel each other. */
Test(block, quantized_expert_in_double)
{
    struct slu_bank_shape mxfp4 = shape_of(256, 224, SLU_FMT_MXFP4, SLU_FMT_MXFP4, true);
    check_expert(mxfp4, 64, SLU_GLU_OAI, 0.04);
    check_expert(mxfp4, 224, SLU_GLU_SILU, 0.04);
    check_expert(shape_of(256, 512, SLU_FMT_Q4_K, SLU_FMT_Q6_K, false), 256, SLU_GLU_SILU, 0.04);
    check_expert(shape_of(96, 96, SLU_FMT_Q8_0, SLU_FMT_F32, false), 32, SLU_GLU_SILU, 0.04);
}

/* A token's numbers are the same bits alone and among 150 others, listed or not, and from every
 * instruction set. */
Test(block, bits_do_not_depend_on_the_batch)
{
    enum { N = 150 };
    uint64_t seed = 5;
    struct slu_bank_shape shape = shape_of(96, 96, SLU_FMT_Q4_0, SLU_FMT_IQ4_NL, true);
    shape.neurons_a_block = 64;
    struct expert e;
    struct slu_acts acts;
    expert_init(&e, &shape, &seed);
    acts_make(&acts, N, 96, &seed);
    const struct slu_kern *c = slu_kern_get(0), *best = slu_kern_get(slu_cpu_flags());
    float *all = malloc(N * 96 * sizeof *all), *other = malloc(N * 96 * sizeof *other);
    uint32_t tok[N];
    for (uint32_t t = 0; t < N; t++) {
        tok[t] = N - 1 - t;
    }
    expert_mul(&e, best, SLU_GLU_SILU, &acts, NULL, N, all);
    expert_mul(&e, c, SLU_GLU_SILU, &acts, NULL, N, other);
    cr_assert_eq(memcmp(all, other, N * 96 * sizeof *all), 0);
    expert_mul(&e, best, SLU_GLU_SILU, &acts, tok, N, other);
    for (uint32_t t = 0; t < N; t++) {
        float one[96];
        cr_assert_eq(memcmp(all + t * 96, other + tok[t] * 96, sizeof one), 0);
        expert_mul(&e, best, SLU_GLU_SILU, &acts, &t, 1, one);
        cr_assert_eq(memcmp(all + t * 96, one, sizeof one), 0, "token %u", t);
    }
    free(all);
    free(other);
    acts_free(&acts);
    expert_finish(&e);
}

/* Where an expert is cut changes nothing but the order of the last additions: the same groups of
 * hidden activations are quantized together. */
Test(block, groups_do_not_depend_on_the_cut)
{
    enum { N_EMBD = 64, N_FF = 128 };
    uint64_t seed = 21;
    struct slu_bank_shape shape = shape_of(N_EMBD, N_FF, SLU_FMT_F32, SLU_FMT_Q8_0, false);
    struct slu_acts acts;
    acts_make(&acts, 1, N_EMBD, &seed);
    shape.neurons_a_block = N_FF;
    struct expert whole, cut;
    expert_init(&whole, &shape, &seed);
    shape.neurons_a_block = 32;
    expert_init(&cut, &shape, &seed);
    struct slu_block_layout at, part;
    cr_assert(slu_block_layout(&whole.shape, 0, &at));
    struct slu_mat_layout down, down_part;
    cr_assert(slu_mat_layout(shape.down, N_EMBD, N_FF, &down));
    cr_assert(slu_mat_layout(shape.down, N_EMBD, 32, &down_part));
    /* The same expert, taken apart by hand. */
    for (uint32_t b = 0; b < 4; b++) {
        cr_assert(slu_block_layout(&shape, b, &part));
        const uint8_t *from = whole.blocks[0];
        size_t rows = 32 * N_EMBD * sizeof(float);
        memcpy(cut.blocks[b], from + b * rows, rows);
        memcpy(cut.blocks[b] + part.up, from + at.up + b * rows, rows);
        for (size_t r = 0; r < N_EMBD; r++) {
            memcpy(cut.blocks[b] + part.down + r * 32, from + at.down + r * N_FF + 32 * b, 32);
            memcpy(cut.blocks[b] + part.down + down_part.scales + r * 2,
                   from + at.down + down.scales + r * 8 + 2 * b, 2);
        }
    }
    float y[N_EMBD], y_cut[N_EMBD];
    double want[N_EMBD];
    expert_mul(&whole, slu_kern_get(0), SLU_GLU_SILU, &acts, NULL, 1, y);
    expert_mul(&cut, slu_kern_get(0), SLU_GLU_SILU, &acts, NULL, 1, y_cut);
    for (int i = 0; i < N_EMBD; i++) {
        want[i] = y[i];
    }
    /* Quantizing other groups would show near 1e-3. */
    cr_assert_leq(difference(y_cut, want, N_EMBD), 1e-6);
    acts_free(&acts);
    expert_finish(&whole);
    expert_finish(&cut);
}
