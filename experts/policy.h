/*
 * Cache policies: who leaves when a slot is needed. A policy is pure bookkeeping: it is told of
 * uses in order and asked for a victim; no locks, no clock, no I/O, so that a recorded trace can
 * replay through it without a model.
 *
 * Thread safety: none; the stream calls it under its lock.
 */
#ifndef SLU_EXPERTS_POLICY_H
#define SLU_EXPERTS_POLICY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct slu_policy {
    const char *name;
    /* Block has just been put into slot. */
    void (*insert)(struct slu_policy *policy, uint32_t slot, uint32_t block);
    /* The block in slot is used once more. */
    void (*touch)(struct slu_policy *policy, uint32_t slot);
    /* The slot is empty again. */
    void (*remove)(struct slu_policy *policy, uint32_t slot);
    /* The slot to take among those inserted for which may_evict(arg, slot) holds; -1 if none.
     * Doesn't remove it. */
    int64_t (*victim)(struct slu_policy *policy, bool (*may_evict)(void *arg, uint32_t slot),
                      void *arg);
    void (*destroy)(struct slu_policy *policy);
};

/* Least recently used. NULL when out of memory. */
struct slu_policy *slu_policy_create_lru(uint32_t n_slots);
/* What it allocates, for the ledger. */
size_t slu_policy_lru_bytes(uint32_t n_slots);

#endif
