/* Attention over the KV cache against a plain one in double precision, and the cache itself. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "model/attend.h"

#define CTX 300u

struct shape {
    uint32_t n_heads, n_heads_kv, k_dim, v_dim, window;
    bool is_mla, has_sinks;
};

/* Head dimensions that are and are no multiple of vectors and groups; groups of 1 to 70 heads. */
static const struct shape shapes[] = {
    {8, 1, 64, 64, 0, false, true},    {16, 2, 64, 64, 100, false, true},
    {6, 2, 24, 24, 0, false, false},   {3, 3, 80, 80, 5, false, false},
    {4, 4, 9, 9, 0, false, false},     {70, 1, 8, 8, 0, false, true},
    {10, 2, 128, 96, 0, false, false}, {6, 1, 48, 40, 0, true, false},
    {5, 1, 43, 35, 0, true, false},
};
#define N_SHAPES (sizeof shapes / sizeof *shapes)

/* What a model needs for attending, and random numbers for CTX tokens. */
struct bed {
    const struct shape *shape;
    struct slu_config config;
    struct slu_model model;
    struct slu_ledger *ledger;
    struct slu_kv_cache kv;
    float *q, *k, *v, *out, sinks[128];
    size_t q_width, k_width, v_width, out_width;
};

static float noise(uint64_t *seed)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        *seed = *seed * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(*seed >> 40) * 0x1p-24f - 0.5f;
    }
    return sum * 1.7f;
}

static float *noises(size_t n, uint64_t seed)
{
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = noise(&seed);
    }
    return x;
}

static void bed_init(struct bed *b, const struct shape *shape, enum slu_kv_cache_type type,
                     uint32_t chunk, unsigned n_threads, unsigned cpu_flags)
{
    *b = (struct bed){.shape = shape};
    uint32_t heads_kv = shape->is_mla ? 1 : shape->n_heads_kv;
    b->config = (struct slu_config){.n_layers = 1,
                                    .n_heads = shape->n_heads,
                                    .n_heads_kv = shape->n_heads_kv,
                                    .k_dim = shape->k_dim,
                                    .v_dim = shape->v_dim,
                                    .window = shape->window,
                                    .is_mla = shape->is_mla,
                                    .kv_lora = shape->v_dim,
                                    .rope_dims = shape->k_dim - shape->v_dim};
    b->q_width = (size_t)shape->n_heads * shape->k_dim;
    b->out_width = (size_t)shape->n_heads * shape->v_dim;
    b->k_width = (size_t)heads_kv * shape->k_dim;
    b->v_width = (size_t)heads_kv * shape->v_dim;
    b->q = noises(CTX * b->q_width, 1);
    b->k = noises(CTX * b->k_width, 2);
    b->v = noises(CTX * b->v_width, 3);
    uint64_t seed = 4;
    for (int i = 0; i < 128; i++) {
        b->sinks[i] = noise(&seed);
    }
    b->out = calloc(CTX * b->out_width, sizeof *b->out);
    b->ledger = slu_ledger_create(1ull << 30);
    cr_assert_eq(slu_kv_cache_init(&b->kv, &b->config, type, CTX, chunk, b->ledger, NULL), 0);
    cr_assert_eq(slu_ledger_used(b->ledger),
                 slu_kv_cache_charge_bytes(&b->config, type, CTX, chunk));
    /* What was never stored must not be looked at. */
    memset(b->kv.memory, 0xff, b->kv.memory_bytes);
    b->model.kern = slu_kern_get(slu_cpu_flags() & cpu_flags);
    cr_assert_eq(slu_pool_create(n_threads, &b->model.pool, NULL), 0);
    struct slu_scratch *s = &b->model.scratch;
    s->attend_stride = slu_attend_scratch(&b->config);
    s->attend = malloc(n_threads * s->attend_stride * sizeof(float));
}

static void bed_finish(struct bed *b)
{
    slu_pool_destroy(b->model.pool);
    slu_kv_cache_finish(&b->kv);
    slu_ledger_destroy(b->ledger);
    free(b->model.scratch.attend);
    free(b->q);
    free(b->k);
    free(b->v);
    free(b->out);
}

/* The next n tokens. */
static void step(struct bed *b, uint32_t n)
{
    uint32_t at = b->kv.n;
    slu_kv_cache_store(&b->kv, b->model.kern, 0, at, n, b->k + at * b->k_width,
                       b->shape->is_mla ? NULL : b->v + at * b->v_width);
    struct slu_attend attend = {.n = n,
                                .q = b->q + at * b->q_width,
                                .out = b->out + at * b->out_width,
                                .sinks = b->shape->has_sinks ? b->sinks : NULL,
                                .n_heads = b->shape->n_heads,
                                .v_dim = b->shape->v_dim,
                                .window = b->shape->window,
                                .scale = 0.3f};
    slu_attend(&b->model, &b->kv, &attend);
    b->kv.n += n;
}

static void run(struct bed *b, uint32_t chunk)
{
    while (b->kv.n < CTX) {
        step(b, CTX - b->kv.n < chunk ? CTX - b->kv.n : chunk);
    }
}

static double dot(const float *a, const float *b, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += (double)a[i] * b[i];
    }
    return sum;
}

/* out of one token and head. */
static void reference(const struct bed *b, uint32_t t, uint32_t h, double *ret_out)
{
    const struct shape *s = b->shape;
    uint32_t g = h / (s->n_heads / (s->is_mla ? 1 : s->n_heads_kv));
    uint32_t from = s->window && t + 1 > s->window ? t + 1 - s->window : 0;
    double sum = s->has_sinks ? exp(b->sinks[h]) : 0;
    memset(ret_out, 0, s->v_dim * sizeof *ret_out);
    for (uint32_t p = from; p <= t; p++) {
        const float *k = b->k + p * b->k_width + (size_t)g * s->k_dim;
        const float *v = s->is_mla ? k : b->v + p * b->v_width + (size_t)g * s->v_dim;
        const float *q = b->q + t * b->q_width + (size_t)h * s->k_dim;
        double weight = exp(0.3f * dot(q, k, s->k_dim));
        sum += weight;
        for (uint32_t i = 0; i < s->v_dim; i++) {
            ret_out[i] += weight * v[i];
        }
    }
    for (uint32_t i = 0; i < s->v_dim; i++) {
        ret_out[i] /= sum;
    }
}

/* The root of the mean square of what differs, over that of what is expected. */
static double error_of(const struct bed *b)
{
    double diff = 0, size = 0, want[128];
    for (uint32_t t = 0; t < CTX; t++) {
        for (uint32_t h = 0; h < b->shape->n_heads; h++) {
            const float *got = b->out + t * b->out_width + (size_t)h * b->shape->v_dim;
            reference(b, t, h, want);
            for (uint32_t i = 0; i < b->shape->v_dim; i++) {
                diff += (got[i] - want[i]) * (got[i] - want[i]);
                size += want[i] * want[i];
            }
        }
    }
    return sqrt(diff / size);
}

/* All shapes come near attention in doubles with either type of cache: f16 rounds by 2^-12 on
 * average, 8 bits by a few thousandths. Without either's scales or windows it would be all wrong.
 */
Test(attend, near_doubles)
{
    for (size_t i = 0; i < N_SHAPES; i++) {
        for (int type = SLU_KV_CACHE_F16; type <= SLU_KV_CACHE_Q8; type++) {
            struct bed b;
            bed_init(&b, &shapes[i], (enum slu_kv_cache_type)type, 32, 2, ~0u);
            run(&b, 32);
            double error = error_of(&b), bound = type == SLU_KV_CACHE_F16 ? 6e-4 : 1.5e-2;
            cr_expect_lt(error, bound, "shape %zu, type %d: %g", i, type, error);
            cr_expect_gt(error, bound / 100, "shape %zu, type %d: %g", i, type, error);
            bed_finish(&b);
        }
    }
}

/* The same bits token by token as in chunks of any size, on any number of threads, and with every
 * instruction set. */
Test(attend, same_bits)
{
    static const struct {
        uint32_t chunk, n_threads;
        unsigned cpu_flags;
    } ways[] = {{1, 1, ~0u},
                {1, 2, ~0u},
                {7, 3, ~0u},
                {64, 2, ~0u},
                {300, 5, ~0u},
                {50, 2, SLU_CPU_AVX2},
                {300, 1, SLU_CPU_DOTPROD}};
    for (size_t i = 0; i < N_SHAPES; i++) {
        for (int type = SLU_KV_CACHE_F16; type <= SLU_KV_CACHE_Q8; type++) {
            struct bed first, b;
            bed_init(&first, &shapes[i], (enum slu_kv_cache_type)type, 32, 1, ~0u);
            run(&first, 32);
            for (size_t way = 0; way < sizeof ways / sizeof *ways; way++) {
                bed_init(&b, &shapes[i], (enum slu_kv_cache_type)type, ways[way].chunk,
                         ways[way].n_threads, ways[way].cpu_flags);
                run(&b, ways[way].chunk);
                cr_expect(!memcmp(b.out, first.out, CTX * b.out_width * sizeof *b.out),
                          "shape %zu, type %d, way %zu", i, type, way);
                bed_finish(&b);
            }
            bed_finish(&first);
        }
    }
}

/* A number that isn't one stays one: in its own head and group, from its position on. */
Test(attend, nan_is_kept)
{
    for (int type = SLU_KV_CACHE_F16; type <= SLU_KV_CACHE_Q8; type++) {
        struct bed b;
        bed_init(&b, &shapes[2], (enum slu_kv_cache_type)type, 300, 2, ~0u);
        b.v[100 * b.v_width + 3] = NAN; /* the first of two heads, for three query heads */
        run(&b, 300);
        for (uint32_t t = 0; t < CTX; t++) {
            const float *out = b.out + t * b.out_width;
            cr_assert_eq(isnan(out[3]) != 0, t >= 100, "type %d, token %u", type, t);
            cr_assert_eq(isnan(out[2 * 24 + 3]) != 0, t >= 100);
            cr_assert(!isnan(out[3 * 24 + 3]));
        }
        bed_finish(&b);
    }
}

/* 8 bits are off by half a step at most, the step being a 127th of a group's largest number and
 * not a hundredth part more; sizes at the ends of the range of floats too. */
Test(kv_cache, q8_rounds_to_nearest)
{
    struct bed b;
    bed_init(&b, &shapes[6], SLU_KV_CACHE_Q8, 32, 1, 0);
    for (uint32_t t = 0; t < CTX; t++) {
        for (size_t i = 0; i < b.k_width; i++) {
            b.k[t * b.k_width + i] *= ldexpf(1, (int)(t + i / 32) % 200 - 100);
        }
    }
    memset(b.k + b.k_width, 0, b.k_width * sizeof *b.k);
    slu_kv_cache_store(&b.kv, b.model.kern, 0, 0, CTX, b.k, b.v);
    float *keys = malloc(128 * SLU_KV_TILE * sizeof *keys);
    float *values = malloc(96 * SLU_KV_TILE * sizeof *values);
    for (uint32_t p = 0; p < CTX; p++) {
        for (uint32_t head = 0; head < 2; head++) {
            struct slu_attn_mat k = slu_kv_cache_keys(&b.kv, 0, p / SLU_KV_TILE, head);
            struct slu_attn_mat v = slu_kv_cache_values(&b.kv, 0, p / SLU_KV_TILE, head);
            b.model.kern->attn_floats(keys, &k, 128, SLU_KV_TILE);
            b.model.kern->attn_floats(values, &v, SLU_KV_TILE, 96);
            for (uint32_t i = 0; i < 128 + 96; i++) {
                bool is_key = i < 128;
                const float *x =
                    is_key ? b.k + p * b.k_width + head * 128 : b.v + p * b.v_width + head * 96;
                uint32_t at = is_key ? i : i - 128;
                float most = 0;
                for (uint32_t j = at / 32 * 32; j < at / 32 * 32 + 32; j++) {
                    most = fmaxf(most, fabsf(x[j]));
                }
                float got = is_key ? keys[at * SLU_KV_TILE + p % SLU_KV_TILE]
                                   : values[p % SLU_KV_TILE * 96 + at];
                cr_assert_leq(fabsf(got - x[at]), 0.505f * most / 127,
                              "position %u, head %u, number %u: %g for %g", p, head, i, got, x[at]);
            }
        }
    }
    free(keys);
    free(values);
    bed_finish(&b);
}

/* In f16 everything comes back as its nearest half, and both types take the memory that their
 * numbers take: with 8 bits 17/32 of it. */
Test(kv_cache, f16_and_sizes)
{
    struct bed b;
    bed_init(&b, &shapes[0], SLU_KV_CACHE_F16, 32, 1, ~0u);
    slu_kv_cache_store(&b.kv, b.model.kern, 0, 0, CTX, b.k, b.v);
    float *keys = malloc(64 * SLU_KV_TILE * sizeof *keys);
    for (uint32_t p = 0; p < CTX; p++) {
        struct slu_attn_mat k = slu_kv_cache_keys(&b.kv, 0, p / SLU_KV_TILE, 0);
        b.model.kern->attn_floats(keys, &k, 64, SLU_KV_TILE);
        for (uint32_t i = 0; i < 64; i++) {
            float want = slu_f16_to_f32(slu_f32_to_f16(b.k[p * b.k_width + i]));
            cr_assert_eq(keys[i * SLU_KV_TILE + p % SLU_KV_TILE], want);
        }
    }
    cr_expect_eq(b.kv.memory_bytes, 5 * 64 * 2 * 64 * 2); /* five tiles */
    free(keys);
    bed_finish(&b);
    bed_init(&b, &shapes[0], SLU_KV_CACHE_Q8, 32, 1, ~0u);
    cr_expect_eq(b.kv.memory_bytes, 5 * 64 * 2 * (64 + 4));
    bed_finish(&b);
}

/* What a number was stored as: different in each layer, position and head; half floats are exact up
 * to 2048. */
static float mark_of(uint32_t l, uint32_t position, uint32_t head)
{
    return (float)((l * CTX + position) * 2 + head);
}

static void expect_mark(const struct slu_kv_cache *kv, uint32_t l, uint32_t position, uint32_t head)
{
    uint32_t tile = position / SLU_KV_TILE, row = position % SLU_KV_TILE;
    const uint16_t *keys = slu_kv_cache_keys(kv, l, tile, head).codes;
    const uint16_t *values = slu_kv_cache_values(kv, l, tile, head).codes;
    float mark = mark_of(l, position, head);
    cr_assert_eq(slu_f16_to_f32(keys[SLU_KV_TILE + row]), mark);
    cr_assert_eq(slu_f16_to_f32(values[(size_t)row * kv->v_dim + 1]), -mark);
}

/* A ring and two whole layers: each keeps its own numbers, and positions below n leave alone what
 * lies past slu_kv_cache_used_bytes(n). */
Test(kv_cache, a_short_context_leaves_the_end)
{
    const struct slu_config config = {
        .n_layers = 3, .n_heads = 2, .n_heads_kv = 2, .k_dim = 3, .v_dim = 2, .window = 0};
    struct slu_config ringed = config;
    ringed.window = 60; /* of layers 0 and 2 */
    const struct slu_config *configs[] = {&config, &ringed};
    const struct slu_kern *kern = slu_kern_get(0);
    for (size_t i = 0; i < 2; i++) {
        struct slu_ledger *ledger = slu_ledger_create(1u << 20);
        struct slu_kv_cache kv;
        cr_assert_eq(slu_kv_cache_init(&kv, configs[i], SLU_KV_CACHE_F16, CTX, 4, ledger, NULL), 0);
        uint8_t *memory = kv.memory;
        memset(memory, 0xa5, kv.memory_bytes);
        for (uint32_t p = 0; p < CTX; p++) {
            for (uint32_t l = 0; l < 3; l++) {
                float a = mark_of(l, p, 0), b = mark_of(l, p, 1);
                const float k[] = {a, a, a, b, b, b}, v[] = {-a, -a, -b, -b};
                slu_kv_cache_store(&kv, kern, l, p, 1, k, v);
            }
            size_t used = slu_kv_cache_used_bytes(&kv, p + 1), at = used;
            cr_assert_leq(used, kv.memory_bytes);
            while (at < kv.memory_bytes && memory[at] == 0xa5) {
                at++;
            }
            cr_assert_eq(at, kv.memory_bytes, "byte %zu of %zu, position %u", at, used, p);
        }
        cr_expect_lt(slu_kv_cache_used_bytes(&kv, 1), kv.memory_bytes / 2);
        cr_expect_eq(slu_kv_cache_used_bytes(&kv, CTX), kv.memory_bytes);
        for (uint32_t l = 0; l < 3; l++) {
            uint32_t held = kv.layers[l].n_rows < CTX ? 60 : CTX;
            for (uint32_t p = CTX - held; p < CTX; p++) {
                expect_mark(&kv, l, p, 0);
                expect_mark(&kv, l, p, 1);
            }
        }
        slu_kv_cache_finish(&kv);
        slu_ledger_destroy(ledger);
    }
}
