#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "scratch.h"
#include "io/codec.h"
#include "io/gguf.h"
#include "io/pack.h"
#include "kern/kern.h"
#include "tools/ecq.h"
#include "tools/packer.h"
#include "tools/synth.h"

enum { ROWS = 48, COLS = 1024 };

static float *make_gaussian(uint64_t seed)
{
    float *x = malloc(ROWS * COLS * sizeof *x);
    for (size_t i = 0; i < (size_t)ROWS * COLS; i++) {
        double sum = 0;
        for (int k = 0; k < 12; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            sum += (double)(seed >> 40) * 0x1p-24 - 0.5;
        }
        x[i] = (float)(0.03 * sum);
    }
    return x;
}

static const struct slu_fmt *ecq_fmt(unsigned bits, unsigned room)
{
    return slu_fmt_get(SLU_FMT_Q3E + bits - 3 + 256 * room);
}

/* A whole matrix, quantized; its numbers come back in out. Returns its relative error. */
static double quantize(const struct slu_ecq *ecq, const float *x, const float *weights,
                       uint32_t rows, struct slu_planes *planes, float *out)
{
    void *scratch = malloc(slu_ecq_scratch_bytes(COLS));
    struct slu_ecq_scales scales = {0};
    struct slu_mat mat;
    double error = 0, power = 0;
    cr_assert(slu_planes_init(planes, ecq->fmt, rows, COLS, NULL));
    planes->data = aligned_alloc(64, planes->at.bytes);
    memset(planes->data, 0, planes->at.bytes);
    for (uint32_t r = 0; r < rows; r++) {
        slu_ecq_scales_add(&scales, ecq, x + (size_t)r * COLS, COLS);
    }
    struct slu_ecq_sums sums = {0};
    float unit = slu_ecq_unit(&scales);
    slu_ecq_head_put(ecq, unit, planes);
    slu_mat_view(&mat, ecq->fmt, rows, COLS, planes->data);
    for (uint32_t r = 0; r < rows; r++) {
        slu_ecq_row_put(ecq, unit, x + (size_t)r * COLS, weights, planes, r, scratch, &sums);
        slu_kern_get(0)->row_f32(out + (size_t)r * COLS, &mat, r);
    }
    for (size_t i = 0; i < (size_t)rows * COLS; i++) {
        error += ((double)x[i] - out[i]) * ((double)x[i] - out[i]);
        power += (double)x[i] * x[i];
    }
    if (!weights) { /* what it says of the rows is what they are */
        cr_assert_float_eq(sums.power, power, 1e-6 * power);
        cr_assert_float_eq(sums.error, error, 1e-3 * error + 1e-9 * power);
    }
    free(scratch);
    return sqrt(error / power);
}

static struct slu_ecq fit(const struct slu_fmt *fmt, float error, const float *x,
                          const float *weights)
{
    struct slu_ecq ecq;
    const struct slu_ecq_params params = {.fmt = fmt, .target_error = error};
    const struct slu_ecq_sample sample = {
        .x = x, .weights = weights, .stride = COLS, .rows = ROWS, .cols = COLS};
    cr_assert_eq(slu_ecq_fit(&ecq, &params, &sample, NULL), 0);
    return ecq;
}

/* Targets are met on Gaussian weights, by the weights that kernels read, in fewer bits on flash
 * than fixed-rate formats of that error take; frames of parts decode to what they were. */
Test(ecq, meets_targets)
{
    static const struct {
        unsigned bits, room;
        float error;
        double bits_max; /* of a weight, compressed */
    } cases[] = {{3, 0, 0.21f, 2.75},
                 {4, 0, 0.12f, 3.5},
                 {4, 6, 0.09f, 3.95},
                 {5, 4, 0.06f, 4.6},
                 {6, 5, 0.03f, 5.6}};
    float *x = make_gaussian(1), *out = malloc(ROWS * COLS * sizeof *out);
    struct slu_encoder *encoder;
    struct slu_decoder *decoder;
    cr_assert_eq(slu_encoder_create(&encoder, NULL), 0);
    cr_assert_eq(slu_decoder_create(&decoder, NULL), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct slu_ecq ecq = fit(ecq_fmt(cases[i].bits, cases[i].room), cases[i].error, x, NULL);
        struct slu_planes planes;
        double error = quantize(&ecq, x, NULL, ROWS, &planes, out);
        cr_assert_leq(error, 1.01 * (double)cases[i].error, "q%ue: %g", cases[i].bits, error);
        cr_assert_geq(error, 0.97 * (double)cases[i].error, "q%ue: %g", cases[i].bits, error);
        size_t cuts[SLU_PLANES_CUTS], n_cuts = 0;
        slu_planes_cuts(&planes.at, ROWS, 0, cuts, &n_cuts);
        const struct slu_parts parts = {.cuts = cuts, .n_cuts = n_cuts};
        size_t room = slu_encode_parts_bound(planes.at.bytes, &parts);
        uint8_t *stored = malloc(room);
        int64_t n =
            slu_encode_parts(encoder, planes.data, planes.at.bytes, &parts, stored, room, NULL);
        cr_assert_gt(n, 0);
        cr_assert_leq(8.0 * (double)n / (ROWS * COLS), cases[i].bits_max, "q%ue: %g bits",
                      cases[i].bits, 8.0 * (double)n / (ROWS * COLS));
        uint8_t *back = malloc(planes.at.bytes);
        cr_assert_eq(slu_decode(decoder, SLU_CODEC_ZSTD, stored, (size_t)n,
                                slu_checksum(stored, (size_t)n), back, planes.at.bytes, NULL),
                     0);
        cr_assert_arr_eq(back, planes.data, planes.at.bytes);
        free(back);
        free(stored);
        free(planes.data);
    }
    slu_decoder_destroy(decoder);
    slu_encoder_destroy(encoder);
    free(x);
    free(out);
}

/* Outliers far apart, and far out, come through the escapes within half a step. */
Test(ecq, keeps_outliers)
{
    float *x = make_gaussian(2), *out = malloc(ROWS * COLS * sizeof *out);
    struct slu_ecq ecq = fit(ecq_fmt(4, 4), 0.11f, x, NULL);
    static const uint32_t at[4] = {0, 300, 301, 1023};
    for (int i = 0; i < 4; i++) {
        x[at[i]] = i % 2 ? -0.5f : 0.9f;
    }
    struct slu_planes planes;
    quantize(&ecq, x, NULL, ROWS, &planes, out);
    for (int i = 0; i < 4; i++) {
        cr_assert_float_eq(out[at[i]], x[at[i]], 0.02f, "column %u: %g", at[i], (double)out[at[i]]);
    }
    free(planes.data);
    free(x);
    free(out);
}

/* Rows of zeros, and rows too small to divide by, become zeros; rows of all sizes keep their error.
 */
Test(ecq, odd_rows)
{
    float *x = make_gaussian(3), *out = malloc(ROWS * COLS * sizeof *out);
    struct slu_ecq ecq = fit(ecq_fmt(4, 2), 0.11f, x, NULL);
    for (uint32_t i = 0; i < COLS; i++) {
        x[i] = 0;
        x[COLS + i] = 1e-42f;
        x[2 * COLS + i] *= 1e-3f;
        x[3 * COLS + i] *= 1e3f;
    }
    struct slu_planes planes;
    quantize(&ecq, x, NULL, ROWS, &planes, out);
    for (uint32_t i = 0; i < COLS; i++) {
        cr_assert(out[i] == 0 && out[COLS + i] == 0);
    }
    for (uint32_t r = 3; r < 6; r++) {
        double error = 0, power = 0;
        for (uint32_t i = r * COLS; i < (r + 1) * COLS; i++) {
            error += ((double)x[i] - out[i]) * ((double)x[i] - out[i]);
            power += (double)x[i] * x[i];
        }
        cr_assert_leq(sqrt(error / power), 0.14, "row %u: %g", r, sqrt(error / power));
    }
    free(planes.data);
    free(x);
    free(out);
}

/* A target that codes of so few bits can't meet gives the least error that they can, however far
 * below that it is. */
Test(ecq, aims_too_low)
{
    static const struct {
        unsigned bits, room;
        float error_max;
    } cases[] = {{3, 0, 0.2f}, {3, 4, 0.2f}, {4, 0, 0.11f}, {5, 0, 0.06f}, {6, 7, 0.03f}};
    static const float targets[] = {0.001f, 0.005f, 0.02f};
    float *x = make_gaussian(5);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (size_t k = 0; k < sizeof targets / sizeof *targets; k++) {
            struct slu_ecq ecq = fit(ecq_fmt(cases[i].bits, cases[i].room), targets[k], x, NULL);
            cr_assert_leq(ecq.error, cases[i].error_max, "q%ue, %g: %g", cases[i].bits,
                          (double)targets[k], (double)ecq.error);
        }
    }
    free(x);
}

/* Weights near the largest float get finite scales, and come back as near as others do. */
Test(ecq, largest_weights)
{
    float *x = make_gaussian(6), *out = malloc(ROWS * COLS * sizeof *out);
    for (size_t i = 0; i < (size_t)ROWS * COLS; i++) {
        x[i] = i % 3 ? 3.4e38f : -3.4e38f;
    }
    struct slu_ecq ecq = fit(ecq_fmt(4, 2), 0.11f, x, NULL);
    cr_assert_leq(ecq.error, 0.12, "%g", (double)ecq.error);
    struct slu_planes planes;
    double error = quantize(&ecq, x, NULL, ROWS, &planes, out);
    cr_assert_leq(error, 0.12, "%g", error);
    free(planes.data);
    free(x);
    free(out);
}

/* Columns that matter more get smaller errors than the others. */
Test(ecq, weighs_columns)
{
    float *x = make_gaussian(4), *out = malloc(ROWS * COLS * sizeof *out);
    float *weights = malloc(ROWS * COLS * sizeof *weights);
    for (size_t i = 0; i < (size_t)ROWS * COLS; i++) {
        weights[i] = i % COLS < COLS / 2 ? 1.9f : 0.1f;
    }
    struct slu_ecq ecq = fit(ecq_fmt(4, 0), 0.12f, x, weights);
    struct slu_planes planes;
    quantize(&ecq, x, weights, ROWS, &planes, out);
    double halves[2] = {0};
    for (size_t i = 0; i < (size_t)ROWS * COLS; i++) {
        halves[i % COLS >= COLS / 2] += ((double)x[i] - out[i]) * ((double)x[i] - out[i]);
    }
    cr_assert_lt(1.2 * halves[0], halves[1]);
    free(planes.data);
    free(x);
    free(weights);
    free(out);
}

static uint32_t pack_version(const uint8_t *data)
{
    uint32_t version;
    memcpy(&version, data + 8, sizeof version);
    return version;
}

/* Quantized packs are the same every time and of version 3; packs without are of version 1. */
Test(ecq, packs)
{
    static const char *const types[] = {"F32", "F16", "BF16", "Q8_0"};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        struct scratch scratch;
        struct slu_err err = {0};
        scratch_init(&scratch);
        const char *gguf = scratch_path(&scratch, "model.gguf");
        const char *out[3] = {scratch_path(&scratch, "a.slu"), scratch_path(&scratch, "b.slu"),
                              scratch_path(&scratch, "c.slu")};
        const struct slu_synth_params model = {.arch = i % 2 ? SLU_ARCH_QWEN3MOE : SLU_ARCH_GPT_OSS,
                                               .n_layers = 1,
                                               .n_experts = 2,
                                               .n_embd = 32,
                                               .n_ff = 32,
                                               .n_heads = 2,
                                               .n_heads_kv = 1,
                                               .head_dim = 32,
                                               .expert_type = types[i],
                                               .dense_type = types[i]};
        cr_assert_eq(slu_synth_write(gguf, &model, &err), 0, "%s", err.text);
        uint8_t *data[3];
        size_t bytes[3];
        for (int k = 0; k < 3; k++) {
            struct slu_packer_params params = {.in = gguf, .out = out[k], .codec = SLU_CODEC_ZSTD};
            params.experts.bits = k < 2 ? 4 : 0;
            params.resident.bits = k < 2 ? 6 : 0;
            cr_assert_eq(slu_packer_run(&params, NULL, &err), 0, "%s", err.text);
            data[k] = scratch_read(out[k], &bytes[k]);
        }
        cr_assert_eq(bytes[0], bytes[1]);
        cr_assert_arr_eq(data[0], data[1], bytes[0]);
        cr_assert_eq(pack_version(data[0]), 3);
        cr_assert_eq(pack_version(data[2]), 1);
        cr_assert_lt(bytes[0], bytes[2]);
        for (int k = 0; k < 3; k++) {
            free(data[k]);
        }
        scratch_finish(&scratch);
    }
}

/* Packs a GGUF with experts of 4 bits and no escapes, which this error needs not. */
static struct slu_packer_report pack_report(const char *gguf, const char *slu)
{
    struct slu_err err = {0};
    struct slu_packer_report report = {0};
    const struct slu_packer_params params = {
        .in = gguf, .out = slu, .codec = SLU_CODEC_RAW, .experts = {.bits = 4, .error = 0.115f}};
    cr_assert_eq(slu_packer_run(&params, &report, &err), 0, "%s", err.text);
    return report;
}

/* The error that is told is that of all weights: a single one far out, in a row that no sample
 * has, is not passed over. */
Test(ecq, packer_tells_the_true_error)
{
    struct scratch scratch;
    struct slu_err err = {0};
    scratch_init(&scratch);
    const char *gguf = scratch_path(&scratch, "model.gguf");
    const char *slu = scratch_path(&scratch, "model.slu");
    const struct slu_synth_params model = {.arch = SLU_ARCH_QWEN3MOE,
                                           .n_layers = 1,
                                           .n_experts = 4,
                                           .n_embd = 256,
                                           .n_ff = 256,
                                           .n_heads = 2,
                                           .n_heads_kv = 1,
                                           .head_dim = 32,
                                           .expert_type = "F32",
                                           .dense_type = "F32"};
    const uint64_t n = 4 * 256 * 256;
    cr_assert_eq(slu_synth_write(gguf, &model, &err), 0, "%s", err.text);
    struct slu_packer_report plain = pack_report(gguf, slu);
    cr_assert_eq(plain.quant_weights, 3 * n);
    cr_assert_eq(plain.quant_missed, 0, "error %g", plain.quant_error);
    cr_assert_float_eq(plain.quant_error, 0.115, 0.003);

    struct slu_source *source;
    struct slu_gguf *file;
    cr_assert_eq(slu_source_open_file(gguf, &source, &err), 0, "%s", err.text);
    cr_assert_eq(slu_gguf_open(source, &file, &err), 0, "%s", err.text);
    uint64_t offset = slu_gguf_find(file, "blk.0.ffn_gate_exps.weight")->offset;
    slu_gguf_close(file);
    slu_source_destroy(source);
    size_t bytes;
    uint8_t *data = scratch_read(gguf, &bytes);
    double power = 0;
    for (uint64_t i = 0; i < n; i++) {
        float w;
        memcpy(&w, data + offset + 4 * i, sizeof w);
        power += (double)w * w;
    }
    float outlier = (float)sqrt(0.05 * power);
    memcpy(data + offset, &outlier, sizeof outlier);
    scratch_write(gguf, data, bytes);
    free(data);
    struct slu_packer_report report = pack_report(gguf, slu);
    cr_assert_eq(report.quant_missed, n);
    cr_assert_gt(report.quant_error, 1.2 * plain.quant_error);
    scratch_finish(&scratch);
}
