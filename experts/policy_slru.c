#include "experts/policy.h"

#include <assert.h>
#include <stdlib.h>

/*
 * Segmented LRU (R. Karedla, J. Love, B. Wherry, "Caching strategies to improve disk system
 * performance", 1994). What is new is on probation; a use there promotes it among the protected, of
 * which there are at most PROTECTED of all slots: the one least recently used goes back on
 * probation. Probation leaves first.
 */
#define PROTECTED_NUM 3u
#define PROTECTED_DEN 4u

enum segment { PROBATION, PROTECTED, SEGMENTS };

/* Two doubly linked rings over slot numbers, the most recent first; entries n_slots and n_slots + 1
 * are their heads. A slot that isn't in points to itself. */
struct slru_link {
    uint32_t newer, older;
};

struct slru {
    struct slu_policy base; /* first: callers hold this */
    uint32_t n_slots;
    uint32_t n_protected, n_protected_max;
    bool *is_protected;       /* [n_slots] */
    struct slru_link links[]; /* [n_slots + SEGMENTS] */
};

static bool is_in(const struct slru *slru, uint32_t slot)
{
    return slru->links[slot].older != slot;
}

static void unlink_slot(struct slru *slru, uint32_t slot)
{
    struct slru_link *link = &slru->links[slot];
    slru->links[link->newer].older = link->older;
    slru->links[link->older].newer = link->newer;
    *link = (struct slru_link){slot, slot};
    slru->n_protected -= slru->is_protected[slot];
    slru->is_protected[slot] = false;
}

static void link_newest(struct slru *slru, uint32_t slot, enum segment segment)
{
    uint32_t head = slru->n_slots + segment;
    uint32_t second = slru->links[head].older;
    slru->links[slot] = (struct slru_link){.newer = head, .older = second};
    slru->links[second].newer = slot;
    slru->links[head].older = slot;
    slru->is_protected[slot] = segment == PROTECTED;
    slru->n_protected += segment == PROTECTED;
}

static void slru_insert(struct slu_policy *policy, uint32_t slot, uint32_t block)
{
    struct slru *slru = (struct slru *)policy;
    (void)block;
    assert(slot < slru->n_slots && !is_in(slru, slot));
    link_newest(slru, slot, PROBATION);
}

static void slru_touch(struct slu_policy *policy, uint32_t slot)
{
    struct slru *slru = (struct slru *)policy;
    assert(slot < slru->n_slots && is_in(slru, slot));
    unlink_slot(slru, slot);
    link_newest(slru, slot, PROTECTED);
    while (slru->n_protected > slru->n_protected_max) {
        uint32_t oldest = slru->links[slru->n_slots + PROTECTED].newer;
        unlink_slot(slru, oldest);
        link_newest(slru, oldest, PROBATION);
    }
}

static void slru_remove(struct slu_policy *policy, uint32_t slot)
{
    struct slru *slru = (struct slru *)policy;
    assert(slot < slru->n_slots && is_in(slru, slot));
    unlink_slot(slru, slot);
}

static int64_t slru_victim(struct slu_policy *policy, bool (*may_evict)(void *arg, uint32_t slot),
                           void *arg)
{
    const struct slru *slru = (struct slru *)policy;
    for (uint32_t segment = 0; segment < SEGMENTS; segment++) {
        uint32_t head = slru->n_slots + segment;
        for (uint32_t slot = slru->links[head].newer; slot != head;
             slot = slru->links[slot].newer) {
            if (may_evict(arg, slot)) {
                return slot;
            }
        }
    }
    return -1;
}

static void slru_resize(struct slu_policy *policy, uint32_t n_slots)
{
    struct slru *slru = (struct slru *)policy;
    slru->n_protected_max = (uint32_t)((uint64_t)n_slots * PROTECTED_NUM / PROTECTED_DEN);
}

static void slru_destroy(struct slu_policy *policy)
{
    free(policy);
}

static size_t links_bytes(uint32_t n_slots)
{
    return ((size_t)n_slots + SEGMENTS) * sizeof(struct slru_link);
}

size_t slu_policy_slru_bytes(const struct slu_policy_shape *shape)
{
    return sizeof(struct slru) + links_bytes(shape->n_slots) + shape->n_slots * sizeof(bool);
}

struct slu_policy *slu_policy_create_slru(const struct slu_policy_shape *shape)
{
    uint32_t n_slots = shape->n_slots;
    struct slru *slru = calloc(1, slu_policy_slru_bytes(shape));
    if (!slru) {
        return NULL;
    }
    slru->base = (struct slu_policy){
        .name = "slru",
        .insert = slru_insert,
        .touch = slru_touch,
        .remove = slru_remove,
        .victim = slru_victim,
        .resize = slru_resize,
        .destroy = slru_destroy,
    };
    slru->n_slots = n_slots;
    slru_resize(&slru->base, n_slots);
    slru->is_protected = (bool *)((char *)slru->links + links_bytes(n_slots));
    for (uint32_t i = 0; i < n_slots + SEGMENTS; i++) {
        slru->links[i] = (struct slru_link){i, i};
    }
    return &slru->base;
}
