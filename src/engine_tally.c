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
    phase->dense_bytes += tally->weight_bytes;
    phase->dense_macs += tally->macs;
    add_threads(phase, tally, slu_pool_threads(e->pool));
    pthread_mutex_unlock(&e->stats);
}
