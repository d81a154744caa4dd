#include "session.h"

#include <stdlib.h>
#include <string.h>

#include "base/arena.h"

int slu_session_create(struct slu_engine *engine, const struct slu_session_params *params,
                       struct slu_session **ret_session, struct slu_err *err)
{
    const struct slu_weights *w = &engine->weights;
    struct slu_session *s = calloc(1, sizeof *s);
    if (!s) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for a session");
    }
    s->engine = engine;
    s->ctx =
        params && params->ctx && params->ctx < engine->plan.ctx ? params->ctx : engine->plan.ctx;
    uint64_t bytes = slu_plan_session_bytes(w, s->ctx);
    int rc = slu_ledger_reserve(engine->ledger, SLU_ACCOUNT_SCRATCH, bytes, err);
    if (rc < 0) {
        goto out;
    }
    s->charged_bytes = bytes;
    s->ids = malloc(s->ctx * sizeof *s->ids);
    if (!s->ids) {
        rc = slu_err_set(err, SLU_ENOMEM, "out of memory for a session's tokens");
        goto out;
    }
    rc = slu_sampler_create(w->config.n_vocab, &s->sampler, err);
    if (rc < 0) {
        goto out;
    }
    rc = slu_kv_cache_init(&s->kv, &w->config, engine->kv, s->ctx, engine->plan.chunk_tokens,
                           engine->ledger, err);
    if (rc == 0 && engine->touches_kv) {
        slu_map_touch(s->kv.memory, s->kv.memory_bytes);
    }
out:
    if (rc < 0) {
        slu_session_destroy(s);
        return rc;
    }
    *ret_session = s;
    return 0;
}

void slu_session_destroy(struct slu_session *s)
{
    if (!s) {
        return;
    }
    slu_session_release_adapters(s->engine, &s->adapters);
    for (size_t i = 0; i < s->n_messages; i++) {
        free((char *)s->messages[i].text);
    }
    free(s->messages);
    if (slu_model_has_lent(&s->engine->model, &s->kv)) { /* else there is nothing to wait for */
        pthread_mutex_lock(&s->engine->compute);
        slu_model_take_back(&s->engine->model, &s->kv);
        pthread_mutex_unlock(&s->engine->compute);
    }
    slu_kv_cache_finish(&s->kv);
    slu_sampler_destroy(s->sampler);
    free(s->ids);
    free(s->answer_scores);
    if (s->charged_bytes) {
        slu_ledger_release(s->engine->ledger, SLU_ACCOUNT_SCRATCH, s->charged_bytes);
    }
    free(s);
}

static int check_room(const struct slu_session *s, size_t have, size_t more, struct slu_err *err)
{
    if (more > s->ctx - have) {
        return slu_err_set(err, SLU_ERANGE,
                           "%zu tokens don't fit a context of %u: with the %zu that it holds and "
                           "an answer it would have to be larger than %zu",
                           more, s->ctx, have, have + more);
    }
    return 0;
}

int slu_session_tokens(struct slu_session *s, const int32_t *ids, size_t n, struct slu_err *err)
{
    uint32_t n_vocab = slu_engine_n_vocab(s->engine);
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || (uint32_t)ids[i] >= n_vocab) {
            return slu_err_set(err, SLU_ERANGE, "token %d is outside the vocabulary of %u",
                               (int)ids[i], n_vocab);
        }
    }
    int rc = check_room(s, s->n_ids, n, err);
    if (rc < 0) {
        return rc;
    }
    if (n > 0) { /* ids may be NULL otherwise */
        memcpy(s->ids + s->n_ids, ids, n * sizeof *ids);
    }
    s->n_ids += (uint32_t)n;
    return 0;
}

int slu_session_text(struct slu_session *s, const char *text, size_t len, struct slu_err *err)
{
    const struct slu_tokenizer *tokenizer = s->engine->tokenizer;
    int64_t n = slu_engine_encode(s->engine, text, len, true, NULL, 0, err);
    if (n < 0) {
        return (int)n;
    }
    int32_t *ids = malloc(((size_t)n + 1) * sizeof *ids);
    if (!ids) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for %lld tokens", (long long)n);
    }
    size_t n_bos = 0;
    if (s->n_ids == 0 && slu_tokenizer_add_bos(tokenizer) && slu_tokenizer_bos(tokenizer) >= 0) {
        ids[n_bos++] = slu_tokenizer_bos(tokenizer);
    }
    n = slu_engine_encode(s->engine, text, len, true, ids + n_bos, (size_t)n, err);
    int rc = n < 0 ? (int)n : slu_session_tokens(s, ids, n_bos + (size_t)n, err);
    free(ids);
    return rc;
}

int slu_session_replace(struct slu_session *s, const int32_t *ids, size_t n, struct slu_err *err)
{
    int rc = check_room(s, 0, n, err);
    if (rc < 0) {
        return rc;
    }
    uint32_t common = 0;
    while (common < n && common < s->n_ids && s->ids[common] == ids[common]) {
        common++;
    }
    slu_kv_cache_truncate(&s->kv, &s->engine->weights.config, common);
    memcpy(s->ids, ids, n * sizeof *ids);
    s->n_ids = (uint32_t)n;
    return 0;
}

/* True once for each request. */
static bool take_cancel(struct slu_session *s)
{
    return atomic_exchange_explicit(&s->cancel, false, memory_order_relaxed);
}

int slu_session_compute(struct slu_session *s, uint32_t first_out, slu_chunk_fn each, void *arg,
                        struct slu_err *err)
{
    struct slu_engine *e = s->engine;
    /* After a long chunk windows couldn't go back to each of its positions. */
    bool is_last_only = first_out + 1 >= s->n_ids;
    uint32_t chunk = is_last_only ? e->plan.long_chunk_tokens : e->plan.chunk_tokens;
    int rc = 0;
    while (rc >= 0 && s->kv.n < s->n_ids) {
        uint32_t first = s->kv.n, n = s->n_ids - first;
        n = n < chunk ? n : chunk;
        uint32_t unneeded = first_out < first ? 0 : first_out - first;
        unneeded = unneeded < n ? unneeded : n;
        pthread_mutex_lock(&e->compute);
        e->model.cancel = &s->cancel;
        e->model.adapters = s->adapters.n ? &s->adapters : NULL;
        struct slu_engine_mark mark;
        slu_engine_tally_begin(e, &mark);
        rc = slu_model_forward(&e->model, &s->kv, s->ids + first, n, unneeded, err);
        if (rc >= 0 && each) {
            rc = each(s, arg, first, n);
        }
        slu_engine_tally_end(e, &mark, s->is_decoding ? SLU_PHASE_DECODE : SLU_PHASE_PREFILL,
                             rc >= 0 ? n : 0);
        e->model.cancel = NULL; /* the session may be gone before the model's next use */
        pthread_mutex_unlock(&e->compute);
        if (rc == SLU_ECANCEL) {
            take_cancel(s);
        }
    }
    return rc;
}

struct eval_call {
    slu_logits_fn logits;
    void *arg;
    struct slu_err *err;
};

static int eval_chunk(struct slu_session *s, void *arg, uint32_t first_position, uint32_t n)
{
    const struct eval_call *call = arg;
    uint32_t n_vocab = slu_engine_n_vocab(s->engine);
    for (uint32_t t = 0; t < n;) {
        uint32_t rows = n - t < SLU_LOGIT_ROWS_MAX ? n - t : SLU_LOGIT_ROWS_MAX;
        const float *logits = slu_model_logits(&s->engine->model, t, rows);
        for (uint32_t i = 0; i < rows; i++, t++) {
            if (call->logits(call->arg, first_position + t, logits + (size_t)i * n_vocab) != 0) {
                slu_kv_cache_truncate(&s->kv, &s->engine->weights.config, first_position + t + 1);
                return slu_err_set(call->err, SLU_ECANCEL, "cancelled");
            }
        }
    }
    return 0;
}

int slu_session_eval(struct slu_session *s, slu_logits_fn logits, void *arg, struct slu_err *err)
{
    struct eval_call call = {logits, arg, err};
    return slu_session_compute(s, logits ? 0 : s->n_ids, logits ? eval_chunk : NULL, &call, err);
}

void slu_session_cancel(struct slu_session *s)
{
    atomic_store_explicit(&s->cancel, true, memory_order_relaxed);
}

const int32_t *slu_session_ids(const struct slu_session *s, size_t *ret_n)
{
    *ret_n = s->n_ids;
    return s->ids;
}
