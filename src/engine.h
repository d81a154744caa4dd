/*
 * What engine and session share. Internal to src.
 *
 * Lock order: slu_engine.compute, which is held while a session computes a chunk, or the
 * registry's; under it a stream's lock; under that the ring's. The arena's is taken only while
 * opening and closing. Streams of adapters have one round at a time because only who holds compute
 * begins one. slu_engine.stats is taken after all of them are released again but the first.
 */
#ifndef SLU_ENGINE_H
#define SLU_ENGINE_H

#include <pthread.h>

#include "adapters/registry.h"
#include "experts/predict.h"
#include "plan.h"
#include "text/chat.h"

struct slu_engine {
    struct slu_pack *pack;
    struct slu_weights weights;
    struct slu_tokenizer *tokenizer;
    enum slu_chat chat;
    struct slu_plan plan;
    enum slu_kv_cache_type kv; /* of its sessions */
    bool touches_kv;           /* when a session is created */
    struct slu_ledger *ledger;
    struct slu_pool *pool;
    uint64_t text_bytes; /* charged */
    struct slu_registry *registry;
    struct slu_predictor *predictor; /* NULL where the pack has none that can be used */
    struct slu_err predictor_err;    /* why, if it has one that can't */

    pthread_mutex_t compute; /* guards model */
    struct slu_model model;

    pthread_mutex_t stats; /* guards phases; nothing is locked under it */
    struct slu_phase_stats phases[SLU_PHASES];
};

/* With the compute lock held. Begin before a chunk is computed; end books what was spent on its n
 * tokens since then. */
struct slu_engine_mark {
    uint64_t start_ns;
    uint64_t flash_bytes;
    uint64_t device_bytes; /* where experts are mapped */
    struct slu_stream_stats stream;
    struct slu_residency_stats residency;
};
void slu_engine_tally_begin(struct slu_engine *engine, struct slu_engine_mark *ret_mark);
void slu_engine_tally_end(struct slu_engine *engine, const struct slu_engine_mark *mark,
                          enum slu_phase phase, uint32_t n);

/* The predictor of the pack's section, if it suits the model. */
void slu_engine_load_predictor(struct slu_engine *engine);

/* x[n][n_embd] = embeddings of any number of ids within the vocabulary. Takes the compute lock.
 * SLU_EIO, SLU_EFORMAT. */
int slu_engine_embed(struct slu_engine *engine, const int32_t *ids, uint32_t n, float *x,
                     struct slu_err *err);

#endif
