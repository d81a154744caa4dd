#include "tools/route_record.h"

#include <stdlib.h>

#include "engine.h"

struct slu_route_record {
    struct slu_engine *engine;
    struct slu_trace_shape shape;
    uint32_t ctx, n_done; /* tokens that went through the last router */
    uint32_t *index;      /* [n_layers] among those with a router */
    uint16_t *experts;    /* [ctx][n_routed][n_used] */
    float *weights;
    uint64_t charged_bytes;
};

static void observe(void *arg, uint32_t layer, uint32_t position, uint32_t n_used,
                    const uint32_t *chosen, const float *weight)
{
    struct slu_route_record *r = arg;
    uint32_t i = r->index[layer];
    if (position >= r->ctx) {
        return;
    }
    size_t at = ((size_t)position * r->shape.n_routed + i) * n_used;
    for (uint32_t k = 0; k < n_used; k++) {
        r->experts[at + k] = (uint16_t)chosen[k];
        r->weights[at + k] = weight[k];
    }
    if (i + 1 == r->shape.n_routed && position >= r->n_done) {
        r->n_done = position + 1;
    }
}

/* Charged as a session is, so that a run that records stays within its budget too. */
static int take_memory(struct slu_route_record *r, struct slu_err *err)
{
    uint64_t bytes = slu_plan_record_bytes(&r->engine->weights, r->ctx);
    int rc = slu_ledger_reserve(r->engine->ledger, SLU_ACCOUNT_SCRATCH, bytes, err);
    if (rc < 0) {
        slu_err_prefix(err, "to record the routing of %u tokens", r->ctx);
        return rc;
    }
    r->charged_bytes = bytes;
    size_t n = (size_t)r->ctx * r->shape.n_routed * r->shape.n_used;
    r->experts = malloc((n + 1) * sizeof *r->experts);
    r->weights = malloc((n + 1) * sizeof *r->weights);
    return r->experts && r->weights
               ? 0
               : slu_err_set(err, SLU_ENOMEM, "out of memory to record %u tokens", r->ctx);
}

int slu_route_record_create(struct slu_engine *engine, uint32_t ctx,
                            struct slu_route_record **ret_record, struct slu_err *err)
{
    const struct slu_config *c = &engine->weights.config;
    struct slu_route_record *r = calloc(1, sizeof *r);
    uint32_t *index = calloc(c->n_layers, sizeof *index);
    if (!r || !index) {
        free(r);
        free(index);
        return slu_err_set(err, SLU_ENOMEM, "out of memory to record routing");
    }
    *r = (struct slu_route_record){.engine = engine,
                                   .ctx = ctx,
                                   .index = index,
                                   .shape = {.fingerprint = engine->pack->fingerprint,
                                             .n_layers = c->n_layers,
                                             .n_experts = c->n_experts,
                                             .n_used = c->n_used,
                                             .n_vocab = c->n_vocab}};
    for (uint32_t l = 0; l < c->n_layers && l < SLU_TRACE_LAYERS_MAX; l++) {
        if (engine->weights.layers[l].routed.n_experts) {
            index[l] = r->shape.n_routed;
            r->shape.layers[r->shape.n_routed++] = l;
        }
    }
    int rc = r->shape.n_routed && c->n_layers <= SLU_TRACE_LAYERS_MAX && c->n_experts <= 65536
                 ? take_memory(r, err)
                 : slu_err_set(err, SLU_EINVAL, "the model has no routed experts to record");
    if (rc < 0) {
        slu_route_record_destroy(r);
        return rc;
    }
    slu_engine_set_observer(engine, observe, r);
    *ret_record = r;
    return 0;
}

void slu_route_record_destroy(struct slu_route_record *r)
{
    if (r) {
        slu_engine_set_observer(r->engine, NULL, NULL);
        if (r->charged_bytes) {
            slu_ledger_release(r->engine->ledger, SLU_ACCOUNT_SCRATCH, r->charged_bytes);
        }
        free(r->index);
        free(r->experts);
        free(r->weights);
        free(r);
    }
}

const struct slu_trace_shape *slu_route_record_shape(const struct slu_route_record *r)
{
    return &r->shape;
}

void slu_route_record_begin(struct slu_route_record *r)
{
    r->n_done = 0;
}

bool slu_route_record_end(const struct slu_route_record *r, const int32_t *ids, size_t n,
                          size_t n_prompt, struct slu_trace_prompt *ret_prompt)
{
    uint32_t n_tokens = r->n_done < n ? r->n_done : (uint32_t)n;
    *ret_prompt = (struct slu_trace_prompt){
        .n_tokens = n_tokens,
        .n_prompt = n_prompt < n_tokens ? (uint32_t)n_prompt : n_tokens,
        .ids = ids,
        .experts = r->experts,
        .weights = r->weights,
    };
    return n_tokens > 0;
}
