#include "experts/policy.h"

#include <assert.h>
#include <stdlib.h>

/* A doubly linked ring over slot numbers, the most recent first; entry n_slots is its head. A slot
 * that isn't in points to itself. */
struct lru_link {
    uint32_t newer, older;
};

struct lru {
    struct slu_policy base; /* first: callers hold this */
    uint32_t n_slots;
    struct lru_link links[]; /* [n_slots + 1] */
};

static void unlink_slot(struct lru *lru, uint32_t slot)
{
    struct lru_link *link = &lru->links[slot];
    lru->links[link->newer].older = link->older;
    lru->links[link->older].newer = link->newer;
    *link = (struct lru_link){slot, slot};
}

static void link_newest(struct lru *lru, uint32_t slot)
{
    uint32_t head = lru->n_slots;
    uint32_t second = lru->links[head].older;
    lru->links[slot] = (struct lru_link){.newer = head, .older = second};
    lru->links[second].newer = slot;
    lru->links[head].older = slot;
}

static bool is_in(const struct lru *lru, uint32_t slot)
{
    return lru->links[slot].older != slot;
}

static void lru_insert(struct slu_policy *policy, uint32_t slot, uint32_t block)
{
    struct lru *lru = (struct lru *)policy;
    (void)block;
    assert(slot < lru->n_slots && !is_in(lru, slot));
    link_newest(lru, slot);
}

static void lru_touch(struct slu_policy *policy, uint32_t slot)
{
    struct lru *lru = (struct lru *)policy;
    assert(slot < lru->n_slots && is_in(lru, slot));
    unlink_slot(lru, slot);
    link_newest(lru, slot);
}

static void lru_remove(struct slu_policy *policy, uint32_t slot)
{
    struct lru *lru = (struct lru *)policy;
    assert(slot < lru->n_slots && is_in(lru, slot));
    unlink_slot(lru, slot);
}

static int64_t lru_victim(struct slu_policy *policy, bool (*may_evict)(void *arg, uint32_t slot),
                          void *arg)
{
    const struct lru *lru = (struct lru *)policy;
    uint32_t head = lru->n_slots;
    for (uint32_t slot = lru->links[head].newer; slot != head; slot = lru->links[slot].newer) {
        if (may_evict(arg, slot)) {
            return slot;
        }
    }
    return -1;
}

static void lru_destroy(struct slu_policy *policy)
{
    free(policy);
}

size_t slu_policy_lru_bytes(uint32_t n_slots)
{
    return sizeof(struct lru) + ((size_t)n_slots + 1) * sizeof(struct lru_link);
}

struct slu_policy *slu_policy_create_lru(uint32_t n_slots)
{
    struct lru *lru = malloc(slu_policy_lru_bytes(n_slots));
    if (!lru) {
        return NULL;
    }
    lru->base = (struct slu_policy){
        .name = "lru",
        .insert = lru_insert,
        .touch = lru_touch,
        .remove = lru_remove,
        .victim = lru_victim,
        .destroy = lru_destroy,
    };
    lru->n_slots = n_slots;
    for (uint32_t i = 0; i <= n_slots; i++) {
        lru->links[i] = (struct lru_link){i, i};
    }
    return &lru->base;
}
