#include "adapters/expert_stream.h"

#include <assert.h>
#include <string.h>

#include "base/arena.h"
#include "experts/stream.h"

struct slu_expert_stream {
    struct slu_ledger *ledger;
    size_t memory_bytes;
    struct slu_stream *stream;
    struct slu_extent *extents; /* [n_blocks] */
    uint32_t n_slots;

    /* The round, if there is one. */
    uint32_t layer, n;
    uint32_t *experts;             /* [round_max] */
    struct slu_stream_item *items; /* [round_max] data: NULL as long as it is not there */
    const uint8_t **bytes;         /* [n_experts] of each expert of the round */
};

static size_t align64(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

/* Where the parts of the mapping begin; the last is its size. */
struct parts {
    size_t extents, experts, items, bytes, end;
};

static uint32_t round_max(const struct slu_sla *sla, uint32_t n_slots)
{
    return n_slots < sla->info.n_experts ? n_slots : sla->info.n_experts;
}

static struct parts lay_out(const struct slu_sla *sla, uint32_t n_slots)
{
    uint32_t n = round_max(sla, n_slots);
    struct parts p;
    p.extents = align64(sizeof(struct slu_expert_stream));
    p.experts = p.extents + align64(sla->info.n_blocks * sizeof(struct slu_extent));
    p.items = p.experts + align64(n * sizeof(uint32_t));
    p.bytes = p.items + align64(n * sizeof(struct slu_stream_item));
    p.end = p.bytes + align64(sla->info.n_experts * sizeof(uint8_t *));
    return p;
}

static const enum slu_account account = SLU_ACCOUNT_ADAPTERS;

static struct slu_stream_params stream_params(const struct slu_sla *sla,
                                              const struct slu_adapter_streaming *streaming)
{
    return (struct slu_stream_params){
        .path = streaming->path,
        .extents = sla->extents + sla->n_extents,
        .n_extents = sla->info.n_blocks,
        .n_slots = streaming->n_slots,
        .n_blocks = sla->info.n_blocks,
        .slot_bytes = sla->info.block_bytes,
        .round_blocks_max = round_max(sla, streaming->n_slots),
        .n_workers = streaming->n_workers,
        .backend = streaming->backend,
        .account = &account,
    };
}

uint64_t slu_expert_stream_bytes(const struct slu_sla *sla,
                                 const struct slu_adapter_streaming *streaming)
{
    struct slu_stream_params params = stream_params(sla, streaming);
    return slu_map_charge_bytes(lay_out(sla, streaming->n_slots).end) +
           slu_stream_charge_bytes(&params, NULL);
}

int slu_expert_stream_create(const struct slu_sla *sla,
                             const struct slu_adapter_streaming *streaming,
                             struct slu_ledger *ledger, struct slu_expert_stream **ret_stream,
                             struct slu_err *err)
{
    struct parts parts = lay_out(sla, streaming->n_slots);
    void *memory = NULL;
    int rc = slu_map_alloc(ledger, SLU_ACCOUNT_ADAPTERS, parts.end, &memory, err);
    if (rc < 0) {
        return rc;
    }
    char *at = memory;
    struct slu_expert_stream *s = memory;
    *s = (struct slu_expert_stream){
        .ledger = ledger,
        .memory_bytes = parts.end,
        .extents = (struct slu_extent *)(at + parts.extents),
        .n_slots = streaming->n_slots,
        .experts = (uint32_t *)(at + parts.experts),
        .items = (struct slu_stream_item *)(at + parts.items),
        .bytes = (const uint8_t **)(at + parts.bytes),
    };
    memcpy(s->extents, sla->extents + sla->n_extents, sla->info.n_blocks * sizeof *s->extents);
    struct slu_stream_params params = stream_params(sla, streaming);
    params.extents = s->extents;
    params.ledger = ledger;
    rc = slu_stream_create(&params, &s->stream, err);
    if (rc < 0) {
        slu_expert_stream_destroy(s);
        return rc;
    }
    *ret_stream = s;
    return 0;
}

void slu_expert_stream_destroy(struct slu_expert_stream *s)
{
    if (s) {
        slu_stream_destroy(s->stream);
        slu_map_free(s->ledger, SLU_ACCOUNT_ADAPTERS, s, s->memory_bytes);
    }
}

uint32_t slu_expert_stream_slots(const struct slu_adapter *adapter)
{
    return adapter->stream ? adapter->stream->n_slots : UINT32_MAX;
}

int slu_expert_stream_begin(const struct slu_adapter *adapter, uint32_t layer,
                            const uint32_t *experts, uint32_t n, struct slu_err *err)
{
    struct slu_expert_stream *s = adapter->stream;
    const struct slu_adapter_layer *l = &adapter->layers[layer];
    assert(s->n == 0 && n > 0 && n <= s->n_slots && n <= l->n);
    s->layer = layer;
    s->n = n;
    for (uint32_t i = 0; i < n; i++) {
        assert(experts[i] < l->n);
        s->experts[i] = l->first_block + experts[i];
        s->items[i].data = NULL;
    }
    int rc = slu_stream_begin(s->stream, s->experts, n, err);
    if (rc < 0) {
        s->n = 0;
    }
    return rc;
}

void slu_expert_stream_take(const struct slu_adapter *adapter, unsigned worker)
{
    struct slu_expert_stream *s = adapter->stream;
    uint32_t first_block = adapter->layers[s->layer].first_block;
    struct slu_stream_item item;
    /* Blocks are kept until the round ends, which is no trouble since there is a slot for each. */
    while (slu_stream_next(s->stream, worker, &item) > 0) {
        s->items[item.index] = item;
        s->bytes[s->experts[item.index] - first_block] = item.data;
    }
}

int slu_expert_stream_check(const struct slu_adapter *adapter)
{
    const struct slu_expert_stream *s = adapter->stream;
    for (uint32_t i = 0; i < s->n; i++) {
        if (!s->items[i].data) {
            return SLU_EIO; /* the sentence comes with the end */
        }
    }
    return 0;
}

int slu_expert_stream_end(const struct slu_adapter *adapter, struct slu_err *err)
{
    struct slu_expert_stream *s = adapter->stream;
    for (uint32_t i = 0; i < s->n; i++) {
        if (s->items[i].data) {
            slu_stream_done(s->stream, &s->items[i]);
        }
    }
    s->n = 0;
    return slu_stream_end(s->stream, err);
}

const uint8_t *slu_expert_bytes(const struct slu_adapter *adapter, uint32_t layer, uint32_t expert)
{
    const struct slu_adapter_layer *l = &adapter->layers[layer];
    if (expert >= l->n) {
        return NULL;
    }
    return l->data ? l->data + (size_t)expert * l->block_bytes : adapter->stream->bytes[expert];
}

uint64_t slu_expert_stream_flash_bytes(const struct slu_adapter *adapter)
{
    struct slu_stream_stats stats = {0};
    if (adapter->stream) {
        slu_stream_stats(adapter->stream->stream, &stats);
    }
    return stats.flash_bytes;
}
