#include "tools/replay.h"

#include <stdlib.h>

#define NONE UINT32_MAX

struct replay {
    const struct slu_route_trace *trace;
    struct slu_policy *policy;
    uint32_t n_slots, n_used;
    bool is_by_use;     /* nothing protects what the same visit wants later */
    uint32_t *slot_of;  /* [n_layers * n_experts] or NONE */
    uint32_t *block_in; /* [n_slots] */
    uint32_t *round_of; /* [n_layers * n_experts] the last round that wanted it, from 1 */
    uint32_t round;
};

uint32_t slu_replay_slots(const struct slu_route_trace *trace, double fraction)
{
    double bank = (double)trace->n_routed_layers * trace->n_experts;
    double n = fraction * bank + 1e-6;
    return n < 1 ? 1 : n < bank ? (uint32_t)n : (uint32_t)bank;
}

static bool is_unwanted(void *arg, uint32_t slot)
{
    const struct replay *r = arg;
    return r->round_of[r->block_in[slot]] != r->round;
}

static bool is_any(void *arg, uint32_t slot)
{
    (void)arg;
    (void)slot;
    return true;
}

static uint32_t take_slot(struct replay *r)
{
    if (r->n_used < r->n_slots) {
        return r->n_used++;
    }
    int64_t slot = r->is_by_use ? -1 : r->policy->victim(r->policy, is_unwanted, r);
    if (slot < 0) {
        slot = r->policy->victim(r->policy, is_any, r);
    }
    r->policy->remove(r->policy, (uint32_t)slot);
    r->slot_of[r->block_in[slot]] = NONE;
    return (uint32_t)slot;
}

static void play_visit(struct replay *r, const struct slu_route_visit *visit,
                       struct slu_replay_result *result)
{
    const uint32_t *experts = &r->trace->experts[visit->first];
    uint32_t base = visit->layer * r->trace->n_experts, n_misses = 0;
    if (r->policy->observe) {
        const struct slu_policy_choice choice = {.token = visit->token,
                                                 .layer = visit->layer,
                                                 .n = visit->n,
                                                 .experts = experts,
                                                 .weights = &r->trace->weights[visit->first]};
        r->policy->observe(r->policy, &choice);
    }
    r->round++;
    for (uint32_t i = 0; i < visit->n; i++) {
        r->round_of[base + experts[i]] = r->round;
    }
    for (uint32_t i = 0; i < visit->n; i++) {
        uint32_t block = base + experts[i];
        if (r->slot_of[block] != NONE) {
            r->policy->touch(r->policy, r->slot_of[block]);
            continue;
        }
        n_misses++;
        uint32_t slot = take_slot(r);
        r->slot_of[block] = slot;
        r->block_in[slot] = block;
        r->policy->insert(r->policy, slot, block);
    }
    if (visit->is_decoding) {
        result->misses += n_misses;
        result->hits += visit->n - n_misses;
    }
}

/* Plays all of it; the policy stays the caller's. */
static int play(const struct slu_route_trace *trace, struct slu_policy *policy, uint32_t n_slots,
                bool is_by_use, struct slu_replay_result *ret_result, struct slu_err *err)
{
    size_t n_blocks = (size_t)trace->n_layers * trace->n_experts;
    struct replay r = {
        .trace = trace,
        .policy = policy,
        .n_slots = n_slots,
        .is_by_use = is_by_use,
        .slot_of = malloc(n_blocks * sizeof(uint32_t)),
        .block_in = malloc(n_slots * sizeof(uint32_t)),
        .round_of = calloc(n_blocks, sizeof(uint32_t)),
    };
    struct slu_replay_result result = {.n_slots = n_slots};
    int rc = 0;
    if (!r.slot_of || !r.block_in || !r.round_of) {
        rc = slu_err_set(err, SLU_ENOMEM, "no memory to replay %zu experts", n_blocks);
        goto cleanup;
    }
    for (size_t i = 0; i < n_blocks; i++) {
        r.slot_of[i] = NONE;
    }
    for (uint32_t i = 0; i < trace->n_visits; i++) {
        play_visit(&r, &trace->visits[i], &result);
    }
    uint64_t n = result.hits + result.misses;
    result.hit_rate = n > 0 ? (double)result.hits / (double)n : 0;
    *ret_result = result;
cleanup:
    free(r.slot_of);
    free(r.block_in);
    free(r.round_of);
    return rc;
}

static int replay(const struct slu_route_trace *trace, const struct slu_policy_kind *kind,
                  uint32_t n_slots, bool is_by_use, struct slu_replay_result *ret_result,
                  struct slu_err *err)
{
    struct slu_policy *policy = kind->create(&(struct slu_policy_shape){
        .n_slots = n_slots,
        .n_layers = trace->n_layers,
        .n_experts = trace->n_experts,
        .n_blocks = trace->n_layers * trace->n_experts,
    });
    if (!policy) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for the policy %s", kind->name);
    }
    int rc = play(trace, policy, n_slots, is_by_use, ret_result, err);
    policy->destroy(policy);
    return rc;
}

int slu_replay_policy(const struct slu_route_trace *trace, const struct slu_policy_kind *kind,
                      uint32_t n_slots, struct slu_replay_result *ret_result, struct slu_err *err)
{
    return replay(trace, kind, n_slots, false, ret_result, err);
}

int slu_replay_lru(const struct slu_route_trace *trace, uint32_t n_slots,
                   struct slu_replay_result *ret_result, struct slu_err *err)
{
    return replay(trace, slu_policy_find("lru"), n_slots, true, ret_result, err);
}

/* Belady's rule as a policy that has the trace beside it. Times are numbers of visits. */
struct belady {
    struct slu_policy base;
    const struct slu_route_trace *trace;
    uint32_t visit;      /* the next one to be observed */
    uint32_t *next_uses; /* [n_choices] the visit that uses the same block next, or NONE */
    uint32_t *next_of;   /* [blocks] as of now */
    uint32_t *block_in;  /* [n_slots] or NONE */
    uint32_t n_slots;
};

static void belady_observe(struct slu_policy *policy, const struct slu_policy_choice *choice)
{
    struct belady *b = (struct belady *)policy;
    const struct slu_route_visit *visit = &b->trace->visits[b->visit++];
    for (uint32_t i = 0; i < choice->n; i++) {
        b->next_of[choice->layer * b->trace->n_experts + choice->experts[i]] =
            b->next_uses[visit->first + i];
    }
}

static void belady_insert(struct slu_policy *policy, uint32_t slot, uint32_t block)
{
    ((struct belady *)policy)->block_in[slot] = block;
}

static void belady_touch(struct slu_policy *policy, uint32_t slot)
{
    (void)policy;
    (void)slot;
}

static void belady_remove(struct slu_policy *policy, uint32_t slot)
{
    ((struct belady *)policy)->block_in[slot] = NONE;
}

static int64_t belady_victim(struct slu_policy *policy, bool (*may_evict)(void *arg, uint32_t slot),
                             void *arg)
{
    const struct belady *b = (struct belady *)policy;
    int64_t victim = -1;
    uint32_t furthest = 0;
    for (uint32_t slot = 0; slot < b->n_slots; slot++) {
        uint32_t block = b->block_in[slot];
        if (block != NONE && (victim < 0 || b->next_of[block] > furthest) && may_evict(arg, slot)) {
            victim = slot;
            furthest = b->next_of[block];
        }
    }
    return victim;
}

static void look_ahead(struct belady *b)
{
    const struct slu_route_trace *trace = b->trace;
    for (uint32_t v = trace->n_visits; v-- > 0;) {
        const struct slu_route_visit *visit = &trace->visits[v];
        for (uint32_t i = visit->first; i < visit->first + visit->n; i++) {
            uint32_t block = visit->layer * trace->n_experts + trace->experts[i];
            b->next_uses[i] = b->next_of[block];
            b->next_of[block] = v;
        }
    }
}

int slu_replay_belady(const struct slu_route_trace *trace, uint32_t n_slots,
                      struct slu_replay_result *ret_result, struct slu_err *err)
{
    size_t n_blocks = (size_t)trace->n_layers * trace->n_experts;
    struct belady b = {
        .base = {.name = "belady",
                 .observe = belady_observe,
                 .insert = belady_insert,
                 .touch = belady_touch,
                 .remove = belady_remove,
                 .victim = belady_victim},
        .trace = trace,
        .next_uses = malloc(trace->n_choices * sizeof(uint32_t)),
        .next_of = malloc(n_blocks * sizeof(uint32_t)),
        .block_in = malloc(n_slots * sizeof(uint32_t)),
        .n_slots = n_slots,
    };
    int rc;
    if (!b.next_uses || !b.next_of || !b.block_in) {
        rc = slu_err_set(err, SLU_ENOMEM, "no memory to look ahead over %zu experts", n_blocks);
        goto cleanup;
    }
    for (size_t i = 0; i < n_blocks; i++) {
        b.next_of[i] = NONE;
    }
    for (uint32_t i = 0; i < n_slots; i++) {
        b.block_in[i] = NONE;
    }
    look_ahead(&b);
    rc = play(trace, &b.base, n_slots, false, ret_result, err);
cleanup:
    free(b.next_uses);
    free(b.next_of);
    free(b.block_in);
    return rc;
}
