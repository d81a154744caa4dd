/*
 * Rate and distortion of weight formats: bits a weight on flash and in memory, with scales, tables
 * and escapes counted, the error that they leave, and how fast one core decodes a block and
 * multiplies with it. Gaussian and Student-t matrices, and the weights of the golden models in F32.
 *
 *     build/bench/rd [--rows N] [--source NAME] [--format NAME --error E | --step S [--lambda L]]
 *                    [--no-speed] [--json]
 *
 * Times are of the thread on a processor, so that other load matters little.
 */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cpu.h"
#include "io/codec.h"
#include "io/gguf.h"
#include "io/source.h"
#include "kern/kern.h"
#include "tools/ecq.h"
#include "tools/planes.h"
#include "tools/quantize.h"

#define COLS 2880u
#define SLICE_BYTES                                                                                \
    ((size_t)720 << 10) /* of a matrix in memory: about what a block has of each                   \
                         */
#define SAMPLE_ROWS  96u
#define SPEED_S      0.4
#define MATRICES_MAX 512u

/* A matrix in floats. */
struct matrix {
    float *x;
    uint32_t rows, cols;
};

struct source {
    char name[64];
    struct matrix matrices[MATRICES_MAX];
    uint32_t n;
};

struct result {
    char source[64], format[32];
    double rmse, flash_bpw, ram_bpw, decode_gweights_s;
};

struct bench {
    struct slu_encoder *encoder;
    struct slu_decoder *decoder;
    const struct slu_kern *kern;
    json_t *rows;
    bool has_speed;
    double error, power, weights, flash_bytes, ram_bytes; /* of the case that runs */
    double seconds, decoded;
};

static void *must(void *memory)
{
    if (!memory) {
        fprintf(stderr, "rd: out of memory\n");
        exit(1);
    }
    return memory;
}

static void check(int rc, const struct slu_err *err)
{
    if (rc < 0) {
        fprintf(stderr, "rd: %s\n", err->text);
        exit(1);
    }
}

/* ---- sources ------------------------------------------------------------------------------ */

static double uniform(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return ((double)(*state >> 11) + 0.5) * 0x1p-53;
}

static double gaussian(uint64_t *state)
{
    return sqrt(-2 * log(uniform(state))) * cos(2 * M_PI * uniform(state));
}

static void make_source(struct source *source, const char *name, uint32_t rows, bool is_student)
{
    uint64_t state = 1;
    float *x = must(malloc((size_t)rows * COLS * sizeof *x));
    for (size_t i = 0; i < (size_t)rows * COLS; i++) {
        double v = gaussian(&state);
        if (is_student) {
            double chi = 0;
            for (int k = 0; k < 5; k++) {
                double g = gaussian(&state);
                chi += g * g;
            }
            v /= sqrt(chi / 5);
        }
        x[i] = (float)(0.02 * v);
    }
    *source = (struct source){.n = 1};
    snprintf(source->name, sizeof source->name, "%s", name);
    source->matrices[0] = (struct matrix){x, rows, COLS};
}

static bool is_matrix(const struct slu_gguf_tensor *t)
{
    return t->type == 0 && t->dims[1] > 1 && t->dims[0] % 32 == 0 && t->name.len > 7 &&
           !memcmp(t->name.at + t->name.len - 7, ".weight", 7) &&
           !memmem(t->name.at, t->name.len, "gate_inp", 8) &&
           !memmem(t->name.at, t->name.len, "token_embd", 10);
}

/* The matrices of a golden model, one after another. False where the file is not there. */
static bool load_golden(struct source *source, const char *folder, const char *model)
{
    char path[512];
    snprintf(path, sizeof path, "%s/golden/models/%s-f32-f32.gguf", folder, model);
    *source = (struct source){0};
    snprintf(source->name, sizeof source->name, "%s", model);
    struct slu_source *file;
    struct slu_gguf *gguf;
    struct slu_err err = {0};
    if (slu_source_open_file(path, &file, &err) < 0) {
        fprintf(stderr, "rd: skipping %s: %s\n", model, err.text);
        return false;
    }
    check(slu_gguf_open(file, &gguf, &err), &err);
    for (uint64_t i = 0; i < gguf->n_tensors; i++) {
        const struct slu_gguf_tensor *t = &gguf->tensors[i];
        uint64_t each = t->dims[0] * t->dims[1];
        for (uint64_t e = 0; is_matrix(t) && e < t->dims[2] && source->n < MATRICES_MAX; e++) {
            float *x = must(malloc(each * sizeof *x));
            check(file->read_at(file, t->offset + e * each * sizeof *x, x, each * sizeof *x, &err),
                  &err);
            source->matrices[source->n++] =
                (struct matrix){x, (uint32_t)t->dims[1], (uint32_t)t->dims[0]};
        }
    }
    slu_gguf_close(gguf);
    slu_source_destroy(file);
    return true;
}

static void free_source(struct source *source)
{
    for (uint32_t i = 0; i < source->n; i++) {
        free(source->matrices[i].x);
    }
}

/* ---- measuring ---------------------------------------------------------------------------- */

static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Decodes a slice and multiplies with it, over and over. */
static void time_slice(struct bench *b, const struct slu_planes *planes, enum slu_codec_id codec,
                       const void *stored, size_t stored_bytes)
{
    uint64_t checksum = slu_checksum(stored, stored_bytes);
    uint8_t *out = must(aligned_alloc(64, planes->at.bytes));
    float *x = must(calloc(planes->cols, sizeof *x)), *y = must(calloc(planes->rows, sizeof *y));
    void *q = must(aligned_alloc(64, slu_acts_bytes(1, planes->cols)));
    struct slu_acts acts;
    uint64_t state = 7;
    for (uint32_t i = 0; i < planes->cols; i++) {
        x[i] = (float)gaussian(&state);
    }
    slu_acts_init(&acts, 1, planes->cols, x, planes->cols, q);
    b->kern->quantize(&acts, 0, 1);
    struct slu_mat mat;
    slu_mat_view(&mat, planes->fmt, planes->rows, planes->cols, out);
    struct slu_err err = {0};
    for (int i = 0; i < 4; i++) { /* the first warms up */
        double start = cpu_s();
        check(slu_decode(b->decoder, codec, stored, stored_bytes, checksum, out, planes->at.bytes,
                         &err),
              &err);
        b->kern->mul[mat.fmt->id](y, planes->rows, &mat, 0, planes->rows, &acts, NULL, 1);
        if (i > 0) {
            b->seconds += cpu_s() - start;
            b->decoded += (double)planes->rows * planes->cols;
        }
    }
    free(out);
    free(x);
    free(y);
    free(q);
}

/* Counts what a slice takes, and what is wrong with it. */
static void count_slice(struct bench *b, const struct slu_planes *planes, const float *x)
{
    size_t cuts[SLU_PLANES_CUTS], n_cuts = 0, raw = planes->at.bytes;
    slu_planes_cuts(&planes->at, planes->rows, 0, cuts, &n_cuts);
    const struct slu_parts parts = {cuts, n_cuts, slu_planes_least_gain(planes->fmt)};
    size_t room = slu_encode_parts_bound(raw, &parts);
    uint8_t *stored = must(malloc(room));
    struct slu_err err = {0};
    int64_t n = slu_encode_parts(b->encoder, planes->data, raw, &parts, stored, room, &err);
    check(n < 0 ? (int)n : 0, &err);
    bool is_raw = (size_t)n > raw - raw / 32; /* as the writer of packs has it */
    b->flash_bytes += is_raw ? (double)raw : (double)n;
    b->ram_bytes += (double)raw;
    b->weights += (double)planes->rows * planes->cols;
    if (b->has_speed) {
        time_slice(b, planes, is_raw ? SLU_CODEC_RAW : SLU_CODEC_ZSTD,
                   is_raw ? planes->data : stored, is_raw ? raw : (size_t)n);
    }
    struct slu_mat mat;
    slu_mat_view(&mat, planes->fmt, planes->rows, planes->cols, planes->data);
    float *row = must(malloc(planes->cols * sizeof *row));
    for (uint32_t r = 0; r < planes->rows; r++) {
        b->kern->row_f32(row, &mat, r);
        for (uint32_t i = 0; i < planes->cols; i++) {
            double w = x[(size_t)r * planes->cols + i], d = w - row[i];
            b->error += d * d;
            b->power += w * w;
        }
    }
    free(row);
    free(stored);
}

static void put_gguf(struct slu_planes *planes, const float *x)
{
    uint8_t *packed = must(malloc(slu_planes_row_bytes(planes->fmt, planes->cols)));
    for (uint32_t r = 0; r < planes->rows; r++) {
        const float *row = x + (size_t)r * planes->cols;
        if (planes->fmt->id == SLU_FMT_Q4_0) {
            slu_quantize_q4_0(row, planes->cols, packed);
        } else {
            slu_quantize_row(planes->fmt, row, planes->cols, packed);
        }
        slu_planes_import(planes, r, packed);
    }
    free(packed);
}

static void put_ecq(const struct slu_ecq *ecq, struct slu_planes *planes, const float *x)
{
    void *scratch = must(malloc(slu_ecq_scratch_bytes(planes->cols)));
    struct slu_ecq_scales scales = {0};
    struct slu_ecq_sums sums = {0}; /* rows are compared as they are read back */
    for (uint32_t r = 0; r < planes->rows; r++) {
        slu_ecq_scales_add(&scales, ecq, x + (size_t)r * planes->cols, planes->cols);
    }
    float unit = slu_ecq_unit(&scales);
    slu_ecq_head_put(ecq, unit, planes);
    for (uint32_t r = 0; r < planes->rows; r++) {
        slu_ecq_row_put(ecq, unit, x + (size_t)r * planes->cols, NULL, planes, r, scratch, &sums);
    }
    free(scratch);
}

static void run_matrix(struct bench *b, const struct slu_fmt *fmt,
                       const struct slu_ecq_params *params, const struct matrix *m)
{
    struct slu_ecq ecq;
    if (params) {
        struct slu_ecq_sample sample = {.x = m->x, .stride = m->cols, .cols = m->cols};
        struct slu_err err = {0};
        sample.rows = m->rows < SAMPLE_ROWS ? m->rows : SAMPLE_ROWS;
        check(slu_ecq_fit(&ecq, params, &sample, &err), &err);
    }
    struct slu_mat_layout at;
    slu_mat_layout(fmt, m->rows, m->cols, &at);
    uint32_t n_slices = (uint32_t)((at.bytes + SLICE_BYTES - 1) / SLICE_BYTES);
    uint32_t each = (m->rows + n_slices - 1) / n_slices;
    for (uint32_t lo = 0; lo < m->rows; lo += each) {
        struct slu_planes planes;
        uint32_t rows = m->rows - lo < each ? m->rows - lo : each;
        slu_planes_init(&planes, fmt, rows, m->cols, NULL);
        planes.data = must(aligned_alloc(64, planes.at.bytes));
        memset(planes.data, 0, planes.at.bytes);
        const float *x = m->x + (size_t)lo * m->cols;
        if (params) {
            put_ecq(&ecq, &planes, x);
        } else {
            put_gguf(&planes, x);
        }
        count_slice(b, &planes, x);
        free(planes.data);
    }
}

static void report(struct bench *b, const struct source *source, const char *format)
{
    struct result r = {.rmse = sqrt(b->error / b->power),
                       .flash_bpw = 8 * b->flash_bytes / b->weights,
                       .ram_bpw = 8 * b->ram_bytes / b->weights,
                       .decode_gweights_s = b->seconds > 0 ? 1e-9 * b->decoded / b->seconds : 0};
    if (b->rows) {
        json_array_append_new(b->rows, json_pack("{s:s, s:s, s:f, s:f, s:f, s:f}", "source",
                                                 source->name, "format", format, "rmse", r.rmse,
                                                 "flash_bpw", r.flash_bpw, "ram_bpw", r.ram_bpw,
                                                 "decode_gweights_s", r.decode_gweights_s));
        return;
    }
    printf("%-14s %-16s %8.4f %8.3f %8.3f %8.2f\n", source->name, format, r.rmse, r.flash_bpw,
           r.ram_bpw, r.decode_gweights_s);
    fflush(stdout);
}

/* One row of the table, unless the format doesn't suit the source. */
static void run(struct bench *b, const struct source *source, const struct slu_fmt *fmt,
                const struct slu_ecq_params *params)
{
    b->error = b->power = b->weights = b->flash_bytes = b->ram_bytes = b->seconds = b->decoded = 0;
    for (uint32_t i = 0; i < source->n; i++) {
        struct matrix m = source->matrices[i];
        size_t n = (size_t)m.rows * m.cols;
        if (m.cols % fmt->granule) { /* as rows that the format can have: its groups don't care */
            m.cols = 9 * fmt->granule;
            m.rows = (uint32_t)(n / m.cols);
        }
        if ((size_t)m.rows * m.cols != n) {
            return;
        }
        run_matrix(b, fmt, params, &m);
    }
    char name[32];
    snprintf(name, sizeof name, "%s", fmt->name);
    if (params && params->target_error > 0) {
        snprintf(name, sizeof name, "%s@%.4g", fmt->name, (double)params->target_error);
    }
    report(b, source, name);
}

/* Rows of 16 weights with a 6-bit scale each under an f16 for 256, and 3-bit codes: what GGUF's
 * Q3_K has, which isn't in the family. Its 3.4375 bits are counted as they are. */
static void run_q3_k_like(struct bench *b, const struct source *source)
{
    double error = 0, power = 0;
    for (uint32_t m = 0; m < source->n; m++) {
        const struct matrix *mat = &source->matrices[m];
        for (size_t at = 0; at + 16 <= (size_t)mat->rows * mat->cols; at += 16) {
            const float *x = mat->x + at;
            double best = INFINITY, most = 0;
            for (int i = 0; i < 16; i++) {
                most = fmax(most, fabs((double)x[i]));
                power += (double)x[i] * x[i];
            }
            for (int k = 20; k <= 64 && most > 0; k++) { /* the scale of least error */
                for (int sign = -1; sign <= 1; sign += 2) {
                    double d = sign * most / 4 * k / 48, sum = 0;
                    for (int i = 0; i < 16; i++) {
                        double q = fmin(3, fmax(-4, rint(x[i] / d))), e = x[i] - q * d;
                        sum += e * e;
                    }
                    best = fmin(best, sum);
                }
            }
            error += most > 0 ? best : 0;
        }
    }
    b->error = error;
    b->power = power;
    b->weights = 1;
    b->flash_bytes = b->ram_bytes = 3.4375 / 8;
    b->seconds = 0;
    report(b, source, "Q3_K-like");
}

static const struct slu_fmt *find_fmt(const char *name)
{
    for (unsigned i = 0; i < 8 * 256; i++) {
        const struct slu_fmt *fmt = slu_fmt_get(i);
        if (fmt && !strcmp(fmt->name, name)) {
            return fmt;
        }
    }
    fprintf(stderr, "rd: no format is called %s\n", name);
    exit(2);
}

static void run_all(struct bench *b, const struct source *source)
{
    static const char *const known[] = {"Q4_0", "Q4_K", "MXFP4", "IQ4_NL", "Q6_K", "Q8_0"};
    static const struct {
        const char *format;
        float error;
    } made[] = {
        {"q3e", 0.2f},    {"q3e+12", 0.17f},   {"q4e+6", 0.126f},
        {"q4e", 0.114f},  {"q4e+12", 0.0857f}, {"q4e+24", 0.0855f},
        {"q5e", 0.0856f}, {"q5e+8", 0.05f},    {"q6e+8", 0.027f},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        run(b, source, find_fmt(known[i]), NULL);
    }
    run_q3_k_like(b, source);
    for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
        struct slu_ecq_params params = {.fmt = find_fmt(made[i].format),
                                        .target_error = made[i].error};
        run(b, source, params.fmt, &params);
    }
}

struct options {
    uint32_t rows;
    const char *source, *format;
    float error, step, lambda;
    bool has_speed, is_json;
};

static struct options parse(int argc, char **argv)
{
    struct options o = {.rows = COLS, .has_speed = true};
    for (int i = 1; i < argc; i++) {
        const char *next = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--json")) {
            o.is_json = true;
        } else if (!strcmp(argv[i], "--no-speed")) {
            o.has_speed = false;
        } else if (!strcmp(argv[i], "--rows")) {
            o.rows = (uint32_t)strtoul(next, NULL, 10), i++;
        } else if (!strcmp(argv[i], "--source")) {
            o.source = next, i++;
        } else if (!strcmp(argv[i], "--format")) {
            o.format = next, i++;
        } else if (!strcmp(argv[i], "--error")) {
            o.error = strtof(next, NULL), i++;
        } else if (!strcmp(argv[i], "--step")) {
            o.step = strtof(next, NULL), i++;
        } else if (!strcmp(argv[i], "--lambda")) {
            o.lambda = strtof(next, NULL), i++;
        } else {
            fprintf(stderr, "rd: %s is no option; the head of bench/rd.c lists them\n", argv[i]);
            exit(2);
        }
    }
    return o;
}

static void run_source(struct bench *b, struct source *source, const struct options *o)
{
    if (o->format) {
        struct slu_ecq_params params = {.fmt = find_fmt(o->format),
                                        .target_error = o->error,
                                        .step = o->step,
                                        .lambda = o->lambda};
        run(b, source, params.fmt, params.fmt->scale == SLU_SCALE_ROW ? &params : NULL);
    } else {
        run_all(b, source);
    }
    free_source(source);
}

int main(int argc, char **argv)
{
    static const char *const golden[] = {"deepseek2-s", "gpt-oss-s",  "granitemoe-s", "llama-s",
                                         "olmoe-s",     "qwen2moe-s", "qwen3moe-s"};
    static struct source source;
    struct options o = parse(argc, argv);
    struct bench b = {.kern = slu_kern_get(slu_cpu_flags()), .has_speed = o.has_speed};
    struct slu_err err = {0};
    check(slu_encoder_create(&b.encoder, &err), &err);
    check(slu_decoder_create(&b.decoder, &err), &err);
    b.rows = o.is_json ? json_array() : NULL;
    if (!o.is_json) {
        printf("%-14s %-16s %8s %8s %8s %8s\n", "source", "format", "rmse", "flash", "ram", "Gw/s");
    }
    if (!o.source || !strcmp(o.source, "gaussian")) {
        make_source(&source, "gaussian", o.rows, false);
        run_source(&b, &source, &o);
    }
    if (!o.source || !strcmp(o.source, "student-t5")) {
        make_source(&source, "student-t5", o.rows, true);
        run_source(&b, &source, &o);
    }
    const char *folder = getenv("SLUICE_DATA") ? getenv("SLUICE_DATA") : "../shared";
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) {
        if ((!o.source || !strcmp(o.source, golden[i])) &&
            load_golden(&source, folder, golden[i])) {
            run_source(&b, &source, &o);
        }
    }
    if (b.rows) {
        json_dumpf(b.rows, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(6));
        printf("\n");
        json_decref(b.rows);
    }
    slu_encoder_destroy(b.encoder);
    slu_decoder_destroy(b.decoder);
    return 0;
}
