/*
 * A recorded trace (tools/route_trace.h) laid over a model, which may have other sizes than the one
 * that it was recorded from. What must survive is how choices follow each other in time, since that
 * is what a cache lives on. For layer l of the model, the choices of the trace's layers l, l + s,
 * l + 2s, ... (modulo their number; s is that number over how many are needed) are put together
 * until there are as many as the model uses. Each layer's expert numbers go through a fixed
 * permutation of its own, and modulo the model's experts where those are fewer; the first layer's
 * stay as they are. docs/benchmarks.md says what follows from that.
 *
 * Prompt tokens are taken from the trace's prompt, around and around, so that the last is its last;
 * generated ones from its decoding.
 *
 * Thread safety: constant once made.
 */
#ifndef SLU_TOOLS_ROUTE_MAP_H
#define SLU_TOOLS_ROUTE_MAP_H

#include "tools/route_trace.h"

struct slu_route_map_params {
    uint32_t n_layers, n_experts, n_used; /* of the model */
    uint32_t n_prompt;                    /* positions before it are the prompt's */
};

struct slu_route_map;

/* Reads the trace. Errors as slu_route_trace_open's; SLU_EINVAL for a model without experts, or
 * that uses more than SLU_TOP_K_MAX for a token. */
int slu_route_map_open(const char *path, const struct slu_route_map_params *params,
                       struct slu_route_map **ret_map, struct slu_err *err);
void slu_route_map_close(struct slu_route_map *map); /* NULL is fine */

/* What the model would have been recorded with, of its prompt and n_decoded tokens after it. Token
 * by token; the caller's, to be finished. SLU_ENOMEM; SLU_EINVAL where it has no tokens, or more
 * of anything than a trace can have. */
int slu_route_map_trace(const struct slu_route_map *map, uint32_t n_decoded,
                        struct slu_route_trace *ret_trace, struct slu_err *err);

/* The experts of a token, n_used distinct ones, and their weights, whose sum is 1. */
void slu_route_map_choose(const struct slu_route_map *map, uint32_t layer, uint32_t position,
                          uint32_t *ret_chosen, float *ret_weight);

/* A guess at the same: each expert is right with probability `share` (0 to 1), and otherwise one
 * that the token doesn't go to, where there is any. The same each time. */
void slu_route_map_guess(const struct slu_route_map *map, uint32_t layer, uint32_t position,
                         float share, uint32_t *ret_guessed, float *ret_weight);

#endif
