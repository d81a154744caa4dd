#include "experts/policy.h"

#include <assert.h>
#include <stdlib.h>

/*
 * Least frequently used, where a use counts half when as many others have followed as three times
 * the cache holds. Instead of all counts shrinking, what a use adds grows. Counts outlive a stay in
 * the cache. A binary heap has the lowest count on top, of equal ones the one used longer ago.
 */
#define HALF_LIFE_CACHES 3.0
#define ADDED_MAX        0x1p512

struct lfu {
    struct slu_policy base; /* first: callers hold this */
    struct slu_policy_shape shape;
    double added;           /* by the next use */
    double growth;          /* of that, from one use to the next */
    double *counts;         /* [n_blocks] */
    uint32_t *slot_blocks;  /* [n_slots] */
    uint32_t *heap_indices; /* [n_slots] or NONE */
    uint32_t *heap;         /* [n_slots] slots */
    uint32_t n;
};

#define NONE UINT32_MAX

/* Counts are never equal once used, since what is added grows. */
static bool is_less(const struct lfu *lfu, uint32_t slot, uint32_t other)
{
    return lfu->counts[lfu->slot_blocks[slot]] < lfu->counts[lfu->slot_blocks[other]];
}

static void put(struct lfu *lfu, uint32_t i, uint32_t slot)
{
    lfu->heap[i] = slot;
    lfu->heap_indices[slot] = i;
}

static void sift_up(struct lfu *lfu, uint32_t i)
{
    uint32_t slot = lfu->heap[i];
    while (i > 0 && is_less(lfu, slot, lfu->heap[(i - 1) / 2])) {
        put(lfu, i, lfu->heap[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    put(lfu, i, slot);
}

static void sift_down(struct lfu *lfu, uint32_t i)
{
    uint32_t slot = lfu->heap[i];
    for (;;) {
        uint32_t child = 2 * i + 1;
        if (child >= lfu->n) {
            break;
        }
        if (child + 1 < lfu->n && is_less(lfu, lfu->heap[child + 1], lfu->heap[child])) {
            child++;
        }
        if (!is_less(lfu, lfu->heap[child], slot)) {
            break;
        }
        put(lfu, i, lfu->heap[child]);
        i = child;
    }
    put(lfu, i, slot);
}

static void count_use(struct lfu *lfu, uint32_t block)
{
    lfu->counts[block] += lfu->added;
    lfu->added *= lfu->growth;
    if (lfu->added > ADDED_MAX) {
        for (uint32_t i = 0; i < lfu->shape.n_blocks; i++) {
            lfu->counts[i] /= ADDED_MAX; /* a power of two: the order stays */
        }
        lfu->added /= ADDED_MAX;
    }
}

static void lfu_insert(struct slu_policy *policy, uint32_t slot, uint32_t block)
{
    struct lfu *lfu = (struct lfu *)policy;
    assert(slot < lfu->shape.n_slots && lfu->heap_indices[slot] == NONE);
    assert(block < lfu->shape.n_blocks);
    lfu->slot_blocks[slot] = block;
    count_use(lfu, block);
    put(lfu, lfu->n++, slot);
    sift_up(lfu, lfu->n - 1);
}

static void lfu_touch(struct slu_policy *policy, uint32_t slot)
{
    struct lfu *lfu = (struct lfu *)policy;
    assert(slot < lfu->shape.n_slots && lfu->heap_indices[slot] != NONE);
    count_use(lfu, lfu->slot_blocks[slot]);
    sift_down(lfu, lfu->heap_indices[slot]);
}

static void lfu_remove(struct slu_policy *policy, uint32_t slot)
{
    struct lfu *lfu = (struct lfu *)policy;
    assert(slot < lfu->shape.n_slots && lfu->heap_indices[slot] != NONE);
    uint32_t i = lfu->heap_indices[slot], last = lfu->heap[--lfu->n];
    lfu->heap_indices[slot] = NONE;
    if (last != slot) {
        put(lfu, i, last);
        sift_up(lfu, i);
        sift_down(lfu, lfu->heap_indices[last]);
    }
}

static int64_t lfu_victim(struct slu_policy *policy, bool (*may_evict)(void *arg, uint32_t slot),
                          void *arg)
{
    const struct lfu *lfu = (struct lfu *)policy;
    if (lfu->n == 0) {
        return -1;
    }
    if (may_evict(arg, lfu->heap[0])) {
        return lfu->heap[0];
    }
    int64_t victim = -1;
    for (uint32_t i = 1; i < lfu->n; i++) {
        uint32_t slot = lfu->heap[i];
        if ((victim < 0 || is_less(lfu, slot, (uint32_t)victim)) && may_evict(arg, slot)) {
            victim = slot;
        }
    }
    return victim;
}

static void lfu_resize(struct slu_policy *policy, uint32_t n_slots)
{
    struct lfu *lfu = (struct lfu *)policy;
    lfu->growth = 1 + 0.69314718 / (HALF_LIFE_CACHES * n_slots);
}

static void lfu_destroy(struct slu_policy *policy)
{
    struct lfu *lfu = (struct lfu *)policy;
    free(lfu->counts);
    free(lfu->slot_blocks);
    free(lfu->heap_indices);
    free(lfu->heap);
    free(lfu);
}

size_t slu_policy_lfu_bytes(const struct slu_policy_shape *shape)
{
    return sizeof(struct lfu) + (size_t)shape->n_blocks * sizeof(double) +
           (size_t)shape->n_slots * 3 * sizeof(uint32_t);
}

struct slu_policy *slu_policy_create_lfu(const struct slu_policy_shape *shape)
{
    assert(shape->n_slots > 0 && shape->n_blocks > 0);
    struct lfu *lfu = calloc(1, sizeof *lfu);
    if (!lfu) {
        return NULL;
    }
    lfu->base = (struct slu_policy){
        .name = "lfu",
        .insert = lfu_insert,
        .touch = lfu_touch,
        .remove = lfu_remove,
        .victim = lfu_victim,
        .resize = lfu_resize,
        .destroy = lfu_destroy,
    };
    lfu->shape = *shape;
    lfu->added = 1;
    lfu_resize(&lfu->base, shape->n_slots);
    lfu->counts = calloc(shape->n_blocks, sizeof *lfu->counts);
    lfu->slot_blocks = calloc(shape->n_slots, sizeof *lfu->slot_blocks);
    lfu->heap_indices = malloc(shape->n_slots * sizeof *lfu->heap_indices);
    lfu->heap = calloc(shape->n_slots, sizeof *lfu->heap);
    if (!lfu->counts || !lfu->slot_blocks || !lfu->heap_indices || !lfu->heap) {
        lfu_destroy(&lfu->base);
        return NULL;
    }
    for (uint32_t i = 0; i < shape->n_slots; i++) {
        lfu->heap_indices[i] = NONE;
    }
    return &lfu->base;
}
