#include "plan.h"

#include <string.h>

#include "base/cgroup.h"
#include "experts/predict.h"
#include "sampler.h"
#include "text/tokenizer.h"

/* Tokens of a prefill chunk. All of a layer's blocks are read once for so many tokens, in which
 * time two cores barely keep up with multiplying them. */
#define CHUNK_MAX 512u
/* Of the budget that experts of adapters are kept in where they would take more. An adapter's
 * experts are wanted as often as the base's, so memory is of as much use for the ones as for the
 * others, and there is less of them. */
#define ADAPTERS_PART 8u

static uint64_t half_of_memory(void)
{
    uint64_t bytes = slu_cgroup_memory_bytes("");
    return bytes ? bytes / 2 : 2ull << 30;
}

static enum slu_io_backend backend_of(enum slu_io io)
{
    switch (io) {
    case SLU_USE_IO_URING:
        return SLU_IO_URING;
    case SLU_USE_IO_PREAD:
        return SLU_IO_PREAD;
    default:
        return SLU_IO_AUTO;
    }
}

/* Of the experts of adapters, what a budget has room for. */
static uint64_t expert_share(uint64_t bytes, uint64_t ram_bytes)
{
    return bytes < ram_bytes / ADAPTERS_PART ? bytes : ram_bytes / ADAPTERS_PART;
}

/* Standard deviations of a token's scores: docs/benchmarks/routing.md has what others give. */
#define ROUTE_BIAS 0.5f

static void resolve_routing(const struct slu_engine_params *params, struct slu_plan_input *in)
{
    in->routing = params->routing;
    in->has_residency = params->routing != SLU_ROUTING_EXACT && in->weights->n_blocks > 0;
    in->residency = (struct slu_residency_params){
        .weights = in->weights,
        .is_locked = params->routing == SLU_ROUTING_LOCKED,
        .share = params->set_share,
        .bias = params->route_bias == 0 ? ROUTE_BIAS : params->route_bias,
        .reads_per_token = params->set_reads,
        .min_coverage = params->min_coverage,
        .policy = in->policy,
    };
    in->lookahead = (enum slu_model_lookahead)params->read_ahead;
}

/* A set has one expert of each layer at least, or what its share comes to. */
static uint32_t set_min(const struct slu_plan_input *in)
{
    const struct slu_config *c = &in->weights->config;
    uint32_t n = in->has_residency ? c->n_layers - c->n_dense_layers : 0;
    return n ? slu_residency_slots(in->weights, n) : 0;
}

void slu_plan_resolve(const struct slu_engine_params *params, const struct slu_pack *pack,
                      const struct slu_weights *weights, struct slu_plan_input *ret_input)
{
    uint32_t trained = weights->config.n_ctx_train;
    *ret_input = (struct slu_plan_input){
        .pack = pack,
        .weights = weights,
        .ram_bytes = params->ram_bytes ? params->ram_bytes : half_of_memory(),
        .ctx = params->ctx      ? params->ctx
               : trained < 4096 ? trained
                                : 4096,
        .n_threads = params->n_threads ? params->n_threads : slu_pool_cpus(),
        .backend = backend_of(params->io),
        .kv = params->kv == SLU_USE_KV_Q8 ? SLU_KV_CACHE_Q8 : SLU_KV_CACHE_F16,
        .minimum_cache = params->minimum_cache,
        .records_routing = params->records_routing,
        .touch_memory = params->touch_memory,
        .policy = slu_policy_find(params->policy ? params->policy : "best"),
        .is_mapped = params->io == SLU_USE_IO_MMAP,
        .adapter_bytes = params->adapter_bytes,
        .adapters_at_once = params->adapters_at_once,
        .adapters_dir = params->adapters_dir,
    };
    resolve_routing(params, ret_input);
    uint64_t experts = params->adapter_expert_bytes;
    if (params->adapter_bytes >= experts) {
        ret_input->adapter_expert_bytes = experts;
        ret_input->adapter_bytes -= experts - expert_share(experts, ret_input->ram_bytes);
    }
    if (ret_input->n_threads > SLU_POOL_THREADS_MAX) {
        ret_input->n_threads = SLU_POOL_THREADS_MAX;
    }
}

uint64_t slu_plan_text_bytes(const struct slu_plan_input *in)
{
    const struct slu_pack *pack = in->pack;
    uint64_t bytes =
        slu_pack_memory_bytes(pack) + in->weights->heap_bytes + slu_tokenizer_bytes_max(&pack->kvs);
    return in->without_predictor ? bytes - pack->section_bytes
                                 : bytes + slu_predictor_bytes(pack->section, pack->section_bytes);
}

uint64_t slu_plan_session_bytes(const struct slu_weights *weights, uint32_t ctx)
{
    const struct slu_config *c = &weights->config;
    uint64_t scores = (uint64_t)c->n_layers * c->n_experts + 1; /* of slu_session_rank_answer */
    return slu_sampler_bytes(c->n_vocab) + (uint64_t)ctx * sizeof(int32_t) + scores * sizeof(float);
}

uint64_t slu_plan_record_bytes(const struct slu_weights *weights, uint32_t ctx)
{
    const struct slu_config *c = &weights->config;
    uint64_t n_visits = (uint64_t)ctx * (c->n_layers - c->n_dense_layers);
    /* A choice in memory is a number and a weight; as stored, an id of two bytes and a share of
     * one, and two bytes more for all of a visit. */
    uint64_t in_memory = sizeof(uint16_t) + sizeof(float), stored = 3;
    return n_visits * (c->n_used * (in_memory + stored) + 2) + (uint64_t)ctx * sizeof(int32_t) +
           c->n_layers * sizeof(uint32_t);
}

_Static_assert((int)SLU_ACCOUNTS <= SLU_PLAN_LINES_MAX, "each account may have a line");

struct division {
    uint64_t accounts[SLU_ACCOUNTS];
    uint64_t total; /* the peak: what runs, or what loading needs if that is more */
};

/* Slots that a KV cache has room for at its first position. */
static uint32_t slots_lent(const struct slu_plan_input *in, const struct slu_model_params *model,
                           uint32_t chunk)
{
    const struct slu_config *config = &in->weights->config;
    if (in->minimum_cache || in->is_mapped || in->weights->n_blocks == 0) {
        return 0;
    }
    struct slu_stream_params stream = slu_model_stream_params(model, in->n_threads);
    stream.n_borrowed_max = UINT32_MAX;
    return slu_stream_borrowed_slots(&stream,
                                     slu_kv_cache_spare_bytes(config, in->kv, in->ctx, chunk));
}

/* Tokens of a prompt for which all of a layer's blocks are read once, at most, if slots have room
 * for their scratch. With more they would be read less often still, but a chunk is what other
 * sessions wait for, and a layer of it who cancels. */
#define LONG_CHUNK_MAX 2048u

/* None where nothing would be gained, or experts are kept by another rule than the cache's. */
static uint32_t choose_long_chunk(const struct slu_plan_input *in,
                                  const struct slu_model_params *model)
{
    const struct slu_weights *w = in->weights;
    uint32_t n_left = model->n_slots - model->n_slots / 4;
    uint32_t longest = in->ctx < LONG_CHUNK_MAX ? in->ctx : LONG_CHUNK_MAX;
    longest = (longest + SLU_LONG_CHUNK_STEP - 1) / SLU_LONG_CHUNK_STEP * SLU_LONG_CHUNK_STEP;
    if (in->minimum_cache || in->is_mapped || in->has_residency || model->n_slots >= w->n_blocks ||
        n_left < w->layer_blocks_max) {
        return model->chunk;
    }
    struct slu_stream_params stream = slu_model_stream_params(model, in->n_threads);
    size_t room = slu_stream_lendable_bytes(&stream);
    uint32_t n_tasks = slu_scratch_tasks_max(w, model->chunk);
    while (longest > model->chunk &&
           (slu_scratch_tasks_max(w, longest) > n_tasks ||
            slu_scratch_chunk_bytes(w, longest, in->n_threads) > room)) {
        longest -= longest < SLU_LONG_CHUNK_STEP ? longest : SLU_LONG_CHUNK_STEP;
    }
    return longest > model->chunk ? longest : model->chunk;
}

struct slu_model_params slu_plan_model_params(const struct slu_plan_input *in, uint32_t n_slots,
                                              uint32_t chunk)
{
    struct slu_model_params params = {.weights = in->weights,
                                      .pack = in->pack,
                                      .chunk = chunk,
                                      .n_slots = n_slots,
                                      .touch_memory = in->touch_memory,
                                      .policy = in->policy,
                                      .backend = in->backend,
                                      .is_mapped = in->is_mapped,
                                      .residency = in->has_residency ? &in->residency : NULL,
                                      .lookahead = in->lookahead};
    params.n_slots_lent = slots_lent(in, &params, chunk);
    params.long_chunk = choose_long_chunk(in, &params);
    return params;
}

static struct division divide(const struct slu_plan_input *in, uint32_t chunk, uint32_t n_slots)
{
    const struct slu_weights *w = in->weights;
    struct division d = {0};
    if (w->n_blocks) {
        struct slu_model_params params = slu_plan_model_params(in, n_slots, chunk);
        struct slu_residency_params residency = slu_model_residency_params(&params);
        struct slu_stream_params stream = slu_model_stream_params(&params, in->n_threads);
        struct slu_mapped_params mapped = slu_model_mapped_params(&params, in->n_threads);
        if (in->is_mapped) {
            d.accounts[SLU_ACCOUNT_IO] += slu_mapped_charge_bytes(&mapped);
        } else {
            slu_stream_charge_bytes(&stream, d.accounts);
        }
        if (residency.n_set > 0) {
            d.accounts[SLU_ACCOUNT_EXPERTS] += slu_residency_bytes(&residency);
        }
    }
    d.accounts[SLU_ACCOUNT_DENSE] += slu_weights_charge_bytes(w);
    d.accounts[SLU_ACCOUNT_KV] += slu_kv_cache_charge_bytes(&w->config, in->kv, in->ctx, chunk);
    d.accounts[SLU_ACCOUNT_SCRATCH] +=
        slu_scratch_charge_bytes(w, chunk, in->n_threads) + slu_plan_session_bytes(w, in->ctx);
    if (in->records_routing) {
        d.accounts[SLU_ACCOUNT_SCRATCH] += slu_plan_record_bytes(w, in->ctx);
    }
    d.accounts[SLU_ACCOUNT_IO] += slu_embed_charge_bytes(w, chunk, in->backend);
    d.accounts[SLU_ACCOUNT_TEXT] += slu_plan_text_bytes(in);
    if (in->adapter_bytes) {
        d.accounts[SLU_ACCOUNT_ADAPTERS] = in->adapter_bytes;
        d.accounts[SLU_ACCOUNT_IO] += slu_adapter_staging_bytes();
    }
    for (int i = 0; i < SLU_ACCOUNTS; i++) {
        d.total += d.accounts[i];
    }
    uint64_t loading =
        d.accounts[SLU_ACCOUNT_DENSE] + d.accounts[SLU_ACCOUNT_TEXT] + slu_weights_loading_bytes(w);
    d.total = loading > d.total ? loading : d.total;
    return d;
}

/* The largest chunk that a context has a use for. */
static uint32_t chunk_max(uint32_t ctx)
{
    uint32_t chunk = CHUNK_MAX;
    while (chunk > ctx && chunk > 1) {
        chunk /= 2;
    }
    return chunk;
}

/* The largest chunk whose scratch leaves the slots their share; small ones if none does. */
static uint32_t choose_chunk(const struct slu_plan_input *in, uint32_t n_slots_min)
{
    for (uint32_t chunk = chunk_max(in->ctx); chunk > 1; chunk /= 2) {
        struct division d = divide(in, chunk, n_slots_min);
        bool is_modest = d.accounts[SLU_ACCOUNT_SCRATCH] <= in->ram_bytes / 8 || chunk <= 8;
        if (d.total <= in->ram_bytes && is_modest) {
            return chunk;
        }
    }
    return 1;
}

/* What a process takes that no account can tell: program and stacks, page tables, what the system
 * provides in whole huge pages. Slots beyond the least leave room for it: 32 MiB of 4 GiB, where 20
 * were measured. */
#define UNSEEN_PART 128u

static uint64_t without_unseen(uint64_t ram_bytes)
{
    return ram_bytes - ram_bytes / UNSEEN_PART;
}

static uint64_t with_unseen(uint64_t bytes)
{
    return bytes + bytes / (UNSEEN_PART - 1) + 1;
}

static bool fits(const struct slu_plan_input *in, uint32_t chunk, uint32_t n_slots)
{
    return divide(in, chunk, n_slots).total <= without_unseen(in->ram_bytes);
}

/* As many as fit. With two sizes they take less than as many of one did, so these are asked for
 * first. */
static uint32_t choose_slots(const struct slu_plan_input *in, uint32_t chunk, uint32_t n_slots_min)
{
    uint32_t lo = n_slots_min, hi = in->weights->n_blocks;
    if (in->minimum_cache || in->is_mapped) {
        return lo;
    }
    struct slu_model_params model = slu_plan_model_params(in, lo, chunk);
    uint32_t two_sizes = slu_model_two_sizes_from(&model);
    if (two_sizes > lo && two_sizes <= hi) {
        bool has_two = fits(in, chunk, two_sizes);
        lo = has_two ? two_sizes : lo;
        hi = has_two ? hi : two_sizes - 1;
    }
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo + 1) / 2;
        if (fits(in, chunk, mid)) {
            lo = mid;
        } else {
            hi = mid - 1;
        }
    }
    return lo;
}

/* The smallest budget that would do: the adapters' share grows with it, by less than it does. */
static uint64_t least_ram(const struct slu_plan_input *in, uint32_t n_slots_min)
{
    uint64_t experts = in->adapter_expert_bytes, ram_bytes = 0, total = 0;
    uint64_t rest = in->adapter_bytes - expert_share(experts, in->ram_bytes);
    struct slu_plan_input with = *in;
    with.without_predictor = true;
    do {
        ram_bytes = total;
        with.adapter_bytes = rest + expert_share(experts, ram_bytes);
        total = divide(&with, 1, n_slots_min).total;
    } while (total > ram_bytes);
    return ram_bytes;
}

static void make(const struct slu_plan_input *in, struct slu_plan *ret_plan)
{
    const struct slu_weights *w = in->weights;
    /* Fewer slots than a layer's active blocks would read some of them after others were used. */
    uint32_t n_min = w->layer_blocks_max < w->n_blocks ? w->layer_blocks_max : w->n_blocks;
    n_min = set_min(in) > n_min ? set_min(in) : n_min;
    n_min = in->is_mapped ? 0 : n_min;
    struct slu_plan plan = {
        .ram_bytes = in->ram_bytes,
        .n_slots_min = n_min,
        .n_blocks = w->n_blocks,
        .slot_bytes = w->block_bytes_max,
        .token_blocks = w->token_blocks,
        .ctx = in->ctx,
        .ctx_trained = w->config.n_ctx_train,
        .memory_bytes = slu_cgroup_memory_bytes(""),
        .n_threads = in->n_threads,
        .kv = in->kv == SLU_KV_CACHE_Q8 ? SLU_USE_KV_Q8 : SLU_USE_KV_F16,
        .routing = in->routing,
    };
    plan.chunk_tokens = choose_chunk(in, n_min);
    plan.n_slots = choose_slots(in, plan.chunk_tokens, n_min);
    struct slu_model_params model = slu_plan_model_params(in, plan.n_slots, plan.chunk_tokens);
    plan.n_slots_lent = model.n_slots_lent;
    plan.long_chunk_tokens = model.long_chunk;
    bool has_two_sizes = plan.n_slots >= slu_model_two_sizes_from(&model);
    plan.small_slot_bytes = has_two_sizes ? w->block_bytes_small : 0;
    if (in->has_residency) {
        plan.set_experts = slu_residency_experts(w, plan.n_slots, in->residency.share);
    }
    struct division d = divide(in, plan.chunk_tokens, plan.n_slots);
    for (int i = 0; i < SLU_ACCOUNTS; i++) {
        if (d.accounts[i]) {
            plan.lines[plan.n_lines++] =
                (struct slu_plan_line){slu_account_name((enum slu_account)i), d.accounts[i]};
        }
    }
    plan.total_bytes = d.total;
    plan.least_ram_bytes = least_ram(in, n_min);
    plan.resident_ram_bytes = with_unseen(divide(in, chunk_max(in->ctx), w->n_blocks).total);
    plan.fits = d.total <= in->ram_bytes;
    uint32_t n_most = plan.n_slots + plan.n_slots_lent;
    plan.below_token = n_most < w->token_blocks && n_most < w->n_blocks;
    *ret_plan = plan;
}

void slu_plan_make(struct slu_plan_input *in, struct slu_plan *ret_plan)
{
    make(in, ret_plan);
    if (!ret_plan->fits && in->pack->section_bytes > 0 && !in->without_predictor) {
        in->without_predictor = true;
        make(in, ret_plan);
    }
}
