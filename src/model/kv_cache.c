#include "model/kv_cache.h"

#include <stdlib.h>

#include "base/arena.h"

uint32_t slu_kv_cache_window(const struct slu_config *config, uint32_t layer)
{
    return layer % 2 == 0 ? config->window : 0;
}

static uint32_t k_width(const struct slu_config *c)
{
    return c->is_mla ? c->kv_lora + c->rope_dims : c->n_heads_kv * c->k_dim;
}

static uint32_t v_width(const struct slu_config *c)
{
    return c->is_mla ? 0 : c->n_heads_kv * c->v_dim;
}

/* While a chunk is written, the first of its positions still looks back over its whole window. */
static uint32_t n_rows(const struct slu_config *c, uint32_t layer, uint32_t ctx, uint32_t chunk)
{
    uint64_t ring = (uint64_t)slu_kv_cache_window(c, layer) + chunk;
    return slu_kv_cache_window(c, layer) && ring < ctx ? (uint32_t)ring : ctx;
}

static uint64_t memory_bytes(const struct slu_config *c, uint32_t ctx, uint32_t chunk)
{
    uint64_t rows = 0;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        rows += n_rows(c, l, ctx, chunk);
    }
    return rows * (k_width(c) + v_width(c)) * sizeof(uint16_t);
}

uint64_t slu_kv_cache_charge_bytes(const struct slu_config *config, uint32_t ctx, uint32_t chunk)
{
    return slu_map_charge_bytes(memory_bytes(config, ctx, chunk));
}

int slu_kv_cache_init(struct slu_kv_cache *kv, const struct slu_config *c, uint32_t ctx,
                      uint32_t chunk, struct slu_ledger *ledger, struct slu_err *err)
{
    *kv = (struct slu_kv_cache){.ctx = ctx,
                                .k_width = k_width(c),
                                .v_width = v_width(c),
                                .n_layers = c->n_layers,
                                .ledger = ledger,
                                .memory_bytes = memory_bytes(c, ctx, chunk)};
    kv->v_stride = c->is_mla ? kv->k_width : kv->v_width;
    kv->layers = calloc(c->n_layers, sizeof *kv->layers);
    if (!kv->layers) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for the KV cache");
    }
    int rc = slu_map_alloc(ledger, SLU_ACCOUNT_KV, kv->memory_bytes, &kv->memory, err);
    if (rc < 0) {
        free(kv->layers);
        *kv = (struct slu_kv_cache){0};
        return rc;
    }
    uint16_t *at = kv->memory;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        struct slu_kv_cache_layer *layer = &kv->layers[l];
        layer->n_rows = n_rows(c, l, ctx, chunk);
        layer->k = at;
        at += (size_t)layer->n_rows * kv->k_width;
        layer->v = c->is_mla ? layer->k : at;
        at += (size_t)layer->n_rows * kv->v_width;
    }
    return 0;
}

void slu_kv_cache_finish(struct slu_kv_cache *kv)
{
    if (kv->memory) {
        slu_map_free(kv->ledger, SLU_ACCOUNT_KV, kv->memory, kv->memory_bytes);
    }
    free(kv->layers);
    *kv = (struct slu_kv_cache){0};
}

uint32_t slu_kv_cache_truncate(struct slu_kv_cache *kv, const struct slu_config *config, uint32_t n)
{
    if (n >= kv->n) {
        return kv->n;
    }
    for (uint32_t l = 0; l < kv->n_layers; l++) {
        uint32_t window = slu_kv_cache_window(config, l), rows = kv->layers[l].n_rows;
        uint32_t oldest = kv->n_high > rows ? kv->n_high - rows : 0; /* still in the ring */
        uint32_t needed = window && n + 1 > window ? n + 1 - window : 0;
        if (window && needed < oldest) {
            n = 0;
            break;
        }
    }
    kv->n = n;
    kv->n_high = n ? kv->n_high : 0;
    return n;
}
