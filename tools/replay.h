/*
 * A recorded routing trace through a cache policy, without a model. One global cache over (layer,
 * expert) pairs; tokens one after the other, layer by layer, a layer's experts in the order in
 * which the router ranks them. The prompt warms the cache; only decoding counts.
 *
 * As in the stream, none of a token's experts of a layer leaves to make room for another one of
 * them as long as there is anything else. Only the yardstick, LRU, is as textbooks have it: each
 * use by itself, with no such protection.
 *
 * Thread safety: none.
 */
#ifndef SLU_TOOLS_REPLAY_H
#define SLU_TOOLS_REPLAY_H

#include "experts/policy.h"
#include "tools/route_trace.h"

struct slu_replay_result {
    uint32_t n_slots;
    uint64_t hits, misses; /* while decoding */
    double hit_rate;       /* 0 if nothing was decoded */
};

/* The slots that a fraction (0 < fraction <= 1) of the trace's bank comes to, at least 1. */
uint32_t slu_replay_slots(const struct slu_route_trace *trace, double fraction);

/* SLU_ENOMEM. */
int slu_replay_policy(const struct slu_route_trace *trace, const struct slu_policy_kind *kind,
                      uint32_t n_slots, struct slu_replay_result *ret_result, struct slu_err *err);

/* Plain LRU. */
int slu_replay_lru(const struct slu_route_trace *trace, uint32_t n_slots,
                   struct slu_replay_result *ret_result, struct slu_err *err);

/* What nobody can beat: the block that leaves is the one whose next use is the furthest away
 * (L. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966). */
int slu_replay_belady(const struct slu_route_trace *trace, uint32_t n_slots,
                      struct slu_replay_result *ret_result, struct slu_err *err);

struct slu_replay_locked {
    uint32_t n_resident;
    float reads_per_token; /* asked for; 0: the default */
    /* While decoding: */
    double covered_router_weight; /* of all router weight, the share of experts in the set */
    double experts_read_per_token;
};

/* The locked set over the trace: chosen after the prompt, then moved as decoding goes. An expert
 * that is read after a layer's choice is there from the next token on. reads_per_token as in
 * experts/locked.h. SLU_ENOMEM. */
int slu_replay_locked(const struct slu_route_trace *trace, uint32_t n_resident,
                      float reads_per_token, struct slu_replay_locked *ret_result,
                      struct slu_err *err);

#endif
