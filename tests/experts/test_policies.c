#include <criterion/criterion.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "experts/kin.h"
#include "experts/policy.h"

#define N_LAYERS  5u
#define N_EXPERTS 70u /* more than a word of bits */
#define N_BLOCKS  (N_LAYERS * N_EXPERTS)

static uint64_t random_next(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

struct life {
    struct slu_policy *policy;
    uint32_t n_slots;
    bool is_in[64];
    bool is_pinned[64];
};

static bool is_free_to_go(void *arg, uint32_t slot)
{
    const struct life *life = arg;
    cr_assert_lt(slot, life->n_slots);
    cr_assert(life->is_in[slot], "asked about slot %u, which is empty", slot);
    return !life->is_pinned[slot];
}

static int64_t victim_of(struct life *life)
{
    return life->policy->victim(life->policy, is_free_to_go, life);
}

static struct life start(const struct slu_policy_kind *kind, uint32_t n_slots)
{
    struct life life = {.n_slots = n_slots};
    life.policy = kind->create(&(struct slu_policy_shape){
        .n_slots = n_slots, .n_layers = N_LAYERS, .n_experts = N_EXPERTS, .n_blocks = N_BLOCKS});
    cr_assert_not_null(life.policy);
    cr_assert_str_eq(life.policy->name, kind->name);
    return life;
}

static void observe(struct slu_policy *policy, uint64_t token, uint32_t layer, uint64_t *random)
{
    uint32_t experts[4];
    float weights[4];
    uint32_t first = (uint32_t)(random_next(random) % N_EXPERTS);
    for (uint32_t i = 0; i < 4; i++) {
        experts[i] = (first + 17 * i) % N_EXPERTS;
        weights[i] = (float)(random_next(random) % 100) / 100;
    }
    const struct slu_policy_choice choice = {.token = token,
                                             .layer = layer,
                                             .n = 1 + (uint32_t)(random_next(random) % 4),
                                             .experts = experts,
                                             .weights = random_next(random) % 4 ? weights : NULL};
    if (policy->observe) {
        policy->observe(policy, &choice);
    }
}

/* One step of a random life; returns the victim that was named, or -1. */
static int64_t step(struct life *life, uint64_t now, bool has_choices, uint64_t *random)
{
    struct slu_policy *policy = life->policy;
    if (has_choices && now % 3 == 0) {
        /* Now and then a token again that isn't the newest, or one far ahead. */
        uint64_t token = now / 15 + (random_next(random) % 50 == 0 ? 300 : 0);
        observe(policy, token, (uint32_t)(now / 3 % N_LAYERS), random);
    }
    uint32_t slot = (uint32_t)(random_next(random) % life->n_slots);
    uint32_t block = (uint32_t)(random_next(random) % N_BLOCKS);
    life->is_pinned[random_next(random) % life->n_slots] ^= true;
    if (!life->is_in[slot]) {
        policy->insert(policy, slot, block);
        life->is_in[slot] = true;
    } else if (random_next(random) % 4 == 0) {
        policy->remove(policy, slot);
        life->is_in[slot] = false;
    } else {
        policy->touch(policy, slot);
    }
    int64_t victim = victim_of(life);
    cr_assert_eq(victim, victim_of(life), "asking changes the answer");
    bool has_any = false;
    for (uint32_t i = 0; i < life->n_slots; i++) {
        has_any = has_any || (life->is_in[i] && !life->is_pinned[i]);
    }
    cr_assert_eq(victim >= 0, has_any);
    cr_assert(victim < 0 || (life->is_in[victim] && !life->is_pinned[victim]));
    if (victim >= 0 && random_next(random) % 2) {
        policy->remove(policy, (uint32_t)victim);
        life->is_in[victim] = false;
        policy->insert(policy, (uint32_t)victim, block);
        life->is_in[victim] = true;
    }
    return victim;
}

/* Over long random lives, with the router's choices and without, with one slot and with many, each
 * policy names a victim exactly when there is one, never one that is pinned, and twice the same. */
Test(policies, keep_the_contract)
{
    static const uint32_t sizes[] = {1, 2, 31, 64};
    for (unsigned k = 0; slu_policy_at(k); k++) {
        for (unsigned s = 0; s < 8; s++) {
            struct life life = start(slu_policy_at(k), sizes[s / 2]);
            struct life twin = start(slu_policy_at(k), sizes[s / 2]);
            uint64_t random = s + 1, random_twin = s + 1;
            for (uint64_t now = 0; now < 4000; now++) {
                int64_t victim = step(&life, now, s % 2, &random);
                cr_assert_eq(victim, step(&twin, now, s % 2, &random_twin));
            }
            life.policy->destroy(life.policy);
            twin.policy->destroy(twin.policy);
        }
    }
}

/* The same while slots come and go. */
Test(policies, shrink_and_grow)
{
    for (unsigned k = 0; slu_policy_at(k); k++) {
        for (unsigned s = 0; s < 2; s++) {
            struct life life = start(slu_policy_at(k), 64);
            uint64_t random = s + 1;
            for (uint64_t now = 0; now < 8000; now++) {
                if (now % 40 == 0) {
                    uint32_t n = 1 + (uint32_t)(random_next(&random) % 64);
                    for (uint32_t slot = n; slot < 64; slot++) {
                        if (life.is_in[slot]) {
                            life.policy->remove(life.policy, slot);
                            life.is_in[slot] = false;
                        }
                    }
                    life.n_slots = n;
                    if (life.policy->resize) {
                        life.policy->resize(life.policy, n);
                    }
                }
                step(&life, now, s, &random);
            }
            life.policy->destroy(life.policy);
        }
    }
}

/* Each policy can be had by its name, and says what it takes. */
Test(policies, are_found_by_name)
{
    const struct slu_policy_shape shape = {
        .n_slots = 100, .n_layers = 3, .n_experts = 8, .n_blocks = 24};
    unsigned n = 0;
    for (; slu_policy_at(n); n++) {
        cr_assert_eq(slu_policy_find(slu_policy_at(n)->name), slu_policy_at(n));
        cr_assert_geq(slu_policy_at(n)->bytes(&shape), 100 * sizeof(uint32_t));
    }
    cr_assert_eq(n, 4);
    cr_assert_not_null(slu_policy_find("best"));
    cr_assert_null(slu_policy_find("worst"));
}

static bool any(void *arg, uint32_t slot)
{
    (void)arg;
    (void)slot;
    return true;
}

/* LFU's heap agrees with a look at all counts, which outlive a stay and fade. */
Test(policies, lfu_agrees_with_a_model)
{
    enum { SLOTS = 13, BLOCKS = 40 };
    struct slu_policy *lfu = slu_policy_create_lfu(&(struct slu_policy_shape){
        .n_slots = SLOTS, .n_layers = 1, .n_experts = BLOCKS, .n_blocks = BLOCKS});
    double counts[BLOCKS] = {0}, added = 1;
    int64_t block_in[SLOTS];
    memset(block_in, -1, sizeof block_in);
    uint64_t random = 3;
    for (int now = 0; now < 40000; now++) { /* long enough for the counts to be scaled down */
        uint32_t slot = (uint32_t)(random_next(&random) % SLOTS);
        uint32_t block = (uint32_t)(random_next(&random) % BLOCKS);
        for (uint32_t i = 0; i < SLOTS; i++) { /* a block is in one slot at most */
            if (block_in[i] == block) {
                block = (block + 1) % BLOCKS;
                i = UINT32_MAX;
            }
        }
        bool is_use = block_in[slot] < 0 || random_next(&random) % 4;
        if (block_in[slot] < 0) {
            lfu->insert(lfu, slot, block);
            block_in[slot] = block;
        } else if (is_use) {
            lfu->touch(lfu, slot);
        } else {
            lfu->remove(lfu, slot);
            block_in[slot] = -1;
        }
        if (is_use) {
            counts[block_in[slot]] += added;
            added *= 1 + 0.69314718 / (3.0 * SLOTS);
            for (int i = 0; added > 1e100 && i < BLOCKS; i++) {
                counts[i] *= 1e-100;
            }
            added = added > 1e100 ? added * 1e-100 : added;
        }
        double lowest = -1;
        for (uint32_t i = 0; i < SLOTS; i++) {
            if (block_in[i] >= 0 && (lowest < 0 || counts[block_in[i]] < lowest)) {
                lowest = counts[block_in[i]];
            }
        }
        int64_t victim = lfu->victim(lfu, any, NULL);
        cr_assert_eq(victim >= 0, lowest >= 0);
        cr_assert(victim < 0 || counts[block_in[victim]] <= lowest * (1 + 1e-9));
    }
    lfu->destroy(lfu);
}

/* A block that was used again outlasts any number of blocks that were used once. */
Test(policies, slru_protects_what_was_used_again)
{
    struct slu_policy *slru = slu_policy_create_slru(
        &(struct slu_policy_shape){.n_slots = 4, .n_layers = 1, .n_experts = 100, .n_blocks = 100});
    for (uint32_t slot = 0; slot < 4; slot++) {
        slru->insert(slru, slot, slot);
    }
    slru->touch(slru, 1);
    for (uint32_t block = 4; block < 50; block++) {
        int64_t victim = slru->victim(slru, any, NULL);
        cr_assert(victim >= 0 && victim != 1);
        slru->remove(slru, (uint32_t)victim);
        slru->insert(slru, (uint32_t)victim, block);
    }
    /* Of three protected at most, the oldest goes back, and leaves when it is the oldest there. */
    slru->touch(slru, 0);
    slru->touch(slru, 2);
    slru->touch(slru, 3);
    cr_assert_eq(slru->victim(slru, any, NULL), 1);
    slru->destroy(slru);
}

static void choose(struct slu_policy *policy, uint64_t token, uint32_t layer, uint32_t expert)
{
    policy->observe(policy, &(struct slu_policy_choice){
                                .token = token, .layer = layer, .n = 1, .experts = &expert});
}

static void remember(struct slu_kin *kin, uint64_t token, uint32_t layer, uint32_t expert)
{
    slu_kin_observe(kin, &(struct slu_policy_choice){
                             .token = token, .layer = layer, .n = 1, .experts = &expert});
}

/* In a text where tokens of kind 0 are followed by kind 1, and 2 by 3, what follows the present
 * token ranks higher than what was used as often and more lately; and it doesn't matter that there
 * are more tokens than are remembered, or that numbers are left out. */
Test(policies, kin_ranks_what_follows)
{
    static const uint32_t text[] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 2, 3, 0, 1, 2, 3, 2, 3};
    enum { N = sizeof text / sizeof text[0] };
    static const uint64_t gaps[] = {0, 100, 1000};
    for (unsigned g = 0; g < 3; g++) {
        struct slu_kin *kin = slu_kin_create(2, 70);
        uint64_t token = 0;
        for (; token < 20 * N; token++) {
            remember(kin, token, 0, 60 + text[token % N]);
            remember(kin, token, 1, 64 + text[token % N]);
        }
        token += gaps[g];
        for (uint64_t end = token + 5 * N; token < end; token++) {
            remember(kin, token, 0, 60 + text[(token - gaps[g]) % N]);
            remember(kin, token, 1, 64 + text[(token - gaps[g]) % N]);
        }
        remember(kin, token, 0, 60);
        remember(kin, token, 1, 64);
        cr_assert_eq(slu_kin_newest(kin), token);
        float scores[70];
        slu_kin_rank(kin, 1, 0, scores);
        cr_assert_gt(scores[65], scores[67]);
        cr_assert_gt(scores[65], scores[3]);
        slu_kin_destroy(kin);
    }
}

/* What the newest token uses in a layer that it comes to is what tokens like it used there. */
Test(policies, kin_foresees)
{
    enum { N = 70 };
    struct slu_kin *kin = slu_kin_create(2, N);
    float chances[N];
    slu_kin_foresee(kin, 1, chances);
    for (uint32_t e = 0; e < N; e++) {
        cr_assert_eq(chances[e], 0);
    }
    for (uint32_t token = 0; token < 300; token++) { /* more than are remembered */
        remember(kin, token, 0, 60 + token % 4);
        remember(kin, token, 1, 10 + token % 4);
    }
    remember(kin, 300, 0, 60);
    slu_kin_foresee(kin, 1, chances);
    for (uint32_t e = 0; e < N; e++) {
        cr_expect(e == 10 ? chances[e] > 0.9f && chances[e] <= 1 : chances[e] < 0.1f,
                  "expert %u: %g", e, chances[e]);
    }
    slu_kin_destroy(kin);
}

/* All of a prompt's chunk goes by layer; the newest token is the one that is compared. */
Test(policies, kin_takes_chunks)
{
    struct slu_kin *by_token = slu_kin_create(3, 9), *by_layer = slu_kin_create(3, 9);
    float scores[2][9];
    for (uint32_t i = 0; i < 3 * 20; i++) {
        uint32_t expert = (i / 3 * 5 + i % 3) % 9;
        remember(by_token, i / 3, i % 3, expert);
        remember(by_layer, i % 20, i / 20, (i % 20 * 5 + i / 20) % 9);
    }
    for (uint32_t layer = 0; layer < 3; layer++) {
        slu_kin_rank(by_token, layer, 0, scores[0]);
        slu_kin_rank(by_layer, layer, 0, scores[1]);
        cr_assert_arr_eq(scores[0], scores[1], sizeof scores[0]);
    }
    slu_kin_destroy(by_token);
    slu_kin_destroy(by_layer);
}

/* Blocks of one expert go by their expert, whatever their numbers. */
Test(policies, kin_maps_blocks_to_experts)
{
    static const uint32_t experts[] = {3, 3, 1, 1, 7, 7};
    struct slu_policy *kin = slu_policy_create_kin(&(struct slu_policy_shape){
        .n_slots = 4, .n_layers = 2, .n_experts = 4, .n_blocks = 6, .block_experts = experts});
    for (uint64_t token = 0; token < 20; token++) {
        choose(kin, token, 0, 1);
        choose(kin, token, 1, token % 2 ? 3 : 0);
    }
    kin->insert(kin, 0, 2);
    kin->insert(kin, 1, 3);
    kin->insert(kin, 2, 0); /* expert 3 of layer 0, never used */
    kin->insert(kin, 3, 1);
    cr_assert_eq(kin->victim(kin, any, NULL), 2);
    kin->remove(kin, 2);
    cr_assert_eq(kin->victim(kin, any, NULL), 3);
    kin->destroy(kin);
}

/* As long as no router is heard, kin is LRU. */
Test(policies, kin_without_choices_is_lru)
{
    struct slu_policy *kin = slu_policy_create_kin(
        &(struct slu_policy_shape){.n_slots = 5, .n_layers = 1, .n_experts = 9, .n_blocks = 9});
    struct slu_policy *lru = slu_policy_create_lru(5);
    bool is_in[5] = {false};
    uint64_t random = 5;
    for (int now = 0; now < 3000; now++) {
        uint32_t slot = (uint32_t)(random_next(&random) % 5);
        struct slu_policy *both[] = {kin, lru};
        bool leaves = is_in[slot] && random_next(&random) % 3 == 0;
        for (int i = 0; i < 2; i++) {
            if (!is_in[slot]) {
                both[i]->insert(both[i], slot, slot);
            } else if (leaves) {
                both[i]->remove(both[i], slot);
            } else {
                both[i]->touch(both[i], slot);
            }
        }
        is_in[slot] = !leaves;
        cr_assert_eq(kin->victim(kin, any, NULL), lru->victim(lru, any, NULL));
    }
    kin->destroy(kin);
    lru->destroy(lru);
}
