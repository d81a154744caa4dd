/*
 * Everything that an adapter in memory is lies in one mapping, so that it is charged in one piece,
 * which can be told from the file alone:
 *
 *     | struct slu_adapter | loras | by_target, layers, for the most layers there can be |
 *     | matrices | expert blocks |
 *
 * Where expert blocks are streamed, the mapping ends before them, and the stream charges its own.
 */
#include "adapters/adapter.h"

#include <stdlib.h>
#include <string.h>

#include "adapters/expert_stream.h"
#include "adapters/load.h"
#include "adapters/sla.h"
#include "base/arena.h"

#define PERMUTE_BYTES (1u << 20)

static size_t align64(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

/* Where the parts of the mapping begin; the last is its size. */
struct parts {
    size_t loras, by_target, layers, matrices, experts, bytes;
};

static bool lay_out(const struct slu_sla *sla, bool is_streamed, struct parts *ret_parts)
{
    struct parts p;
    p.loras = align64(sizeof(struct slu_adapter));
    p.by_target = p.loras + align64(sla->info.n_loras * sizeof(struct slu_lora));
    p.layers = p.by_target + align64(SLU_SLA_LAYERS_MAX * SLU_TARGETS * sizeof(uint32_t));
    p.matrices = p.layers + align64(SLU_SLA_LAYERS_MAX * sizeof(struct slu_adapter_layer));
    if (sla->matrix_bytes > SIZE_MAX / 4 || sla->info.expert_bytes > SIZE_MAX / 4) {
        return false;
    }
    p.experts = p.matrices + (size_t)sla->matrix_bytes;
    p.bytes = p.experts + (is_streamed ? 0 : (size_t)sla->info.expert_bytes);
    *ret_parts = p;
    return true;
}

static int open_index(struct slu_source *source, bool is_streamed, struct slu_sla *ret_sla,
                      struct parts *ret_parts, struct slu_err *err)
{
    int rc = slu_sla_open(source, ret_sla, err);
    if (rc < 0) {
        return rc;
    }
    struct parts all;
    if (!lay_out(ret_sla, false, &all) || !lay_out(ret_sla, is_streamed, ret_parts)) {
        slu_sla_finish(ret_sla);
        return slu_err_set(err, SLU_EUNSUP, "%s: is larger than this machine can address",
                           source->name);
    }
    ret_sla->info.memory_bytes = slu_map_charge_bytes(all.bytes);
    ret_sla->info.extra_bytes = slu_load_bytes(ret_sla, false) - slu_adapter_staging_bytes();
    return 0;
}

int slu_adapter_inspect(struct slu_source *source, struct slu_adapter_info *ret_info,
                        struct slu_err *err)
{
    struct slu_sla sla;
    struct parts parts = {0};
    int rc = open_index(source, false, &sla, &parts, err);
    if (rc < 0) {
        return rc;
    }
    *ret_info = sla.info;
    slu_sla_finish(&sla);
    return 0;
}

static bool is_permuted(const struct slu_adapter_info *info, const struct slu_target_shape *shape)
{
    return info->is_hf_order && shape->permute_heads > 0;
}

/* One record against the base's matrix. */
static int check_shape(const struct slu_adapter_info *info, const struct slu_sla_record *r,
                       const struct slu_base *base, const char *name, struct slu_err *err)
{
    const char *target = slu_target_name((enum slu_target)r->target);
    if (r->layer >= base->n_layers) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: changes %s of layer %u, but the model has %u layers; it was made "
                           "for another model",
                           name, target, r->layer, base->n_layers);
    }
    struct slu_target_shape shape = {0};
    base->shape(base->arg, (enum slu_target)r->target, r->layer, &shape);
    if (shape.n == 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: changes %s of layer %u, which the model doesn't have; it was made "
                           "for another model",
                           name, target, r->layer);
    }
    if (shape.in != r->in || shape.out != r->out) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s of layer %u is made for %u inputs and %u outputs, but the "
                           "model's has %u and %u",
                           name, target, r->layer, r->in, r->out, shape.in, shape.out);
    }
    if (shape.n != r->n) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s of layer %u has pairs for %u experts, but the model has %u; "
                           "import it with --base if it leaves the last ones alone",
                           name, target, r->layer, r->n, shape.n);
    }
    if (is_permuted(info, &shape) && r->out % (2 * shape.permute_heads) != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: the %u rows of %s of layer %u don't make %u heads of even width",
                           name, r->out, target, r->layer, shape.permute_heads);
    }
    return 0;
}

static int check_base(const struct slu_sla *sla, const struct slu_base *base, const char *name,
                      struct slu_err *err)
{
    const struct slu_adapter_info *info = &sla->info;
    if (info->arch[0] && base->arch && strcmp(info->arch, base->arch) != 0) {
        return slu_err_set(err, SLU_EUNSUP, "%s: is an adapter for %s, but the model is %s", name,
                           info->arch, base->arch);
    }
    if (info->base_fingerprint && info->base_fingerprint != base->fingerprint) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: belongs to the pack with fingerprint %016llx, and this one has "
                           "%016llx; import it again for this one",
                           name, (unsigned long long)info->base_fingerprint,
                           (unsigned long long)base->fingerprint);
    }
    if (base->n_layers > SLU_SLA_LAYERS_MAX) {
        return slu_err_set(err, SLU_EUNSUP, "%s: models of over %u layers take no adapters", name,
                           SLU_SLA_LAYERS_MAX);
    }
    for (uint32_t i = 0; i < info->n_loras; i++) {
        int rc = check_shape(info, &sla->records[i], base, name, err);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

/* Rows of n_heads heads from Hugging Face's order, in which the first halves of all RoPE pairs come
 * before their second halves, to GGUF's, in which the halves of a pair are neighbours. A head is
 * copied out a stripe of columns at a time, so that a scratch of any size does. */
static void permute_rows(uint8_t *data, size_t row_bytes, uint32_t rows, uint32_t n_heads,
                         uint8_t *scratch, size_t scratch_bytes)
{
    uint32_t width = rows / n_heads;
    size_t stripe = scratch_bytes / width;
    for (uint32_t h = 0; h < n_heads; h++) {
        uint8_t *head = data + (size_t)h * width * row_bytes;
        for (size_t at = 0; at < row_bytes; at += stripe) {
            size_t n = row_bytes - at < stripe ? row_bytes - at : stripe;
            for (uint32_t r = 0; r < width; r++) {
                memcpy(scratch + r * n, head + r * row_bytes + at, n);
            }
            for (uint32_t r = 0; r < width; r++) {
                uint32_t from = r % 2 * (width / 2) + r / 2;
                memcpy(head + r * row_bytes + at, scratch + from * n, n);
            }
        }
    }
}

static int permute(struct slu_adapter *adapter, const struct slu_base *base,
                   struct slu_ledger *ledger, struct slu_err *err)
{
    const size_t scratch_bytes = PERMUTE_BYTES;
    void *scratch = NULL;
    int rc = 0;
    for (uint32_t i = 0; i < adapter->info.n_loras && rc == 0; i++) {
        const struct slu_lora *lora = &adapter->loras[i];
        struct slu_target_shape shape = {0};
        base->shape(base->arg, lora->target, lora->layer, &shape);
        if (!is_permuted(&adapter->info, &shape) || !lora->b.data) {
            continue;
        }
        if (!scratch) {
            rc = slu_map_alloc(ledger, SLU_ACCOUNT_IO, scratch_bytes, &scratch, err);
        }
        if (rc == 0 && lora->b.rows / shape.permute_heads > scratch_bytes) {
            rc = slu_err_set(err, SLU_EUNSUP, "%s of layer %u has heads of %u rows",
                             slu_target_name(lora->target), lora->layer,
                             lora->b.rows / shape.permute_heads);
        }
        if (rc == 0) {
            size_t at = (size_t)(lora->b.data - (uint8_t *)adapter->memory);
            permute_rows((uint8_t *)adapter->memory + at, lora->b.at.codes_row, lora->b.rows,
                         shape.permute_heads, scratch, scratch_bytes);
        }
    }
    slu_map_free(ledger, SLU_ACCOUNT_IO, scratch, scratch_bytes);
    return rc;
}

/* Where each layer's blocks are, and each of its pairs in them. */
static void describe_experts(struct slu_adapter *adapter, const struct slu_sla *sla,
                             const uint8_t *experts)
{
    for (uint32_t i = 0; i < sla->n_layers; i++) {
        const struct slu_sla_layer *l = &sla->layers[i];
        adapter->layers[l->layer] = (struct slu_adapter_layer){
            .n = l->n,
            .first_block = l->first_block,
            .block_bytes = l->block_bytes,
            .data = experts,
        };
        experts = experts ? experts + (size_t)l->n * l->block_bytes : NULL;
        size_t at = 0;
        for (uint32_t r = 0; r < l->n_records; r++) {
            struct slu_lora *lora = &adapter->loras[l->first_record + r];
            lora->at = at;
            at += lora->a.at.bytes + lora->b.at.bytes;
        }
    }
}

/* Fills everything but the numbers. ret_at[i]: where record i begins among the matrices. */
static struct slu_adapter *describe(const struct slu_sla *sla, const struct parts *parts,
                                    uint8_t *memory, uint32_t n_layers, uint64_t *ret_at)
{
    struct slu_adapter *adapter = (struct slu_adapter *)memory;
    *adapter = (struct slu_adapter){
        .info = sla->info,
        .loras = (struct slu_lora *)(memory + parts->loras),
        .by_target = (uint32_t *)(memory + parts->by_target),
        .layers = (struct slu_adapter_layer *)(memory + parts->layers),
        .n_layers = n_layers,
        .memory = memory,
        .memory_bytes = parts->bytes,
    };
    uint64_t at = 0;
    for (uint32_t i = 0; i < sla->info.n_loras; i++) {
        const struct slu_sla_record *r = &sla->records[i];
        struct slu_lora *lora = &adapter->loras[i];
        *lora = (struct slu_lora){
            .target = (enum slu_target)r->target,
            .layer = r->layer,
            .rank = r->rank,
            .n = r->n,
            .scale = r->scale,
        };
        const uint8_t *data = memory + parts->matrices + at;
        slu_mat_view(&lora->a, slu_fmt_get(r->fmt_a), r->rank, r->in, data);
        slu_mat_view(&lora->b, slu_fmt_get(r->fmt_b), r->out, r->rank, data + lora->a.at.bytes);
        adapter->by_target[r->layer * SLU_TARGETS + r->target] = i + 1;
        ret_at[i] = at;
        if (slu_sla_is_expert(r->target)) {
            lora->a.data = lora->b.data = NULL;
        } else {
            at += (uint64_t)lora->a.at.bytes + lora->b.at.bytes;
        }
    }
    describe_experts(adapter, sla, parts->bytes > parts->experts ? memory + parts->experts : NULL);
    return adapter;
}

/* streaming: NULL where everything is to be in memory. */
static int load_all(struct slu_source *source, const struct slu_sla *sla, const struct parts *parts,
                    const struct slu_base *base, const struct slu_adapter_streaming *streaming,
                    struct slu_ledger *ledger, struct slu_adapter **ret_adapter,
                    struct slu_err *err)
{
    void *memory = NULL;
    uint64_t *record_at = calloc(sla->info.n_loras, sizeof *record_at);
    if (!record_at) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to open it", source->name);
    }
    int rc = slu_map_alloc(ledger, SLU_ACCOUNT_ADAPTERS, parts->bytes, &memory, err);
    if (rc < 0) {
        slu_err_prefix(err, "%s", source->name);
        free(record_at);
        return rc;
    }
    struct slu_adapter *adapter = describe(sla, parts, memory, base->n_layers, record_at);
    adapter->ledger = ledger;
    adapter->charged_bytes = slu_map_charge_bytes(parts->bytes) +
                             (streaming ? slu_expert_stream_bytes(sla, streaming) : 0);
    const struct slu_load_params load = {
        .source = source,
        .sla = sla,
        .matrices = (uint8_t *)memory + parts->matrices,
        .record_at = record_at,
        .experts = streaming ? NULL : (uint8_t *)memory + parts->experts,
        .ledger = ledger,
    };
    rc = slu_load_run(&load, err);
    free(record_at);
    rc = rc < 0 ? rc : permute(adapter, base, ledger, err);
    if (rc == 0 && streaming) {
        rc = slu_expert_stream_create(sla, streaming, ledger, &adapter->stream, err);
        if (rc < 0) {
            slu_err_prefix(err, "%s", source->name);
        }
    }
    if (rc < 0) {
        slu_adapter_close(adapter);
        return rc;
    }
    *ret_adapter = adapter;
    return 0;
}

static int open_any(struct slu_source *source, const struct slu_base *base,
                    const struct slu_adapter_streaming *streaming, struct slu_ledger *ledger,
                    struct slu_adapter **ret_adapter, struct slu_err *err)
{
    struct slu_sla sla;
    struct parts parts = {0};
    int rc = open_index(source, streaming != NULL, &sla, &parts, err);
    if (rc < 0) {
        return rc;
    }
    rc = check_base(&sla, base, source->name, err);
    if (rc == 0) {
        rc = load_all(source, &sla, &parts, base, sla.info.n_blocks ? streaming : NULL, ledger,
                      ret_adapter, err);
    }
    slu_sla_finish(&sla);
    return rc;
}

int slu_adapter_open(struct slu_source *source, const struct slu_base *base,
                     struct slu_ledger *ledger, struct slu_adapter **ret_adapter,
                     struct slu_err *err)
{
    return open_any(source, base, NULL, ledger, ret_adapter, err);
}

int slu_adapter_open_streamed(struct slu_source *source, const struct slu_base *base,
                              const struct slu_adapter_streaming *streaming,
                              struct slu_ledger *ledger, struct slu_adapter **ret_adapter,
                              struct slu_err *err)
{
    return open_any(source, base, streaming, ledger, ret_adapter, err);
}

static uint64_t streamed_bytes(const struct slu_sla *sla, const struct parts *parts,
                               const struct slu_adapter_streaming *streaming, uint32_t n_slots)
{
    struct slu_adapter_streaming with = *streaming;
    with.n_slots = n_slots;
    return slu_map_charge_bytes(parts->bytes) + slu_expert_stream_bytes(sla, &with);
}

int slu_adapter_fit(struct slu_source *source, const struct slu_base *base, uint64_t bytes_max,
                    struct slu_adapter_streaming *streaming, uint64_t *ret_bytes,
                    struct slu_err *err)
{
    struct slu_sla sla;
    struct parts parts = {0};
    int rc = open_index(source, true, &sla, &parts, err);
    if (rc < 0) {
        return rc;
    }
    if (sla.info.n_blocks == 0) {
        slu_sla_finish(&sla);
        return slu_err_set(err, SLU_EINVAL, "%s: has no experts to stream", source->name);
    }
    uint32_t lo = base->n_used < sla.info.n_experts ? base->n_used : sla.info.n_experts;
    uint32_t hi = sla.info.n_blocks;
    lo = lo ? lo : 1;
    bool fits = streamed_bytes(&sla, &parts, streaming, lo) <= bytes_max;
    while (fits && lo < hi) {
        uint32_t mid = lo + (hi - lo + 1) / 2;
        if (streamed_bytes(&sla, &parts, streaming, mid) <= bytes_max) {
            lo = mid;
        } else {
            hi = mid - 1;
        }
    }
    streaming->n_slots = lo;
    *ret_bytes = streamed_bytes(&sla, &parts, streaming, lo);
    slu_sla_finish(&sla);
    return fits ? 0 : SLU_EBUDGET;
}

void slu_adapter_close(struct slu_adapter *adapter)
{
    if (adapter) {
        slu_expert_stream_destroy(adapter->stream);
        slu_map_free(adapter->ledger, SLU_ACCOUNT_ADAPTERS, adapter->memory, adapter->memory_bytes);
    }
}
