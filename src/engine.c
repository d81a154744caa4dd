#include "engine.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "io/printable.h"
#include "model/lookahead.h"

static int describe(const char *path, struct slu_pack **ret_pack, struct slu_weights *ret_weights,
                    struct slu_err *err)
{
    int rc = slu_pack_open_file(path, ret_pack, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_weights_describe(*ret_pack, ret_weights, err);
    if (rc < 0) {
        slu_pack_close(*ret_pack);
    }
    return rc;
}

/* Up to here no size that is computed from the context passes 64 bits, whatever the model. */
#define CTX_MAX (1u << 28)

static bool is_share(float share)
{
    return share >= 0 && share <= 1;
}

static int check_routing(const struct slu_engine_params *params, struct slu_err *err)
{
    if ((unsigned)params->routing > SLU_ROUTING_LOCKED ||
        (unsigned)params->read_ahead > SLU_AHEAD_WRONG) {
        return slu_err_set(err, SLU_EINVAL, "there is no such way to route or to look ahead");
    }
    if (!isfinite(params->route_bias) || !is_share(params->set_share) ||
        !is_share(params->min_coverage) || !(params->set_reads >= 0) ||
        !isfinite(params->set_reads)) {
        return slu_err_set(err, SLU_EINVAL,
                           "the set's share and the least coverage are numbers from 0 to 1, the "
                           "bias of routing and the set's reads finite numbers");
    }
    if (params->routing != SLU_ROUTING_EXACT && params->io == SLU_USE_IO_MMAP) {
        return slu_err_set(err, SLU_EINVAL,
                           "experts that are mapped are in no cache to choose them by; use another "
                           "io, or exact routing");
    }
    return 0;
}

_Static_assert((int)SLU_AHEAD_ON == SLU_MODEL_AHEAD_ON &&
                   (int)SLU_AHEAD_OFF == SLU_MODEL_AHEAD_OFF &&
                   (int)SLU_AHEAD_WRONG == SLU_MODEL_AHEAD_WRONG,
               "one enum for users, one for the model");

static int check_params(const struct slu_engine_params *params, struct slu_err *err)
{
    if (params->ctx > CTX_MAX) {
        return slu_err_set(err, SLU_EINVAL, "a context of %u tokens is more than the %u allowed",
                           params->ctx, CTX_MAX);
    }
    if ((unsigned)params->kv > SLU_USE_KV_Q8) {
        return slu_err_set(err, SLU_EINVAL, "there is no type %u of KV cache",
                           (unsigned)params->kv);
    }
    if ((unsigned)params->io > SLU_USE_IO_MMAP) {
        return slu_err_set(err, SLU_EINVAL, "there is no way %u to read", (unsigned)params->io);
    }
    if (params->policy && !slu_policy_find(params->policy)) {
        return slu_err_set(err, SLU_EINVAL,
                           "there is no cache policy %s; there are lru, lfu, slru and kin",
                           params->policy);
    }
    return check_routing(params, err);
}

int slu_plan(const char *path, const struct slu_engine_params *params, struct slu_plan *ret_plan,
             struct slu_err *err)
{
    struct slu_pack *pack;
    struct slu_weights weights;
    int rc = check_params(params, err);
    rc = rc < 0 ? rc : describe(path, &pack, &weights, err);
    if (rc < 0) {
        return rc;
    }
    struct slu_plan_input input;
    slu_plan_resolve(params, pack, &weights, &input);
    slu_plan_make(&input, ret_plan);
    slu_weights_finish(&weights);
    slu_pack_close(pack);
    return 0;
}

/* Loads everything under a plan that fits. */
static int load(struct slu_engine *e, const char *path, const struct slu_plan_input *input,
                struct slu_err *err)
{
    uint64_t text_bytes = slu_plan_text_bytes(input);
    int rc = slu_ledger_reserve(e->ledger, SLU_ACCOUNT_TEXT, text_bytes, err);
    if (rc < 0) {
        return rc;
    }
    e->text_bytes = text_bytes;
    rc = slu_tokenizer_create(&e->pack->kvs, &e->tokenizer, err);
    if (rc < 0) {
        slu_err_prefix(err, "%s", path);
        return rc;
    }
    if (slu_tokenizer_n_vocab(e->tokenizer) != e->weights.config.n_vocab) {
        return slu_err_set(err, SLU_EFORMAT, "%s: tokenizer and embedding differ in size", path);
    }
    e->chat = slu_chat_detect(&e->pack->kvs);
    rc = slu_pool_create(input->n_threads, &e->pool, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_weights_load(&e->weights, e->pack, e->pool, e->ledger, e->plan.total_bytes, err);
    if (rc < 0) {
        return rc;
    }
    struct slu_base base = slu_lora_base(&e->weights, e->pack->fingerprint);
    struct slu_registry_params registry = {.ledger = e->ledger,
                                           .base = &base,
                                           .bytes_max = input->adapter_bytes,
                                           .n_at_once = input->adapters_at_once,
                                           .n_workers = slu_pool_threads(e->pool),
                                           .backend = input->backend,
                                           .dir = input->adapters_dir};
    rc = slu_registry_create(&registry, &e->registry, err);
    if (rc < 0) {
        return rc;
    }
    struct slu_model_params params =
        slu_plan_model_params(input, e->plan.n_slots, e->plan.chunk_tokens);
    params.path = path;
    params.pool = e->pool;
    params.kern = slu_kern_get(slu_cpu_flags());
    params.ledger = e->ledger;
    slu_engine_load_predictor(e);
    return slu_model_init(&e->model, &params, err);
}

static int refuse(const struct slu_plan *plan, const char *path, struct slu_err *err)
{
    return slu_err_set(err, SLU_EBUDGET,
                       "%s needs at least %" PRIu64 " bytes (%" PRIu64
                       " MiB) with a context of %u, and was given %" PRIu64,
                       path, plan->least_ram_bytes, (plan->least_ram_bytes >> 20) + 1, plan->ctx,
                       plan->ram_bytes);
}

/* Exact routing would gain next to nothing from it, and says nothing of it. */
static void leave_predictor(struct slu_engine *e)
{
    if (e->plan.routing != SLU_ROUTING_EXACT) {
        slu_err_set(&e->pack->section_err, SLU_EBUDGET,
                    "%s: its predictor takes %u bytes and as many to run, which the budget of "
                    "%" PRIu64 " has no room for",
                    e->pack->source->name, e->pack->section_bytes, e->plan.ram_bytes);
    }
    slu_pack_drop_section(e->pack);
}

int slu_engine_open(const char *path, const struct slu_engine_params *params,
                    struct slu_engine **ret_engine, struct slu_err *err)
{
    int rc = check_params(params, err);
    if (rc < 0) {
        return rc;
    }
    struct slu_engine *e = calloc(1, sizeof *e);
    if (!e) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for an engine");
    }
    pthread_mutex_init(&e->compute, NULL);
    pthread_mutex_init(&e->stats, NULL);
    rc = describe(path, &e->pack, &e->weights, err);
    if (rc < 0) {
        e->pack = NULL;
        goto out;
    }
    struct slu_plan_input input;
    slu_plan_resolve(params, e->pack, &e->weights, &input);
    slu_plan_make(&input, &e->plan);
    e->kv = input.kv;
    e->touches_kv = params->touch_memory;
    if (!e->plan.fits) {
        rc = refuse(&e->plan, path, err);
        goto out;
    }
    if (input.without_predictor) {
        leave_predictor(e);
    }
    e->ledger = slu_ledger_create(input.ram_bytes);
    rc = e->ledger ? load(e, path, &input, err)
                   : slu_err_set(err, SLU_ENOMEM, "out of memory for the ledger");
out:
    if (rc < 0) {
        slu_engine_close(e);
        return rc;
    }
    *ret_engine = e;
    return 0;
}

void slu_engine_close(struct slu_engine *e)
{
    if (!e) {
        return;
    }
    slu_model_finish(&e->model);
    slu_predictor_destroy(e->predictor);
    slu_registry_destroy(e->registry);
    slu_pool_destroy(e->pool);
    slu_tokenizer_destroy(e->tokenizer);
    slu_weights_finish(&e->weights);
    slu_pack_close(e->pack);
    if (e->text_bytes) {
        slu_ledger_release(e->ledger, SLU_ACCOUNT_TEXT, e->text_bytes);
    }
    slu_ledger_destroy(e->ledger);
    pthread_mutex_destroy(&e->compute);
    pthread_mutex_destroy(&e->stats);
    free(e);
}

const struct slu_plan *slu_engine_plan(const struct slu_engine *engine)
{
    return &engine->plan;
}

void slu_engine_stats(const struct slu_engine *engine, struct slu_engine_stats *ret_stats)
{
    const struct slu_model *m = &engine->model;
    struct slu_engine_stats stats = {
        .flash_bytes = atomic_load_explicit(&m->embed.flash_bytes, memory_order_relaxed),
        .ledger_used_bytes = slu_ledger_used(engine->ledger),
        .ledger_peak_bytes = slu_ledger_peak(engine->ledger),
        .ledger_limit_bytes = slu_ledger_limit(engine->ledger),
        .kernels = m->kern->name,
        /* Without experts there is no stream, and with a tied embedding nothing is read at all. */
        .io_backend = m->embed.ring ? m->embed.ring->backend : "none",
        .io_direct = !m->embed.ring || m->embed.ring->is_direct,
    };
    if (m->mapped) {
        stats.io_backend = "mmap";
        stats.io_direct = false;
    }
    if (m->stream) {
        struct slu_stream_stats stream;
        slu_stream_stats(m->stream, &stream);
        stats.flash_bytes += stream.flash_bytes;
        stats.hits = stream.hits;
        stats.misses = stream.misses;
        stats.n_slots = stream.n_slots;
        stats.wait_ns = stream.wait_ns;
        stats.decode_ns = stream.decode_ns;
        stats.io_backend = stream.backend;
        stats.io_direct = stream.is_direct;
    }
    pthread_mutex_t *lock = (pthread_mutex_t *)&engine->stats; /* constant but for the lock */
    pthread_mutex_lock(lock);
    memcpy(stats.phases, engine->phases, sizeof stats.phases);
    pthread_mutex_unlock(lock);
    if (engine->registry) {
        struct slu_registry_stats adapters;
        slu_registry_stats(engine->registry, &adapters);
        stats.adapter_flash_bytes = adapters.flash_bytes;
        stats.n_adapters = adapters.n_resident;
        stats.n_adapters_streamed = adapters.n_streamed;
    }
    *ret_stats = stats;
}

void slu_engine_info(const struct slu_engine *engine, struct slu_engine_info *ret_info)
{
    const struct slu_config *c = &engine->weights.config;
    *ret_info = (struct slu_engine_info){
        .architecture = slu_arch_name(c->arch),
        .n_layers = c->n_layers,
        .n_experts = c->n_experts,
        .n_used = c->n_used,
        .n_vocab = c->n_vocab,
    };
    struct slu_str name;
    if (slu_kvs_str(&engine->pack->kvs, "general.name", &name, NULL) == 0) {
        struct slu_printable text = slu_printable(name.at, name.len);
        memcpy(ret_info->name, text.text, sizeof ret_info->name - 1);
    }
}

void slu_engine_set_route(struct slu_engine *engine, slu_route_fn route, void *arg)
{
    pthread_mutex_lock(&engine->compute);
    engine->model.route = route;
    engine->model.route_arg = arg;
    slu_lookahead_init(&engine->model);
    pthread_mutex_unlock(&engine->compute);
}

void slu_engine_set_guess(struct slu_engine *engine, slu_route_fn guess, void *arg)
{
    pthread_mutex_lock(&engine->compute);
    engine->model.guess = guess;
    engine->model.guess_arg = arg;
    slu_lookahead_init(&engine->model);
    pthread_mutex_unlock(&engine->compute);
}

void slu_engine_set_observer(struct slu_engine *engine, slu_observe_fn observe, void *arg)
{
    pthread_mutex_lock(&engine->compute);
    engine->model.observe = observe;
    engine->model.observe_arg = arg;
    pthread_mutex_unlock(&engine->compute);
}

uint32_t slu_engine_n_vocab(const struct slu_engine *engine)
{
    return engine->weights.config.n_vocab;
}

int64_t slu_engine_encode(const struct slu_engine *engine, const char *text, size_t len,
                          bool special, int32_t *ret_ids, size_t n_max, struct slu_err *err)
{
    int64_t n = slu_tokenizer_encode(engine->tokenizer, text, len, special ? SLU_ENCODE_SPECIAL : 0,
                                     ret_ids, n_max);
    return n < 0 ? slu_err_set(err, (int)n, "tokenizing failed: %s", slu_strerror((int)n)) : n;
}

struct text_out {
    char *text;
    size_t n, n_max;
};

static void append(void *arg, const char *bytes, size_t len)
{
    struct text_out *out = arg;
    for (size_t i = 0; i < len; i++, out->n++) {
        if (out->n < out->n_max) {
            out->text[out->n] = bytes[i];
        }
    }
}

int64_t slu_engine_decode(const struct slu_engine *engine, const int32_t *ids, size_t n,
                          char *ret_text, size_t bytes_max, struct slu_err *err)
{
    struct text_out out = {.text = ret_text, .n_max = bytes_max};
    struct slu_detok detok;
    slu_detok_init(&detok, engine->tokenizer, false);
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || (uint32_t)ids[i] >= slu_engine_n_vocab(engine)) {
            return slu_err_set(err, SLU_ERANGE, "token %d is outside the vocabulary", (int)ids[i]);
        }
        slu_detok_push(&detok, ids[i], append, &out);
    }
    slu_detok_flush(&detok, append, &out);
    return (int64_t)out.n;
}
