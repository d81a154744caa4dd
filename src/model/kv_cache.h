/*
 * The KV cache of one session: a key and a value for each position, layer after layer, in f16 or
 * in 8 bits with a scale for each 32 numbers. With MLA the key is the latent and the RoPE key, and
 * its first part serves as the value. Layers with a sliding window keep a ring just long enough
 * for the window and a chunk.
 *
 * Positions lie in tiles of SLU_KV_TILE, in each of which every head has its numbers together, in
 * the order in which attention wants them: keys with the positions of a dimension side by side, so
 * that a tile is scored without adding across a register; values with the dimensions of a
 * position side by side.
 *
 *   a layer's tile: k [head][k_dim][tile], v [head][tile][v_dim]
 *
 * First in memory are the rings, layer after layer. Behind them come the first tiles of all other
 * layers, then their second tiles, and so on: as long as a context is short, the end of the memory
 * has no use, and may be lent.
 *
 * In 8 bits a head's codes are followed by its scales, the upper halves of floats: of keys
 * [k_dim / 32][tile], of values [tile][v_dim / 32], both rounded up.
 *
 * Thread safety: none; it belongs to one session, and the engine computes for one at a time.
 * Positions may be stored from several threads, each its own.
 */
#ifndef SLU_MODEL_KV_CACHE_H
#define SLU_MODEL_KV_CACHE_H

#include "base/ledger.h"
#include "kern/kern.h"
#include "model/config.h"

#define SLU_KV_TILE 64u

enum slu_kv_cache_type { SLU_KV_CACHE_F16, SLU_KV_CACHE_Q8 };

struct slu_kv_cache_layer {
    uint8_t *tiles;
    size_t stride;   /* from tile to tile */
    uint32_t n_rows; /* whole tiles; position p is in row p % n_rows */
};

struct slu_kv_cache {
    uint32_t n;      /* positions computed */
    uint32_t n_high; /* the most that were begun since it was last empty, also in a chunk that
                        failed: rings hold what lies before it */
    uint32_t ctx;    /* positions at most */
    enum slu_kv_cache_type type;
    uint32_t n_heads, k_dim, v_dim;  /* heads of keys and values, and their numbers; v_dim 0: MLA */
    size_t k_bytes, v_bytes;         /* of a head's tile */
    size_t rings_bytes, level_bytes; /* of all rings; of a tile in each other layer */
    struct slu_kv_cache_layer *layers;
    uint32_t n_layers;
    struct slu_ledger *ledger;
    void *memory;
    size_t memory_bytes;
};

/* What init will charge to SLU_ACCOUNT_KV. chunk is the most positions computed at once. */
uint64_t slu_kv_cache_charge_bytes(const struct slu_config *config, enum slu_kv_cache_type type,
                                   uint32_t ctx, uint32_t chunk);

int slu_kv_cache_init(struct slu_kv_cache *kv, const struct slu_config *config,
                      enum slu_kv_cache_type type, uint32_t ctx, uint32_t chunk,
                      struct slu_ledger *ledger, struct slu_err *err);
void slu_kv_cache_finish(struct slu_kv_cache *kv);

/* Stores keys k[n][n_heads][k_dim] and values v[n][n_heads][v_dim] (unused with MLA) of layer l at
 * positions first .. first + n - 1. */
void slu_kv_cache_store(struct slu_kv_cache *kv, const struct slu_kern *kern, uint32_t l,
                        uint32_t first, uint32_t n, const float *k, const float *v);

/* A head's keys [k_dim x tile] in the tile of positions tile * SLU_KV_TILE .. , and its values
 * [tile x v_dim]. Rows of positions that the layer doesn't hold are whatever was there before. */
struct slu_attn_mat slu_kv_cache_keys(const struct slu_kv_cache *kv, uint32_t l, uint32_t tile,
                                      uint32_t head);
struct slu_attn_mat slu_kv_cache_values(const struct slu_kv_cache *kv, uint32_t l, uint32_t tile,
                                        uint32_t head);

/* The bytes, from the start of the memory, that the first n positions lie in: all that will be
 * looked at until there are more. Grows with n; at most memory_bytes. */
size_t slu_kv_cache_used_bytes(const struct slu_kv_cache *kv, uint32_t n);

/* What of its memory is unused at a single position. */
uint64_t slu_kv_cache_spare_bytes(const struct slu_config *config, enum slu_kv_cache_type type,
                                  uint32_t ctx, uint32_t chunk);

/* Forgets positions from n on, so that computing resumes at n. Where a sliding window's ring no
 * longer holds what position n looks back at, which it may not either after a chunk that failed,
 * forgets all. Returns how many positions are left. */
uint32_t slu_kv_cache_truncate(struct slu_kv_cache *kv, const struct slu_config *config,
                               uint32_t n);

/* The window of a layer, 0 for none. */
uint32_t slu_kv_cache_window(const struct slu_config *config, uint32_t layer);

#endif
