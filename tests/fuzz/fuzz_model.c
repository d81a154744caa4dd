/*
 * Any metadata as a model's: the configuration is read, a pack's tables are made that fit it, the
 * rest of the input pokes into these, and whatever passes the reader's checks is described and
 * planned. Nothing is loaded. The input:
 *
 *   0   u16  pairs of metadata         4   u8   weight format of matrices
 *   2   u16  their bytes               5   u8   bit 0 tied, bit 1 small blocks; bits 2 to 7 threads
 *   6   u32  context                   10  the pairs, then pokes of u32 place, u32 value
 */
#include <stdlib.h>
#include <string.h>

#include "io/pack_check.h"
#include "kern/block.h"
#include "plan.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define HEAD_BYTES  10u
#define EXTENTS_MAX 20000u /* larger models are left out, for speed */

static void check(bool is_true)
{
    if (!is_true) {
        abort();
    }
}

/* The tables while they are made; where `at` is NULL records are only counted. */
struct tables {
    struct slu_pack_tensor *tensors;
    struct slu_pack_bank *banks;
    struct slu_extent *extents;
    uint32_t n_tensors, n_banks;
    uint64_t n_extents, offset;
    const struct slu_fmt *fmt;
    bool is_tied, is_small;
};

static void add_extent(struct tables *tables, uint64_t bytes, bool is_marker)
{
    if (tables->extents) {
        uint32_t size = is_marker ? 0 : (uint32_t)bytes;
        tables->extents[tables->n_extents] =
            (struct slu_extent){.offset = tables->offset, .stored_bytes = size, .raw_bytes = size};
    }
    tables->n_extents++;
    tables->offset += slu_pack_page_up(bytes);
}

static void add_tensor(struct tables *tables, const struct slu_tensor_spec *spec)
{
    bool is_embedding = strcmp(spec->name, "token_embd.weight") == 0;
    bool is_rows = is_embedding && !tables->is_tied;
    if (tables->is_tied && strcmp(spec->name, "output.weight") == 0) {
        return;
    }
    const struct slu_fmt *fmt = tables->fmt;
    struct slu_mat_layout at;
    if (spec->is_vector || !slu_mat_layout(fmt, spec->rows, spec->cols, &at)) {
        fmt = slu_fmt_get(SLU_FMT_F32);
        check(slu_mat_layout(fmt, spec->rows, spec->cols, &at));
    }
    struct slu_pack_tensor tensor = {.kind = is_rows ? SLU_PACK_ROWS : SLU_PACK_MATRIX,
                                     .fmt = fmt->id,
                                     .rows = spec->rows,
                                     .cols = spec->cols,
                                     .n = spec->n,
                                     .first_extent = (uint32_t)tables->n_extents};
    memcpy(tensor.name, spec->name, sizeof tensor.name);
    if (is_rows) {
        check(slu_mat_layout(fmt, 1, spec->cols, &at));
        tensor.row_stride = (uint32_t)(at.bytes + 4 + 63) / 64 * 64;
        add_extent(tables, (uint64_t)tensor.row_stride * spec->rows, true);
    }
    uint64_t left = is_rows ? 0 : (uint64_t)at.bytes * spec->n;
    while (left > 0 && tables->n_extents < EXTENTS_MAX) {
        uint64_t piece = left < SLU_PACK_PIECE_BYTES ? left : SLU_PACK_PIECE_BYTES;
        add_extent(tables, piece, false);
        left -= piece;
    }
    tensor.n_extents = (uint32_t)(tables->n_extents - tensor.first_extent);
    if (tables->tensors) {
        tables->tensors[tables->n_tensors] = tensor;
    }
    tables->n_tensors++;
}

static void add_bank(struct tables *tables, const struct slu_config *config, uint32_t layer,
                     enum slu_bank_kind kind, uint32_t n_experts, uint32_t n_ff, bool has_bias)
{
    struct slu_bank_shape shape = {.n_embd = config->n_embd,
                                   .n_ff = n_ff,
                                   .gate = tables->fmt,
                                   .up = tables->fmt,
                                   .down = tables->fmt,
                                   .has_bias = has_bias};
    size_t target_bytes = tables->is_small ? 4096 : 1 << 20;
    if (!slu_bank_split(&shape, target_bytes)) {
        shape.gate = shape.up = shape.down = slu_fmt_get(SLU_FMT_F32);
        if (!slu_bank_split(&shape, target_bytes)) {
            return;
        }
    }
    struct slu_pack_bank bank = {.layer = layer,
                                 .kind = kind,
                                 .n_experts = n_experts,
                                 .n_embd = config->n_embd,
                                 .n_ff = n_ff,
                                 .neurons_a_block = shape.neurons_a_block,
                                 .fmt_gate = shape.gate->id,
                                 .fmt_up = shape.up->id,
                                 .fmt_down = shape.down->id,
                                 .has_bias = has_bias,
                                 .n_blocks = slu_bank_blocks(&shape),
                                 .first_extent = (uint32_t)tables->n_extents};
    for (uint64_t i = 0; i < (uint64_t)n_experts * bank.n_blocks && tables->n_extents < EXTENTS_MAX;
         i++) {
        struct slu_block_layout at;
        check(slu_block_layout(&shape, (uint32_t)(i % bank.n_blocks), &at));
        add_extent(tables, at.bytes, false);
    }
    if (tables->banks) {
        tables->banks[tables->n_banks] = bank;
    }
    tables->n_banks++;
}

static void fill(struct tables *tables, const struct slu_config *config,
                 const struct slu_tensor_spec *specs, size_t n_specs)
{
    tables->n_tensors = tables->n_banks = 0;
    tables->n_extents = 0;
    tables->offset = SLU_PACK_ALIGN;
    for (size_t i = 0; i < n_specs; i++) {
        add_tensor(tables, &specs[i]);
    }
    for (uint32_t l = 0; l < config->n_layers; l++) {
        if (l < config->n_dense_layers) {
            add_bank(tables, config, l, SLU_BANK_DENSE, 1, config->n_ff_dense, false);
            continue;
        }
        add_bank(tables, config, l, SLU_BANK_ROUTED, config->n_experts, config->n_ff_expert,
                 config->has_expert_bias);
        if (config->n_ff_shared) {
            add_bank(tables, config, l, SLU_BANK_SHARED, 1, config->n_ff_shared, false);
        }
    }
}

static void plan(const struct slu_pack *pack, const uint8_t *head)
{
    struct slu_weights weights;
    struct slu_err err = {0};
    int rc = slu_weights_describe(pack, &weights, &err);
    if (rc != 0) {
        check(err.code == rc && err.text[0] != '\0' && !strchr(err.text, '\n'));
        return;
    }
    struct slu_engine_params params = {.ram_bytes = 1 << 30, .n_threads = 1u + (head[5] >> 2)};
    memcpy(&params.ctx, head + 6, sizeof params.ctx);
    params.ctx &= (1u << 28) - 1;
    struct slu_plan_input input;
    struct slu_plan plan;
    slu_plan_resolve(&params, pack, &weights, &input);
    slu_plan_make(&input, &plan);
    /* No sum may have gone around. */
    check(plan.fits == (plan.total_bytes <= plan.ram_bytes));
    for (uint32_t i = 0; i < plan.n_lines; i++) {
        check(plan.lines[i].bytes <= plan.total_bytes);
    }
    check(plan.total_bytes >= weights.memory_bytes);
    check(plan.n_slots >= plan.n_slots_min && plan.n_slots <= plan.n_blocks);
    /* The least does, and no less. */
    input.ram_bytes = plan.least_ram_bytes;
    slu_plan_make(&input, &plan);
    check(plan.fits && plan.total_bytes == input.ram_bytes);
    input.ram_bytes--;
    slu_plan_make(&input, &plan);
    check(!plan.fits && plan.least_ram_bytes == input.ram_bytes + 1);
    slu_weights_finish(&weights);
}

static void poke(uint8_t *index, size_t index_bytes, const uint8_t *pokes, size_t size)
{
    for (; size >= 8; pokes += 8, size -= 8) {
        uint32_t at;
        memcpy(&at, pokes, sizeof at);
        memcpy(index + at % (index_bytes / 4) * 4, pokes + 4, 4);
    }
}

static void try_model(struct slu_pack *pack, const struct slu_config *config, const uint8_t *head,
                      const uint8_t *pokes, size_t pokes_bytes)
{
    struct tables tables = {
        .fmt = slu_fmt_get(head[4] % SLU_FMTS), .is_tied = head[5] & 1, .is_small = head[5] & 2};
    size_t n_specs = slu_config_tensors(config, NULL, 0);
    check(n_specs <= SLU_TENSORS_MAX);
    struct slu_tensor_spec *specs = calloc(n_specs, sizeof *specs);
    uint8_t *index = NULL;
    if (!specs) {
        return;
    }
    slu_config_tensors(config, specs, n_specs);
    fill(&tables, config, specs, n_specs);
    size_t index_bytes =
        slu_pack_index_bytes(tables.n_tensors, tables.n_banks, (uint32_t)tables.n_extents);
    if (tables.n_extents < EXTENTS_MAX && (index = calloc(1, index_bytes)) != NULL) {
        tables.tensors = (struct slu_pack_tensor *)index;
        tables.banks = (struct slu_pack_bank *)(tables.tensors + tables.n_tensors);
        tables.extents = (struct slu_extent *)(tables.banks + tables.n_banks);
        fill(&tables, config, specs, n_specs);
        poke(index, index_bytes, pokes, pokes_bytes);
        pack->header.n_tensors = tables.n_tensors;
        pack->header.n_banks = tables.n_banks;
        pack->header.n_extents = (uint32_t)tables.n_extents;
        /* Metadata and index come last, a page each. */
        pack->header.meta = (struct slu_extent){.offset = tables.offset, .stored_bytes = 1};
        pack->header.index =
            (struct slu_extent){.offset = tables.offset + SLU_PACK_ALIGN, .stored_bytes = 1};
        pack->header.file_bytes = tables.offset + 2 * SLU_PACK_ALIGN;
        pack->tensors = tables.tensors;
        pack->banks = tables.banks;
        pack->extents = tables.extents;
        struct slu_err err = {0};
        int rc = slu_pack_check_index(&pack->header, pack->tensors, pack->banks, pack->extents,
                                      "fuzz", &err);
        check(rc == 0 || pokes_bytes > 0 || tables.offset >> 48);
        if (rc == 0) {
            plan(pack, head);
        }
    }
    free(index);
    free(specs);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < HEAD_BYTES) {
        return 0;
    }
    const uint8_t *pairs = data + HEAD_BYTES;
    size_t n_pairs = (size_t)data[0] | (size_t)data[1] << 8;
    size_t pairs_bytes = (size_t)data[2] | (size_t)data[3] << 8;
    if (pairs_bytes > size - HEAD_BYTES) {
        return 0;
    }
    struct slu_source *source;
    struct slu_pack pack = {0};
    size_t used;
    struct slu_err err = {0};
    if (slu_source_open_memory(data, size, "fuzz", &source) != 0) {
        return 0;
    }
    pack.source = source;
    pack.header.meta.raw_bytes = (uint32_t)pairs_bytes;
    if (slu_kvs_parse(pairs, pairs_bytes, n_pairs, &pack.kvs, &used, "fuzz", &err) == 0) {
        struct slu_config config;
        int rc = slu_config_read(&pack.kvs, &config, &err);
        check(rc == 0 || (err.code == rc && err.text[0] != '\0'));
        if (rc == 0) {
            try_model(&pack, &config, data, pairs + pairs_bytes, size - HEAD_BYTES - pairs_bytes);
        }
        slu_kvs_finish(&pack.kvs);
    }
    slu_source_destroy(source);
    return 0;
}
