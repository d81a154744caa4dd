#include "experts/policy.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

#include "experts/kin.h"

/*
 * The policy that asks the memory of tokens (experts/kin.h). An expert can be used again only when
 * its layer is visited again, and to keep it until then takes its slot for that long; so what is
 * compared is the chance of a use per time of waiting: rank minus a multiple of the logarithm of
 * the distance to the layer's next visit, in tokens, from 1 / n_layers for the next layer to 1 for
 * the one just visited. Experts of layers that are about to be visited thus stay until their turn,
 * and those that it didn't bring up compete with each other right after it.
 *
 * A layer's ranks are made once, after its visit, and kept until the next. Making them waits until
 * the next layer's choice or until a victim is wanted, so that prompts, whose chunks bring many
 * choices for each layer, don't pay for each.
 *
 * Without a router's choices it has nothing to go by but the order of uses, and is LRU.
 */
#define DISTANCE_POWER          1.1f
#define DISTANCE_POWER_X        0.1f
#define HORIZON_TOKENS          16.0f /* where the powers' _X don't count */
#define HORIZON_X_MIN           (-2.0f)
#define HORIZON_X_MAX           2.5f
#define MISSES_KEPT             0.917f /* a token later: halved in 8 */
#define MISSES_WORTH_FORESEEING 0.5f   /* blocks read a token */
#define CANDIDATES              32u
#define NONE                    UINT32_MAX

struct kin_policy {
    struct slu_policy base; /* first: callers hold this */
    struct slu_policy_shape shape;
    struct slu_kin *kin;
    uint64_t n_uses;
    uint64_t *used_at;      /* [n_slots] for the time without choices */
    uint32_t *slot_experts; /* [n_slots] layer * n_experts + expert, or NONE */
    uint32_t *slot_layers;  /* [n_slots] of that, to spare a division */
    float *keys;            /* [n_slots] the lowest leaves; INFINITY: empty */
    float *scores;          /* [n_layers * n_experts] */
    float *distances;       /* [n_layers] what the wait for the next visit takes off */
    bool *is_dirty;         /* [n_layers] the scores aren't those of the last visit */
    uint32_t n_in;
    bool has_choices;
    bool are_keys_stale;
    uint32_t layer;                   /* of the last choice */
    float n_misses;                   /* since the last token */
    float misses_sum, misses_weight;  /* a token, recent ones counting more */
    uint32_t candidates[CANDIDATES];  /* the slots of the lowest keys, the lowest last */
    float candidate_keys[CANDIDATES]; /* as they were when listed */
    uint32_t n_candidates;
};

/* How long a slot keeps a block, in tokens, if all were alike; as ln(tokens / HORIZON_TOKENS). */
static float horizon_x(const struct kin_policy *p)
{
    float misses = p->misses_weight > 0 ? p->misses_sum / p->misses_weight : 0;
    if (misses * HORIZON_TOKENS * 16 < (float)p->shape.n_slots) {
        return HORIZON_X_MAX;
    }
    float x = logf((float)p->shape.n_slots / misses / HORIZON_TOKENS);
    return x < HORIZON_X_MIN ? HORIZON_X_MIN : x > HORIZON_X_MAX ? HORIZON_X_MAX : x;
}

static void rank_layer(struct kin_policy *p, uint32_t layer)
{
    slu_kin_rank(p->kin, layer, horizon_x(p), &p->scores[(size_t)layer * p->shape.n_experts]);
    p->is_dirty[layer] = false;
}

static void start_token(struct kin_policy *p, uint64_t n_tokens)
{
    for (uint64_t i = 0; i < n_tokens && i < SLU_KIN_TOKENS; i++) {
        p->misses_sum = p->misses_sum * MISSES_KEPT + p->n_misses;
        p->misses_weight = p->misses_weight * MISSES_KEPT + 1;
        p->n_misses = 0;
    }
}

static void kin_observe(struct slu_policy *policy, const struct slu_policy_choice *choice)
{
    struct kin_policy *p = (struct kin_policy *)policy;
    assert(choice->layer < p->shape.n_layers);
    if (p->has_choices && choice->layer != p->layer && p->is_dirty[p->layer] &&
        p->n_in == p->shape.n_slots) {
        rank_layer(p, p->layer);
    }
    uint64_t newest = slu_kin_newest(p->kin);
    if (p->has_choices && choice->token > newest) {
        start_token(p, choice->token - newest);
    }
    slu_kin_observe(p->kin, choice);
    p->has_choices = true;
    p->layer = choice->layer;
    p->is_dirty[choice->layer] = true;
    p->are_keys_stale = true;
}

static void kin_insert(struct slu_policy *policy, uint32_t slot, uint32_t block)
{
    struct kin_policy *p = (struct kin_policy *)policy;
    assert(slot < p->shape.n_slots && p->slot_experts[slot] == NONE && block < p->shape.n_blocks);
    uint32_t expert = p->shape.block_experts ? p->shape.block_experts[block] : block;
    assert(expert < p->shape.n_layers * p->shape.n_experts);
    p->slot_experts[slot] = expert;
    p->slot_layers[slot] = expert / p->shape.n_experts;
    p->used_at[slot] = ++p->n_uses;
    p->n_in++;
    p->n_misses++;
    if (!p->are_keys_stale) {
        p->keys[slot] = p->scores[expert] - p->distances[p->slot_layers[slot]];
    }
}

static void kin_touch(struct slu_policy *policy, uint32_t slot)
{
    struct kin_policy *p = (struct kin_policy *)policy;
    assert(slot < p->shape.n_slots && p->slot_experts[slot] != NONE);
    p->used_at[slot] = ++p->n_uses;
}

static void kin_remove(struct slu_policy *policy, uint32_t slot)
{
    struct kin_policy *p = (struct kin_policy *)policy;
    assert(slot < p->shape.n_slots && p->slot_experts[slot] != NONE);
    p->slot_experts[slot] = NONE;
    p->keys[slot] = INFINITY;
    p->n_in--;
}

static void measure_distances(struct kin_policy *p)
{
    float power = DISTANCE_POWER + DISTANCE_POWER_X * horizon_x(p);
    uint32_t n = p->shape.n_layers;
    for (uint32_t layer = 0; layer < n; layer++) {
        uint32_t n_away = (layer + n - p->layer - 1) % n + 1;
        p->distances[layer] = power * logf((float)n_away / (float)n);
    }
}

static void refresh(struct kin_policy *p)
{
    for (uint32_t layer = 0; layer < p->shape.n_layers; layer++) {
        if (p->is_dirty[layer]) {
            rank_layer(p, layer);
        }
    }
    measure_distances(p);
    for (uint32_t slot = 0; slot < p->shape.n_slots; slot++) {
        uint32_t expert = p->slot_experts[slot];
        p->keys[slot] =
            expert == NONE ? INFINITY : p->scores[expert] - p->distances[p->slot_layers[slot]];
    }
    p->are_keys_stale = false;
    p->n_candidates = 0;
}

/* The slots of the lowest keys, of equal ones the first slot. */
static void list_candidates(struct kin_policy *p)
{
    uint32_t n = 0;
    float most = INFINITY; /* what a key must be under to get in */
    for (uint32_t slot = 0; slot < p->shape.n_slots; slot++) {
        float key = p->keys[slot];
        if (!(key < most)) {
            continue;
        }
        /* The list falls: the highest is first and drops out when there is no room. */
        uint32_t i;
        if (n == CANDIDATES) {
            for (i = 0; i + 1 < n && p->candidate_keys[i + 1] > key; i++) {
                p->candidate_keys[i] = p->candidate_keys[i + 1];
                p->candidates[i] = p->candidates[i + 1];
            }
        } else {
            for (i = n++; i > 0 && p->candidate_keys[i - 1] <= key; i--) {
                p->candidate_keys[i] = p->candidate_keys[i - 1];
                p->candidates[i] = p->candidates[i - 1];
            }
        }
        p->candidate_keys[i] = key;
        p->candidates[i] = slot;
        most = n == CANDIDATES ? p->candidate_keys[0] : INFINITY;
    }
    p->n_candidates = n;
}

/* Another block is in the slot by now. */
static bool is_stale(const struct kin_policy *p, uint32_t candidate)
{
    return p->keys[p->candidates[candidate]] != p->candidate_keys[candidate];
}

static int64_t scan(const struct kin_policy *p, bool (*may_evict)(void *arg, uint32_t slot),
                    void *arg)
{
    int64_t victim = -1;
    for (uint32_t slot = 0; slot < p->shape.n_slots; slot++) {
        if (p->slot_experts[slot] == NONE) {
            continue;
        }
        bool is_lower = victim < 0 || (p->has_choices ? p->keys[slot] < p->keys[victim]
                                                      : p->used_at[slot] < p->used_at[victim]);
        if (is_lower && may_evict(arg, slot)) {
            victim = slot;
        }
    }
    return victim;
}

static int64_t kin_victim(struct slu_policy *policy, bool (*may_evict)(void *arg, uint32_t slot),
                          void *arg)
{
    struct kin_policy *p = (struct kin_policy *)policy;
    if (!p->has_choices) {
        return scan(p, may_evict, arg);
    }
    if (p->are_keys_stale) {
        refresh(p);
    }
    for (int round = 0; round < 2; round++) {
        while (p->n_candidates > 0 && is_stale(p, p->n_candidates - 1)) {
            p->n_candidates--;
        }
        for (uint32_t i = p->n_candidates; i > 0; i--) {
            if (!is_stale(p, i - 1) && may_evict(arg, p->candidates[i - 1])) {
                return p->candidates[i - 1];
            }
        }
        if (p->n_candidates > 0) {
            break;
        }
        list_candidates(p);
    }
    return scan(p, may_evict, arg);
}

static void kin_resize(struct slu_policy *policy, uint32_t n_slots)
{
    struct kin_policy *p = (struct kin_policy *)policy;
    assert(p->n_in <= n_slots);
    p->shape.n_slots = n_slots;
    p->are_keys_stale = true; /* they go by the number of slots, as horizon_x does */
}

static bool kin_foresee(struct slu_policy *policy, uint32_t layer, float *ret_chances)
{
    struct kin_policy *p = (struct kin_policy *)policy;
    if (p->misses_sum < MISSES_WORTH_FORESEEING * p->misses_weight) {
        return false;
    }
    slu_kin_foresee(p->kin, layer, ret_chances);
    return true;
}

static void kin_destroy(struct slu_policy *policy)
{
    struct kin_policy *p = (struct kin_policy *)policy;
    slu_kin_destroy(p->kin);
    free(p->used_at);
    free(p->slot_experts);
    free(p->slot_layers);
    free(p->keys);
    free(p->scores);
    free(p->distances);
    free(p->is_dirty);
    free(p);
}

size_t slu_policy_kin_bytes(const struct slu_policy_shape *shape)
{
    size_t n_slots = shape->n_slots, n_layers = shape->n_layers;
    return sizeof(struct kin_policy) + slu_kin_bytes(shape->n_layers, shape->n_experts) +
           n_slots * (sizeof(uint64_t) + 2 * sizeof(uint32_t) + sizeof(float)) +
           n_layers * (shape->n_experts * sizeof(float) + sizeof(float) + sizeof(bool));
}

struct slu_policy *slu_policy_create_kin(const struct slu_policy_shape *shape)
{
    assert(shape->n_slots > 0 && shape->n_layers > 0 && shape->n_experts > 0);
    struct kin_policy *p = calloc(1, sizeof *p);
    if (!p) {
        return NULL;
    }
    p->base = (struct slu_policy){
        .name = "kin",
        .observe = kin_observe,
        .insert = kin_insert,
        .touch = kin_touch,
        .remove = kin_remove,
        .victim = kin_victim,
        .resize = kin_resize,
        .foresee = kin_foresee,
        .destroy = kin_destroy,
    };
    p->shape = *shape;
    p->kin = slu_kin_create(shape->n_layers, shape->n_experts);
    p->used_at = calloc(shape->n_slots, sizeof *p->used_at);
    p->slot_experts = malloc(shape->n_slots * sizeof *p->slot_experts);
    p->slot_layers = calloc(shape->n_slots, sizeof *p->slot_layers);
    p->keys = malloc(shape->n_slots * sizeof *p->keys);
    p->scores = calloc((size_t)shape->n_layers * shape->n_experts, sizeof *p->scores);
    p->distances = calloc(shape->n_layers, sizeof *p->distances);
    p->is_dirty = malloc(shape->n_layers * sizeof *p->is_dirty);
    if (!p->kin || !p->used_at || !p->slot_experts || !p->slot_layers || !p->keys || !p->scores ||
        !p->distances || !p->is_dirty) {
        kin_destroy(&p->base);
        return NULL;
    }
    for (uint32_t slot = 0; slot < shape->n_slots; slot++) {
        p->slot_experts[slot] = NONE;
        p->keys[slot] = INFINITY;
    }
    for (uint32_t layer = 0; layer < shape->n_layers; layer++) {
        p->is_dirty[layer] = true;
    }
    return &p->base;
}
