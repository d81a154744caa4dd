/*
 * Compares every kernel of every instruction set that this machine has with plain C, bit by bit,
 * on random and adversarial shapes and numbers; with --bench [FILTER] it times them instead.
 *
 *   checkasm [--seed N]
 *   checkasm --bench [FILTER]      FILTER is a part of a kernel's name, "mul_Q4_0" for instance
 *
 * Buffers end where a page without access begins, so that a read or write past one is fatal.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/cpu.h"
#include "tests/kern/checkasm.h"

#define TOKENS_MAX 137
#define TOKENS_ANY 0
#define ROWS_MAX   67 /* of two panels and more */
#define COLS_MAX   2880
#define KERNS_MAX  8

#ifdef CHECKASM_VL256
/* The AVX-VNNI kernels in an encoding that this machine has. */
extern const struct slu_kern slu_kern_vl256;
#endif

void guarded_init(struct guarded *g, size_t bytes, size_t align)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t used = (bytes + align - 1) / align * align;
    size_t whole = (used + page - 1) / page * page;
    g->map_bytes = whole + page;
    g->map = mmap(NULL, g->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g->map == MAP_FAILED || mprotect(g->map + whole, page, PROT_NONE)) {
        fprintf(stderr, "checkasm: no memory\n");
        exit(2);
    }
    g->data = g->map + whole - used;
}

void guarded_finish(struct guarded *g)
{
    munmap(g->map, g->map_bytes);
}

bool same(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t x, y;
        memcpy(&x, &a[i], sizeof x);
        memcpy(&y, &b[i], sizeof y);
        bool both_nan = isnan(a[i]) && isnan(b[i]) && (x == CANARY) == (y == CANARY);
        if (x != y && !both_nan) {
            return false;
        }
    }
    return true;
}

void fill_canary(float *y, size_t n)
{
    uint32_t canary = CANARY;
    for (size_t i = 0; i < n; i++) {
        memcpy(&y[i], &canary, sizeof canary);
    }
}

static const char *const weights_names[] = {"sane", "any", "0xff", "zero", "extreme", "tiny"};
static const char *const acts_names[] = {"sane", "largest", "sparse", "tiny", "odd"};

/* One matrix, one set of activations, and the results of both kernels. */
struct case_mul {
    struct slu_mat w;
    struct slu_acts x;
    uint32_t lo, hi, n;
    uint32_t *tok; /* n, or NULL */
    size_t y_stride;
};

static bool run_mul(const struct slu_kern *kern, const struct case_mul *c, const float *want)
{
    struct guarded y;
    size_t n_floats = (c->n - 1) * c->y_stride + c->w.rows;
    guarded_init(&y, n_floats * sizeof(float), sizeof(float));
    float *out = (float *)(void *)y.data;
    fill_canary(out, n_floats);
    kern->mul[c->w.fmt->id](out, c->y_stride, &c->w, c->lo, c->hi, &c->x, c->tok, c->n);
    bool ok = same(out, want, n_floats);
    guarded_finish(&y);
    return ok;
}

static bool check_case(const struct slu_kern *c_kern, const struct slu_kern *kern,
                       const struct slu_fmt *fmt, uint32_t rows, uint32_t cols,
                       enum weights weights, enum acts acts, uint32_t n)
{
    /* Mostly few: more take long in C. */
    uint32_t any = 1 + below(below(8) ? 19 : TOKENS_MAX);
    struct case_mul c = {.n = n == TOKENS_ANY ? any : n};
    struct slu_mat_layout at;
    if (!slu_mat_layout(fmt, rows, cols, &at)) {
        return true;
    }
    struct guarded data, x, buffer, tok;
    guarded_init(&data, at.bytes, 64);
    slu_mat_view(&c.w, fmt, rows, cols, data.data);
    fill_weights(&c.w, data.data, weights);
    size_t x_stride = cols + below(3);
    uint32_t n_there = c.n + below(5);
    guarded_init(&x, (n_there - 1) * x_stride * sizeof(float) + cols * sizeof(float), 4);
    fill_acts((float *)(void *)x.data, (n_there - 1) * x_stride + cols, acts);
    guarded_init(&buffer, slu_acts_bytes(n_there, cols), 64);
    memset(buffer.data, 0xff, slu_acts_bytes(n_there, cols)); /* no zeros but those of quantize */
    slu_acts_init(&c.x, n_there, cols, (float *)(void *)x.data, x_stride, buffer.data);
    c_kern->quantize(&c.x, 0, n_there);
    guarded_init(&tok, c.n * sizeof *c.tok, sizeof *c.tok);
    c.tok = below(2) ? (uint32_t *)(void *)tok.data : NULL;
    for (size_t t = 0; t < c.n && c.tok; t++) {
        c.tok[t] = below(n_there);
    }
    c.lo = below(rows);
    c.hi = c.lo + below(rows - c.lo + 1); /* or none */
    if (below(2)) {
        c.lo = 0;
        c.hi = rows;
    }
    c.y_stride = rows + below(5);
    size_t n_floats = (c.n - 1) * c.y_stride + rows;
    float *want = malloc(n_floats * sizeof *want);
    fill_canary(want, n_floats);
    c_kern->mul[fmt->id](want, c.y_stride, &c.w, c.lo, c.hi, &c.x, c.tok, c.n);
    bool ok = run_mul(kern, &c, want);
    if (!ok) {
        printf("%s: mul_%s differs: %u x %u, rows %u to %u, %u tokens%s, weights %s, x %s\n",
               kern->name, fmt->name, rows, cols, c.lo, c.hi, c.n, c.tok ? " listed" : "",
               weights_names[weights], acts_names[acts]);
    }
    /* A token alone has the numbers that it has among others. */
    struct case_mul one = c;
    for (uint32_t i = 0; ok && i < c.n; i++) {
        uint32_t alone = c.tok ? c.tok[i] : i;
        one.n = 1;
        one.tok = &alone;
        ok = run_mul(kern, &one, want + i * c.y_stride);
        if (!ok) {
            printf("%s: mul_%s: token %u of %u differs when alone: %u x %u\n", kern->name,
                   fmt->name, i, c.n, rows, cols);
        }
    }
    free(want);
    guarded_finish(&data);
    guarded_finish(&x);
    guarded_finish(&buffer);
    guarded_finish(&tok);
    return ok;
}

static bool check_mul(const struct slu_kern *c_kern, const struct slu_kern *kern,
                      const struct slu_fmt *fmt)
{
    static const uint32_t granules[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 33};
    bool ok = true;
    for (int round = 0; ok && round < 3; round++) {
        for (int weights = 0; weights < N_WEIGHTS; weights++) {
            for (int acts = 0; acts < N_ACTS; acts++) {
                uint32_t rows = 1 + below(ROWS_MAX);
                uint32_t cols = granules[below(10)] * fmt->granule;
                if (fmt->granule == 1) {
                    cols = 1 + below(200);
                } else if (cols > COLS_MAX) {
                    cols = fmt->granule;
                }
                ok &= check_case(c_kern, kern, fmt, rows, cols, (enum weights)weights,
                                 (enum acts)acts, TOKENS_ANY);
            }
        }
    }
    /* More tokens than pass over an unpacked panel, with the least rows of which a second panel is
     * made; and more groups than a panel holds, so many that tokens take turns, and more than there
     * are tiles for. */
    uint32_t few = fmt->granule == 1 ? 100 : fmt->granule < 96 ? 96 : fmt->granule;
    for (int i = 0; i < 2; i++) {
        uint32_t n = TOKENS_MAX - below(8);
        ok &= check_case(c_kern, kern, fmt, 33, few, WEIGHTS_SANE, ACTS_SANE, n);
    }
    ok &=
        check_case(c_kern, kern, fmt, 33, 4352, WEIGHTS_SANE, below(2) ? ACTS_SANE : ACTS_ODD, 16);
    ok &= check_case(c_kern, kern, fmt, 5, 4352, WEIGHTS_SANE, ACTS_SANE, TOKENS_MAX);
    ok &= check_case(c_kern, kern, fmt, 5, 14336, WEIGHTS_SANE, ACTS_SANE, 70);
    ok &= check_case(c_kern, kern, fmt, 5, 33024, WEIGHTS_SANE, ACTS_SANE, 30);
    ok &= check_case(c_kern, kern, fmt, 3, 65536 + 256, WEIGHTS_SANE, ACTS_SANE, 9);
    /* Panels of three registers of rows, and what is left of them: less than one, one, two; of few
     * groups, and of a few more than one holds. */
    static const uint32_t heights[] = {16, 33, 48, 49, 64, 97};
    for (size_t i = 0; i < sizeof heights / sizeof *heights && fmt->granule > 1; i++) {
        uint32_t some = i % 3 == 2 ? 4096 + fmt->granule
                                   : (544 + fmt->granule - 1) / fmt->granule * fmt->granule;
        ok &= check_case(c_kern, kern, fmt, heights[i], some, (enum weights)below(N_WEIGHTS),
                         ACTS_SANE, i % 3 == 1 ? TOKENS_MAX : 32);
    }
    /* More columns than a few tokens have room for on the side. */
    ok &= check_case(c_kern, kern, fmt, 5, 4352, WEIGHTS_ANY, ACTS_LARGEST, 1 + below(3));
    /* Rows long enough for a pipeline of units, whose last ones end anywhere. */
    for (int i = 0; i < 4; i++) {
        uint32_t some = (500 + below(1500)) / fmt->granule * fmt->granule;
        ok &= check_case(c_kern, kern, fmt, 1 + below(40), some, (enum weights)below(N_WEIGHTS),
                         (enum acts)below(N_ACTS), 1);
    }
    /* Columns and rows of a real model. */
    uint32_t cols = COLS_MAX / fmt->granule * fmt->granule;
    return check_case(c_kern, kern, fmt, 5, cols, WEIGHTS_SANE, ACTS_SANE, TOKENS_ANY) && ok;
}

/* Whether a token has the same numbers in both. */
static bool same_acts(const struct slu_acts *a, const struct slu_acts *b, uint32_t t)
{
    size_t n_groups = ((size_t)a->cols + 127) / 128 * 4, at = t * a->g_stride;
    return !memcmp(a->q + t * a->q_stride, b->q + t * b->q_stride, 32 * n_groups) &&
           !memcmp(a->sums + 2 * at, b->sums + 2 * at, 4 * n_groups) &&
           same(a->d + at, b->d + at, n_groups) && same(a->s + at, b->s + at, n_groups);
}

static bool check_quantize(const struct slu_kern *c_kern, const struct slu_kern *kern)
{
    enum { N = 3 };
    bool ok = true;
    for (int round = 0; ok && round < 200; round++) {
        uint32_t cols = 1 + below(round % 2 ? 40 : 700), lo = below(N), hi = lo + 1 + below(N - lo);
        size_t bytes = slu_acts_bytes(N, cols);
        struct guarded x, buffers[2];
        struct slu_acts acts[2];
        guarded_init(&x, N * cols * sizeof(float), sizeof(float));
        fill_acts((float *)(void *)x.data, N * cols, (enum acts)(round % N_ACTS));
        for (int i = 0; i < 2; i++) {
            guarded_init(&buffers[i], bytes, 64);
            memset(buffers[i].data, 0x55, bytes);
            slu_acts_init(&acts[i], N, cols, (float *)(void *)x.data, cols, buffers[i].data);
            (i ? kern : c_kern)->quantize(&acts[i], lo, hi);
        }
        /* The other rows are still full of the same bytes. */
        for (uint32_t t = 0; t < N; t++) {
            ok &= same_acts(&acts[0], &acts[1], t);
        }
        if (!ok) {
            printf("%s: quantize differs: rows %u to %u of %u, x %s\n", kern->name, lo, hi, cols,
                   acts_names[round % N_ACTS]);
        }
        guarded_finish(&x);
        guarded_finish(&buffers[0]);
        guarded_finish(&buffers[1]);
    }
    return ok;
}

bool report(bool ok, const struct slu_kern *kern, const char *what)
{
    if (!ok) {
        printf("%s: %s differs\n", kern->name, what);
    }
    return ok;
}

/* Sums of terms of any size, in any order too as long as they are of moderate size. */
static bool check_add_grid(const struct slu_kern *kern, const struct slu_kern *c_kern, float factor,
                           const float *x, uint32_t n)
{
    struct guarded sums, wanted;
    guarded_init(&sums, n * sizeof(double), sizeof(double));
    guarded_init(&wanted, n * sizeof(double), sizeof(double));
    double *sum = (double *)(void *)sums.data, *want = (double *)(void *)wanted.data;
    for (int i = 0; i < 3; i++) {
        kern->add_grid(sum, factor * (float)(i + 1), x, n);
        c_kern->add_grid(want, factor * (float)(i + 1), x, n);
    }
    bool ok = true;
    for (uint32_t i = 0; i < n; i++) {
        ok &= sum[i] == want[i] || (isnan(sum[i]) && isnan(want[i]));
    }
    ok = report(ok, kern, "add_grid");
    memset(want, 0, n * sizeof *want);
    for (int i = 3; i > 0; i--) {
        kern->add_grid(want, factor * (float)i, x, n);
    }
    for (uint32_t i = 0; i < n; i++) {
        ok &= fabs(sum[i]) >= 0x1p19 || isnan(sum[i]) || sum[i] == want[i];
    }
    guarded_finish(&sums);
    guarded_finish(&wanted);
    return report(ok, kern, "add_grid's order");
}

/* dot, axpy and the conversion to halves. */
static bool check_vectors(const struct slu_kern *c_kern, const struct slu_kern *kern)
{
    bool ok = true;
    for (int round = 0; ok && round < 400; round++) {
        uint32_t n = 1 + below(300);
        struct guarded a, b, half, y, half_out;
        guarded_init(&a, n * sizeof(float), sizeof(float));
        guarded_init(&b, n * sizeof(float), sizeof(float));
        guarded_init(&y, n * sizeof(float), sizeof(float));
        guarded_init(&half, n * sizeof(uint16_t), sizeof(uint16_t));
        guarded_init(&half_out, n * sizeof(uint16_t), sizeof(uint16_t));
        float *x = (float *)(void *)a.data, *z = (float *)(void *)b.data;
        float *out = (float *)(void *)y.data, *want = malloc(n * sizeof *want);
        uint16_t *h = (uint16_t *)(void *)half.data, *h_out = (uint16_t *)(void *)half_out.data;
        uint16_t *h_want = malloc(n * sizeof *h_want);
        fill_acts(x, n, (enum acts)(round % N_ACTS));
        fill_acts(z, n, (enum acts)(round / 4 % N_ACTS));
        if (round % 3) {
            fill_halves(half.data, n * sizeof *h, 1);
        } else {
            fill_random(half.data, n * sizeof *h);
        }
        if (round % 5 == 0) {
            fill_random(b.data, n * sizeof *z);
        }
        float dots[2] = {kern->dot_f32(x, z, n), kern->dot_f16(x, h, n)};
        float dots_want[2] = {c_kern->dot_f32(x, z, n), c_kern->dot_f16(x, h, n)};
        ok &= report(same(dots, dots_want, 1), kern, "dot_f32");
        ok &= report(same(dots + 1, dots_want + 1, 1), kern, "dot_f16");
        float factor = noise();
        memcpy(out, z, n * sizeof *z);
        memcpy(want, z, n * sizeof *z);
        kern->axpy_f32(out, factor, x, n);
        c_kern->axpy_f32(want, factor, x, n);
        ok &= report(same(out, want, n), kern, "axpy_f32");
        kern->axpy_f16(out, factor, h, n);
        c_kern->axpy_f16(want, factor, h, n);
        ok &= report(same(out, want, n), kern, "axpy_f16");
        ok &= check_add_grid(kern, c_kern, factor, x, n);
        kern->f32_to_f16(h_out, z, n);
        c_kern->f32_to_f16(h_want, z, n);
        ok &= report(!memcmp(h_out, h_want, n * sizeof *h), kern, "f32_to_f16");
        free(want);
        free(h_want);
        guarded_finish(&a);
        guarded_finish(&b);
        guarded_finish(&y);
        guarded_finish(&half);
        guarded_finish(&half_out);
    }
    return ok;
}

static bool check_rows(const struct slu_kern *c_kern, const struct slu_kern *kern,
                       const struct slu_fmt *fmt)
{
    bool ok = true;
    for (int weights = 0; weights < N_WEIGHTS; weights++) {
        uint32_t cols = fmt->granule == 1 ? 77 : 3 * fmt->granule;
        struct slu_mat_layout at;
        struct slu_mat w;
        struct guarded data;
        slu_mat_layout(fmt, 3, cols, &at);
        guarded_init(&data, at.bytes, 64);
        slu_mat_view(&w, fmt, 3, cols, data.data);
        fill_weights(&w, data.data, (enum weights)weights);
        float out[3 * 256], want[3 * 256];
        for (uint32_t row = 0; row < 3; row++) {
            kern->row_f32(out, &w, row);
            c_kern->row_f32(want, &w, row);
            ok &= report(same(out, want, cols), kern, "row_f32");
        }
        guarded_finish(&data);
    }
    return ok;
}

static int check_all(const struct slu_kern *const *kerns, int n_kerns)
{
    bool all = true;
    /* The first is C; it is held to itself too, which tests that it is batch-invariant. */
    for (int i = 0; i < n_kerns; i++) {
        bool ok = true;
        for (unsigned id = 0; id < SLU_FMTS; id++) {
            ok &= check_mul(kerns[0], kerns[i], slu_fmt_get(id));
            ok &= check_rows(kerns[0], kerns[i], slu_fmt_get(id));
        }
        for (unsigned id = SLU_FMT_GGUFS; id < SLU_FMTS; id++) {
            const struct slu_fmt *roomy = slu_fmt_get(id + 256 * (1 + below(SLU_ECQ_ROOMS - 1)));
            ok &= check_mul(kerns[0], kerns[i], roomy);
            ok &= check_rows(kerns[0], kerns[i], roomy);
            for (unsigned room = 1; room < SLU_ECQ_ROOMS; room++) {
                /* Narrow enough for one escape, and too wide for AVX-512's own product. */
                const struct slu_fmt *fmt = slu_fmt_get(id + 256 * room);
                ok &=
                    check_case(kerns[0], kerns[i], fmt, 1, 32, WEIGHTS_SANE, ACTS_SANE, TOKENS_ANY);
                ok &= check_case(kerns[0], kerns[i], fmt, 3, 992, WEIGHTS_SANE, ACTS_SANE,
                                 TOKENS_ANY);
            }
            /* As wide as escapes and tiles of many tokens are kept for, and wider. */
            ok &= check_case(kerns[0], kerns[i], roomy, 3, 4096, WEIGHTS_SANE, ACTS_SANE, 12);
            ok &= check_case(kerns[0], kerns[i], roomy, 33, 4128, WEIGHTS_SANE, ACTS_SANE, 12);
            ok &= check_case(kerns[0], kerns[i], roomy, 3, 9696, WEIGHTS_SANE, ACTS_SANE, 70);
            ok &= check_case(kerns[0], kerns[i], roomy, 3, 16384, WEIGHTS_SANE, ACTS_SANE, 5);
            ok &= check_case(kerns[0], kerns[i], roomy, 2, 16416, WEIGHTS_SANE, ACTS_SANE, 5);
            /* Columns that 16 bits wouldn't hold. */
            ok &= check_case(kerns[0], kerns[i], roomy, 1, 66560, WEIGHTS_SANE, ACTS_SANE, 2);
        }
        ok &= check_quantize(kerns[0], kerns[i]);
        ok &= check_vectors(kerns[0], kerns[i]);
        ok &= check_attn(kerns[0], kerns[i]);
        printf("%-8s %s\n", kerns[i]->name, ok ? "ok" : "DIFFERS");
        all &= ok;
    }
    return all ? 0 : 1;
}

/* What this machine can run, from the fewest flags to all of them, each set of kernels once. */
static int list_kerns(const struct slu_kern *kerns[KERNS_MAX])
{
    static const unsigned masks[] = {
        0, SLU_CPU_AVX2, SLU_CPU_AVX2 | SLU_CPU_AVX_VNNI, SLU_CPU_DOTPROD, ~0u,
    };
    int n = 0;
    for (size_t i = 0; i < sizeof masks / sizeof *masks; i++) {
        int k = 0;
        kerns[n] = slu_kern_get(slu_cpu_flags() & masks[i]);
        while (kerns[k] != kerns[n]) {
            k++;
        }
        n += k == n;
    }
#ifdef CHECKASM_VL256
    if (slu_cpu_flags() & SLU_CPU_AVX512) {
        kerns[n++] = &slu_kern_vl256;
    }
#endif
    return n;
}

int main(int argc, char **argv)
{
    const struct slu_kern *kerns[KERNS_MAX];
    int n_kerns = list_kerns(kerns);
    if (argc > 1 && !strcmp(argv[1], "--bench")) {
        return bench_all(kerns, n_kerns, argc > 2 ? argv[2] : NULL);
    }
    uint64_t seed = 20261121;
    if (argc > 2 && !strcmp(argv[1], "--seed")) {
        seed = strtoull(argv[2], NULL, 0);
    }
    printf("seed %" PRIu64 "\n", seed);
    rng_seed(seed);
    return check_all(kerns, n_kerns);
}
