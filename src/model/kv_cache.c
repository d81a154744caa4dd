#include "model/kv_cache.h"

#include <stdlib.h>
#include <string.h>

#include "base/arena.h"

uint32_t slu_kv_cache_window(const struct slu_config *config, uint32_t layer)
{
    return layer % 2 == 0 ? config->window : 0;
}

/* Numbers that share a scale. */
#define GROUP 32u

static uint32_t n_groups(uint32_t dim)
{
    return (dim + GROUP - 1) / GROUP;
}

/* Bytes of a head's keys or values in a tile. */
static size_t head_bytes(enum slu_kv_cache_type type, uint32_t dim)
{
    size_t bytes =
        type == SLU_KV_CACHE_F16 ? sizeof(uint16_t) * dim : dim + sizeof(uint16_t) * n_groups(dim);
    return bytes * SLU_KV_TILE;
}

/* The sizes that follow from the model and the type. */
static struct slu_kv_cache shape_of(const struct slu_config *c, enum slu_kv_cache_type type)
{
    struct slu_kv_cache kv = {.type = type,
                              .n_heads = c->is_mla ? 1 : c->n_heads_kv,
                              .k_dim = c->is_mla ? c->kv_lora + c->rope_dims : c->k_dim,
                              .v_dim = c->is_mla ? 0 : c->v_dim,
                              .n_layers = c->n_layers};
    kv.k_bytes = head_bytes(type, kv.k_dim);
    kv.v_bytes = head_bytes(type, kv.v_dim);
    return kv;
}

static uint64_t tiles_for(uint64_t n_positions)
{
    return (n_positions + SLU_KV_TILE - 1) / SLU_KV_TILE;
}

/* While a chunk is written, the first of its positions still looks back over its whole window. */
static uint64_t layer_tiles(const struct slu_config *c, uint32_t layer, uint32_t ctx,
                            uint32_t chunk)
{
    uint64_t ring = (uint64_t)slu_kv_cache_window(c, layer) + chunk;
    uint64_t rows = slu_kv_cache_window(c, layer) && ring < ctx ? ring : ctx;
    return tiles_for(rows);
}

static bool is_ring(const struct slu_config *c, uint32_t layer, uint32_t ctx, uint32_t chunk)
{
    return layer_tiles(c, layer, ctx, chunk) < tiles_for(ctx);
}

static uint64_t tile_bytes(const struct slu_kv_cache *kv)
{
    return kv->n_heads * ((uint64_t)kv->k_bytes + kv->v_bytes);
}

static uint64_t memory_bytes(const struct slu_config *c, enum slu_kv_cache_type type, uint32_t ctx,
                             uint32_t chunk)
{
    struct slu_kv_cache kv = shape_of(c, type);
    uint64_t tiles = 0;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        tiles += layer_tiles(c, l, ctx, chunk);
    }
    return tiles * tile_bytes(&kv);
}

/* Of a tile in all layers that aren't rings. */
static uint64_t level_bytes(const struct slu_kv_cache *kv, const struct slu_config *c, uint32_t ctx,
                            uint32_t chunk)
{
    uint64_t n = 0;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        n += !is_ring(c, l, ctx, chunk);
    }
    return n * tile_bytes(kv);
}

uint64_t slu_kv_cache_charge_bytes(const struct slu_config *config, enum slu_kv_cache_type type,
                                   uint32_t ctx, uint32_t chunk)
{
    return slu_map_charge_bytes(memory_bytes(config, type, ctx, chunk));
}

uint64_t slu_kv_cache_spare_bytes(const struct slu_config *c, enum slu_kv_cache_type type,
                                  uint32_t ctx, uint32_t chunk)
{
    struct slu_kv_cache kv = shape_of(c, type);
    return (tiles_for(ctx) - 1) * level_bytes(&kv, c, ctx, chunk);
}

static void lay_out(struct slu_kv_cache *kv, const struct slu_config *c, uint32_t chunk)
{
    size_t bytes = tile_bytes(kv);
    kv->level_bytes = level_bytes(kv, c, kv->ctx, chunk);
    kv->rings_bytes = kv->memory_bytes - tiles_for(kv->ctx) * kv->level_bytes;
    uint8_t *ring = kv->memory, *level = ring + kv->rings_bytes;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        struct slu_kv_cache_layer *layer = &kv->layers[l];
        layer->n_rows = (uint32_t)layer_tiles(c, l, kv->ctx, chunk) * SLU_KV_TILE;
        if (is_ring(c, l, kv->ctx, chunk)) {
            layer->tiles = ring;
            layer->stride = bytes;
            ring += layer->n_rows / SLU_KV_TILE * bytes;
        } else {
            layer->tiles = level;
            layer->stride = kv->level_bytes;
            level += bytes;
        }
    }
}

size_t slu_kv_cache_used_bytes(const struct slu_kv_cache *kv, uint32_t n)
{
    return kv->rings_bytes + tiles_for(n) * kv->level_bytes;
}

int slu_kv_cache_init(struct slu_kv_cache *kv, const struct slu_config *c,
                      enum slu_kv_cache_type type, uint32_t ctx, uint32_t chunk,
                      struct slu_ledger *ledger, struct slu_err *err)
{
    *kv = shape_of(c, type);
    kv->ctx = ctx;
    kv->ledger = ledger;
    kv->memory_bytes = memory_bytes(c, type, ctx, chunk);
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
    lay_out(kv, c, chunk);
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
    if (n > kv->n) {
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

static uint8_t *tile_at(const struct slu_kv_cache *kv, uint32_t l, uint32_t tile)
{
    const struct slu_kv_cache_layer *layer = &kv->layers[l];
    return layer->tiles + tile % (layer->n_rows / SLU_KV_TILE) * layer->stride;
}

static uint8_t *keys_at(const struct slu_kv_cache *kv, uint32_t l, uint32_t tile, uint32_t head)
{
    return tile_at(kv, l, tile) + head * kv->k_bytes;
}

static uint8_t *values_at(const struct slu_kv_cache *kv, uint32_t l, uint32_t tile, uint32_t head)
{
    return tile_at(kv, l, tile) + kv->n_heads * kv->k_bytes + head * kv->v_bytes;
}

struct slu_attn_mat slu_kv_cache_keys(const struct slu_kv_cache *kv, uint32_t l, uint32_t tile,
                                      uint32_t head)
{
    const uint8_t *at = keys_at(kv, l, tile, head);
    struct slu_attn_mat keys = {.kind = SLU_ATTN_F16, .codes = at, .stride = SLU_KV_TILE};
    if (kv->type == SLU_KV_CACHE_Q8) {
        keys.kind = SLU_ATTN_Q8_DOWN;
        keys.scales = (const uint16_t *)(const void *)(at + (size_t)kv->k_dim * SLU_KV_TILE);
        keys.scales_stride = SLU_KV_TILE;
    }
    return keys;
}

struct slu_attn_mat slu_kv_cache_values(const struct slu_kv_cache *kv, uint32_t l, uint32_t tile,
                                        uint32_t head)
{
    const uint8_t *at = values_at(kv, l, tile, head);
    struct slu_attn_mat values = {.kind = SLU_ATTN_F16, .codes = at, .stride = kv->v_dim};
    if (kv->type == SLU_KV_CACHE_Q8) {
        values.kind = SLU_ATTN_Q8_ALONG;
        values.scales = (const uint16_t *)(const void *)(at + (size_t)kv->v_dim * SLU_KV_TILE);
        values.scales_stride = n_groups(kv->v_dim);
    }
    return values;
}

/* Numbers of one head and position, of which element i goes to codes[i * step], and the scale of
 * group g to scales[g * scales_step]. */
static void store_q8(int8_t *codes, size_t step, uint16_t *scales, size_t scales_step,
                     const float *x, uint32_t dim)
{
    const float shift = 0x1.8p+23f; /* added and taken off, it rounds to the nearest even */
    for (uint32_t lo = 0; lo < dim; lo += GROUP) {
        uint32_t n = dim - lo < GROUP ? dim - lo : GROUP;
        uint32_t bits[GROUP], most = 0; /* magnitudes are ordered as their bits are, NaNs above */
        float magnitude, inverse;
        memcpy(bits, x + lo, n * sizeof *x);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t size = bits[i] & 0x7fffffff;
            most = size > most ? size : most;
        }
        memcpy(&magnitude, &most, sizeof magnitude);
        scales[lo / GROUP * scales_step] = slu_attn_step(magnitude, &inverse);
        for (uint32_t i = 0; i < n; i++) {
            float code = inverse == 0 ? 0 : x[lo + i] * inverse + shift - shift;
            codes[(lo + i) * step] = (int8_t)code;
        }
    }
}

static void store_f16(const struct slu_kern *kern, uint16_t *out, size_t step, const float *x,
                      uint32_t dim)
{
    uint16_t some[64];
    if (step == 1) {
        kern->f32_to_f16(out, x, dim);
        return;
    }
    for (uint32_t lo = 0; lo < dim; lo += 64) {
        uint32_t n = dim - lo < 64 ? dim - lo : 64;
        kern->f32_to_f16(some, x + lo, n);
        for (uint32_t i = 0; i < n; i++) {
            out[(lo + i) * step] = some[i];
        }
    }
}

static void store_one(const struct slu_kv_cache *kv, const struct slu_kern *kern, uint32_t l,
                      uint32_t position, uint32_t head, const float *k, const float *v)
{
    uint32_t row = position % SLU_KV_TILE, tile = position / SLU_KV_TILE;
    uint8_t *keys = keys_at(kv, l, tile, head);
    uint8_t *values = kv->v_dim ? values_at(kv, l, tile, head) : NULL;
    if (kv->type == SLU_KV_CACHE_F16) {
        store_f16(kern, (uint16_t *)(void *)keys + row, SLU_KV_TILE, k, kv->k_dim);
        if (values) {
            store_f16(kern, (uint16_t *)(void *)values + row * kv->v_dim, 1, v, kv->v_dim);
        }
        return;
    }
    uint16_t *scales = (uint16_t *)(void *)(keys + (size_t)kv->k_dim * SLU_KV_TILE);
    store_q8((int8_t *)keys + row, SLU_KV_TILE, scales + row, SLU_KV_TILE, k, kv->k_dim);
    if (values) {
        scales = (uint16_t *)(void *)(values + (size_t)kv->v_dim * SLU_KV_TILE);
        store_q8((int8_t *)values + row * kv->v_dim, 1, scales + row * n_groups(kv->v_dim), 1, v,
                 kv->v_dim);
    }
}

void slu_kv_cache_store(struct slu_kv_cache *kv, const struct slu_kern *kern, uint32_t l,
                        uint32_t first, uint32_t n, const float *k, const float *v)
{
    for (uint32_t head = 0; head < kv->n_heads; head++) {
        for (uint32_t t = 0; t < n; t++) {
            size_t from = (size_t)t * kv->n_heads + head;
            store_one(kv, kern, l, first + t, head, k + from * kv->k_dim,
                      v ? v + from * kv->v_dim : NULL);
        }
    }
}
