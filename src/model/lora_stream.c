#include "model/lora_stream.h"

#include "adapters/expert_stream.h"

static bool has(const struct slu_lora_round *round, const struct slu_adapter *adapter)
{
    for (uint32_t i = 0; i < round->n; i++) {
        if (round->adapters[i] == adapter) {
            return true;
        }
    }
    return false;
}

void slu_lora_round_init(struct slu_lora_round *round, const struct slu_adapter_set *set,
                         uint32_t layer)
{
    *round = (struct slu_lora_round){.experts_max = UINT32_MAX};
    for (uint32_t i = 0; set && i < set->n; i++) {
        /* A set may have an adapter twice, its stream only one round. */
        const struct slu_adapter *adapter = set->uses[i].adapter;
        if (!adapter->stream || adapter->layers[layer].n == 0 || has(round, adapter)) {
            continue;
        }
        uint32_t n_slots = slu_expert_stream_slots(adapter);
        round->experts_max = n_slots < round->experts_max ? n_slots : round->experts_max;
        round->adapters[round->n++] = adapter;
    }
}

int slu_lora_round_begin(struct slu_lora_round *round, uint32_t layer, const uint32_t *experts,
                         uint32_t n, struct slu_err *err)
{
    for (; round->n_begun < round->n; round->n_begun++) {
        int rc = slu_expert_stream_begin(round->adapters[round->n_begun], layer, experts, n, err);
        if (rc < 0) {
            slu_lora_round_end(round, NULL);
            return rc;
        }
    }
    return 0;
}

static void take(void *arg, unsigned thread, unsigned n_threads)
{
    const struct slu_lora_round *round = arg;
    (void)n_threads;
    for (uint32_t i = 0; i < round->n_begun; i++) {
        slu_expert_stream_take(round->adapters[i], thread);
    }
}

int slu_lora_round_fetch(struct slu_lora_round *round, struct slu_pool *pool)
{
    if (round->n_begun == 0) {
        return 0;
    }
    slu_pool_run(pool, take, round);
    for (uint32_t i = 0; i < round->n_begun; i++) {
        int rc = slu_expert_stream_check(round->adapters[i]);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

int slu_lora_round_end(struct slu_lora_round *round, struct slu_err *err)
{
    int first = 0;
    for (uint32_t i = 0; i < round->n_begun; i++) {
        int rc = slu_expert_stream_end(round->adapters[i], first == 0 ? err : NULL);
        first = first == 0 ? rc : first;
    }
    round->n_begun = 0;
    return first;
}
