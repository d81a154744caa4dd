/*
 * Describing and loading go through the same list: the tensors that the configuration asks for,
 * each with the place in struct slu_weights where it belongs. Describing lays them out one after
 * another in a mapping that doesn't exist yet (views with data NULL plus an offset); loading makes
 * the mapping, reads, and adds its address.
 */
#include "model/weights.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"

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

/* Gives a tensor its place in the mapping. */
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

uint64_t slu_weights_staging_bytes(const struct slu_pack *pack)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < pack->header.n_extents; i++) {
        uint32_t stored = pack->extents[i].stored_bytes;
        most = stored > most ? stored : most;
    }
    return slu_map_charge_bytes(most) + slu_decoder_bytes();
}

struct loader {
    const struct slu_pack *pack;
    struct slu_decoder *decoder;
    void *staging;
    uint8_t *at; /* the next free byte of the mapping */
};

static int load_tensor(struct loader *in, struct slu_weights *w, const char *name,
                       struct slu_err *err)
{
    const struct slu_pack_tensor *t = slu_pack_find(in->pack, name);
    if (!t || t->kind == SLU_PACK_ROWS) {
        return 0;
    }
    struct slu_mat *mat;
    const void **where = place_of(w, name, &mat);
    size_t done = 0;
    for (uint32_t i = 0; i < t->n_extents; i++) {
        uint32_t extent = t->first_extent + i;
        int rc =
            slu_pack_read_extent(in->pack, in->decoder, extent, in->staging, in->at + done, err);
        if (rc < 0) {
            slu_err_prefix(err, "tensor %s", name);
            return rc;
        }
        done += in->pack->extents[extent].raw_bytes;
    }
    *where = in->at;
    in->at += align64(done);
    return 0;
}

static int load_resident_bank(struct loader *in, struct slu_bank *bank, struct slu_err *err)
{
    for (uint32_t b = 0; b < bank->n_blocks; b++) {
        int rc = slu_pack_read_extent(in->pack, in->decoder, bank->first_extent + b, in->staging,
                                      in->at + b * bank->data_stride, err);
        if (rc < 0) {
            return rc;
        }
    }
    bank->data = in->at;
    in->at += bank->n_blocks * bank->data_stride;
    return 0;
}

static int load_all(struct loader *in, struct slu_weights *w, struct slu_err *err)
{
    size_t n_specs;
    struct slu_tensor_spec *specs = list_specs(&w->config, &n_specs);
    if (!specs) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for the list of tensors");
    }
    int rc = 0;
    for (size_t i = 0; i < n_specs && rc == 0; i++) {
        rc = load_tensor(in, w, specs[i].name, err);
    }
    free(specs);
    for (uint32_t l = 0; l < w->config.n_layers && rc == 0; l++) {
        rc = load_resident_bank(in, &w->layers[l].resident, err);
    }
    return rc;
}

int slu_weights_load(struct slu_weights *w, const struct slu_pack *pack, struct slu_ledger *ledger,
                     struct slu_err *err)
{
    struct loader in = {.pack = pack};
    uint64_t decoder_bytes = slu_decoder_bytes();
    size_t staging_bytes = (size_t)(slu_weights_staging_bytes(pack) - decoder_bytes);
    int rc = slu_map_alloc(ledger, SLU_ACCOUNT_DENSE, w->memory_bytes, &w->memory, err);
    if (rc < 0) {
        return rc;
    }
    w->ledger = ledger;
    rc = slu_ledger_reserve(ledger, SLU_ACCOUNT_IO, decoder_bytes, err);
    if (rc < 0) {
        goto out_map;
    }
    rc = slu_map_alloc(ledger, SLU_ACCOUNT_IO, staging_bytes, &in.staging, err);
    if (rc < 0) {
        goto out_reserve;
    }
    rc = slu_decoder_create(&in.decoder, err);
    if (rc == 0) {
        in.at = w->memory;
        rc = load_all(&in, w, err);
        assert(rc < 0 || in.at == (uint8_t *)w->memory + w->memory_bytes);
    }
    slu_decoder_destroy(in.decoder);
    slu_map_free(ledger, SLU_ACCOUNT_IO, in.staging, staging_bytes);
out_reserve:
    slu_ledger_release(ledger, SLU_ACCOUNT_IO, decoder_bytes);
out_map:
    if (rc < 0) {
        slu_map_free(ledger, SLU_ACCOUNT_DENSE, w->memory, w->memory_bytes);
        w->memory = NULL;
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
