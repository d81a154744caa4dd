/*
 * Describing and loading go through the same list: the tensors that the configuration asks for,
 * each with the place in struct slu_weights where it belongs. Describing checks them and adds up
 * the mapping that they need; loading makes it, gives each its place there, and has all of the
 * pieces read.
 */
#include "model/weights.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "experts/slots.h"
#include "model/load.h"

/* Where a tensor of a layer goes, by the part of its name behind "blk.N.". */
static const struct place {
    const char *name;
    bool is_vector;
    size_t offset;
} places[] = {
    {"attn_norm.weight", true, offsetof(struct slu_layer, attn_norm)},
    {"ffn_norm.weight", true, offsetof(struct slu_layer, ffn_norm)},
    {"post_attention_norm.weight", true, offsetof(struct slu_layer, ffn_norm)},
    {"attn_q.weight", false, offsetof(struct slu_layer, q)},
    {"attn_k.weight", false, offsetof(struct slu_layer, k)},
    {"attn_v.weight", false, offsetof(struct slu_layer, v)},
    {"attn_output.weight", false, offsetof(struct slu_layer, out)},
    {"attn_q.bias", true, offsetof(struct slu_layer, q_bias)},
    {"attn_k.bias", true, offsetof(struct slu_layer, k_bias)},
    {"attn_v.bias", true, offsetof(struct slu_layer, v_bias)},
    {"attn_output.bias", true, offsetof(struct slu_layer, out_bias)},
    {"attn_q_norm.weight", true, offsetof(struct slu_layer, q_norm)},
    {"attn_k_norm.weight", true, offsetof(struct slu_layer, k_norm)},
    {"attn_sinks.weight", true, offsetof(struct slu_layer, sinks)},
    {"attn_q_a.weight", false, offsetof(struct slu_layer, q_a)},
    {"attn_q_a_norm.weight", true, offsetof(struct slu_layer, q_a_norm)},
    {"attn_q_b.weight", false, offsetof(struct slu_layer, q_b)},
    {"attn_kv_a_mqa.weight", false, offsetof(struct slu_layer, kv_a)},
    {"attn_kv_a_norm.weight", true, offsetof(struct slu_layer, kv_a_norm)},
    {"attn_kv_b.weight", false, offsetof(struct slu_layer, kv_b)},
    {"attn_k_b.weight", false, offsetof(struct slu_layer, k_b)},
    {"attn_v_b.weight", false, offsetof(struct slu_layer, v_b)},
    {"ffn_gate_inp.weight", false, offsetof(struct slu_layer, router)},
    {"ffn_gate_inp.bias", true, offsetof(struct slu_layer, router_bias)},
    {"exp_probs_b.bias", true, offsetof(struct slu_layer, gate_bias)},
    {"ffn_gate_inp_shexp.weight", true, offsetof(struct slu_layer, shared_gate)},
};

static const void **place_of(struct slu_weights *w, const char *name, struct slu_mat **ret_mat)
{
    *ret_mat = NULL;
    if (!strcmp(name, "output_norm.weight")) {
        return (const void **)&w->output_norm;
    }
    if (!strcmp(name, "output.weight") || !strcmp(name, "token_embd.weight")) {
        *ret_mat = &w->head;
        return (const void **)&w->head.data;
    }
    unsigned layer;
    int n = 0;
    if (sscanf(name, "blk.%u.%n", &layer, &n) != 1 || n == 0 || layer >= w->config.n_layers) {
        return NULL;
    }
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (!strcmp(name + n, places[i].name)) {
            void *at = (char *)&w->layers[layer] + places[i].offset;
            if (places[i].is_vector) {
                return at;
            }
            *ret_mat = at;
            return (const void **)&(*ret_mat)->data;
        }
    }
    return NULL;
}

static size_t align64(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

/* A tensor's record against what the configuration asks for. */
static int check_tensor(const struct slu_pack *pack, const struct slu_tensor_spec *spec,
                        const struct slu_pack_tensor *t, size_t *ret_bytes, struct slu_err *err)
{
    const char *file = pack->source->name;
    if (t->rows != spec->rows || t->cols != spec->cols || t->n != spec->n) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: tensor %s is %u x %u x %u where the configuration asks for "
                           "%u x %u x %u",
                           file, spec->name, t->rows, t->cols, t->n, spec->rows, spec->cols,
                           spec->n);
    }
    const struct slu_fmt *fmt = slu_fmt_get(t->fmt);
    struct slu_mat_layout at;
    if (!fmt || !slu_mat_layout(fmt, t->rows, t->cols, &at)) {
        return slu_err_set(err, SLU_EFORMAT, "%s: tensor %s has a format that doesn't fit it", file,
                           spec->name);
    }
    if (spec->is_vector && fmt->id != SLU_FMT_F32) {
        return slu_err_set(err, SLU_EFORMAT, "%s: vector %s is %s where F32 is needed", file,
                           spec->name, fmt->name);
    }
    uint64_t bytes = (uint64_t)at.bytes * t->n;
    if (t->kind == SLU_PACK_ROWS) {
        slu_mat_layout(fmt, 1, t->cols, &at);
        uint64_t offset = pack->extents[t->first_extent].offset;
        if (t->row_stride != align64(at.bytes + sizeof(uint32_t)) ||
            (uint64_t)t->row_stride * t->rows > pack->header.file_bytes - offset) {
            return slu_err_set(err, SLU_EFORMAT, "%s: rows of %s don't fit the file", file,
                               spec->name);
        }
        *ret_bytes = 0;
        return 0;
    }
    uint64_t pieces = (bytes + SLU_PACK_PIECE_BYTES - 1) / SLU_PACK_PIECE_BYTES;
    uint64_t raw = 0;
    for (uint32_t i = 0; i < t->n_extents; i++) {
        raw += pack->extents[t->first_extent + i].raw_bytes;
    }
    if (t->n_extents != pieces || raw != bytes) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: tensor %s holds %llu bytes where its format needs %llu", file,
                           spec->name, (unsigned long long)raw, (unsigned long long)bytes);
    }
    *ret_bytes = (size_t)bytes;
    return 0;
}

/* Notes extents that loading will read. */
static void count_pieces(struct slu_weights *w, const struct slu_pack *pack, uint32_t first,
                         uint32_t n)
{
    w->n_pieces += n;
    for (uint32_t i = first; i < first + n; i++) {
        const struct slu_extent *x = &pack->extents[i];
        if (x->codec != SLU_CODEC_RAW && x->stored_bytes > w->stored_bytes_max) {
            w->stored_bytes_max = x->stored_bytes;
        }
    }
}

static int describe_tensor(struct slu_weights *w, const struct slu_pack *pack,
                           const struct slu_tensor_spec *spec, struct slu_err *err)
{
    const struct slu_pack_tensor *t = slu_pack_find(pack, spec->name);
    if (!t) {
        return spec->is_optional ? 0
                                 : slu_err_set(err, SLU_EFORMAT, "%s: tensor %s is missing",
                                               pack->source->name, spec->name);
    }
    size_t bytes = 0;
    int rc = check_tensor(pack, spec, t, &bytes, err);
    if (rc < 0) {
        return rc;
    }
    if (!strcmp(spec->name, "token_embd.weight")) {
        w->embedding = *t;
        w->embedding_offset = pack->extents[t->first_extent].offset;
        w->is_tied = t->kind == SLU_PACK_MATRIX;
        if (!w->is_tied) {
            return 0;
        }
    } else if (t->kind != SLU_PACK_MATRIX) {
        return slu_err_set(err, SLU_EFORMAT, "%s: tensor %s is stored by rows", pack->source->name,
                           spec->name);
    }
    if (!strcmp(spec->name, "output.weight") && w->is_tied) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: has output.weight beside an embedding that is its own head",
                           pack->source->name);
    }
    struct slu_mat *mat;
    const void **where = place_of(w, spec->name, &mat);
    assert(where);
    if (mat) {
        mat->fmt = slu_fmt_get(t->fmt);
        mat->rows = t->rows;
        mat->cols = t->cols;
        slu_mat_layout(mat->fmt, t->rows, t->cols, &mat->at);
    }
    w->memory_bytes += align64(bytes);
    count_pieces(w, pack, t->first_extent, t->n_extents);
    return 0;
}

/* A bank's record against the layer that it is for. */
static int describe_bank(struct slu_weights *w, const struct slu_pack *pack, uint32_t layer,
                         enum slu_bank_kind kind, uint32_t n_experts, uint32_t n_ff, bool has_bias,
                         struct slu_bank *ret_bank, struct slu_err *err)
{
    static const char *const kinds[] = {"experts", "a shared expert", "a dense network"};
    const char *file = pack->source->name;
    const struct slu_pack_bank *b = slu_pack_find_bank(pack, layer, kind);
    if (!b) {
        return slu_err_set(err, SLU_EFORMAT, "%s: layer %u lacks %s", file, layer, kinds[kind]);
    }
    struct slu_bank bank = {
        .shape = {.n_embd = b->n_embd,
                  .n_ff = b->n_ff,
                  .neurons_a_block = b->neurons_a_block,
                  .gate = slu_fmt_get(b->fmt_gate),
                  .up = slu_fmt_get(b->fmt_up),
                  .down = slu_fmt_get(b->fmt_down),
                  .has_bias = b->has_bias != 0},
        .n_experts = b->n_experts,
        .n_blocks = b->n_blocks,
        .first_extent = b->first_extent,
    };
    struct slu_block_layout at;
    if (b->n_experts != n_experts || b->n_ff != n_ff || b->n_embd != w->config.n_embd ||
        (b->has_bias != 0) != has_bias || !bank.shape.gate || !bank.shape.up || !bank.shape.down ||
        !slu_block_layout(&bank.shape, 0, &at) || slu_bank_blocks(&bank.shape) != b->n_blocks) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %s of layer %u don't fit the configuration", file,
                           kinds[kind], layer);
    }
    for (uint32_t i = 0; i < b->n_blocks; i++) {
        if (!slu_block_layout(&bank.shape, i, &at)) {
            return slu_err_set(err, SLU_EFORMAT, "%s: block %u of layer %u has no valid layout",
                               file, i, layer);
        }
        for (uint32_t e = 0; e < n_experts; e++) {
            const struct slu_extent *x = &pack->extents[b->first_extent + e * b->n_blocks + i];
            if (x->raw_bytes != at.bytes) {
                return slu_err_set(err, SLU_EFORMAT,
                                   "%s: block %u of expert %u in layer %u holds %u bytes where its "
                                   "shape needs %zu",
                                   file, i, e, layer, x->raw_bytes, at.bytes);
            }
        }
    }
    bank.data_stride = slu_bank_block_bytes(&bank.shape);
    *ret_bank = bank;
    return 0;
}

static size_t slot_bytes(const struct slu_bank_shape *shape, uint32_t block)
{
    struct slu_block_layout at;
    return slu_slots_round(slu_block_layout(shape, block, &at) ? at.bytes : 0);
}

/* Routed blocks of all layers that fit a slot. All of an expert but the first, which may have a
 * bias more, and the last are alike. */
static uint32_t count_blocks(const struct slu_weights *w, size_t slot)
{
    uint32_t n_fit = 0;
    for (uint32_t l = w->config.n_dense_layers; l < w->config.n_layers; l++) {
        const struct slu_bank *bank = &w->layers[l].routed;
        uint32_t n = bank->n_blocks;
        uint32_t n_of_expert = slot_bytes(&bank->shape, 0) <= slot;
        n_of_expert += n > 2 && slot_bytes(&bank->shape, 1) <= slot ? n - 2 : 0;
        n_of_expert += n > 1 && slot_bytes(&bank->shape, n - 1) <= slot;
        n_fit += bank->n_experts * n_of_expert;
    }
    return n_fit;
}

/* Slots of two sizes, where they take that much less: the smaller size that saves most. */
#define SAVING_PART 32u

static void choose_small_blocks(struct slu_weights *w)
{
    size_t large = slu_slots_round(w->block_bytes_max);
    uint64_t most = (uint64_t)w->n_blocks * large / SAVING_PART;
    for (uint32_t l = w->config.n_dense_layers; l < w->config.n_layers; l++) {
        size_t small = slot_bytes(&w->layers[l].routed.shape, 0);
        uint32_t n = count_blocks(w, small);
        uint64_t saved = (uint64_t)n * (large - small);
        if (saved > most) {
            most = saved;
            w->block_bytes_small = small;
            w->n_blocks_small = n;
        }
    }
}

static int describe_banks(struct slu_weights *w, const struct slu_pack *pack, struct slu_err *err)
{
    const struct slu_config *c = &w->config;
    w->first_block = UINT32_MAX;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        struct slu_layer *layer = &w->layers[l];
        int rc = 0;
        if (l < c->n_dense_layers) {
            rc = describe_bank(w, pack, l, SLU_BANK_DENSE, 1, c->n_ff_dense, false,
                               &layer->resident, err);
        } else {
            rc = describe_bank(w, pack, l, SLU_BANK_ROUTED, c->n_experts, c->n_ff_expert,
                               c->has_expert_bias, &layer->routed, err);
            if (rc == 0 && c->n_ff_shared) {
                rc = describe_bank(w, pack, l, SLU_BANK_SHARED, 1, c->n_ff_shared, false,
                                   &layer->resident, err);
            }
        }
        if (rc < 0) {
            return rc;
        }
        w->memory_bytes += (size_t)layer->resident.n_blocks * layer->resident.data_stride;
        count_pieces(w, pack, layer->resident.first_extent, layer->resident.n_blocks);
        if (layer->routed.n_experts) {
            const struct slu_bank *b = &layer->routed;
            uint32_t all = b->n_experts * b->n_blocks, used = c->n_used * b->n_blocks;
            size_t bytes = slu_bank_block_bytes(&b->shape);
            w->n_blocks += all;
            w->token_blocks += used;
            w->layer_blocks_max = used > w->layer_blocks_max ? used : w->layer_blocks_max;
            w->block_bytes_max = bytes > w->block_bytes_max ? bytes : w->block_bytes_max;
            w->first_block = b->first_extent < w->first_block ? b->first_extent : w->first_block;
            w->end_block =
                b->first_extent + all > w->end_block ? b->first_extent + all : w->end_block;
        }
    }
    choose_small_blocks(w);
    return 0;
}

static bool has_query_norm(const struct slu_pack *pack, uint32_t layer)
{
    char name[SLU_PACK_NAME_BYTES];
    snprintf(name, sizeof name, "blk.%u.attn_q_a_norm.weight", layer);
    return slu_pack_find(pack, name) != NULL;
}

/* With MLA, one of two forms each of queries and of keys and values. */
static int check_mla(const struct slu_weights *w, const struct slu_pack *pack, struct slu_err *err)
{
    for (uint32_t l = 0; w->config.is_mla && l < w->config.n_layers; l++) {
        const struct slu_layer *layer = &w->layers[l];
        if (!layer->q.fmt && !(layer->q_a.fmt && layer->q_b.fmt && has_query_norm(pack, l))) {
            return slu_err_set(err, SLU_EFORMAT,
                               "%s: layer %u has neither attn_q nor all of attn_q_a, "
                               "attn_q_a_norm and attn_q_b",
                               pack->source->name, l);
        }
        if (!layer->kv_b.fmt && !(layer->k_b.fmt && layer->v_b.fmt)) {
            return slu_err_set(err, SLU_EFORMAT,
                               "%s: layer %u has neither attn_kv_b nor attn_k_b with attn_v_b",
                               pack->source->name, l);
        }
    }
    return 0;
}

static struct slu_tensor_spec *list_specs(const struct slu_config *config, size_t *ret_n)
{
    *ret_n = slu_config_tensors(config, NULL, 0);
    struct slu_tensor_spec *specs = calloc(*ret_n, sizeof *specs);
    if (specs) {
        slu_config_tensors(config, specs, *ret_n);
    }
    return specs;
}

int slu_weights_describe(const struct slu_pack *pack, struct slu_weights *ret_weights,
                         struct slu_err *err)
{
    struct slu_weights w = {0};
    int rc = slu_config_read(&pack->kvs, &w.config, err);
    if (rc < 0) {
        slu_err_prefix(err, "%s", pack->source->name);
        return rc;
    }
    size_t n_specs;
    struct slu_tensor_spec *specs = list_specs(&w.config, &n_specs);
    w.layers = calloc(w.config.n_layers, sizeof *w.layers);
    if (!specs || !w.layers) {
        rc = slu_err_set(err, SLU_ENOMEM, "out of memory for the list of tensors");
        goto out;
    }
    for (size_t i = 0; i < n_specs && rc == 0; i++) {
        rc = describe_tensor(&w, pack, &specs[i], err);
    }
    rc = rc < 0 ? rc : check_mla(&w, pack, err);
    rc = rc < 0 ? rc : describe_banks(&w, pack, err);
    if (rc == 0 && !w.is_tied && !w.head.fmt) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: has neither output.weight nor a tied embedding",
                         pack->source->name);
    }
    w.heap_bytes = w.config.n_layers * sizeof *w.layers;
out:
    free(specs);
    if (rc < 0) {
        free(w.layers);
        return rc;
    }
    *ret_weights = w;
    return 0;
}

uint64_t slu_weights_charge_bytes(const struct slu_weights *weights)
{
    return slu_map_charge_bytes(weights->memory_bytes);
}

static uint64_t list_bytes(const struct slu_weights *w)
{
    return w->n_pieces * sizeof(struct slu_load_piece);
}

uint64_t slu_weights_loading_bytes(const struct slu_weights *weights)
{
    return list_bytes(weights) + slu_load_charge_bytes(weights->stored_bytes_max);
}

/* Pieces to load and where the next one goes. */
struct list {
    struct slu_load_piece *pieces;
    size_t n;
    uint8_t *at;
};

static void list_tensor(struct list *list, struct slu_weights *w, const struct slu_pack *pack,
                        const char *name)
{
    const struct slu_pack_tensor *t = slu_pack_find(pack, name);
    if (!t || t->kind == SLU_PACK_ROWS) {
        return;
    }
    struct slu_mat *mat;
    *place_of(w, name, &mat) = list->at;
    size_t done = 0;
    for (uint32_t i = 0; i < t->n_extents; i++) {
        uint32_t extent = t->first_extent + i;
        list->pieces[list->n++] =
            (struct slu_load_piece){.extent = extent, .name = name, .at = list->at + done};
        done += pack->extents[extent].raw_bytes;
    }
    list->at += align64(done);
}

static void list_resident_bank(struct list *list, struct slu_bank *bank)
{
    bank->data = list->at;
    for (uint32_t b = 0; b < bank->n_blocks; b++) {
        list->pieces[list->n++] =
            (struct slu_load_piece){.extent = bank->first_extent + b, .at = list->at};
        list->at += bank->data_stride;
    }
}

static int load_all(struct slu_weights *w, const struct slu_pack *pack, struct slu_pool *pool,
                    uint64_t used_bytes_max, struct slu_err *err)
{
    size_t n_specs;
    struct slu_tensor_spec *specs = list_specs(&w->config, &n_specs);
    struct list list = {.pieces = calloc(w->n_pieces, sizeof *list.pieces), .at = w->memory};
    int rc = 0;
    if (!specs || !list.pieces) {
        rc = slu_err_set(err, SLU_ENOMEM, "out of memory for the list of tensors");
        goto out;
    }
    for (size_t i = 0; i < n_specs; i++) {
        list_tensor(&list, w, pack, specs[i].name);
    }
    for (uint32_t l = 0; l < w->config.n_layers; l++) {
        list_resident_bank(&list, &w->layers[l].resident);
    }
    assert(list.n == w->n_pieces && list.at == (uint8_t *)w->memory + w->memory_bytes);
    rc = slu_load(&(struct slu_load_params){.pack = pack,
                                            .pieces = list.pieces,
                                            .n_pieces = list.n,
                                            .stored_bytes_max = w->stored_bytes_max,
                                            .pool = pool,
                                            .ledger = w->ledger,
                                            .used_bytes_max = used_bytes_max},
                  err);
out:
    free(list.pieces);
    free(specs);
    return rc;
}

int slu_weights_load(struct slu_weights *w, const struct slu_pack *pack, struct slu_pool *pool,
                     struct slu_ledger *ledger, uint64_t used_bytes_max, struct slu_err *err)
{
    int rc = slu_map_alloc(ledger, SLU_ACCOUNT_DENSE, w->memory_bytes, &w->memory, err);
    if (rc < 0) {
        return rc;
    }
    w->ledger = ledger;
    rc = slu_ledger_reserve(ledger, SLU_ACCOUNT_IO, list_bytes(w), err);
    if (rc == 0) {
        rc = load_all(w, pack, pool, used_bytes_max, err);
        slu_ledger_release(ledger, SLU_ACCOUNT_IO, list_bytes(w));
    }
    return rc;
}

void slu_weights_finish(struct slu_weights *w)
{
    if (w->memory) {
        slu_map_free(w->ledger, SLU_ACCOUNT_DENSE, w->memory, w->memory_bytes);
    }
    free(w->layers);
    *w = (struct slu_weights){0};
}
