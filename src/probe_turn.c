#include "engine.h"
#include "probe.h"

/* In each of the ways to read it. */
#define READ_BYTES ((size_t)128 << 20)

/* What all turns have to come to, in each of them, to be worth a figure. */
#define TURNS_NS 20000000u

/* Nothing is allocated: what is read is the dense weights, part after part. Where experts are
 * streamed or mapped, flash would go on meanwhile, or save up what a throttle grants. */
void slu_probe_turn(struct slu_engine *e, struct slu_probe_turns *turns)
{
    if (e->plan.n_slots < e->plan.n_blocks) {
        return;
    }
    uintptr_t start = ((uintptr_t)e->weights.memory + 63) / 64 * 64;
    size_t bytes = e->weights.memory_bytes - (size_t)(start - (uintptr_t)e->weights.memory);
    size_t n_parts = bytes / READ_BYTES;
    if (n_parts * READ_BYTES < slu_probe_ram_bytes()) {
        return;
    }
    pthread_mutex_lock(&e->compute);
    for (unsigned i = 0; i < SLU_PROBE_STREAMS; i++) {
        size_t part = (turns->n * (size_t)SLU_PROBE_STREAMS + i) % n_parts;
        turns->ram_ns[i] +=
            slu_probe_read(e->pool, e->model.kern->name, (const uint8_t *)start + part * READ_BYTES,
                           READ_BYTES, 1u << i);
        turns->ram_bytes[i] += READ_BYTES;
    }
    turns->n++;
    pthread_mutex_unlock(&e->compute);
}

bool slu_probe_take_turns(struct slu_probe *probe, const struct slu_probe_turns *turns)
{
    double best = 0;
    for (unsigned i = 0; i < SLU_PROBE_STREAMS; i++) {
        if (turns->ram_ns[i] < TURNS_NS) {
            return false;
        }
        double rate = 1e9 * (double)turns->ram_bytes[i] / (double)turns->ram_ns[i];
        best = rate > best ? rate : best;
    }
    probe->ram_bytes_s = best;
    return true;
}
