#include "compare.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/pack.h"
#include "kern/block.h"
#include "tools/planes.h"

struct compared {
    struct slu_pack *pack;
    struct slu_decoder *decoder;
    struct slu_source *source; /* of the GGUF at hand */
    struct slu_gguf *gguf;
};

static uint8_t *read_tensor(struct compared *c, const struct slu_gguf_tensor *tensor)
{
    struct slu_err err;
    uint8_t *data = malloc(tensor->bytes);
    cr_assert(data);
    cr_assert_eq(c->source->read_at(c->source, tensor->offset, data, tensor->bytes, &err), 0, "%s",
                 err.text);
    return data;
}

static uint8_t *read_extent(struct compared *c, uint32_t number, size_t *ret_bytes)
{
    cr_assert_lt(number, c->pack->header.n_extents);
    const struct slu_extent *extent = &c->pack->extents[number];
    struct slu_err err;
    uint8_t *staging = malloc(extent->stored_bytes);
    uint8_t *out = aligned_alloc(64, (extent->raw_bytes + 63u) / 64 * 64);
    cr_assert(staging && out);
    cr_assert_eq(slu_pack_read_extent(c->pack, c->decoder, number, staging, out, &err), 0, "%s",
                 err.text);
    free(staging);
    *ret_bytes = extent->raw_bytes;
    return out;
}

/* 16-bit floats as the F32 that a pack keeps for vectors. Takes `data` over. */
static uint8_t *widened(uint8_t *data, const struct slu_gguf_tensor *tensor)
{
    if (tensor->type == 0) {
        return data;
    }
    size_t n = tensor->bytes / 2;
    float *out = malloc(n * sizeof *out);
    cr_assert(out);
    for (size_t i = 0; i < n; i++) {
        uint16_t half = (uint16_t)(data[2 * i] | data[2 * i + 1] << 8);
        uint32_t bits = (uint32_t)half << 16;
        if (tensor->type == 1) {
            out[i] = slu_f16_to_f32(half);
        } else {
            memcpy(&out[i], &bits, sizeof bits);
        }
    }
    free(data);
    return (uint8_t *)out;
}

/* ---- dense tensors ------------------------------------------------------------------------ */

static void compare_rows(struct compared *c, const struct slu_pack_tensor *in_pack,
                         const uint8_t *wanted)
{
    const struct slu_fmt *fmt = slu_fmt_get(in_pack->fmt);
    size_t row_bytes = slu_planes_row_bytes(fmt, in_pack->cols);
    uint64_t offset = c->pack->extents[in_pack->first_extent].offset;
    uint8_t *record = aligned_alloc(64, in_pack->row_stride);
    uint8_t *row = malloc(row_bytes);
    for (uint32_t r = 0; r < in_pack->rows; r++) {
        struct slu_err err;
        struct slu_source *source = c->pack->source;
        cr_assert_eq(source->read_at(source, offset + (uint64_t)r * in_pack->row_stride, record,
                                     in_pack->row_stride, &err),
                     0, "%s", err.text);
        struct slu_planes planes;
        cr_assert(slu_planes_init(&planes, fmt, 1, in_pack->cols, record));
        uint64_t checksum = slu_checksum(record, planes.at.bytes);
        for (size_t i = planes.at.bytes; i < in_pack->row_stride; i++) {
            size_t at = i - planes.at.bytes;
            cr_assert_eq(record[i], at < 4 ? (uint8_t)(checksum >> (8 * at)) : 0);
        }
        slu_planes_export(&planes, 0, row);
        cr_assert_arr_eq(row, wanted + r * row_bytes, row_bytes, "%s row %u", in_pack->name, r);
    }
    free(row);
    free(record);
}

static void compare_matrix(struct compared *c, const struct slu_pack_tensor *in_pack,
                           const uint8_t *wanted)
{
    const struct slu_fmt *fmt = slu_fmt_get(in_pack->fmt);
    struct slu_planes planes;
    cr_assert(slu_planes_init(&planes, fmt, in_pack->rows, in_pack->cols, NULL));
    size_t bytes = planes.at.bytes * in_pack->n, at = 0;
    uint8_t *all = aligned_alloc(64, bytes);
    cr_assert(all);
    for (uint32_t i = 0; i < in_pack->n_extents; i++) {
        size_t piece_bytes;
        uint8_t *piece = read_extent(c, in_pack->first_extent + i, &piece_bytes);
        cr_assert_leq(piece_bytes, bytes - at);
        cr_assert(piece_bytes == SLU_PACK_PIECE_BYTES || i + 1 == in_pack->n_extents);
        memcpy(all + at, piece, piece_bytes);
        at += piece_bytes;
        free(piece);
    }
    cr_assert_eq(at, bytes, "%s", in_pack->name);
    size_t row_bytes = slu_planes_row_bytes(fmt, in_pack->cols);
    uint8_t *row = malloc(row_bytes);
    for (uint32_t k = 0; k < in_pack->n; k++) {
        planes.data = all + k * planes.at.bytes;
        for (uint32_t r = 0; r < in_pack->rows; r++, wanted += row_bytes) {
            slu_planes_export(&planes, r, row);
            cr_assert_arr_eq(row, wanted, row_bytes, "%s matrix %u row %u", in_pack->name, k, r);
        }
    }
    free(row);
    free(all);
}

static void compare_dense(struct compared *c, const struct slu_gguf_tensor *tensor,
                          const struct slu_pack_tensor *in_pack)
{
    cr_assert_eq(in_pack->cols, tensor->dims[0]);
    cr_assert_eq(in_pack->rows, tensor->dims[1]);
    cr_assert_eq(in_pack->n, tensor->dims[2]);
    uint8_t *wanted = read_tensor(c, tensor);
    const struct slu_fmt *fmt = slu_fmt_get(in_pack->fmt);
    if (slu_planes_ggml_type(fmt) != tensor->type) {
        cr_assert(fmt->id == SLU_FMT_F32 && (tensor->type == 1 || tensor->type == 30), "%s",
                  in_pack->name);
        wanted = widened(wanted, tensor);
    }
    if (in_pack->kind == SLU_PACK_ROWS) {
        cr_assert_str_eq(in_pack->name, "token_embd.weight");
        compare_rows(c, in_pack, wanted);
    } else {
        compare_matrix(c, in_pack, wanted);
    }
    free(wanted);
}

/* ---- experts ------------------------------------------------------------------------------ */

enum part { GATE, UP, DOWN };

static struct slu_bank_shape shape_of(const struct slu_pack_bank *bank)
{
    return (struct slu_bank_shape){
        .n_embd = bank->n_embd,
        .n_ff = bank->n_ff,
        .neurons_a_block = bank->neurons_a_block,
        .gate = slu_fmt_get(bank->fmt_gate),
        .up = slu_fmt_get(bank->fmt_up),
        .down = slu_fmt_get(bank->fmt_down),
        .has_bias = bank->has_bias,
    };
}

/* One expert's matrix, put together from its blocks as GGUF has it. */
static uint8_t *expert_matrix(struct compared *c, const struct slu_pack_bank *bank, uint32_t expert,
                              enum part part, size_t *ret_bytes)
{
    struct slu_bank_shape shape = shape_of(bank);
    const struct slu_fmt *fmt = part == GATE ? shape.gate : part == UP ? shape.up : shape.down;
    uint32_t rows = part == DOWN ? bank->n_embd : bank->n_ff;
    size_t row_bytes = slu_planes_row_bytes(fmt, part == DOWN ? bank->n_ff : bank->n_embd);
    uint8_t *out = malloc(rows * row_bytes);
    cr_assert(out);
    for (uint32_t b = 0; b < bank->n_blocks; b++) {
        struct slu_block_layout at;
        cr_assert(slu_block_layout(&shape, b, &at));
        size_t bytes;
        uint8_t *block = read_extent(c, bank->first_extent + expert * bank->n_blocks + b, &bytes);
        cr_assert_eq(bytes, at.bytes);
        struct slu_planes planes;
        if (part == DOWN) {
            cr_assert(slu_planes_init(&planes, fmt, rows, at.n, block + at.down));
            for (uint32_t r = 0; r < rows; r++) {
                slu_planes_export_range(&planes, r, out + r * row_bytes, at.lo);
            }
        } else {
            uint8_t *data = block + (part == GATE ? at.gate : at.up);
            cr_assert(slu_planes_init(&planes, fmt, at.n, bank->n_embd, data));
            for (uint32_t r = 0; r < at.n; r++) {
                slu_planes_export(&planes, r, out + (at.lo + r) * row_bytes);
            }
        }
        free(block);
    }
    *ret_bytes = rows * row_bytes;
    return out;
}

static float *expert_bias(struct compared *c, const struct slu_pack_bank *bank, uint32_t expert,
                          enum part part, size_t *ret_bytes)
{
    struct slu_bank_shape shape = shape_of(bank);
    uint32_t n = part == DOWN ? bank->n_embd : bank->n_ff;
    float *out = calloc(n, sizeof *out);
    cr_assert(out && bank->has_bias);
    for (uint32_t b = 0; b < bank->n_blocks; b++) {
        struct slu_block_layout at;
        cr_assert(slu_block_layout(&shape, b, &at));
        size_t bytes;
        uint8_t *block = read_extent(c, bank->first_extent + expert * bank->n_blocks + b, &bytes);
        if (part == DOWN && b == 0) {
            memcpy(out, block + at.down_bias, n * sizeof *out);
        } else if (part != DOWN) {
            memcpy(out + at.lo, block + (part == GATE ? at.gate_bias : at.up_bias),
                   at.n * sizeof *out);
        }
        free(block);
    }
    *ret_bytes = n * sizeof *out;
    return out;
}

/* blk.L.ffn_PART[_exps|_shexp][.E].(weight|bias) */
static void compare_expert(struct compared *c, const struct slu_gguf_tensor *tensor,
                           const char *name)
{
    unsigned layer;
    char part_name[64], middle[64] = "", last[64] = "";
    int n = sscanf(name, "blk.%u.ffn_%63[^.].%63[^.].%63s", &layer, part_name, middle, last);
    cr_assert_geq(n, 3, "tensor %s is not in the pack", name);
    bool is_bias = strcmp(middle, "bias") == 0;
    bool is_single = n == 4;
    bool is_stack = strstr(part_name, "_exps") != NULL;
    bool is_shared = strstr(part_name, "_shexp") != NULL;
    enum part part = strncmp(part_name, "gate", 4) == 0 ? GATE
                     : strncmp(part_name, "up", 2) == 0 ? UP
                                                        : DOWN;
    const struct slu_pack_bank *bank = slu_pack_find_bank(c->pack, layer,
                                                          is_stack || is_single ? SLU_BANK_ROUTED
                                                          : is_shared           ? SLU_BANK_SHARED
                                                                                : SLU_BANK_DENSE);
    cr_assert(bank, "tensor %s is not in the pack", name);
    uint8_t *wanted = read_tensor(c, tensor), *at = wanted;
    if (is_bias) {
        at = wanted = widened(wanted, tensor);
    }
    uint32_t first = is_single ? (uint32_t)strtoul(middle, NULL, 10) : 0;
    uint32_t n_experts = is_single ? 1 : bank->n_experts;
    for (uint32_t e = 0; e < n_experts; e++) {
        size_t bytes;
        void *got = is_bias ? (void *)expert_bias(c, bank, e, part, &bytes)
                            : expert_matrix(c, bank, first + e, part, &bytes);
        cr_assert_arr_eq((uint8_t *)got, at, bytes, "%s expert %u", name, e);
        at += bytes;
        free(got);
    }
    free(wanted);
}

static void compare_all(struct compared *c)
{
    for (uint64_t t = 0; t < c->gguf->n_tensors; t++) {
        const struct slu_gguf_tensor *tensor = &c->gguf->tensors[t];
        char name[128];
        snprintf(name, sizeof name, "%.*s", (int)tensor->name.len, tensor->name.at);
        const struct slu_pack_tensor *in_pack = slu_pack_find(c->pack, name);
        if (in_pack) {
            compare_dense(c, tensor, in_pack);
        } else {
            compare_expert(c, tensor, name);
        }
    }
}

void compare_pack(const char *pack_path, const char *const *ggufs, unsigned n_ggufs)
{
    struct compared c = {0};
    struct slu_err err;
    cr_assert_eq(slu_pack_open_file(pack_path, &c.pack, &err), 0, "%s", err.text);
    cr_assert_eq(slu_decoder_create(&c.decoder, &err), 0, "%s", err.text);
    for (unsigned i = 0; i < n_ggufs; i++) {
        cr_assert_eq(slu_source_open_file(ggufs[i], &c.source, &err), 0, "%s", err.text);
        cr_assert_eq(slu_gguf_open(c.source, &c.gguf, &err), 0, "%s", err.text);
        if (i == 0) {
            cr_assert_eq(c.pack->header.n_kvs, c.gguf->kvs.n);
            cr_assert_eq(c.pack->header.meta.raw_bytes, c.gguf->kv_bytes);
            cr_assert_arr_eq(c.pack->meta, c.gguf->kv_data, c.gguf->kv_bytes);
        }
        compare_all(&c);
        slu_gguf_close(c.gguf);
        slu_source_destroy(c.source);
    }
    slu_decoder_destroy(c.decoder);
    slu_pack_close(c.pack);
}
