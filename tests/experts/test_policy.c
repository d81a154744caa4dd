#include <criterion/criterion.h>

#include <stdint.h>
#include <string.h>

#include "experts/policy.h"

static bool any(void *arg, uint32_t slot)
{
    (void)arg;
    (void)slot;
    return true;
}

static bool none(void *arg, uint32_t slot)
{
    (void)arg;
    (void)slot;
    return false;
}

static bool is_odd(void *arg, uint32_t slot)
{
    (void)arg;
    return slot % 2 == 1;
}

/* The victim is the slot whose last use is the longest ago. */
Test(policy_lru, evicts_the_oldest)
{
    struct slu_policy *lru = slu_policy_create_lru(4);
    cr_assert_not_null(lru);
    cr_assert_eq(lru->victim(lru, any, NULL), -1);
    for (uint32_t slot = 0; slot < 4; slot++) {
        lru->insert(lru, slot, 100 + slot);
    }
    cr_assert_eq(lru->victim(lru, any, NULL), 0);
    lru->touch(lru, 0);
    cr_assert_eq(lru->victim(lru, any, NULL), 1);
    lru->touch(lru, 1);
    lru->remove(lru, 2);
    cr_assert_eq(lru->victim(lru, any, NULL), 3);
    lru->insert(lru, 2, 200);
    lru->touch(lru, 3);
    cr_assert_eq(lru->victim(lru, any, NULL), 0);
    lru->destroy(lru);
}

/* Only a slot that may be evicted is named, and asking removes nothing. */
Test(policy_lru, asks_before_it_evicts)
{
    struct slu_policy *lru = slu_policy_create_lru(4);
    for (uint32_t slot = 0; slot < 4; slot++) {
        lru->insert(lru, slot, slot);
    }
    cr_assert_eq(lru->victim(lru, none, NULL), -1);
    cr_assert_eq(lru->victim(lru, is_odd, NULL), 1);
    cr_assert_eq(lru->victim(lru, is_odd, NULL), 1);
    cr_assert_eq(lru->victim(lru, any, NULL), 0);
    lru->destroy(lru);
}

/* Over a long random life it agrees with clocks on each slot. */
Test(policy_lru, agrees_with_a_model)
{
    enum { N = 17 };
    uint64_t used_at[N] = {0}; /* 0: not in */
    struct slu_policy *lru = slu_policy_create_lru(N);
    uint64_t random = 7;
    for (uint64_t now = 1; now < 20000; now++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        uint32_t slot = (uint32_t)((random >> 33) % N);
        if (used_at[slot] == 0) {
            lru->insert(lru, slot, slot);
            used_at[slot] = now;
        } else if ((random >> 20) % 3 == 0) {
            lru->remove(lru, slot);
            used_at[slot] = 0;
        } else {
            lru->touch(lru, slot);
            used_at[slot] = now;
        }
        int64_t oldest = -1;
        for (uint32_t i = 0; i < N; i++) {
            if (used_at[i] != 0 && (oldest < 0 || used_at[i] < used_at[oldest])) {
                oldest = i;
            }
        }
        cr_assert_eq(lru->victim(lru, any, NULL), oldest);
    }
    lru->destroy(lru);
}

/* Its size for the ledger grows by a link a slot. */
Test(policy_lru, foretells_its_size)
{
    cr_assert_eq(slu_policy_lru_bytes(1000) - slu_policy_lru_bytes(0), 8000);
}
