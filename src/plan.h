/*
 * The plan: how the ledger's limit is divided among the accounts, from a pack's header alone.
 * `sluice plan` prints it and the engine runs under it; the sizes come from the very functions
 * that later charge them.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_PLAN_H
#define SLU_PLAN_H

#include "model/model.h"
#include "slu.h"

/* Parameters with every "0 means" resolved. */
struct slu_plan_input {
    const struct slu_pack *pack;
    const struct slu_weights *weights; /* described */
    uint64_t ram_bytes;
    uint32_t ctx, n_threads;
    enum slu_io_backend backend;
    enum slu_kv_cache_type kv;
    bool minimum_cache;
    bool records_routing;
    bool touch_memory;
    bool without_predictor;               /* the pack's section is left aside */
    const struct slu_policy_kind *policy; /* NULL: there is none of that name */
    bool is_mapped;                       /* experts are not streamed but mapped */
    enum slu_routing routing;
    bool has_residency; /* experts are chosen by what is in memory, as below */
    struct slu_residency_params residency;
    enum slu_model_lookahead lookahead;
    uint64_t adapter_bytes;        /* the share under ram_bytes */
    uint64_t adapter_expert_bytes; /* what experts take of adapters, of which the share has no more
                                      than a part of ram_bytes */
    uint32_t adapters_at_once;
    const char *adapters_dir;
};

void slu_plan_resolve(const struct slu_engine_params *params, const struct slu_pack *pack,
                      const struct slu_weights *weights, struct slu_plan_input *ret_input);

/* The model's part of it, for a number of slots and tokens of a chunk. */
struct slu_model_params slu_plan_model_params(const struct slu_plan_input *input, uint32_t n_slots,
                                              uint32_t chunk);

/* A predictor is left aside where the budget has no room for it, which sets without_predictor. */
void slu_plan_make(struct slu_plan_input *input, struct slu_plan *ret_plan);

/* Bytes that the engine charges to SLU_ACCOUNT_TEXT, and a session to SLU_ACCOUNT_SCRATCH. */
uint64_t slu_plan_text_bytes(const struct slu_plan_input *input);
uint64_t slu_plan_session_bytes(const struct slu_weights *weights, uint32_t ctx);
/* What recording the routing of ctx tokens takes, and writing it down: to be charged to
 * SLU_ACCOUNT_SCRATCH by who does it. */
uint64_t slu_plan_record_bytes(const struct slu_weights *weights, uint32_t ctx);

#endif
