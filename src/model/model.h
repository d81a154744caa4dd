/*
 * A model ready to compute: weights, kernels, pool, stream of experts, embedding and scratch. Its
 * forward pass takes a chunk of tokens of one session and leaves their final hidden states; logits
 * are made from those on demand. Results don't depend on how a text is cut into chunks, on the
 * number of threads, or on which blocks are resident.
 *
 * Thread safety: none; the engine lets one session compute at a time.
 */
#ifndef SLU_MODEL_MODEL_H
#define SLU_MODEL_MODEL_H

#include <stdatomic.h>

#include "base/pool.h"
#include "experts/mapped.h"
#include "experts/stream.h"
#include "model/embed.h"
#include "model/kv_cache.h"
#include "model/lora.h"
#include "model/residency.h"
#include "model/scratch.h"
#include "model/tally.h"

/* For measurements: may replace the experts that the router of a layer has chosen for a token, and
 * their weights; n_used of each. */
typedef void (*slu_model_route_fn)(void *arg, uint32_t layer, uint32_t position, uint32_t n_used,
                                   uint32_t *chosen, float *weight);

/* Is told what was chosen. */
typedef void (*slu_model_observe_fn)(void *arg, uint32_t layer, uint32_t position, uint32_t n_used,
                                     const uint32_t *chosen, const float *weight);

/* For calibration: is shown what goes into a matrix, n rows of x. Of expert banks one expert's:
 * numbers first .. first + cols - 1 of each row, `expert`; else first is 0 and expert too. From
 * any of the pool's threads, but what goes into an expert's gate is shown before what goes into its
 * down matrix, and never the same numbers of a matrix to two threads. rows: which of x; NULL: all.
 */
struct slu_model_inputs {
    void (*see)(void *arg, uint32_t layer, enum slu_target target, uint32_t expert, uint32_t first,
                uint32_t cols, const float *x, size_t stride, const uint32_t *rows, uint32_t n);
    void *arg;
};

/* What is read ahead while decoding. Wrong: what nobody will want, to see that it changes no result
 * and what it costs. */
enum slu_model_lookahead {
    SLU_MODEL_AHEAD_AUTO,
    SLU_MODEL_AHEAD_ON,
    SLU_MODEL_AHEAD_OFF,
    SLU_MODEL_AHEAD_WRONG
};

struct slu_model {
    const struct slu_weights *weights;
    const struct slu_kern *kern;
    struct slu_pool *pool;
    struct slu_stream *stream; /* NULL where there are no routed experts, or they are mapped */
    struct slu_mapped *mapped; /* NULL where they are streamed */
    /* Whose unused memory the stream has; NULL: nobody's. Atomic for slu_model_has_lent. */
    const struct slu_kv_cache *_Atomic lender;
    struct slu_residency *residency; /* NULL: experts are chosen as the routers have it */
    uint64_t residency_bytes;        /* charged */
    struct slu_ledger *ledger;
    enum slu_model_lookahead lookahead;
    struct slu_embed embed;
    uint32_t chunk;      /* tokens that KV caches have room for beside their windows */
    uint32_t long_chunk; /* that are computed at once, at most; chunk or more */
    struct slu_scratch scratch;
    double *rope_freqs;                     /* rope_dims / 2 */
    const struct slu_adapter_set *adapters; /* of the session that computes; NULL: none */
    const atomic_bool *cancel;              /* looked at before each layer; NULL: never */
    struct slu_tally tally;                 /* of the chunk; started by the caller */
    slu_model_route_fn route;               /* has the last word on choices; NULL: the router */
    void *route_arg;
    slu_model_route_fn guess; /* the same for what look-ahead guesses of a layer */
    void *guess_arg;
    slu_model_observe_fn observe; /* looks on; NULL: nobody does */
    void *observe_arg;
    const struct slu_model_inputs *inputs; /* NULL: nobody wants to see them */
    uint32_t position;                     /* of the chunk's first token */
    uint32_t first_out;                    /* the chunk's first whose hidden state is asked for */
    uint64_t n_tokens;                     /* computed so far, of all sessions */
};

struct slu_model_params {
    const struct slu_weights *weights; /* loaded */
    const struct slu_pack *pack;
    const char *path;
    struct slu_pool *pool;
    const struct slu_kern *kern;
    struct slu_ledger *ledger;
    uint32_t chunk;                 /* tokens computed at once, by what is charged for */
    uint32_t long_chunk;            /* and in memory of slots, where these are fewer than blocks */
    uint32_t n_slots, n_slots_lent; /* of its own, and at most in a KV cache */
    bool touch_memory;              /* of slots and activations, at once */
    const struct slu_policy_kind *policy; /* of the cache of experts */
    enum slu_io_backend backend;
    bool is_mapped; /* experts through a mapping of the file, for comparison */
    /* Experts chosen by what is in memory: see model/residency.h. NULL: as the routers have it.
     * weights and n_set are filled in. */
    const struct slu_residency_params *residency;
    enum slu_model_lookahead lookahead;
};

/* Chunks of more than `chunk` tokens have scratch for whole multiples of so many, so that those that
 * differ a little have the same; or for long_chunk. */
#define SLU_LONG_CHUNK_STEP 64u

/* What a model's residency is made of, for planning and for making it; n_set is 0 where there is
 * none, or no room for one. share as in slu_residency_experts, from params->residency. */
struct slu_residency_params slu_model_residency_params(const struct slu_model_params *params);

/* From how many slots on layers of smaller blocks have smaller ones; UINT32_MAX: never. n_slots
 * isn't looked at. */
uint32_t slu_model_two_sizes_from(const struct slu_model_params *params);

/* The stream's parameters for a model, for planning and for making it. */
struct slu_stream_params slu_model_stream_params(const struct slu_model_params *params,
                                                 uint32_t n_threads);
struct slu_mapped_params slu_model_mapped_params(const struct slu_model_params *params,
                                                 uint32_t n_threads);

/* Everything is allocated here. Weights, pack, pool and ledger must outlive the model. */
int slu_model_init(struct slu_model *model, const struct slu_model_params *params,
                   struct slu_err *err);
void slu_model_finish(struct slu_model *model);

/* Computes n tokens (1 .. long_chunk, ids within the vocabulary, room for them in kv) at positions
 * kv->n .. and advances kv. Those before first_out (0 .. n) are computed as far as later tokens
 * need them, which the last layer's experts aren't. On failure kv is as it was, or empty where it
 * has windows and n is more than chunk. SLU_ECANCEL, SLU_EIO, SLU_EFORMAT. Allocates nothing.
 * Memory that kv has no use for yet keeps experts from then on, unless another's does already; but
 * during more than a chunk it is experts that make room. */
int slu_model_forward(struct slu_model *model, struct slu_kv_cache *kv, const int32_t *ids,
                      uint32_t n, uint32_t first_out, struct slu_err *err);
/* Before a KV cache is finished that may have lent: no expert lies in it any more. */
void slu_model_take_back(struct slu_model *model, const struct slu_kv_cache *kv);
/* Whether it has. By who owns kv, also while the model computes with another, which may give back
 * what it has lent, and never takes more. */
bool slu_model_has_lent(const struct slu_model *model, const struct slu_kv_cache *kv);

/* For a model with a residency: what is expected of the next text. Reading begins at once. */
void slu_model_rank(struct slu_model *model, const struct slu_ranking *ranking);

/* Logits after tokens first .. first + n - 1 of the last chunk, first >= its first_out,
 * n <= SLU_LOGIT_ROWS_MAX and <= chunk: n x n_vocab floats that stay until the next call. */
const float *slu_model_logits(struct slu_model *model, uint32_t first, uint32_t n);

#endif
