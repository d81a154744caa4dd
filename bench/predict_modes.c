/*
 * Each message is answered greedily in exact routing with everything in memory: that is the
 * reference. Then, for each mode, predictor and size of the cache, it is answered again, for speed
 * and reads; and the reference's answer is computed token by token, for what its probabilities are
 * there: KL divergence and perplexity against exact.
 */
#include "predict_modes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/calibrate_input.h"

#define ANSWER_MAX 64u
#define CTX        512u

enum predictor { NONE, NETWORK };
static const char *const predictor_names[] = {"-", "network"};
static const char *const mode_names[] = {"exact", "prefer", "locked"};

struct message {
    char *text;
    size_t bytes;
    int32_t *ids; /* of prompt and reference answer */
    uint32_t n_prompt, n;
    float *logits; /* [n - n_prompt][n_vocab]: before each token of the answer */
};

struct bench {
    const struct bench_modes *params;
    struct message *messages;
    uint32_t n, n_vocab;
};

struct row {
    enum slu_routing routing;
    enum predictor predictor;
    double share;
    double prefill_s, decode_s, kl, nll;
    uint64_t n_decoded, n_scored, n_same;
    struct slu_engine_stats stats; /* after the answers */
};

struct scoring {
    const struct message *message;
    struct row *row;
    uint32_t n_vocab;
    float *keep; /* where the reference's logits go; NULL: they are compared with */
};

static double log_sum(const float *logits, uint32_t n, float *ret_high)
{
    double sum = 0;
    *ret_high = logits[0];
    for (uint32_t i = 1; i < n; i++) {
        *ret_high = logits[i] > *ret_high ? logits[i] : *ret_high;
    }
    for (uint32_t i = 0; i < n; i++) {
        sum += exp((double)logits[i] - *ret_high);
    }
    return log(sum) + *ret_high;
}

static int on_logits(void *arg, uint32_t position, const float *logits)
{
    struct scoring *s = arg;
    const struct message *m = s->message;
    if (position + 1 < m->n_prompt || position + 1 >= m->n) {
        return 0;
    }
    size_t at = (size_t)(position + 1 - m->n_prompt) * s->n_vocab;
    if (s->keep) {
        memcpy(s->keep + at, logits, s->n_vocab * sizeof *logits);
        return 0;
    }
    float high;
    const float *exact = m->logits + at;
    double here = log_sum(logits, s->n_vocab, &high), there = log_sum(exact, s->n_vocab, &high);
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        double p = exp(exact[i] - there);
        s->row->kl += p * ((exact[i] - there) - (logits[i] - here));
    }
    s->row->nll += here - logits[m->ids[position + 1]];
    s->row->n_scored++;
    return 0;
}

/* Ranks for the prompt now and for the answer when it begins; *ret_answer, to be freed, is the
 * latter, NULL without a predictor. */
static int rank(struct slu_engine *engine, struct slu_session *session, enum predictor predictor,
                float **ret_answer, struct slu_err *err)
{
    struct slu_engine_info info;
    slu_engine_info(engine, &info);
    size_t n = (size_t)info.n_layers * info.n_experts;
    float *scores = calloc(2 * n + 1, sizeof *scores);
    int rc = scores ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory");
    *ret_answer = NULL;
    if (rc == 0 && predictor == NETWORK) {
        rc = slu_session_predict(session, scores, scores + n, err);
    }
    if (rc > 0) {
        struct slu_ranking ranking = {info.n_layers, info.n_experts, scores};
        rc = slu_session_rank(session, &ranking, err);
        ranking.score = scores + n;
        rc = rc < 0 ? rc : slu_session_rank_answer(session, &ranking, err);
        memcpy(scores, scores + n, n * sizeof *scores);
        *ret_answer = scores;
        return rc;
    }
    free(scores);
    return rc;
}

/* The reference's tokens, the prompt at once and the answer one by one. */
static int score(struct slu_engine *engine, struct scoring *s, struct slu_err *err)
{
    const struct message *m = s->message;
    struct slu_session *session;
    struct slu_engine_info info;
    float *for_answer = NULL;
    int rc = slu_session_create(engine, NULL, &session, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_session_tokens(session, m->ids, m->n_prompt, err);
    rc = rc < 0 || s->keep ? rc : rank(engine, session, s->row->predictor, &for_answer, err);
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

static int no_text(void *arg, const char *text, size_t len, int32_t token)
{
    (void)arg, (void)text, (void)len, (void)token;
    return 0;
}

/* Answers; the first time the answer becomes the reference. */
static int answer(struct slu_engine *engine, struct message *m, struct row *row,
                  struct slu_err *err)
{
    struct slu_session *session;
    struct slu_result result = {0};
    size_t n_prompt, n;
    float *for_answer = NULL;
    int rc = slu_session_create(engine, NULL, &session, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_session_chat(session, m->text, m->bytes, err);
    slu_session_ids(session, &n_prompt);
    rc = rc < 0 ? rc : rank(engine, session, row->predictor, &for_answer, err);
    rc = rc < 0 ? rc
                : slu_session_generate(
                      session, &(struct slu_generate_params){.n_max = ANSWER_MAX, .text = no_text},
                      &result, err);
    const int32_t *ids = slu_session_ids(session, &n);
    if (rc == 0 && !m->ids) {
        m->ids = malloc((n + 1) * sizeof *m->ids);
        m->n_prompt = (uint32_t)n_prompt;
        m->n = (uint32_t)n_prompt + result.n_generated;
        rc = m->ids ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory");
        if (rc == 0) {
            memcpy(m->ids, ids, m->n * sizeof *ids);
        }
    }
    if (rc == 0) {
        row->n_same +=
            n_prompt + result.n_generated == m->n && memcmp(ids, m->ids, m->n * sizeof *ids) == 0;
        row->prefill_s += result.prefill_s;
        row->decode_s += result.decode_s;
        row->n_decoded += result.n_generated;
    }
    free(for_answer);
    slu_session_destroy(session);
    return rc;
}

/* The least budget whose plan has slots for that share of the blocks. */
static int find_ram(const char *model, struct slu_engine_params *params, double share,
                    struct slu_err *err)
{
    struct slu_plan plan;
    params->ram_bytes = 1ull << 40;
    int rc = slu_plan(model, params, &plan, err);
    uint64_t lo = plan.least_ram_bytes, hi = plan.resident_ram_bytes;
    while (rc == 0 && lo + 4096 < hi) {
        params->ram_bytes = lo + (hi - lo) / 2;
        rc = slu_plan(model, params, &plan, err);
        if (plan.fits && plan.n_slots >= share * plan.n_blocks) {
            hi = params->ram_bytes;
        } else {
            lo = params->ram_bytes;
        }
    }
    params->ram_bytes = hi;
    return rc;
}

static int run_row(struct bench *b, struct row *row, struct slu_err *err)
{
    struct slu_engine *engine;
    struct slu_engine_params params = {.ctx = CTX, .routing = row->routing};
    int rc = find_ram(b->params->model, &params, row->share, err);
    rc = rc < 0 ? rc : slu_engine_open(b->params->model, &params, &engine, err);
    if (rc < 0) {
        return rc;
    }
    for (uint32_t i = 0; i < b->n && rc == 0; i++) {
        rc = answer(engine, &b->messages[i], row, err);
    }
    slu_engine_stats(engine, &row->stats);
    for (uint32_t i = 0; i < b->n && rc == 0; i++) {
        struct scoring s = {&b->messages[i], row, b->n_vocab, NULL};
        rc = score(engine, &s, err);
    }
    slu_engine_close(engine);
    return rc;
}

/* Answers and logits of exact routing, all in memory. */
static int make_reference(struct bench *b, struct slu_err *err)
{
    struct slu_engine *engine;
    struct row row = {.share = 1};
    struct slu_engine_params params = {.ctx = CTX, .ram_bytes = 1ull << 34};
    int rc = slu_engine_open(b->params->model, &params, &engine, err);
    if (rc < 0) {
        return rc;
    }
    b->n_vocab = slu_engine_n_vocab(engine);
    for (uint32_t i = 0; i < b->n && rc == 0; i++) {
        struct message *m = &b->messages[i];
        rc = answer(engine, m, &row, err);
        if (rc == 0) {
            m->logits = malloc(((size_t)(m->n - m->n_prompt) * b->n_vocab + 1) * sizeof(float));
            struct scoring s = {m, &row, b->n_vocab, m->logits};
            rc = m->logits ? score(engine, &s, err) : slu_err_set(err, SLU_ENOMEM, "out of memory");
        }
    }
    slu_engine_close(engine);
    return rc;
}

static void print_row(const struct bench *b, const struct row *r, bool is_first)
{
    const struct slu_phase_stats *decode = &r->stats.phases[SLU_PHASE_DECODE];
    const struct slu_phase_stats *prefill = &r->stats.phases[SLU_PHASE_PREFILL];
    double steps = r->n_decoded > b->n ? (double)(r->n_decoded - b->n) : 1;
    double weight = decode->router_weight + prefill->router_weight;
    double covered = weight > 0 ? (decode->covered_weight + prefill->covered_weight) / weight : 1;
    double n_tokens = decode->n_tokens ? (double)decode->n_tokens : 1;
    double ppl = exp(r->n_scored ? r->nll / (double)r->n_scored : 0);
    double kl = r->n_scored ? r->kl / (double)r->n_scored : 0;
    const char *format =
        b->params->is_json
            ? "%s{\"mode\": \"%s\", \"predictor\": \"%s\", \"cache\": %.3f, \"covered\": %.4f, "
              "\"decode_covered\": %.4f, \"flash_bytes_token\": %.0f, \"first_token_ms\": %.2f, "
              "\"tok_s\": %.1f, \"kl\": %.5f, \"perplexity\": %.4f, \"same\": %.3f}"
            : "%s%-7s %-8s %6.3f %8.4f %8.4f %10.0f %9.2f %8.1f %9.5f %8.4f %6.3f\n";
    printf(format, b->params->is_json && !is_first ? ", " : "", mode_names[r->routing],
           predictor_names[r->predictor], r->share, covered,
           decode->router_weight > 0 ? decode->covered_weight / decode->router_weight : 1,
           (double)decode->flash_bytes / n_tokens, 1e3 * r->prefill_s / b->n, steps / r->decode_s,
           kl, ppl, (double)r->n_same / b->n);
    fflush(stdout);
}

static int run_table(struct bench *b, struct slu_err *err)
{
    static const double shares[] = {.75, .5, .25};
    bool is_first = true;
    printf(b->params->is_json ? "{\"modes\": ["
                              : "%u messages\nmode    guess     cache  covered  decoded  "
                                "B a token  first ms    tok/s        KL      ppl   same\n",
           b->n);
    for (int i = 0; i < 3; i++) {
        for (int mode = SLU_ROUTING_EXACT; mode <= SLU_ROUTING_LOCKED; mode++) {
            for (int p = NONE; p <= (mode == SLU_ROUTING_LOCKED ? NETWORK : NONE); p++) {
                struct row row = {.routing = (enum slu_routing)mode,
                                  .predictor = (enum predictor)p,
                                  .share = shares[i]};
                int rc = run_row(b, &row, err);
                if (rc < 0) {
                    return rc;
                }
                print_row(b, &row, is_first);
                is_first = false;
            }
        }
    }
    printf(b->params->is_json ? "]}\n" : "");
    return 0;
}

static int read_messages(struct bench *b, struct slu_err *err)
{
    struct slu_calibrate_input *input;
    struct slu_calibrate_item item;
    int rc = slu_calibrate_input_open(b->params->prompts, NULL, 1, &input, err);
    if (rc < 0) {
        return rc;
    }
    while (b->n < b->params->n_prompts && (rc = slu_calibrate_input_next(input, &item, err)) > 0) {
        struct message *m = &b->messages[b->n++];
        m->text = strndup(item.prompt, item.prompt_bytes);
        m->bytes = m->text ? strlen(m->text) : 0;
    }
    slu_calibrate_input_close(input);
    return rc < 0 ? rc : b->n ? 0 : slu_err_set(err, SLU_EINVAL, "there are no messages");
}

int bench_modes_run(const struct bench_modes *params, struct slu_err *err)
{
    struct bench b = {.params = params};
    b.messages = calloc(params->n_prompts, sizeof *b.messages);
    int rc = b.messages ? read_messages(&b, err) : slu_err_set(err, SLU_ENOMEM, "out of memory");
    rc = rc < 0 ? rc : make_reference(&b, err);
    rc = rc < 0 ? rc : run_table(&b, err);
    for (uint32_t i = 0; i < b.n; i++) {
        free(b.messages[i].text);
        free(b.messages[i].ids);
        free(b.messages[i].logits);
    }
    free(b.messages);
    return rc;
}
