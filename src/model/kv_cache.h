/*
 * The KV cache of one session: keys and values in f16, a row for each position, layer after layer.
 * Layers with a sliding window keep a ring of rows just long enough for the window and a chunk;
 * with MLA a row is the latent and the RoPE key, from which keys and values are both made.
 *
 * Thread safety: none; it belongs to one session, and the engine computes for one at a time.
 */
#ifndef SLU_MODEL_KV_CACHE_H
#define SLU_MODEL_KV_CACHE_H

#include "base/ledger.h"
#include "model/config.h"

struct slu_kv_cache_layer {
    uint16_t *k; /* [n_rows][k_width] */
    uint16_t *v; /* [n_rows][v_width]; with MLA the rows of k again */
    uint32_t n_rows;
};

struct slu_kv_cache {
    uint32_t n;      /* positions computed */
    uint32_t n_high; /* the most that were begun since it was last empty, also in a chunk that
                        failed: rings hold what lies before it */
    uint32_t ctx;    /* positions at most */
    uint32_t k_width, v_width, v_stride; /* elements a row */
    struct slu_kv_cache_layer *layers;
    uint32_t n_layers;
    struct slu_ledger *ledger;
    void *memory;
    size_t memory_bytes;
};

/* What init will charge to SLU_ACCOUNT_KV. chunk is the most positions computed at once. */
uint64_t slu_kv_cache_charge_bytes(const struct slu_config *config, uint32_t ctx, uint32_t chunk);

int slu_kv_cache_init(struct slu_kv_cache *kv, const struct slu_config *config, uint32_t ctx,
                      uint32_t chunk, struct slu_ledger *ledger, struct slu_err *err);
void slu_kv_cache_finish(struct slu_kv_cache *kv);

/* Forgets positions from n on, so that computing resumes at n. Where a sliding window's ring no
 * longer holds what position n looks back at, forgets all. Returns how many positions are left. */
uint32_t slu_kv_cache_truncate(struct slu_kv_cache *kv, const struct slu_config *config,
                               uint32_t n);

/* The window of a layer, 0 for none. */
uint32_t slu_kv_cache_window(const struct slu_config *config, uint32_t layer);

#endif
