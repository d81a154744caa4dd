/*
 * Each message is answered greedily in exact routing with everything in memory: that is the
 * reference. Then, for each mode, predictor and size of the cache, it is answered again, for speed,
 * reads and right answers; and the reference's answer is computed token by token, for what its
 * probabilities are there: KL divergence and perplexity against exact.
 */
#include "bench/predict_modes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "bench/modes.h"
#include "engine.h"
#include "tools/divergence.h"
#include "tools/route_record.h"

#define CTX 512u

struct scoring {
    const struct bench_message *message;
    struct bench_row *row;
    uint32_t n_vocab;
    float *keep; /* where the reference's logits go; NULL: they are compared with */
};

static int on_logits(void *arg, uint32_t position, const float *logits)
{
    struct scoring *s = arg;
    const struct bench_message *m = s->message;
    if (position + 1 < m->n_prompt || position + 1 >= m->n) {
        return 0;
    }
    size_t at = (size_t)(position + 1 - m->n_prompt) * s->n_vocab;
    if (s->keep) {
        memcpy(s->keep + at, logits, s->n_vocab * sizeof *logits);
        return 0;
    }
    s->row->kl += slu_divergence_token(m->logits + at, logits, s->n_vocab);
    s->row->nll += slu_log_sum_exp(logits, s->n_vocab) - logits[m->ids[position + 1]];
    s->row->n_scored++;
    return 0;
}

/* What all other messages used, or those of the same task: prompts, then answers. */
static void sum_others(const struct bench_run *run, const struct bench_message *m, bool same_task,
                       float *ret_scores)
{
    memset(ret_scores, 0, 2 * run->n_scores * sizeof *ret_scores);
    for (uint32_t i = 0; i < run->n; i++) {
        const struct bench_message *other = &run->messages[i];
        if (other == m || (same_task && other->task != m->task)) {
            continue;
        }
        for (size_t j = 0; j < 2 * run->n_scores; j++) {
            ret_scores[j] += other->uses[j];
        }
    }
}

static int run_linear(const struct bench_run *run, struct slu_engine *engine,
                      struct slu_session *session, float *scores, struct slu_err *err)
{
    size_t n;
    const int32_t *ids = slu_session_ids(session, &n);
    float *x = malloc(n * engine->weights.config.n_embd * sizeof *x);
    int rc = x ? slu_engine_embed(engine, ids, (uint32_t)n, x, err)
               : slu_err_set(err, SLU_ENOMEM, "out of memory");
    if (rc == 0) {
        struct slu_predictor *linear = run->params->linear;
        slu_predictor_run(linear, x, (uint32_t)n, scores);
        memcpy(scores, slu_predictor_prompt(linear), run->n_scores * sizeof *scores);
        memcpy(scores + run->n_scores, slu_predictor_answer(linear),
               run->n_scores * sizeof *scores);
    }
    free(x);
    return rc;
}

/* scores[2][n_scores] for the prompt that is pending, and for its answer. */
static int predict(const struct bench_run *run, struct slu_engine *engine,
                   struct slu_session *session, const struct bench_message *m,
                   enum bench_ranker ranker, float *scores, struct slu_err *err)
{
    switch (ranker) {
    case BENCH_LINEAR:
        return run_linear(run, engine, session, scores, err);
    case BENCH_NETWORK: {
        int rc = slu_session_predict(session, scores, scores + run->n_scores, err);
        return rc == 0 ? slu_err_set(err, SLU_EINVAL, "the pack's predictor can't be used") : rc;
    }
    case BENCH_HINDSIGHT:
        memcpy(scores, m->uses, 2 * run->n_scores * sizeof *scores);
        return 0;
    case BENCH_PROFILE:
        /* One for both, as files of profiles are. */
        sum_others(run, m, true, scores);
        for (size_t i = 0; i < run->n_scores; i++) {
            scores[i] += scores[run->n_scores + i];
            scores[run->n_scores + i] = scores[i];
        }
        return 0;
    default:
        sum_others(run, m, false, scores);
        return 0;
    }
}

/* Ranks for the prompt now and for the answer when it begins; *ret_answer, to be freed, is the
 * latter, NULL without a predictor. */
static int rank(const struct bench_run *run, struct slu_engine *engine, struct slu_session *session,
                const struct bench_message *m, enum bench_ranker ranker, float **ret_answer,
                struct slu_err *err)
{
    struct slu_engine_info info;
    slu_engine_info(engine, &info);
    *ret_answer = NULL;
    if (ranker == BENCH_NONE) {
        return 0;
    }
    float *scores = calloc(2 * run->n_scores + 1, sizeof *scores);
    if (!scores) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory");
    }
    int rc = predict(run, engine, session, m, ranker, scores, err);
    struct slu_ranking ranking = {info.n_layers, info.n_experts, scores};
    rc = rc < 0 ? rc : slu_session_rank(session, &ranking, err);
    ranking.score = scores + run->n_scores;
    rc = rc < 0 ? rc : slu_session_rank_answer(session, &ranking, err);
    memcpy(scores, scores + run->n_scores, run->n_scores * sizeof *scores);
    *ret_answer = scores;
    return rc;
}

static int open_session(const struct bench_run *run, struct slu_engine *engine,
                        const struct bench_message *m, struct slu_session **ret_session,
                        struct slu_err *err)
{
    const struct slu_adapter_choice choice = {run->tasks[m->task].adapter, 1};
    int rc = slu_session_create(engine, NULL, ret_session, err);
    if (rc == 0 && choice.adapter) {
        rc = slu_session_set_adapters(*ret_session, &choice, 1, err);
        if (rc < 0) {
            slu_session_destroy(*ret_session);
        }
    }
    return rc;
}

/* The reference's tokens, the prompt at once and the answer one by one. */
static int score(const struct bench_run *run, struct slu_engine *engine, struct scoring *s,
                 struct slu_err *err)
{
    const struct bench_message *m = s->message;
    struct slu_session *session;
    struct slu_engine_info info;
    float *for_answer = NULL;
    int rc = open_session(run, engine, m, &session, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_session_tokens(session, m->ids, m->n_prompt, err);
    rc = rc < 0 || s->keep ? rc : rank(run, engine, session, m, s->row->ranker, &for_answer, err);
    rc = rc < 0 ? rc : slu_session_eval(session, on_logits, s, err);
    if (rc == 0 && for_answer) { /* generate would do it at this point */
        slu_engine_info(engine, &info);
        rc = slu_session_rank(
            session, &(struct slu_ranking){info.n_layers, info.n_experts, for_answer}, err);
    }
    for (uint32_t i = m->n_prompt; i < m->n && rc == 0; i++) {
        rc = slu_session_tokens(session, m->ids + i, 1, err);
        rc = rc < 0 ? rc : slu_session_eval(session, on_logits, s, err);
    }
    free(for_answer);
    slu_session_destroy(session);
    return rc;
}

/* How much of an answer is what was expected. */
struct comparison {
    const char *expected;
    size_t n_same;
    bool differs;
};

static int on_text(void *arg, const char *text, size_t len, int32_t token)
{
    struct comparison *c = arg;
    (void)token;
    c->differs = c->differs || !c->expected || strncmp(c->expected + c->n_same, text, len) != 0;
    c->n_same += c->differs ? 0 : len;
    return 0;
}

/* What an answer was, beside what it should be. */
static int note(struct bench_message *m, const struct slu_session *session, size_t n_prompt,
                const struct slu_result *result, struct bench_row *row, struct slu_err *err)
{
    size_t n;
    const int32_t *ids = slu_session_ids(session, &n);
    if (!m->ids) { /* the first time it becomes the reference */
        m->ids = malloc((n + 1) * sizeof *m->ids);
        m->n_prompt = (uint32_t)n_prompt;
        m->n = (uint32_t)n_prompt + result->n_generated;
        if (!m->ids) {
            return slu_err_set(err, SLU_ENOMEM, "out of memory");
        }
        memcpy(m->ids, ids, m->n * sizeof *ids);
    }
    row->n_same +=
        n_prompt + result->n_generated == m->n && memcmp(ids, m->ids, m->n * sizeof *ids) == 0;
    row->first_s += result->prefill_s;
    row->decode_s += result->decode_s;
    row->n_decoded += result->n_generated;
    return 0;
}

static int answer(const struct bench_run *run, struct slu_engine *engine, struct bench_message *m,
                  struct bench_row *row, struct slu_err *err)
{
    struct slu_session *session;
    struct slu_result result = {0};
    struct comparison comparison = {.expected = m->expected};
    size_t n_prompt;
    float *for_answer = NULL;
    int rc = open_session(run, engine, m, &session, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_session_chat(session, m->text, m->bytes, err);
    slu_session_ids(session, &n_prompt);
    double start_s = slu_now_s();
    rc = rc < 0 ? rc : rank(run, engine, session, m, row->ranker, &for_answer, err);
    row->first_s += slu_now_s() - start_s;
    const struct slu_generate_params params = {
        .n_max = run->params->n_answer, .text = on_text, .arg = &comparison};
    rc = rc < 0 ? rc : slu_session_generate(session, &params, &result, err);
    rc = rc < 0 ? rc : note(m, session, n_prompt, &result, row, err);
    row->n_right[m->task] +=
        m->expected && !comparison.differs && m->expected[comparison.n_same] == '\0';
    free(for_answer);
    slu_session_destroy(session);
    return rc;
}

/* What all runs have in common. */
static int make_params(const struct bench_run *run, struct slu_engine_params *ret_params,
                       struct slu_err *err)
{
    *ret_params = (struct slu_engine_params){.ctx = CTX,
                                             .ram_bytes = 1ull << 34,
                                             .records_routing = true,
                                             .adapters_dir = run->params->adapters_dir};
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        uint64_t bytes;
        if (!run->tasks[i].adapter) {
            continue;
        }
        int rc =
            slu_adapter_memory(run->params->adapters_dir, run->tasks[i].adapter, &bytes, NULL, err);
        if (rc < 0) {
            return rc;
        }
        ret_params->adapter_bytes += bytes;
        ret_params->adapters_at_once++;
    }
    return 0;
}

/* The least budget in which a set of that share of all experts has room, for all modes alike. */
static int find_ram(const struct bench_run *run, double share, uint64_t *ret_ram_bytes,
                    struct slu_err *err)
{
    struct slu_engine_params params;
    struct slu_plan plan;
    int rc = make_params(run, &params, err);
    params.routing = SLU_ROUTING_LOCKED;
    params.set_share = (float)share;
    rc = rc < 0 ? rc : slu_plan(run->params->model, &params, &plan, err);
    uint32_t n_wanted = plan.set_experts;
    uint64_t lo = plan.least_ram_bytes, hi = plan.resident_ram_bytes;
    while (rc == 0 && lo + 4096 < hi) {
        params.ram_bytes = lo + (hi - lo) / 2;
        rc = slu_plan(run->params->model, &params, &plan, err);
        if (plan.fits && plan.set_experts >= n_wanted) {
            hi = params.ram_bytes;
        } else {
            lo = params.ram_bytes;
        }
    }
    *ret_ram_bytes = hi;
    return rc;
}

static int run_row(struct bench_run *run, struct bench_row *row, struct slu_err *err)
{
    struct slu_engine *engine;
    struct slu_engine_params params;
    int rc = make_params(run, &params, err);
    params.ram_bytes = row->ram_bytes;
    params.routing = row->routing;
    params.set_share = row->routing == SLU_ROUTING_EXACT ? 0 : (float)row->share;
    params.route_bias = (float)row->bias;
    params.min_coverage = (float)row->min_coverage;
    rc = rc < 0 ? rc : slu_engine_open(run->params->model, &params, &engine, err);
    if (rc < 0) {
        return rc;
    }
    for (uint32_t i = 0; i < run->n && rc == 0; i++) {
        rc = answer(run, engine, &run->messages[i], row, err);
    }
    slu_engine_stats(engine, &row->stats);
    for (uint32_t i = 0; i < run->n && rc == 0; i++) {
        struct scoring s = {&run->messages[i], row, run->n_vocab, NULL};
        rc = score(run, engine, &s, err);
    }
    slu_engine_close(engine);
    return rc;
}

/* Each expert's share of its layer's router weight, in the prompt and in the answer. */
static void sum_up(const struct bench_run *run, const struct slu_trace_shape *shape,
                   const struct slu_trace_prompt *prompt, float *ret_uses)
{
    uint32_t k = shape->n_used;
    for (size_t i = 0; i < (size_t)prompt->n_tokens * shape->n_routed; i++) {
        bool is_answer = i / shape->n_routed >= prompt->n_prompt;
        float *at = ret_uses + (is_answer ? run->n_scores : 0) +
                    (size_t)shape->layers[i % shape->n_routed] * shape->n_experts;
        float sum = 0;
        for (uint32_t j = 0; j < k; j++) {
            sum += prompt->weights[i * k + j];
        }
        for (uint32_t j = 0; j < k && sum > 0; j++) {
            at[prompt->experts[i * k + j]] += prompt->weights[i * k + j] / sum;
        }
    }
}

/* A message's reference: answer, what it used of the experts, logits. */
static int refer(struct bench_run *run, struct slu_engine *engine, struct slu_route_record *record,
                 struct bench_message *m, struct bench_row *row, struct slu_err *err)
{
    struct slu_trace_prompt prompt;
    slu_route_record_begin(record);
    int rc = answer(run, engine, m, row, err);
    m->uses = calloc(2 * run->n_scores + 1, sizeof *m->uses);
    if (rc == 0 && m->uses && slu_route_record_end(record, m->ids, m->n, m->n_prompt, &prompt)) {
        sum_up(run, slu_route_record_shape(record), &prompt, m->uses);
    }
    m->logits = malloc(((size_t)(m->n - m->n_prompt) * run->n_vocab + 1) * sizeof(float));
    if (rc == 0 && (!m->uses || !m->logits)) {
        rc = slu_err_set(err, SLU_ENOMEM, "out of memory for logits");
    }
    struct scoring s = {m, row, run->n_vocab, m->logits};
    return rc < 0 ? rc : score(run, engine, &s, err);
}

/* Answers and logits of exact routing, all in memory. */
static int make_reference(struct bench_run *run, struct slu_err *err)
{
    struct slu_engine *engine;
    struct slu_engine_info info;
    struct slu_route_record *record = NULL;
    struct slu_engine_params params;
    struct bench_row row = {.share = 1};
    int rc = make_params(run, &params, err);
    rc = rc < 0 ? rc : slu_engine_open(run->params->model, &params, &engine, err);
    if (rc < 0) {
        return rc;
    }
    slu_engine_info(engine, &info);
    run->n_vocab = slu_engine_n_vocab(engine);
    run->n_scores = (size_t)info.n_layers * info.n_experts;
    run->has_network = slu_engine_has_predictor(engine, NULL);
    rc = slu_route_record_create(engine, CTX, &record, err);
    for (uint32_t i = 0; i < run->n && rc == 0; i++) {
        rc = refer(run, engine, record, &run->messages[i], &row, err);
    }
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        run->tasks[i].n_right = row.n_right[i];
    }
    slu_route_record_destroy(record);
    slu_engine_close(engine);
    return rc;
}

static void add_row(struct bench_run *run, const struct bench_row *row)
{
    run->rows[run->n_rows++] = *row;
}

/* All rows of a size: exact first. */
static void list_rows(struct bench_run *run, double share, uint64_t ram_bytes)
{
    const struct bench_modes *p = run->params;
    struct bench_row row = {.share = share, .ram_bytes = ram_bytes};
    add_row(run, &row);
    row.routing = SLU_ROUTING_PREFER;
    for (uint32_t i = 0; i < p->biases.n; i++) {
        row.bias = p->biases.items[i];
        add_row(run, &row);
    }
    row.routing = SLU_ROUTING_LOCKED;
    row.bias = 0;
    for (int ranker = BENCH_NONE; ranker < BENCH_RANKERS; ranker++) {
        if ((ranker == BENCH_NETWORK && !run->has_network) ||
            (ranker == BENCH_LINEAR && !p->linear)) {
            continue;
        }
        row.ranker = (enum bench_ranker)ranker;
        add_row(run, &row);
    }
    row.ranker = run->has_network ? BENCH_NETWORK : BENCH_NONE;
    for (uint32_t i = 0; i < p->coverages.n; i++) {
        row.min_coverage = p->coverages.items[i];
        add_row(run, &row);
    }
}

static int run_table(struct bench_run *run, struct slu_err *err)
{
    const struct bench_modes *p = run->params;
    run->n_rows_max = p->shares.n * (1 + p->biases.n + BENCH_RANKERS + p->coverages.n);
    run->rows = calloc(run->n_rows_max, sizeof *run->rows);
    int rc = run->rows ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory");
    for (uint32_t i = 0; i < p->shares.n && rc == 0; i++) {
        uint64_t ram_bytes = 0;
        rc = find_ram(run, p->shares.items[i], &ram_bytes, err);
        list_rows(run, p->shares.items[i], ram_bytes);
    }
    if (rc == 0) {
        bench_modes_print_head(run);
    }
    const struct bench_row *exact = NULL;
    for (uint32_t i = 0; i < run->n_rows && rc == 0; i++) {
        struct bench_row *row = &run->rows[i];
        rc = run_row(run, row, err);
        if (rc == 0) {
            exact = row->routing == SLU_ROUTING_EXACT ? row : exact;
            bench_modes_finish_row(run, row, exact);
            run->exact_perplexity = exact->perplexity;
            bench_modes_print_row(run, row);
        }
    }
    return rc;
}

int bench_modes_run(const struct bench_modes *params, struct slu_err *err)
{
    struct bench_run run = {.params = params};
    run.messages = calloc(params->n_prompts, sizeof *run.messages);
    int rc =
        run.messages ? bench_modes_read(&run, err) : slu_err_set(err, SLU_ENOMEM, "out of memory");
    rc = rc < 0 ? rc : make_reference(&run, err);
    rc = rc < 0 ? rc : run_table(&run, err);
    if (rc == 0) {
        bench_modes_print_end(&run);
        rc = params->svg ? bench_modes_plot(&run, err) : 0;
    }
    for (uint32_t i = 0; run.messages && i < params->n_prompts; i++) {
        free(run.messages[i].text);
        free(run.messages[i].expected);
        free(run.messages[i].ids);
        free(run.messages[i].logits);
        free(run.messages[i].uses);
    }
    for (uint32_t i = 0; i < run.n_tasks; i++) {
        free(run.tasks[i].adapter);
    }
    free(run.messages);
    free(run.rows);
    return rc;
}
