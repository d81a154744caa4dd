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

/* What a router chose for one token at one layer: n distinct experts with their weights. */
struct slu_policy_choice {
    uint64_t token; /* counts all tokens of the policy's life; its predecessor in the text, if it
                       has one, is the number before */
    uint32_t layer;
    uint32_t n;
    const uint32_t *experts; /* [n] within the layer */
    const float *weights;    /* [n] as the outputs are weighed; NULL: not known */
};

struct slu_policy {
    const char *name;
    /* A router has chosen; comes before the uses that follow from it, one call for each token: of
     * a chunk all tokens of one layer, then those of the next. NULL where a policy doesn't care. */
    void (*observe)(struct slu_policy *policy, const struct slu_policy_choice *choice);
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
    /* Slots from n on, all empty, aren't used until told otherwise; n is at most what the policy
     * was made for, and that at first. NULL where a policy doesn't care. */
    void (*resize)(struct slu_policy *policy, uint32_t n_slots);
    /* As slu_kin_foresee; false where next to nothing is read anyway. NULL where a policy can't. */
    bool (*foresee)(struct slu_policy *policy, uint32_t layer, float *ret_chances);
    void (*destroy)(struct slu_policy *policy);
};

/* What a policy is made for. */
struct slu_policy_shape {
    uint32_t n_slots;             /* at most */
    uint32_t n_layers, n_experts; /* experts of each layer */
    uint32_t n_blocks;
    const uint32_t *block_experts; /* [n_blocks] layer * n_experts + expert, kept; NULL: blocks are
                                      numbered so themselves */
};

/* The policies by name. */
struct slu_policy_kind {
    const char *name;
    struct slu_policy *(*create)(const struct slu_policy_shape *shape); /* NULL: out of memory */
    size_t (*bytes)(const struct slu_policy_shape *shape); /* what it allocates, for the ledger */
};

/* NULL if there is none of that name; "best" is the one that is right for most. */
const struct slu_policy_kind *slu_policy_find(const char *name);
/* All of them, one after the other; NULL after the last. */
const struct slu_policy_kind *slu_policy_at(unsigned i);

/* Least recently used. NULL when out of memory. */
struct slu_policy *slu_policy_create_lru(uint32_t n_slots);
/* What it allocates, for the ledger. */
size_t slu_policy_lru_bytes(uint32_t n_slots);

/* Least frequently used, with counts that fade as others are used. NULL when out of memory. */
struct slu_policy *slu_policy_create_lfu(const struct slu_policy_shape *shape);
size_t slu_policy_lfu_bytes(const struct slu_policy_shape *shape);

/* LRU in two segments: blocks used once don't push out those used again. NULL when out of memory.
 */
struct slu_policy *slu_policy_create_slru(const struct slu_policy_shape *shape);
size_t slu_policy_slru_bytes(const struct slu_policy_shape *shape);

/* Ranks blocks by what followed the tokens that were routed like the present one, over the distance
 * to their layer's next visit; see policy_kin.c. Needs observe. NULL when out of memory. */
struct slu_policy *slu_policy_create_kin(const struct slu_policy_shape *shape);
size_t slu_policy_kin_bytes(const struct slu_policy_shape *shape);

#endif
