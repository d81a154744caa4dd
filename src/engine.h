/*
 * What engine and session share. Internal to src.
 *
 * Lock order: slu_engine.compute, which is held while a session computes a chunk, or the
 * registry's; under it a stream's lock; under that the ring's. The arena's is taken only while
 * opening and closing. Streams of adapters have one round at a time because only who holds compute
 * begins one.
 */
#ifndef SLU_ENGINE_H
#define SLU_ENGINE_H

#include <pthread.h>

#include "adapters/registry.h"
#include "plan.h"
#include "text/chat.h"

struct slu_engine {
    struct slu_pack *pack;
    struct slu_weights weights;
    struct slu_tokenizer *tokenizer;
    enum slu_chat chat;
    struct slu_plan plan;
    struct slu_ledger *ledger;
    struct slu_pool *pool;
    uint64_t text_bytes; /* charged */
    struct slu_registry *registry;

    pthread_mutex_t compute; /* guards model */
    struct slu_model model;
};

#endif
