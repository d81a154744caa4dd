#include "experts/policy.h"

#include <string.h>

static struct slu_policy *create_lru(const struct slu_policy_shape *shape)
{
    return slu_policy_create_lru(shape->n_slots);
}

static size_t lru_bytes(const struct slu_policy_shape *shape)
{
    return slu_policy_lru_bytes(shape->n_slots);
}

static const struct slu_policy_kind kinds[] = {
    {"kin", slu_policy_create_kin, slu_policy_kin_bytes},
    {"lfu", slu_policy_create_lfu, slu_policy_lfu_bytes},
    {"lru", create_lru, lru_bytes},
    {"slru", slu_policy_create_slru, slu_policy_slru_bytes},
};

const struct slu_policy_kind *slu_policy_at(unsigned i)
{
    return i < sizeof kinds / sizeof kinds[0] ? &kinds[i] : NULL;
}

const struct slu_policy_kind *slu_policy_find(const char *name)
{
    if (strcmp(name, "best") == 0) {
        return &kinds[0]; /* kin */
    }
    for (unsigned i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (strcmp(name, kinds[i].name) == 0) {
            return &kinds[i];
        }
    }
    return NULL;
}
