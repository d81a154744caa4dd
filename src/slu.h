/*
 * sluice: sparse mixture-of-experts language models, far larger than memory, streamed from flash.
 *
 * Two nouns. An engine is one model (a .slu pack) opened under one memory budget: its dense
 * weights are resident, its experts are streamed. A session is one conversation on an engine: its
 * KV cache and sampler.
 *
 *     struct slu_engine *engine;
 *     struct slu_err err;
 *     if (slu_engine_open("model.slu", &(struct slu_engine_params){.ram_bytes = 4ull << 30},
 *                         &engine, &err) < 0) { ... err.text ... }
 *     slu_session_create(engine, &(struct slu_session_params){0}, &session, &err);
 *     slu_session_chat(session, "Hello", 5, &err);
 *     slu_session_generate(session, &(struct slu_generate_params){...}, &result, &err);
 *
 * The library never prints, logs or exits. Functions return 0 or a count, or a negative enum
 * slu_error with a sentence in the nullable `err`.
 *
 * Thread safety: an engine may be used from any thread, and computes for one session at a time:
 * sessions that compute on several threads take turns, chunk by chunk. A session belongs to one
 * thread at a time, but for slu_session_cancel, which may be called from any thread or from a
 * signal handler as long as the session is there. A thread that has a session compute does a part
 * of the work itself, for which it needs 2 MiB of stack.
 */
#ifndef SLU_H
#define SLU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "experts/ranking.h"

#ifdef __cplusplus
extern "C" {
#endif

struct slu_engine;
struct slu_session;

enum slu_io {
    SLU_USE_IO_AUTO,
    SLU_USE_IO_URING,
    SLU_USE_IO_PREAD,
    SLU_USE_IO_MMAP, /* for comparison only: experts through a mapping of the pack, without a cache
                        of one's own; the page cache that it fills is in no plan and no ledger */
};

/* How keys and values of past tokens are kept. */
enum slu_use_kv {
    SLU_USE_KV_F16,
    SLU_USE_KV_Q8, /* 8 bits and a scale for each 32 numbers: 17/32 of the memory, and a small
                      divergence */
};

/* How experts are chosen; docs/design.md says what each is for. An engine has one way, since what
 * the last two go by is what its memory holds, of which there is one. */
enum slu_routing {
    SLU_ROUTING_EXACT,  /* as the model's routers have it: the resident model's output, bit for bit
                         */
    SLU_ROUTING_PREFER, /* leaning towards experts that are in memory; the router's first choice
                           always stays. Fewer reads, for a small divergence */
    SLU_ROUTING_LOCKED, /* among a set that fits in memory and follows the text: next to no waiting
                           for reads, and a short time to the first token; what the set misses is
                           counted, see slu_engine_stats */
};

/* What is read ahead while decoding. It never changes a result. */
enum slu_read_ahead {
    SLU_AHEAD_AUTO, /* as much as the flash has time for on this machine */
    SLU_AHEAD_ON,   /* whatever is likely to be wanted, though others may have to wait */
    SLU_AHEAD_OFF,
    SLU_AHEAD_WRONG, /* what is not wanted, to see that nothing but time depends on it */
};

struct slu_engine_params {
    uint64_t ram_bytes; /* the ledger's limit; 0: half of slu_plan's memory_bytes */
    uint32_t ctx;       /* tokens of context to plan for; 0: 4096 or what the model was trained
                           for, whichever is less; 2^28 at most */
    uint32_t n_threads; /* 0: one for each CPU, or as many as its control groups give time to; 64 at
                           most */
    enum slu_io io;
    enum slu_use_kv kv;
    bool minimum_cache;     /* give expert slots the planner's minimum whatever ram_bytes allows */
    uint64_t adapter_bytes; /* the adapters' share of ram_bytes; 0: no adapters */
    uint64_t adapter_expert_bytes; /* so much of it is for experts, which may as well be streamed:
                                      what of these passes an eighth of ram_bytes is not kept for
                                      adapters; 0: all of the share is */
    uint32_t adapters_at_once; /* that are to be in use: one whose experts are streamed takes only
                                  such a part of the share; 0: 2, one and the next */
    const char *adapters_dir;  /* where adapters are found by name; NULL: by path only */
    const char *policy;        /* of the cache of experts, by name; NULL: the best there is */
    enum slu_routing routing;
    float route_bias;   /* prefer, and locked where it falls back to it: how much experts in memory
                           are favoured, in standard deviations of a token's scores over all
                           experts; 0: 0.5, and less than 0: not at all */
    float set_share;    /* prefer and locked: at most this share of all experts, up to 1, counts as
                           in memory, even where memory has room for more; 0: no such bound */
    float set_reads;    /* locked: experts read a token, on average, to follow the text; 0: 1.15
                           times n^0.38, of n experts that a token uses in all layers */
    float min_coverage; /* locked: where the set covers less than this share of the router's weight,
                           lately, choose as in prefer, and for a prompt read more; 0: never */
    bool records_routing; /* leave room for tools/route_record.h to record a context's routing */
    enum slu_read_ahead read_ahead; /* for measurements */
    bool touch_memory; /* have the system provide the memory of expert slots and activations while
                          the engine is opened, and of keys and values while a session is created,
                          and not as it is first used: for measurements. It takes 3 s a GiB on some
                          virtual machines */
};

/* A plan: what each account of the ledger will hold, from the pack's header alone. */
struct slu_plan_line {
    const char *name;
    uint64_t bytes;
};
#define SLU_PLAN_LINES_MAX 8
struct slu_plan {
    struct slu_plan_line lines[SLU_PLAN_LINES_MAX];
    uint32_t n_lines;
    uint64_t total_bytes;                    /* the sum of the lines, or what loading takes for
                                                a moment where that is more */
    uint64_t ram_bytes;                      /* the limit it was made for */
    uint64_t least_ram_bytes;                /* the smallest limit that would do */
    uint64_t resident_ram_bytes;             /* the limit from which on everything is resident */
    uint32_t n_slots, n_slots_min, n_blocks; /* expert slots planned; the least; blocks in all */
    uint32_t n_slots_lent; /* at most so many more, in the part of the KV cache that an as yet short
                              context leaves unused */
    uint64_t slot_bytes;
    uint64_t small_slot_bytes; /* where some layers' blocks are smaller, or 0 */
    uint32_t token_blocks;     /* blocks that one token uses, all layers together */
    enum slu_routing routing;
    uint32_t set_experts;       /* prefer, locked: that count as in memory; 0 in exact */
    uint32_t chunk_tokens;      /* of a prompt, computed at once */
    uint32_t long_chunk_tokens; /* likewise, while more is left and slots make room; no fewer */
    uint32_t ctx, n_threads;
    uint32_t ctx_trained;  /* the context that the model was trained for; 0: not known */
    uint64_t memory_bytes; /* that the machine has, or this process's control group may use; 0: not
                              known */
    enum slu_use_kv kv;
    bool fits;        /* into ram_bytes */
    bool below_token; /* slots hold less than one token uses, lent ones too: few will hit */
};

/* Plans without loading anything. 0 also when it doesn't fit: see ret_plan->fits. Errors as
 * slu_engine_open's, but for SLU_EBUDGET. */
int slu_plan(const char *path, const struct slu_engine_params *params, struct slu_plan *ret_plan,
             struct slu_err *err);

/* Blocks while the dense weights are read. SLU_EBUDGET, before anything is loaded, with the least
 * that would do; SLU_EINVAL for params; SLU_ENOENT, SLU_EIO, SLU_EFORMAT, SLU_EUNSUP for the file;
 * SLU_EUNSUP too for io_uring asked for by name where there is none; SLU_ENOMEM. */
int slu_engine_open(const char *path, const struct slu_engine_params *params,
                    struct slu_engine **ret_engine, struct slu_err *err);
/* All its sessions must be destroyed before. NULL is fine. */
void slu_engine_close(struct slu_engine *engine);

/* The plan that it runs under; valid as long as the engine is. */
const struct slu_plan *slu_engine_plan(const struct slu_engine *engine);

/* Where the time of computing went. The parts of wall_ns are exclusive and add up to it; what
 * threads did is within experts_ns, of which each has as much. */
enum slu_phase { SLU_PHASE_PREFILL, SLU_PHASE_DECODE, SLU_PHASES };
#define SLU_STATS_THREADS_MAX 64

struct slu_thread_stats {
    uint64_t stall_ns;   /* waiting for blocks, with nothing else to do */
    uint64_t unpack_ns;  /* decoding and checking blocks that arrived */
    uint64_t product_ns; /* multiplying blocks */
};

struct slu_phase_stats {
    uint64_t n_tokens, n_chunks;
    uint64_t wall_ns;
    uint64_t embed_ns;       /* reading embedding rows */
    uint64_t dense_ns;       /* attention's projections, routers, norms */
    uint64_t attention_ns;   /* scores and sums over the KV cache */
    uint64_t experts_ns;     /* feed-forward networks, streaming included */
    uint64_t head_ns;        /* final norm and output matrix */
    uint64_t other_ns;       /* sampling */
    uint64_t flash_bytes;    /* read, for experts and embedding rows */
    uint64_t unpacked_bytes; /* of compressed blocks, once decoded */
    uint64_t hits, misses;   /* expert blocks */
    uint64_t guesses;        /* blocks read before a layer asked for them */
    uint64_t foreseen;       /* of the guesses, those that it then did ask for */
    /* Weights multiplied, once for each chunk that they served, and products of one weight with
     * one token. */
    uint64_t dense_bytes, expert_bytes, dense_macs, expert_macs;
    /* Weight that routers gave to the experts they chose, 1 for each token and layer; and how much
     * of it went to experts that were then used: all of it in SLU_ROUTING_EXACT. */
    double router_weight, covered_weight;
    double experts_read; /* from flash, on average blocks of an expert */
    uint32_t n_threads;
    struct slu_thread_stats threads[SLU_STATS_THREADS_MAX];
};

/* What model it is. */
struct slu_engine_info {
    char name[64]; /* as the pack's metadata have it, in printable ASCII; may be empty */
    const char *architecture;
    uint32_t n_layers, n_experts, n_used, n_vocab; /* experts: routed ones; 0 if there are none */
};
void slu_engine_info(const struct slu_engine *engine, struct slu_engine_info *ret_info);

/* For measurements, and for nothing else, since it changes what the model computes: after the
 * router of a layer has chosen experts for the token at `position`, `route` may put n_used others
 * in their place, distinct and below n_experts, and other weights. NULL: the router decides. Not
 * while a session computes. */
typedef void (*slu_route_fn)(void *arg, uint32_t layer, uint32_t position, uint32_t n_used,
                             uint32_t *chosen, float *weight);
void slu_engine_set_route(struct slu_engine *engine, slu_route_fn route, void *arg);
/* For measurements likewise: look-ahead can foresee nothing of choices that were put in the
 * router's place, so `guess` may replace what it guesses of a layer that hasn't run yet: n_used
 * distinct experts below n_experts, the likeliest first, and their weights. It has a part in what
 * is computed only in SLU_ROUTING_LOCKED, whose set goes by it while a prompt is computed. In the
 * thread that computes; it must not call the engine. NULL: the layer's router guesses. Not while a
 * session computes. */
void slu_engine_set_guess(struct slu_engine *engine, slu_route_fn guess, void *arg);

/* To look on, and change nothing: `observe` is told what each layer's router chose for the token at
 * `position`, before any way of routing but the exact one has its say: n_used distinct experts, and
 * what their outputs would be weighed with. In the thread that computes; it should return soon and
 * must not call the engine. NULL: nobody looks on. Not while a session computes. */
typedef void (*slu_observe_fn)(void *arg, uint32_t layer, uint32_t position, uint32_t n_used,
                               const uint32_t *chosen, const float *weight);
void slu_engine_set_observer(struct slu_engine *engine, slu_observe_fn observe, void *arg);

struct slu_engine_stats {
    uint64_t flash_bytes;        /* read since it was opened, for experts and embedding rows */
    uint64_t hits, misses;       /* expert blocks */
    uint32_t n_slots;            /* for them at present: those planned, and what is lent */
    uint64_t wait_ns, decode_ns; /* summed over threads */
    uint64_t ledger_used_bytes, ledger_peak_bytes, ledger_limit_bytes;
    uint64_t adapter_flash_bytes; /* read for adapters, beyond flash_bytes */
    uint32_t n_adapters;          /* in memory */
    uint32_t n_adapters_streamed; /* of these, those whose experts are streamed */
    const char *io_backend; /* "io_uring", "pread", "mmap"; "none" where nothing is streamed */
    const char *kernels;    /* "c", "avx2", ... */
    bool io_direct;         /* false: the file system refused O_DIRECT */
    struct slu_phase_stats phases[SLU_PHASES];
};
/* May be called at any time and from any thread, also while a session computes. */
void slu_engine_stats(const struct slu_engine *engine, struct slu_engine_stats *ret_stats);

/* What this machine gives, measured at the time of the call: what bounds the speed of a pack. */
struct slu_probe {
    double flash_bytes_s;  /* direct reads of the pack's experts, chosen at random, as many in
                              flight as the engine has; 0 where there are none */
    double ram_bytes_s;    /* reading memory, with all threads, on the average of .4 s */
    double macs_s;         /* int8 multiply-adds of the kernels' instructions, with all threads;
                              0 where that can't be told */
    double unpack_bytes_s; /* decoding the pack's compressed blocks, with all threads, in bytes of
                              output; 0 where there are none */
    uint32_t flash_depth;  /* reads in flight */
    uint32_t flash_read_bytes; /* of the largest */
};

/* Blocks for some three seconds. Takes up to 512 MiB of memory, or params->ram_bytes if that is
 * less, and gives it back; so call it when no engine is open. Errors as slu_engine_open's. */
int slu_probe_run(const char *path, const struct slu_engine_params *params,
                  struct slu_probe *ret_probe, struct slu_err *err);

/* Memory in turns with an engine's tokens, since what a machine gives changes within seconds where
 * others use it too: what turns have come to, zeros at first. */
#define SLU_PROBE_STREAMS 3u /* 1, 2 or 4 streams a thread */
struct slu_probe_turns {
    uint32_t n;
    uint64_t ram_bytes[SLU_PROBE_STREAMS], ram_ns[SLU_PROBE_STREAMS];
};

/* A turn, some 10 ms at 40 GB/s, between two steps of a session: a text callback may call it.
 * Reads dense weights, and does nothing where they are less than sixteen times the last cache
 * (or than 512 MiB, if that is more), or where not all experts have slots. Waits while another
 * session computes a chunk; never from a callback for logits, routes, guesses or choices. */
void slu_probe_turn(struct slu_engine *engine, struct slu_probe_turns *turns);
/* Puts what turns have measured in place of what the probe has; false if that is too little. */
bool slu_probe_take_turns(struct slu_probe *probe, const struct slu_probe_turns *turns);

/* The least seconds that a token of a phase can take where a probe's rates hold, if everything
 * overlaps perfectly: the largest of four. */
struct slu_bound {
    double flash_s;      /* reading what was read */
    double unpack_s;     /* decoding what was decoded */
    double ram_s;        /* reading the weights that were multiplied from memory, once a chunk */
    double arithmetic_s; /* multiplying them */
    double token_s;      /* the bound */
    const char *by;      /* "flash", "unpack", "ram", "arithmetic"; "nothing" where nothing ran */
    double efficiency;   /* the bound over the time that a token took; 0 where nothing ran */
};
void slu_bound_of(const struct slu_phase_stats *phase, const struct slu_probe *probe,
                  struct slu_bound *ret_bound);

/* Text to ids and back. Returns a count (written up to n_max) or a negative error. special: spelled
 * out special tokens are recognised. */
uint32_t slu_engine_n_vocab(const struct slu_engine *engine);
int64_t slu_engine_encode(const struct slu_engine *engine, const char *text, size_t len,
                          bool special, int32_t *ret_ids, size_t n_max, struct slu_err *err);
int64_t slu_engine_decode(const struct slu_engine *engine, const int32_t *ids, size_t n,
                          char *ret_text, size_t bytes_max, struct slu_err *err);

struct slu_session_params {
    uint32_t ctx; /* 0: the engine's; never more */
};

/* An empty context; all of its memory is taken here. The plan has room for one session of the
 * engine's context; further ones need a budget that leaves it. params may be NULL. SLU_EBUDGET,
 * SLU_ENOMEM. */
int slu_session_create(struct slu_engine *engine, const struct slu_session_params *params,
                       struct slu_session **ret_session, struct slu_err *err);
/* NULL is fine. Waits while another session computes a chunk, if what this one's context left
 * unused has kept experts. */
void slu_session_destroy(struct slu_session *session);

/* A LoRA adapter by path (with a '/' or ending in ".sla") or by name in adapters_dir. Its
 * products are multiplied by scale; 1 is what it was trained for. */
struct slu_adapter_choice {
    const char *adapter;
    float scale;
};

/* From the next computed token on, the session runs with exactly these adapters, n of them; none
 * with 0. Adapters in memory are swapped at once; others are loaded first, and the least recently
 * used ones that no session holds make room, for which both what the session has and what it asks
 * for must fit at once. One for which there is still too little has its experts' matrices streamed
 * from flash, with the same results. What was computed under another choice is computed again. On
 * failure the session keeps what it had: SLU_EINVAL for a scale that is, or makes, no finite
 * number, and for too many adapters; SLU_ENOENT, SLU_EIO, SLU_EFORMAT, SLU_EUNSUP, SLU_EBUDGET,
 * SLU_ENOMEM.
 */
int slu_session_set_adapters(struct slu_session *session, const struct slu_adapter_choice *choices,
                             size_t n, struct slu_err *err);

/* Bytes of memory that an adapter takes when all of it is there, from its header: for
 * slu_engine_params.adapter_bytes; and how many of these are for experts (may be NULL), which are
 * streamed from flash where the share has no room for them. It is looked up as
 * slu_session_set_adapters does; adapters_dir may be NULL. */
int slu_adapter_memory(const char *adapters_dir, const char *adapter, uint64_t *ret_bytes,
                       uint64_t *ret_expert_bytes, struct slu_err *err);

/* What a predictor or a profile expects of the text that is about to be computed, before its first
 * token is: in SLU_ROUTING_LOCKED the set begins with it, and reading begins at once. Replaces what
 * was known of any text before it, so it is for a session whose context is empty; call it after the
 * session's adapters are set, and right before generate or eval where sessions take turns. In other
 * modes it is checked and otherwise without effect. The scores are copied. SLU_EINVAL for another
 * shape than the model's, and for scores that are negative or no finite numbers. */
int slu_session_rank(struct slu_session *session, const struct slu_ranking *ranking,
                     struct slu_err *err);

/* Whether the pack has a predictor of which experts a prompt will want; sluice calibrate puts one
 * in. *ret_why (may be NULL): NULL, or, where there is one that is damaged, not this model's or,
 * with routing that isn't exact, too large for the budget, a sentence; the engine runs without it
 * then. */
bool slu_engine_has_predictor(const struct slu_engine *engine, const char **ret_why);

/* What the predictor expects of the session's pending text, before it is computed: 1 with
 * ret_prompt[n_layers][n_experts], a layer's adding up to 1, to be given to slu_session_rank, and
 * ret_answer, to be given to slu_session_rank_answer; 0 without a predictor, or without anything
 * pending, or where the budget leaves no memory for it. With ret_answer NULL, ret_prompt is for
 * both together. It takes some milliseconds. SLU_EIO, SLU_EFORMAT. */
int slu_session_predict(struct slu_session *session, float *ret_prompt, float *ret_answer,
                        struct slu_err *err);

/* The ranking that takes slu_session_rank's place once the next slu_session_generate has computed
 * the prompt: an answer wants other experts than its prompt. It is for that one answer. Checked and
 * copied as slu_session_rank does; SLU_ENOMEM. */
int slu_session_rank_answer(struct slu_session *session, const struct slu_ranking *ranking,
                            struct slu_err *err);

/* Profiles: such scores in a file, for texts of one kind; bound to the pack they were made with.
 * Saving: whole or not at all; SLU_EIO, SLU_ENOMEM; SLU_EINVAL for scores that are negative or no
 * numbers. Loading: SLU_ENOENT, SLU_EIO; SLU_EFORMAT for a file that is damaged or none, or one for
 * another model; SLU_EUNSUP for a newer version. Scores: [n_layers][n_experts]. */
int slu_profile_save(const char *path, const struct slu_engine *engine, const float *scores,
                     struct slu_err *err);
int slu_profile_load(const char *path, const struct slu_engine *engine, float *ret_scores,
                     struct slu_err *err);

/* Append to the context what the next generate starts from. SLU_ERANGE when it doesn't fit.
 * Nothing is computed yet. */
int slu_session_text(struct slu_session *session, const char *text, size_t len,
                     struct slu_err *err); /* as it is, special tokens recognised, BOS if wanted */
int slu_session_system(struct slu_session *session, const char *text, size_t len,
                       struct slu_err *err); /* before the first message; takes effect with it */
int slu_session_chat(struct slu_session *session, const char *text, size_t len,
                     struct slu_err *err); /* a user's message through the chat template */
int slu_session_tokens(struct slu_session *session, const int32_t *ids, size_t n,
                       struct slu_err *err);

/* Computes the pending tokens; logits (n_vocab floats, valid during the call) after each go to
 * the callback, which returns 0 to go on. It must not compute with another session of the engine,
 * nor destroy one: that waits for this one. SLU_ECANCEL if it stopped or slu_session_cancel was
 * called, after which tokens whose logits it wasn't given are pending again; SLU_EIO, SLU_EFORMAT.
 */
typedef int (*slu_logits_fn)(void *arg, uint32_t position, const float *logits);
int slu_session_eval(struct slu_session *session, slu_logits_fn logits, void *arg,
                     struct slu_err *err);

struct slu_sampling {
    float temperature;      /* 0: greedy */
    uint32_t top_k;         /* 0: all */
    float top_p;            /* 0 or 1: all */
    float min_p;            /* 0: off */
    float repeat_penalty;   /* 0 or 1: off */
    uint32_t repeat_window; /* tokens looked back at; 0 means 64 */
    uint64_t seed;
};

/* Text as it comes: whole UTF-8 sequences. Returns 0 to go on. */
typedef int (*slu_text_fn)(void *arg, const char *text, size_t len, int32_t token);

struct slu_generate_params {
    uint32_t n_max;  /* tokens at most; 0: until the end of the turn or of the context */
    bool ignore_end; /* go on past end-of-turn tokens */
    struct slu_sampling sampling;
    slu_text_fn text; /* may be NULL */
    void *arg;
};

enum slu_stop { SLU_STOP_END, SLU_STOP_LENGTH, SLU_STOP_CONTEXT, SLU_STOP_CANCEL };

struct slu_result {
    enum slu_stop stop;
    uint32_t n_prompt;    /* tokens computed before the first one was generated */
    uint32_t n_generated; /* without the one that ended the turn */
    double prefill_s, decode_s;
};

/* Prefills what is pending and generates. After an error (SLU_EIO in the middle, say) the session
 * holds what was computed before it, and engine and other sessions go on; ret_result (may be NULL)
 * is then left as it was. Called again without anything new, it goes on where it stopped, also
 * within a chat's answer.
 * SLU_EINVAL with an empty context, SLU_EIO, SLU_ENOMEM; SLU_EFORMAT where the pack is damaged or
 * the model computes no numbers. */
int slu_session_generate(struct slu_session *session, const struct slu_generate_params *params,
                         struct slu_result *ret_result, struct slu_err *err);

/* Ends the running or the next generate or eval at its next step, with SLU_STOP_CANCEL or
 * SLU_ECANCEL. Async-signal-safe. */
void slu_session_cancel(struct slu_session *session);

/* The ids in the context so far, prompt and answers; valid until the session's next call. */
const int32_t *slu_session_ids(const struct slu_session *session, size_t *ret_n);

#ifdef __cplusplus
}
#endif

#endif
