/*
 * Banks of experts, block by block. Gate and up rows of a block lie together in the input; its part
 * of the down matrix is a range of columns of every row, so the expert's whole down matrix is read
 * once and kept while its blocks are made.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "tools/packer_parts.h"

struct buffers {
    uint8_t *block; /* slu_bank_block_bytes */
    uint8_t *rows;  /* gate or up rows of one block */
    uint8_t *down;  /* one expert's */
    float *gate_bias, *up_bias, *down_bias;
};

static void buffers_finish(struct buffers *buffers)
{
    free(buffers->block);
    free(buffers->rows);
    free(buffers->down);
    free(buffers->gate_bias);
    free(buffers->up_bias);
    free(buffers->down_bias);
}

static int buffers_init(struct buffers *buffers, const struct slu_bank_shape *shape,
                        struct slu_err *err)
{
    *buffers = (struct buffers){0};
    size_t gate_row = slu_planes_row_bytes(shape->gate, shape->n_embd);
    size_t up_row = slu_planes_row_bytes(shape->up, shape->n_embd);
    size_t down_row = slu_planes_row_bytes(shape->down, shape->n_ff);
    buffers->block = slu_packer_alloc(slu_bank_block_bytes(shape));
    buffers->rows = malloc(shape->neurons_a_block * (gate_row > up_row ? gate_row : up_row));
    buffers->down = malloc(shape->n_embd * down_row);
    bool is_whole = buffers->block && buffers->rows && buffers->down;
    if (shape->has_bias) {
        buffers->gate_bias = malloc(shape->n_ff * sizeof(float));
        buffers->up_bias = malloc(shape->n_ff * sizeof(float));
        buffers->down_bias = malloc(shape->n_embd * sizeof(float));
        is_whole = is_whole && buffers->gate_bias && buffers->up_bias && buffers->down_bias;
    }
    if (!is_whole) {
        buffers_finish(buffers);
        return slu_err_set(err, SLU_ENOMEM, "out of memory for experts of %u x %u weights",
                           shape->n_ff, shape->n_embd);
    }
    return 0;
}

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
static int take_rows(const struct slu_packer_experts *experts, const struct slu_bank_shape *shape,
                     const struct slu_fmt *fmt, uint32_t expert, const struct slu_block_layout *at,
                     uint8_t *rows, uint8_t *to, struct slu_err *err)
{
    int code = read_expert_rows(experts, expert, at->lo, at->n, rows, err);
    if (code < 0) {
        return code;
    }
    struct slu_planes planes;
    bool is_valid = slu_planes_init(&planes, fmt, at->n, shape->n_embd, to);
    assert(is_valid); /* slu_block_layout has accepted the shape */
    (void)is_valid;
    size_t row_bytes = slu_planes_row_bytes(fmt, shape->n_embd);
    for (uint32_t i = 0; i < at->n; i++) {
        slu_planes_import(&planes, i, rows + i * row_bytes);
    }
    return 0;
}

static void take_down(const struct slu_bank_shape *shape, const struct slu_block_layout *at,
                      const uint8_t *down, uint8_t *to)
{
    struct slu_planes planes;
    bool is_valid = slu_planes_init(&planes, shape->down, shape->n_embd, at->n, to);
    assert(is_valid);
    (void)is_valid;
    size_t row_bytes = slu_planes_row_bytes(shape->down, shape->n_ff);
    for (uint32_t r = 0; r < shape->n_embd; r++) {
        slu_planes_import_range(&planes, r, down + r * row_bytes, at->lo);
    }
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

static int write_block(struct slu_packer_job *job, const struct slu_packer_bank *bank,
                       uint32_t expert, const struct slu_block_layout *at,
                       const struct buffers *buffers, int64_t *ret_extent, struct slu_err *err)
{
    const struct slu_bank_shape *shape = &bank->shape;
    uint8_t *block = buffers->block;
    memset(block, 0, at->bytes);
    int code;
    if ((code = take_rows(&bank->gate, shape, shape->gate, expert, at, buffers->rows,
                          block + at->gate, err)) < 0 ||
        (code = take_rows(&bank->up, shape, shape->up, expert, at, buffers->rows, block + at->up,
                          err)) < 0) {
        return code;
    }
    take_down(shape, at, buffers->down, block + at->down);
    if (shape->has_bias) {
        take_biases(shape, at, buffers);
    }
    uint64_t before = slu_pack_writer_stored_bytes(job->writer);
    *ret_extent = slu_pack_writer_extent(job->writer, block, at->bytes, err);
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

static int read_expert(const struct slu_packer_bank *bank, uint32_t expert,
                       const struct buffers *buffers, struct slu_err *err)
{
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

int slu_packer_write_bank(struct slu_packer_job *job, const struct slu_packer_bank *bank,
                          struct slu_err *err)
{
    const struct slu_bank_shape *shape = &bank->shape;
    struct slu_pack_bank record = {
        .layer = bank->layer,
        .kind = bank->kind,
        .n_experts = bank->n_experts,
        .n_embd = shape->n_embd,
        .n_ff = shape->n_ff,
        .neurons_a_block = shape->neurons_a_block,
        .fmt_gate = shape->gate->id,
        .fmt_up = shape->up->id,
        .fmt_down = shape->down->id,
        .has_bias = shape->has_bias,
        .n_blocks = slu_bank_blocks(shape),
    };
    struct buffers buffers;
    int code = buffers_init(&buffers, shape, err);
    uint64_t n_all = (uint64_t)bank->n_experts * record.n_blocks, n_done = 0;
    for (uint32_t e = 0; e < bank->n_experts && code == 0; e++) {
        code = read_expert(bank, e, &buffers, err);
        for (uint32_t b = 0; b < record.n_blocks && code == 0; b++) {
            struct slu_block_layout at;
            bool is_valid = slu_block_layout(shape, b, &at);
            assert(is_valid); /* the plan has split this shape */
            (void)is_valid;
            int64_t extent = 0;
            code = write_block(job, bank, e, &at, &buffers, &extent, err);
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
    size_t block_bytes = slu_bank_block_bytes(shape);
    if (block_bytes > job->report.block_bytes_max) {
        job->report.block_bytes_max = block_bytes;
    }
    job->done_bytes += bank_bytes(bank);
    return slu_pack_writer_bank(job->writer, &record, err);
}
