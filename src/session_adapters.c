/*
 * A session's adapters. Keys and values belong to the base and the adapters and scales that they
 * were computed under: any change of those forgets them, and the tokens are prefilled again.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "session.h"

void slu_session_release_adapters(struct slu_engine *engine, struct slu_adapter_set *set)
{
    for (uint32_t i = 0; i < set->n; i++) {
        slu_registry_release(engine->registry, set->uses[i].adapter);
    }
    set->n = 0;
}

static bool is_same(const struct slu_adapter_set *a, const struct slu_adapter_set *b)
{
    for (uint32_t i = 0; i < a->n && a->n == b->n; i++) {
        if (a->uses[i].adapter != b->uses[i].adapter || a->uses[i].scale != b->uses[i].scale) {
            return false;
        }
    }
    return a->n == b->n;
}

/* What those behind choice `at` take at least of the adapters' share. */
static int needed(struct slu_session *s, const struct slu_adapter_choice *choices, size_t n,
                  size_t at, uint64_t *ret_bytes, struct slu_err *err)
{
    *ret_bytes = 0;
    for (size_t i = at + 1; i < n; i++) {
        size_t same = 0;
        while (strcmp(choices[same].adapter, choices[i].adapter) != 0) {
            same++;
        }
        uint64_t bytes = 0;
        int rc =
            same < i ? 0 : slu_registry_need(s->engine->registry, choices[i].adapter, &bytes, err);
        if (rc < 0) {
            return rc;
        }
        *ret_bytes += bytes;
    }
    return 0;
}

/* Whether all that is multiplied by the user's scale stays a number. */
static bool can_scale(const struct slu_adapter *adapter, float scale)
{
    for (uint32_t i = 0; i < adapter->info.n_loras; i++) {
        if (!isfinite(adapter->loras[i].scale * scale)) {
            return false;
        }
    }
    return true;
}

static int acquire(struct slu_session *s, const struct slu_adapter_choice *choices, size_t n,
                   struct slu_adapter_set *set, struct slu_err *err)
{
    uint32_t ranks = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(choices[i].scale)) { /* before anything is loaded */
            return slu_err_set(err, SLU_EINVAL, "the scale of adapter %s is not a finite number",
                               choices[i].adapter);
        }
    }
    for (size_t i = 0; i < n; i++) {
        const struct slu_adapter *adapter;
        uint64_t leave_bytes;
        int rc = needed(s, choices, n, i, &leave_bytes, err);
        rc = rc < 0 ? rc
                    : slu_registry_acquire(s->engine->registry, choices[i].adapter, leave_bytes,
                                           &adapter, err);
        if (rc < 0) {
            return rc;
        }
        set->uses[set->n++] = (struct slu_adapter_use){adapter, choices[i].scale};
        if (!can_scale(adapter, choices[i].scale)) {
            return slu_err_set(err, SLU_EINVAL, "the scale %g is too large for adapter %s",
                               (double)choices[i].scale, choices[i].adapter);
        }
        ranks += adapter->info.rank_max;
        if (ranks > SLU_LORA_RANKS_MAX) {
            return slu_err_set(err, SLU_EUNSUP,
                               "with adapter %s the ranks come to %u; a session takes up to %u",
                               choices[i].adapter, ranks, SLU_LORA_RANKS_MAX);
        }
    }
    return 0;
}

int slu_session_set_adapters(struct slu_session *s, const struct slu_adapter_choice *choices,
                             size_t n, struct slu_err *err)
{
    if (n > SLU_ADAPTERS_MAX) {
        return slu_err_set(err, SLU_EINVAL, "%zu adapters at once; a session takes up to %u", n,
                           SLU_ADAPTERS_MAX);
    }
    struct slu_adapter_set set = {0};
    int rc = acquire(s, choices, n, &set, err);
    if (rc < 0 || is_same(&set, &s->adapters)) {
        slu_session_release_adapters(s->engine, &set);
        return rc;
    }
    slu_session_release_adapters(s->engine, &s->adapters);
    s->adapters = set;
    slu_kv_cache_truncate(&s->kv, &s->engine->weights.config, 0);
    return 0;
}

int slu_adapter_memory(const char *adapters_dir, const char *adapter, uint64_t *ret_bytes,
                       uint64_t *ret_expert_bytes, struct slu_err *err)
{
    char *path;
    struct slu_source *source;
    struct slu_adapter_info info;
    int rc = slu_registry_path(adapters_dir, adapter, &path, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_source_open_file(path, &source, err);
    free(path);
    if (rc < 0) {
        return rc;
    }
    rc = slu_adapter_inspect(source, &info, err);
    slu_source_destroy(source);
    if (rc == 0) {
        *ret_bytes = info.memory_bytes + info.extra_bytes;
    }
    if (rc == 0 && ret_expert_bytes) {
        *ret_expert_bytes = info.expert_bytes;
    }
    return rc;
}
