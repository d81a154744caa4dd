/*
 * Banks of experts, block by block. Gate and up rows of a block lie together in the input; its part
 * of the down matrix is a range of columns of every row, so the expert's whole down matrix is read
 * once and kept while its blocks are made.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "tools/packer_parts.h"

/* One of a bank's three matrices on its way: its quantizer, if it gets one. */
struct part {
    const struct slu_packer_experts *experts;
    bool is_quantized;
    struct slu_ecq ecq;
    float *weights; /* of its columns, for one expert */
    struct slu_ecq_sums sums;
};

struct buffers {
    uint8_t *block; /* slu_bank_block_bytes */
    uint8_t *rows;  /* gate or up rows of one block, as in the input */
    uint8_t *down;  /* one expert's */
    float *gate_bias, *up_bias, *down_bias;
    struct part gate, up, down_part;
};

static void buffers_finish(struct buffers *buffers)
{
    free(buffers->block);
    free(buffers->rows);
    free(buffers->down);
    free(buffers->gate_bias);
    free(buffers->up_bias);
    free(buffers->down_bias);
    free(buffers->gate.weights);
    free(buffers->up.weights);
    free(buffers->down_part.weights);
}

static size_t input_row_bytes(const struct slu_packer_experts *experts)
{
    return slu_packer_ref_row_bytes(&experts->refs[0]);
}

/* The buffers beside the quantizers, which are there already. */
static int buffers_init(struct buffers *buffers, const struct slu_packer_bank *bank,
                        struct slu_err *err)
{
    const struct slu_bank_shape *shape = &bank->shape;
    size_t gate_row = input_row_bytes(&bank->gate), up_row = input_row_bytes(&bank->up);
    buffers->block = slu_packer_alloc(slu_bank_block_bytes(shape));
    buffers->rows = malloc(shape->neurons_a_block * (gate_row > up_row ? gate_row : up_row));
    buffers->down = malloc(shape->n_embd * input_row_bytes(&bank->down));
    buffers->gate.weights = malloc(shape->n_embd * sizeof(float));
    buffers->up.weights = malloc(shape->n_embd * sizeof(float));
    buffers->down_part.weights = malloc(shape->n_ff * sizeof(float));
    bool is_whole = buffers->block && buffers->rows && buffers->down && buffers->gate.weights &&
                    buffers->up.weights && buffers->down_part.weights;
    if (shape->has_bias) {
        buffers->gate_bias = malloc(shape->n_ff * sizeof(float));
        buffers->up_bias = malloc(shape->n_ff * sizeof(float));
        buffers->down_bias = malloc(shape->n_embd * sizeof(float));
        is_whole = is_whole && buffers->gate_bias && buffers->up_bias && buffers->down_bias;
    }
    if (!is_whole) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for experts of %u x %u weights",
                           shape->n_ff, shape->n_embd);
    }
    return 0;
}

/* ---- quantizers --------------------------------------------------------------------------- */

/* Fits the quantizer of one part, in which rows are `width` columns wide, and sets its format. */
static int fit_part(struct slu_packer_job *job, const struct slu_packer_quant *quant,
                    const struct slu_packer_experts *experts, uint32_t width, struct part *part,
                    const struct slu_fmt **fmt, struct slu_err *err)
{
    part->experts = experts;
    part->is_quantized = slu_packer_quantizes(quant, &experts->refs[0]);
    if (!part->is_quantized) {
        return 0;
    }
    int code = slu_packer_fit(job, quant, experts->refs, experts->n_refs, width, &part->ecq, err);
    if (code == 0) {
        *fmt = part->ecq.fmt;
    }
    return code;
}

/* Chooses the formats of a bank's matrices, and with them how its experts are cut. */
static int fit_bank(struct slu_packer_job *job, struct slu_packer_bank *bank,
                    struct buffers *buffers, struct slu_err *err)
{
    const struct slu_packer_quant *quant =
        bank->kind == SLU_BANK_ROUTED ? &job->params->experts : &job->params->resident;
    struct slu_bank_shape *shape = &bank->shape;
    uint32_t block_bytes = job->params->block_bytes ? job->params->block_bytes : 1u << 20;
    const struct slu_fmt *middle = slu_fmt_get(SLU_FMT_Q3E + (quant->bits ? quant->bits : 4) - 3);
    const struct slu_fmt **fmts[3] = {&shape->gate, &shape->up, &shape->down};
    const struct slu_packer_experts *experts[3] = {&bank->gate, &bank->up, &bank->down};
    bool is_any = false;
    for (int i = 0; i < 3; i++) {
        if (slu_packer_quantizes(quant, &experts[i]->refs[0])) {
            *fmts[i] = middle;
            is_any = true;
        }
    }
    /* Rows of the down matrix are as wide as blocks have neurons, so the cut comes first. */
    if (is_any && !slu_bank_split(shape, block_bytes)) {
        return slu_err_set(err, SLU_EUNSUP, "%s: experts of layer %u cannot be split into blocks",
                           bank->gate.refs[0].source->name, bank->layer);
    }
    int code;
    if ((code = fit_part(job, quant, &bank->gate, shape->n_embd, &buffers->gate, &shape->gate,
                         err)) < 0 ||
        (code = fit_part(job, quant, &bank->up, shape->n_embd, &buffers->up, &shape->up, err)) <
            0) {
        return code;
    }
    return fit_part(job, quant, &bank->down, shape->neurons_a_block, &buffers->down_part,
                    &shape->down, err);
}

/* Quantizes rows of the input, columns first_col on, into a matrix. */
static int put_quantized(struct slu_packer_job *job, struct part *part, struct slu_planes *planes,
                         const uint8_t *raw, uint32_t first_col, struct slu_err *err)
{
    const struct slu_packer_rows rows = {
        .ref = &part->experts->refs[0],
        .raw = raw,
        .n = planes->rows,
        .first_col = first_col,
        .n_cols = planes->cols,
    };
    struct slu_ecq_scales scales = {0};
    int code = slu_packer_scales_add(job, &rows, &part->ecq, &scales, err);
    if (code < 0) {
        return code;
    }
    float unit = slu_ecq_unit(&scales);
    slu_ecq_head_put(&part->ecq, unit, planes);
    return slu_packer_rows_put(job, &rows, &part->ecq, unit, part->weights, planes, &part->sums,
                               err);
}

/* ---- blocks ------------------------------------------------------------------------------- */

static int read_expert_rows(const struct slu_packer_experts *experts, uint32_t expert,
                            uint32_t first, uint32_t n, uint8_t *out, struct slu_err *err)
{
    if (experts->n_refs > 1) {
        return slu_packer_read_rows(&experts->refs[expert], first, n, out, err);
    }
    const struct slu_packer_ref *ref = &experts->refs[0];
    return slu_packer_read_rows(ref, (uint64_t)expert * ref->rows + first, n, out, err);
}

/* Gate or up rows of the block into its matrix at `to`. */
static int take_rows(struct slu_packer_job *job, struct part *part,
                     const struct slu_bank_shape *shape, const struct slu_fmt *fmt, uint32_t expert,
                     const struct slu_block_layout *at, struct buffers *buffers, uint8_t *to,
                     struct slu_err *err)
{
    int code = read_expert_rows(part->experts, expert, at->lo, at->n, buffers->rows, err);
    if (code < 0) {
        return code;
    }
    struct slu_planes planes;
    bool is_valid = slu_planes_init(&planes, fmt, at->n, shape->n_embd, to);
    assert(is_valid); /* slu_block_layout has accepted the shape */
    (void)is_valid;
    if (part->is_quantized) {
        return put_quantized(job, part, &planes, buffers->rows, 0, err);
    }
    size_t row_bytes = slu_planes_row_bytes(fmt, shape->n_embd);
    for (uint32_t i = 0; i < at->n; i++) {
        slu_planes_import(&planes, i, buffers->rows + i * row_bytes);
    }
    return 0;
}

static int take_down(struct slu_packer_job *job, const struct slu_bank_shape *shape,
                     const struct slu_block_layout *at, struct buffers *buffers, uint8_t *to,
                     struct slu_err *err)
{
    struct slu_planes planes;
    bool is_valid = slu_planes_init(&planes, shape->down, shape->n_embd, at->n, to);
    assert(is_valid);
    (void)is_valid;
    if (buffers->down_part.is_quantized) {
        return put_quantized(job, &buffers->down_part, &planes, buffers->down, at->lo, err);
    }
    size_t row_bytes = slu_planes_row_bytes(shape->down, shape->n_ff);
    for (uint32_t r = 0; r < shape->n_embd; r++) {
        slu_planes_import_range(&planes, r, buffers->down + r * row_bytes, at->lo);
    }
    return 0;
}

struct slu_parts slu_packer_block_parts(const struct slu_bank_shape *shape,
                                        const struct slu_block_layout *at,
                                        size_t cuts[SLU_PACKER_CUTS])
{
    const struct {
        const struct slu_fmt *fmt;
        uint32_t rows, cols;
        size_t base;
    } mats[3] = {{shape->gate, at->n, shape->n_embd, at->gate},
                 {shape->up, at->n, shape->n_embd, at->up},
                 {shape->down, shape->n_embd, at->n, at->down}};
    struct slu_parts parts = {.cuts = cuts, .least_gain = SLU_PARTS_LEAST_GAIN};
    for (int i = 0; i < 3; i++) {
        struct slu_mat_layout layout;
        if (slu_mat_layout(mats[i].fmt, mats[i].rows, mats[i].cols, &layout)) {
            slu_planes_cuts(&layout, mats[i].rows, mats[i].base, cuts, &parts.n_cuts);
        }
        if (slu_planes_least_gain(mats[i].fmt) == 0) {
            parts.least_gain = 0;
        }
    }
    return parts;
}

static void take_biases(const struct slu_bank_shape *shape, const struct slu_block_layout *at,
                        const struct buffers *buffers)
{
    uint8_t *block = buffers->block;
    memcpy(block + at->gate_bias, buffers->gate_bias + at->lo, at->n * sizeof(float));
    memcpy(block + at->up_bias, buffers->up_bias + at->lo, at->n * sizeof(float));
    if (at->lo == 0) {
        memcpy(block + at->down_bias, buffers->down_bias, shape->n_embd * sizeof(float));
    }
}

/* Into buffers->block. */
static int make_block(struct slu_packer_job *job, const struct slu_bank_shape *shape,
                      uint32_t expert, const struct slu_block_layout *at, struct buffers *buffers,
                      struct slu_err *err)
{
    uint8_t *block = buffers->block;
    memset(block, 0, at->bytes);
    int code;
    if ((code = take_rows(job, &buffers->gate, shape, shape->gate, expert, at, buffers,
                          block + at->gate, err)) < 0 ||
        (code = take_rows(job, &buffers->up, shape, shape->up, expert, at, buffers, block + at->up,
                          err)) < 0 ||
        (code = take_down(job, shape, at, buffers, block + at->down, err)) < 0) {
        return code;
    }
    if (shape->has_bias) {
        take_biases(shape, at, buffers);
    }
    return 0;
}

/* Of a block of routed experts, of which an automatic choice compresses a share. */
static enum slu_codec_id block_codec(const struct slu_packer_job *job,
                                     const struct slu_packer_bank *bank, uint64_t i)
{
    if (!job->params->automatic.is_on || bank->kind != SLU_BANK_ROUTED) {
        return job->codec;
    }
    double share = job->report.codec.choice.share;
    return slu_codec_takes(share, bank->layer, i) ? SLU_CODEC_ZSTD : SLU_CODEC_RAW;
}

/* Block i of the bank, which is a block of this expert. */
static int write_block(struct slu_packer_job *job, const struct slu_packer_bank *bank, uint64_t i,
                       uint32_t expert, const struct slu_block_layout *at, struct buffers *buffers,
                       int64_t *ret_extent, struct slu_err *err)
{
    const struct slu_bank_shape *shape = &bank->shape;
    int code = make_block(job, shape, expert, at, buffers, err);
    if (code < 0) {
        return code;
    }
    uint64_t before = slu_pack_writer_stored_bytes(job->writer);
    size_t cuts[SLU_PACKER_CUTS];
    const struct slu_parts parts = slu_packer_block_parts(shape, at, cuts);
    slu_pack_writer_set_codec(job->writer, block_codec(job, bank, i));
    *ret_extent = slu_pack_writer_extent_parts(job->writer, buffers->block, at->bytes, &parts, err);
    slu_pack_writer_set_codec(job->writer, job->codec);
    if (*ret_extent < 0) {
        return (int)*ret_extent;
    }
    if (bank->kind == SLU_BANK_ROUTED) {
        uint64_t stored = slu_pack_writer_stored_bytes(job->writer) - before;
        job->report.expert_raw_bytes += at->bytes;
        job->report.expert_stored_bytes += stored;
        job->report.n_blocks++;
        job->report.n_blocks_compressed += stored < at->bytes;
    }
    return 0;
}

/* What the part's columns matter to one expert. */
static void weigh(struct slu_packer_job *job, const struct part *part, uint32_t expert)
{
    if (part->is_quantized) {
        const struct slu_packer_experts *experts = part->experts;
        slu_packer_weights(job, &experts->refs[experts->n_refs > 1 ? expert : 0], expert,
                           part->weights);
    }
}

static int read_expert(struct slu_packer_job *job, const struct slu_packer_bank *bank,
                       uint32_t expert, const struct buffers *buffers, struct slu_err *err)
{
    weigh(job, &buffers->gate, expert);
    weigh(job, &buffers->up, expert);
    weigh(job, &buffers->down_part, expert);
    int code = read_expert_rows(&bank->down, expert, 0, bank->shape.n_embd, buffers->down, err);
    if (code < 0 || !bank->shape.has_bias) {
        return code;
    }
    if ((code = slu_packer_read_rows(&bank->gate_bias, expert, 1, buffers->gate_bias, err)) < 0 ||
        (code = slu_packer_read_rows(&bank->up_bias, expert, 1, buffers->up_bias, err)) < 0) {
        return code;
    }
    return slu_packer_read_rows(&bank->down_bias, expert, 1, buffers->down_bias, err);
}

static uint64_t experts_bytes(const struct slu_packer_experts *experts)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < experts->n_refs; i++) {
        bytes += experts->refs[i].bytes;
    }
    return bytes;
}

static uint64_t bank_bytes(const struct slu_packer_bank *bank)
{
    return experts_bytes(&bank->gate) + experts_bytes(&bank->up) + experts_bytes(&bank->down) +
           bank->gate_bias.bytes + bank->up_bias.bytes + bank->down_bias.bytes;
}

static struct slu_pack_bank make_record(const struct slu_packer_bank *bank)
{
    const struct slu_bank_shape *shape = &bank->shape;
    return (struct slu_pack_bank){
        .layer = bank->layer,
        .kind = bank->kind,
        .n_experts = bank->n_experts,
        .n_embd = shape->n_embd,
        .n_ff = shape->n_ff,
        .neurons_a_block = shape->neurons_a_block,
        .fmt_gate = shape->gate->stored,
        .fmt_up = shape->up->stored,
        .fmt_down = shape->down->stored,
        .has_bias = shape->has_bias,
        .n_blocks = slu_bank_blocks(shape),
    };
}

static void report_parts(struct slu_packer_job *job, const struct slu_packer_bank *bank,
                         const struct buffers *buffers)
{
    const struct slu_packer_quant *quant =
        bank->kind == SLU_BANK_ROUTED ? &job->params->experts : &job->params->resident;
    const struct part *parts[3] = {&buffers->gate, &buffers->up, &buffers->down_part};
    uint64_t n = (uint64_t)bank->n_experts * bank->shape.n_ff * bank->shape.n_embd;
    for (int i = 0; i < 3; i++) {
        if (parts[i]->is_quantized) {
            slu_packer_quantized(job, quant, n, &parts[i]->sums);
        }
    }
}

int slu_packer_write_bank(struct slu_packer_job *job, const struct slu_packer_bank *planned,
                          struct slu_err *err)
{
    struct slu_packer_bank copy = *planned, *bank = &copy; /* quantizing changes its shape */
    const struct slu_bank_shape *shape = &bank->shape;
    struct buffers buffers = {0};
    int code = fit_bank(job, bank, &buffers, err);
    if (code == 0) {
        code = buffers_init(&buffers, bank, err);
    }
    struct slu_pack_bank record = make_record(bank);
    uint64_t n_all = (uint64_t)bank->n_experts * record.n_blocks, n_done = 0;
    for (uint32_t e = 0; e < bank->n_experts && code == 0; e++) {
        code = read_expert(job, bank, e, &buffers, err);
        for (uint32_t b = 0; b < record.n_blocks && code == 0; b++) {
            struct slu_block_layout at;
            bool is_valid = slu_block_layout(shape, b, &at);
            assert(is_valid); /* the plan has split this shape */
            (void)is_valid;
            int64_t extent = 0;
            code = write_block(job, bank, n_done, e, &at, &buffers, &extent, err);
            if (n_done == 0) {
                record.first_extent = (uint32_t)extent;
            }
            n_done++;
            double part = (double)n_done / (double)n_all;
            if (code == 0) {
                code = slu_packer_step(job, (uint64_t)((double)bank_bytes(bank) * part), err);
            }
        }
    }
    buffers_finish(&buffers);
    if (code < 0) {
        return code;
    }
    report_parts(job, bank, &buffers);
    size_t block_bytes = slu_bank_block_bytes(shape);
    if (block_bytes > job->report.block_bytes_max) {
        job->report.block_bytes_max = block_bytes;
    }
    job->done_bytes += bank_bytes(bank);
    return slu_pack_writer_bank(job->writer, &record, err);
}

int slu_packer_sample_bank(struct slu_packer_job *job, const struct slu_packer_bank *planned,
                           uint32_t n, struct slu_packer_sample *ret_samples, struct slu_err *err)
{
    struct slu_packer_bank copy = *planned, *bank = &copy;
    const struct slu_packer_report report = job->report;
    struct buffers buffers = {0};
    int code = fit_bank(job, bank, &buffers, err);
    if (code == 0) {
        code = buffers_init(&buffers, bank, err);
    }
    for (uint32_t i = 0; i < n && code == 0; i++) {
        struct slu_packer_sample *sample = &ret_samples[i];
        uint32_t expert = (uint32_t)((2 * (uint64_t)i + 1) * bank->n_experts / (2 * (uint64_t)n));
        sample->shape = bank->shape;
        bool is_valid = slu_block_layout(&bank->shape, 0, &sample->at);
        assert(is_valid);
        (void)is_valid;
        code = read_expert(job, bank, expert, &buffers, err);
        code = code < 0 ? code : make_block(job, &bank->shape, expert, &sample->at, &buffers, err);
        sample->raw = code < 0 ? NULL : slu_packer_alloc(sample->at.bytes);
        if (sample->raw) {
            memcpy(sample->raw, buffers.block, sample->at.bytes);
        } else if (code == 0) {
            code = slu_err_set(err, SLU_ENOMEM, "%s: out of memory for a sample of blocks",
                               job->params->out);
        }
    }
    buffers_finish(&buffers);
    job->report = report;
    return code;
}
