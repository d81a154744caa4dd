#include <stdatomic.h>

#include "engine.h"

_Static_assert((int)SLU_STATS_THREADS_MAX >= (int)SLU_POOL_THREADS_MAX, "a thread has an entry");

void slu_engine_tally_begin(struct slu_engine *e, struct slu_engine_mark *ret_mark)
{
    struct slu_model *m = &e->model;
    *ret_mark = (struct slu_engine_mark){
        .flash_bytes = atomic_load_explicit(&m->embed.flash_bytes, memory_order_relaxed)};
    if (m->stream) {
        slu_stream_stats(m->stream, &ret_mark->stream);
    }
    if (m->residency) {
        ret_mark->residency = slu_residency_stats(m->residency);
    }
    ret_mark->device_bytes = m->mapped ? slu_mapped_device_bytes() : 0;
    slu_tally_start(&m->tally, slu_pool_threads(e->pool));
    ret_mark->start_ns = m->tally.border_ns;
}

static void add_threads(struct slu_phase_stats *phase, const struct slu_tally *tally,
                        unsigned n_threads)
{
    phase->n_threads = n_threads;
    for (unsigned i = 0; i < n_threads; i++) {
        const struct slu_tally_thread *spent = &tally->threads[i];
        phase->threads[i].stall_ns += spent->stall_ns;
        phase->threads[i].unpack_ns += spent->unpack_ns;
        phase->threads[i].product_ns += spent->product_ns;
        phase->expert_bytes += spent->weight_bytes;
        phase->expert_macs += spent->macs;
    }
}

/* How experts were chosen and read. */
static void add_experts(const struct slu_engine *e, struct slu_phase_stats *phase,
                        const struct slu_engine_mark *mark, const struct slu_stream_stats *now,
                        uint32_t n)
{
    const struct slu_weights *w = &e->weights;
    uint32_t n_layers = w->config.n_layers - w->config.n_dense_layers;
    if (e->model.residency) {
        struct slu_residency_stats residency = slu_residency_stats(e->model.residency);
        phase->router_weight += residency.router_weight - mark->residency.router_weight;
        phase->covered_weight += residency.covered_weight - mark->residency.covered_weight;
    } else if (w->n_blocks) {
        phase->router_weight += (double)n * n_layers;
        phase->covered_weight += (double)n * n_layers;
    }
    if (w->n_blocks) {
        uint64_t n_read = now->misses - mark->stream.misses + now->guesses - mark->stream.guesses -
                          (now->foreseen - mark->stream.foreseen);
        phase->experts_read += (double)n_read * n_layers * w->config.n_experts / w->n_blocks;
    }
}

void slu_engine_tally_end(struct slu_engine *e, const struct slu_engine_mark *mark,
                          enum slu_phase which, uint32_t n)
{
    struct slu_model *m = &e->model;
    struct slu_tally *tally = &m->tally;
    slu_tally_cross(tally, SLU_PART_OTHER);
    struct slu_stream_stats stream = {0};
    if (m->stream) {
        slu_stream_stats(m->stream, &stream);
    }
    uint64_t flash_bytes = stream.flash_bytes - mark->stream.flash_bytes +
                           atomic_load_explicit(&m->embed.flash_bytes, memory_order_relaxed) -
                           mark->flash_bytes;
    if (m->mapped) { /* the system's own count has the embedding rows too */
        flash_bytes = slu_mapped_device_bytes() - mark->device_bytes;
    }
    pthread_mutex_lock(&e->stats);
    struct slu_phase_stats *phase = &e->phases[which];
    phase->n_tokens += n;
    phase->n_chunks++;
    phase->wall_ns += tally->border_ns - mark->start_ns;
    phase->embed_ns += tally->part_ns[SLU_PART_EMBED];
    phase->dense_ns += tally->part_ns[SLU_PART_DENSE];
    phase->attention_ns += tally->part_ns[SLU_PART_ATTENTION];
    phase->experts_ns += tally->part_ns[SLU_PART_EXPERTS];
    phase->head_ns += tally->part_ns[SLU_PART_HEAD];
    phase->other_ns += tally->part_ns[SLU_PART_OTHER];
    phase->flash_bytes += flash_bytes;
    phase->unpacked_bytes += stream.unpacked_bytes - mark->stream.unpacked_bytes;
    phase->hits += stream.hits - mark->stream.hits;
    phase->misses += stream.misses - mark->stream.misses;
    phase->guesses += stream.guesses - mark->stream.guesses;
    phase->foreseen += stream.foreseen - mark->stream.foreseen;
    add_experts(e, phase, mark, &stream, n);
    phase->dense_bytes += tally->weight_bytes;
    phase->dense_macs += tally->macs;
    add_threads(phase, tally, slu_pool_threads(e->pool));
    pthread_mutex_unlock(&e->stats);
}
