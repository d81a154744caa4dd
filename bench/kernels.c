/*
 * What the kernels reach of what the machine has: weights a second of matrix-vector products
 * beside the read bandwidth of memory, and products a second of matrix-matrix products beside the
 * peak of the byte instructions, all taken in turns in one run, with one thread and with more.
 *
 *     build/bench/kernels [--format NAME] [--threads N] [--rounds N] [--bytes MiB] [--mask FLAGS]
 *                         [--cols N] [--vec] [--cpu] [--json]
 *
 * Matrices are blocks of 224 rows, which threads take one after the other until they have been
 * through all that vectors are multiplied with too. Figures are medians of the rounds, shares
 * those of each round's, in wall time, or with --cpu in the threads' own time on a processor, for
 * machines that are busy with other things. --mask keeps only these CPU flags (base/cpu.h), --vec
 * leaves the matrix-matrix products out, --cols takes narrower matrices than 2880 columns, as a
 * block's down matrix is. Of the q*e formats those without escapes and those with 12 in 1024
 * columns are shown, others by name.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "base/cpu.h"
#include "base/pool.h"
#include "kern/peak.h"
#include "kern/kern.h"

#define COLS         2880 /* at most; less what isn't whole */
#define GRAIN        512  /* rows of a product that a thread takes at once */
#define BLOCK_ROWS   224  /* that gate and up have in a block of 1 MiB, in MXFP4 */
#define ROUNDS_MAX   101
#define BYTES_MIN    ((size_t)16 << 20) /* what 1024 rows of floats take */
#define TOKENS_MAX   512
#define PEAK_ROUNDS  2000000u
#define READ_GRAIN   ((size_t)1 << 20)
#define N_TOKEN_SETS 4

static const uint32_t token_sets[N_TOKEN_SETS] = {4, 8, 64, 512};

struct bench {
    const struct slu_kern *kern;
    struct slu_pool *pools[2]; /* one thread, and as many as asked for */
    unsigned n_threads, n_rounds;
    uint32_t cols;
    uint8_t *data;
    size_t bytes;
    struct slu_acts acts;
    float *y;
    bool is_json, is_cpu, is_vec, has_printed;
};

static double clock_s(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t n)
{
    qsort(values, n, sizeof *values, compare);
    return values[n / 2];
}

/* What all threads of a measurement share: they take grains until none is left. */
struct job {
    struct bench *bench;
    struct slu_mat mat; /* of matrices of blocks, the first */
    uint32_t n_tokens;
    size_t n_blocks;
    slu_pool_fn fn;
    _Atomic size_t next;
    _Atomic uint64_t cpu_ns;
    _Atomic uint64_t sum; /* for the compiler to believe that bytes are needed */
};

static void read_work(void *arg, unsigned thread, unsigned n_threads)
{
    struct job *job = arg;
    uint64_t sum[8] = {0};
    (void)thread;
    (void)n_threads;
    for (;;) {
        size_t at = atomic_fetch_add_explicit(&job->next, READ_GRAIN, memory_order_relaxed);
        if (at >= job->bench->bytes) {
            break;
        }
        const uint64_t *words = (const uint64_t *)(const void *)(job->bench->data + at);
        for (size_t i = 0; i < READ_GRAIN / 8; i += 8) {
            for (size_t k = 0; k < 8; k++) {
                sum[k] += words[i + k];
            }
        }
    }
    for (size_t k = 0; k < 8; k++) {
        atomic_fetch_add_explicit(&job->sum, sum[k], memory_order_relaxed);
    }
}

static void vec_work(void *arg, unsigned thread, unsigned n_threads)
{
    struct job *job = arg;
    const struct slu_mat *w = &job->mat;
    (void)thread;
    (void)n_threads;
    for (;;) {
        size_t lo = atomic_fetch_add_explicit(&job->next, GRAIN, memory_order_relaxed);
        if (lo >= w->rows) {
            return;
        }
        uint32_t hi = (uint32_t)(lo + GRAIN < w->rows ? lo + GRAIN : w->rows);
        job->bench->kern->mul[w->fmt->id](job->bench->y, w->rows, w, (uint32_t)lo, hi,
                                          &job->bench->acts, NULL, 1);
    }
}

/* Block i of a job. */
static struct slu_mat block_at(const struct job *job, size_t i)
{
    const struct slu_mat *first = &job->mat;
    struct slu_mat w;
    slu_mat_view(&w, first->fmt, first->rows, first->cols, first->data + i * first->at.bytes);
    return w;
}

static void mat_work(void *arg, unsigned thread, unsigned n_threads)
{
    struct job *job = arg;
    float *y = job->bench->y + (size_t)thread * TOKENS_MAX * BLOCK_ROWS;
    (void)n_threads;
    for (;;) {
        size_t i = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (i >= job->n_blocks) {
            return;
        }
        struct slu_mat w = block_at(job, i);
        job->bench->kern->mul[w.fmt->id](y, BLOCK_ROWS, &w, 0, BLOCK_ROWS, &job->bench->acts, NULL,
                                         job->n_tokens);
    }
}

static void peak_work(void *arg, unsigned thread, unsigned n_threads)
{
    struct job *job = arg;
    (void)thread;
    (void)n_threads;
    atomic_fetch_add_explicit(&job->sum, slu_peak_macs(job->bench->kern->name, PEAK_ROUNDS),
                              memory_order_relaxed);
}

static void clocked_work(void *arg, unsigned thread, unsigned n_threads)
{
    struct job *job = arg;
    double start = clock_s(CLOCK_THREAD_CPUTIME_ID);
    job->fn(job, thread, n_threads);
    double took = clock_s(CLOCK_THREAD_CPUTIME_ID) - start;
    atomic_fetch_add_explicit(&job->cpu_ns, (uint64_t)(1e9 * took), memory_order_relaxed);
}

/* Seconds that fn takes. */
static double timed(struct job *job, int pool, slu_pool_fn fn)
{
    struct slu_pool *threads = job->bench->pools[pool];
    job->fn = fn;
    atomic_store_explicit(&job->next, 0, memory_order_relaxed);
    atomic_store_explicit(&job->cpu_ns, 0, memory_order_relaxed);
    double start = clock_s(CLOCK_MONOTONIC);
    slu_pool_run(threads, clocked_work, job);
    double took = clock_s(CLOCK_MONOTONIC) - start;
    if (!job->bench->is_cpu) {
        return took;
    }
    uint64_t cpu_ns = atomic_load_explicit(&job->cpu_ns, memory_order_relaxed);
    return 1e-9 * (double)cpu_ns / slu_pool_threads(threads);
}

/* Ordinary scales in the planes of a matrix, whose codes may be any bytes. */
static void fill_halves(uint8_t *plane, size_t bytes, float scale)
{
    for (size_t i = 0; i + 2 <= bytes; i += 2) {
        uint16_t half = slu_f32_to_f16(scale * (1 + (float)(i * 37 % 101) * 0.01f));
        memcpy(plane + i, &half, sizeof half);
    }
}

/* The table of a q*e matrix, ordinary scales, and escapes all over each row. */
static void fill_ecq(const struct slu_mat *w, uint8_t *data)
{
    struct slu_ecq_head head = {.unit = 0.01f, .escape = 4};
    for (int i = 0; i < 64; i++) {
        head.table[i] = (int8_t)(4 * i - 126);
    }
    memcpy(data + w->at.head, &head, sizeof head);
    memset(data + w->at.scales, 8, w->rows * w->at.scales_row);
    size_t n = w->rows * w->at.escapes_row;
    uint32_t room = slu_fmt_escapes(w->fmt, w->cols), gap = room ? w->cols / room : 0;
    gap = gap < 250 ? gap : 250;
    for (size_t i = 0; i < n; i++) { /* a quarter less and more than the mean, in turns */
        data[w->at.gaps + i] = (uint8_t)(i % w->at.escapes_row % 2 ? gap - gap / 4 : gap);
    }
}

static void fill(const struct slu_mat *w, uint8_t *data)
{
    uint64_t x = 88172645463325252u;
    for (size_t i = 0; i < w->at.bytes; i += 8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        /* Numbers of exponents that don't overflow, should they be floats. */
        uint64_t word = w->fmt->group ? x : (x & 0x83ff83ff83ff83ff) | 0x3800380038003800;
        memcpy(data + i, &word, 8);
    }
    size_t scales = w->rows * w->at.scales_row;
    if (w->fmt->scale == SLU_SCALE_F16) {
        fill_halves(data + w->at.scales, scales, 0.01f);
    } else if (w->fmt->scale == SLU_SCALE_E8M0) {
        memset(data + w->at.scales, 122, scales);
    }
    if (w->fmt->min == SLU_MIN_F16) {
        fill_halves(data + w->at.mins, w->rows * w->at.mins_row, 0.01f);
    }
    fill_halves(data + w->at.supers, w->rows * w->at.supers_row, 0.001f);
    if (w->fmt->scale == SLU_SCALE_ROW) {
        fill_ecq(w, data);
    }
}

static uint32_t cols_of(const struct bench *b, const struct slu_fmt *fmt)
{
    return b->cols / fmt->granule * fmt->granule;
}

/* The activations of the greatest number of tokens, for cols columns. */
static void make_acts(struct bench *b, uint32_t cols, float *x, void *buffer)
{
    for (size_t i = 0; i < (size_t)TOKENS_MAX * cols; i++) {
        x[i] = (float)((i * 2654435761u >> 7) % 1000) * 0.002f - 1;
    }
    slu_acts_init(&b->acts, TOKENS_MAX, cols, x, cols, buffer);
    b->kern->quantize(&b->acts, 0, TOKENS_MAX);
}

static void print_vec(struct bench *b, const char *format, const double gb[2], const double ram[2],
                      const double share[2])
{
    if (b->is_json) {
        printf(
            "%s\n    {\"format\": \"%s\", \"vec_gb_s\": [%.2f, %.2f], \"ram_gb_s\": [%.2f, %.2f], "
            "\"vec_share\": [%.3f, %.3f], \"mat\": [",
            b->has_printed ? "," : "", format, gb[0], gb[1], ram[0], ram[1], share[0], share[1]);
        b->has_printed = true;
        return;
    }
    printf("%-7s %6.1f of %5.1f (%3.0f %%) %6.1f of %5.1f (%3.0f %%)", format, gb[0], ram[0],
           100 * share[0], gb[1], ram[1], 100 * share[1]);
}

#define ROWS_MAX ((uint32_t)1 << 24) /* of a matrix */

static void bench_vec(struct bench *b, const struct slu_fmt *fmt)
{
    struct job job = {.bench = b};
    struct slu_mat_layout at;
    slu_mat_layout(fmt, 1024, cols_of(b, fmt), &at);
    size_t n = b->bytes / at.bytes * 1024;
    uint32_t rows = n < ROWS_MAX ? (uint32_t)n : ROWS_MAX;
    slu_mat_view(&job.mat, fmt, rows, cols_of(b, fmt), b->data);
    fill(&job.mat, b->data);
    double gb[2][ROUNDS_MAX], ram[2][ROUNDS_MAX], share[2][ROUNDS_MAX];
    for (unsigned r = 0; r < b->n_rounds; r++) {
        for (int p = 0; p < 2; p++) {
            ram[p][r] = 1e-9 * (double)b->bytes / timed(&job, p, read_work);
            gb[p][r] = 1e-9 * (double)job.mat.at.bytes / timed(&job, p, vec_work);
            share[p][r] = gb[p][r] / ram[p][r];
        }
    }
    const double gb_s[2] = {median(gb[0], b->n_rounds), median(gb[1], b->n_rounds)};
    const double ram_s[2] = {median(ram[0], b->n_rounds), median(ram[1], b->n_rounds)};
    const double shares[2] = {median(share[0], b->n_rounds), median(share[1], b->n_rounds)};
    print_vec(b, fmt->name, gb_s, ram_s, shares);
}

static void print_mat(struct bench *b, uint32_t n, const double g[2], const double peak[2],
                      const double share[2])
{
    if (b->is_json) {
        printf(
            "%s\n      {\"tokens\": %u, \"g_mac_s\": [%.1f, %.1f], \"peak_g_mac_s\": [%.1f, %.1f], "
            "\"share\": [%.3f, %.3f]}",
            n == token_sets[0] ? "" : ",", n, g[0], g[1], peak[0], peak[1], share[0], share[1]);
        return;
    }
    printf(" | %5.1f %5.1f", g[0], g[1]);
    if (peak[0] > 0) {
        printf(" (%2.0f, %2.0f %%)", 100 * share[0], 100 * share[1]);
    }
}

static void bench_mat(struct bench *b, const struct slu_fmt *fmt, uint32_t n)
{
    struct job job = {.bench = b, .n_tokens = n};
    slu_mat_view(&job.mat, fmt, BLOCK_ROWS, cols_of(b, fmt), b->data);
    job.n_blocks = b->bytes / job.mat.at.bytes;
    for (size_t i = 0; i < job.n_blocks; i++) {
        struct slu_mat w = block_at(&job, i);
        fill(&w, b->data + i * w.at.bytes);
    }
    const double macs = (double)job.n_blocks * BLOCK_ROWS * job.mat.cols * n;
    double g[2][ROUNDS_MAX], peak[2][ROUNDS_MAX], share[2][ROUNDS_MAX];
    unsigned n_rounds = n > 64 ? (b->n_rounds + 1) / 2 : b->n_rounds;
    for (unsigned r = 0; r < n_rounds; r++) {
        for (int p = 0; p < 2; p++) {
            g[p][r] = 1e-9 * macs / timed(&job, p, mat_work);
            atomic_store_explicit(&job.sum, 0, memory_order_relaxed);
            double took = timed(&job, p, peak_work);
            peak[p][r] = 1e-9 * (double)atomic_load_explicit(&job.sum, memory_order_relaxed) / took;
            share[p][r] = peak[p][r] > 0 ? g[p][r] / peak[p][r] : 0;
        }
    }
    const double g_s[2] = {median(g[0], n_rounds), median(g[1], n_rounds)};
    const double peak_s[2] = {median(peak[0], n_rounds), median(peak[1], n_rounds)};
    const double shares[2] = {median(share[0], n_rounds), median(share[1], n_rounds)};
    print_mat(b, n, g_s, peak_s, shares);
}

static void bench_format(struct bench *b, const struct slu_fmt *fmt, float *x, void *buffer)
{
    make_acts(b, cols_of(b, fmt), x, buffer);
    bench_vec(b, fmt);
    fflush(stdout);
    for (int i = 0; i < N_TOKEN_SETS && !b->is_vec; i++) {
        bench_mat(b, fmt, token_sets[i]);
        fflush(stdout);
    }
    printf(b->is_json ? "]}" : "\n");
}

static void bench_all(struct bench *b, const char *format)
{
    float *x = malloc((size_t)TOKENS_MAX * COLS * sizeof *x);
    void *buffer = aligned_alloc(64, slu_acts_bytes(TOKENS_MAX, COLS));
    size_t rows_max = b->bytes / (b->cols / 4) + 1024; /* no format has fewer than 2 bits */
    size_t y_floats = (size_t)b->n_threads * TOKENS_MAX * BLOCK_ROWS;
    b->y = malloc((y_floats > rows_max ? y_floats : rows_max) * sizeof *b->y);
    if (!x || !buffer || !b->y) {
        fprintf(stderr, "kernels: no memory\n");
        exit(2);
    }
    if (b->is_json) {
        printf("{\"kernels\": \"%s\", \"threads\": [1, %u], \"formats\": [", b->kern->name,
               b->n_threads);
    } else {
        printf("%s, one thread and %u. Matrix-vector: GB/s of weights, of memory's. Matrix-matrix: "
               "G multiply-adds/s, and\nshares of the peak of the byte instructions, for 4, 8, 64 "
               "and 512 tokens.\n",
               b->kern->name, b->n_threads);
    }
    for (unsigned id = 0; id < SLU_FMTS; id++) {
        for (unsigned room = 0; room < SLU_ECQ_ROOMS; room++) {
            const struct slu_fmt *fmt = slu_fmt_get(id + 256 * room);
            if (fmt && (format ? !strcmp(format, fmt->name) : room == 0 || fmt->escapes == 12)) {
                bench_format(b, fmt, x, buffer);
            }
        }
    }
    printf(b->is_json ? "\n]}\n" : "");
    free(x);
    free(buffer);
    free(b->y);
}

int main(int argc, char **argv)
{
    struct bench b = {
        .n_threads = slu_pool_cpus(), .n_rounds = 7, .cols = COLS, .bytes = (size_t)512 << 20};
    const char *format = NULL;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--json")) {
            b.is_json = true;
            continue;
        }
        if (!strcmp(argv[i], "--cpu")) {
            b.is_cpu = true;
            continue;
        }
        if (!strcmp(argv[i], "--vec")) {
            b.is_vec = true;
            continue;
        }
        i++;
        if (!strcmp(argv[i - 1], "--format")) {
            format = value;
        } else if (!strcmp(argv[i - 1], "--threads")) {
            b.n_threads = (unsigned)strtoul(value, NULL, 0);
        } else if (!strcmp(argv[i - 1], "--rounds")) {
            b.n_rounds = (unsigned)strtoul(value, NULL, 0);
        } else if (!strcmp(argv[i - 1], "--bytes")) {
            b.bytes = (size_t)strtoul(value, NULL, 0) << 20;
        } else if (!strcmp(argv[i - 1], "--cols")) {
            b.cols = (uint32_t)strtoul(value, NULL, 0);
        } else if (!strcmp(argv[i - 1], "--mask")) {
            slu_cpu_set_mask((unsigned)strtoul(value, NULL, 0));
        } else {
            fprintf(stderr, "kernels: what is %s? See the head of bench/kernels.c.\n", argv[i - 1]);
            return 2;
        }
    }
    b.n_rounds = b.n_rounds < 1 ? 1 : b.n_rounds > ROUNDS_MAX ? ROUNDS_MAX : b.n_rounds;
    b.bytes = b.bytes < BYTES_MIN ? BYTES_MIN : b.bytes;
    if (b.cols < 256 || b.cols > COLS) { /* 256 being the largest granule */
        fprintf(stderr, "kernels: --cols takes 256 to %d\n", COLS);
        return 2;
    }
    b.kern = slu_kern_get(slu_cpu_flags());
    struct slu_err err = {0};
    b.data = mmap(NULL, b.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b.data == MAP_FAILED || slu_pool_create(1, &b.pools[0], &err) < 0 ||
        slu_pool_create(b.n_threads, &b.pools[1], &err) < 0) {
        fprintf(stderr, "kernels: no memory or no threads\n");
        return 2;
    }
    b.n_threads = slu_pool_threads(b.pools[1]);
    madvise(b.data, b.bytes, MADV_HUGEPAGE);
    memset(b.data, 1, b.bytes);
    bench_all(&b, format);
    slu_pool_destroy(b.pools[0]);
    slu_pool_destroy(b.pools[1]);
    munmap(b.data, b.bytes);
    return 0;
}
