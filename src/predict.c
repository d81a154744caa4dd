/*
 * The predictor of the pack's section at work: for a prompt, before it is computed.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "session.h"

/* More of a prompt isn't looked at: RUNS stretches of it, evenly spaced, so that the memory taken
 * for their embeddings stays small. */
#define TOKENS_MAX 256u
#define RUNS       16u

void slu_engine_load_predictor(struct slu_engine *e)
{
    const struct slu_config *c = &e->weights.config;
    struct slu_err *err = &e->predictor_err;
    *err = e->pack->section_err;
    if (!e->pack->section) {
        return;
    }
    if (slu_predictor_create(e->pack->section, e->pack->section_bytes, &e->predictor, err) < 0) {
        slu_err_prefix(err, "%s", e->pack->source->name);
        return;
    }
    const struct slu_predict_shape *shape = slu_predictor_shape(e->predictor);
    if (shape->n_embd != c->n_embd || shape->n_layers != c->n_layers ||
        shape->n_experts != c->n_experts) {
        slu_err_set(err, SLU_EFORMAT, "%s: its predictor is one for a model of another shape",
                    e->pack->source->name);
        slu_predictor_destroy(e->predictor);
        e->predictor = NULL;
    }
}

bool slu_engine_has_predictor(const struct slu_engine *e, const char **ret_why)
{
    if (ret_why) {
        *ret_why = e->predictor_err.code != 0 ? e->predictor_err.text : NULL;
    }
    return e->predictor != NULL;
}

int slu_engine_embed(struct slu_engine *e, const int32_t *ids, uint32_t n, float *x,
                     struct slu_err *err)
{
    pthread_mutex_lock(&e->compute);
    int rc = slu_embed_rows(&e->model.embed, ids, n, x, err);
    pthread_mutex_unlock(&e->compute);
    return rc;
}

/* The ids to look at, n_max at most (a multiple of RUNS): all, or stretches of them. */
static void thin_out(const int32_t *ids, uint32_t n, uint32_t n_max, int32_t *ret_ids)
{
    uint32_t length = n_max / RUNS, taken = 0;
    if (n <= n_max) {
        for (uint32_t i = 0; i < n; i++) {
            ret_ids[i] = ids[i];
        }
        return;
    }
    for (uint32_t run = 0; run < RUNS; run++) {
        uint32_t first = (uint32_t)((uint64_t)run * (n - length) / (RUNS - 1));
        for (uint32_t i = 0; i < length; i++) {
            ret_ids[taken++] = ids[first + i];
        }
    }
}

/* Takes the memory for a prompt's embeddings, of fewer tokens where there isn't room for all that
 * are worth looking at. Returns how many tokens; 0 where there is no room for any. */
static uint32_t reserve(struct slu_engine *e, uint32_t n)
{
    uint64_t row_bytes = e->weights.config.n_embd * sizeof(float);
    for (uint32_t n_max = TOKENS_MAX; n_max >= RUNS; n_max /= 2) {
        uint32_t n_taken = n < n_max ? n : n_max;
        if (slu_ledger_reserve(e->ledger, SLU_ACCOUNT_SCRATCH, n_taken * row_bytes, NULL) == 0) {
            return n_taken;
        }
    }
    return 0;
}

int slu_session_predict(struct slu_session *s, float *ret_prompt, float *ret_answer,
                        struct slu_err *err)
{
    struct slu_engine *e = s->engine;
    int32_t ids[TOKENS_MAX];
    if (!e->predictor || s->n_ids == s->kv.n) {
        return 0;
    }
    uint32_t n_pending = s->n_ids - s->kv.n, n = reserve(e, n_pending);
    if (n == 0) {
        return 0;
    }
    thin_out(s->ids + s->kv.n, n_pending, n, ids);
    uint64_t bytes = (uint64_t)n * e->weights.config.n_embd * sizeof(float);
    float *x = malloc(bytes);
    int rc = x ? slu_engine_embed(e, ids, n, x, err)
               : slu_err_set(err, SLU_ENOMEM, "out of memory for a prompt's embeddings");
    if (rc == 0) {
        pthread_mutex_lock(&e->compute); /* the predictor's scratch */
        slu_predictor_run(e->predictor, x, n, ret_prompt);
        if (ret_answer) {
            size_t bytes_out = (size_t)e->weights.config.n_layers * e->weights.config.n_experts *
                               sizeof *ret_prompt;
            memcpy(ret_prompt, slu_predictor_prompt(e->predictor), bytes_out);
            memcpy(ret_answer, slu_predictor_answer(e->predictor), bytes_out);
        }
        pthread_mutex_unlock(&e->compute);
        rc = 1;
    }
    free(x);
    slu_ledger_release(e->ledger, SLU_ACCOUNT_SCRATCH, bytes);
    return rc;
}

int slu_session_rank_answer(struct slu_session *s, const struct slu_ranking *ranking,
                            struct slu_err *err)
{
    const struct slu_config *c = &s->engine->weights.config;
    size_t n = (size_t)c->n_layers * c->n_experts;
    bool is_sound = ranking->n_layers == c->n_layers && ranking->n_experts == c->n_experts;
    for (size_t i = 0; i < n && is_sound; i++) {
        is_sound = ranking->score[i] >= 0 && isfinite(ranking->score[i]);
    }
    if (!is_sound) {
        return slu_err_set(err, SLU_EINVAL,
                           "a ranking of %u layers of %u experts doesn't suit a model of %u and "
                           "%u, or has scores that are negative or no numbers",
                           ranking->n_layers, ranking->n_experts, c->n_layers, c->n_experts);
    }
    if (!s->answer_scores) {
        s->answer_scores = malloc((n + 1) * sizeof *s->answer_scores);
    }
    if (!s->answer_scores) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for a ranking");
    }
    memcpy(s->answer_scores, ranking->score, n * sizeof *s->answer_scores);
    s->has_answer_scores = true;
    return 0;
}

void slu_session_begin_answer(struct slu_session *s)
{
    const struct slu_config *c = &s->engine->weights.config;
    if (s->has_answer_scores) {
        const struct slu_ranking ranking = {c->n_layers, c->n_experts, s->answer_scores};
        s->has_answer_scores = false;
        slu_session_rank(s, &ranking, NULL); /* it was checked when it came */
    }
}
