/*
 * A session's insides, shared by session.c (context and eval), conversation.c (chat messages) and
 * generate.c. Internal to src.
 */
#ifndef SLU_SESSION_H
#define SLU_SESSION_H

#include <stdatomic.h>

#include "engine.h"
#include "sampler.h"

struct slu_session {
    struct slu_engine *engine;
    struct slu_kv_cache kv; /* kv.n of the ids are computed, the rest is pending */
    int32_t *ids;           /* ctx */
    uint32_t n_ids, ctx;
    struct slu_sampler *sampler;
    struct slu_adapter_set adapters; /* what kv was computed under; held in the registry */
    uint64_t charged_bytes;
    atomic_bool cancel; /* set from anywhere, relaxed: it carries no data */

    struct slu_message *messages; /* of the chat so far; texts are owned */
    size_t n_messages;
    float *answer_scores; /* layers * experts, of slu_session_rank_answer; NULL: never asked for */
    bool has_answer_scores; /* that have not been put to use */
    bool is_decoding;       /* the next chunk is one generated token */
    bool is_chat;           /* the ids from answer_from on are an assistant's turn still open */
    bool has_answer;        /* what there is of it is the last message */
    uint32_t answer_from;   /* of the ids */
};

/* Makes ids[0..n) the context: what is computed of a common prefix is kept. */
int slu_session_replace(struct slu_session *session, const int32_t *ids, size_t n,
                        struct slu_err *err);

/* Computes the pending ids, chunk by chunk, under the engine's lock; after each chunk, calls `each`
 * (may be NULL) with its first position and length while its hidden states are there, those of
 * positions from first_out on. Stops at the first negative return, or with SLU_ECANCEL. */
typedef int (*slu_chunk_fn)(struct slu_session *session, void *arg, uint32_t first_position,
                            uint32_t n);
int slu_session_compute(struct slu_session *session, uint32_t first_out, slu_chunk_fn each,
                        void *arg, struct slu_err *err);

/* Gives a set's adapters back and empties it. */
void slu_session_release_adapters(struct slu_engine *engine, struct slu_adapter_set *set);

/* Makes what there is of the open turn, ids[answer_from..n_ids), the conversation's last message.
 */
int slu_session_answered(struct slu_session *session, struct slu_err *err);

/* The prompt is computed: experts are ranked for the answer from here on, if that was asked for. */
void slu_session_begin_answer(struct slu_session *session);

#endif
