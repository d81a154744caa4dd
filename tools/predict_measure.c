#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/predict_train.h"

bool slu_predict_is_held_out(uint32_t prompt)
{
    return prompt % 10 == 9;
}

int slu_predict_data_init(struct slu_predict_data *data, struct slu_trace_reader *reader,
                          slu_predict_embed_fn embed, void *arg, uint32_t n_embd,
                          struct slu_err *err)
{
    struct slu_predict_data d = {.reader = reader, .embed = embed, .arg = arg, .n_embd = n_embd};
    struct slu_trace_prompt prompt;
    uint32_t n_max = 0;
    int rc;
    for (;;) {
        uint64_t offset = slu_trace_reader_offset(reader);
        rc = slu_trace_reader_next(reader, &prompt, err);
        if (rc <= 0) {
            break;
        }
        if (d.n_prompts == n_max) {
            n_max = n_max ? 2 * n_max : 256;
            uint64_t *more = realloc(d.offsets, n_max * sizeof *more);
            if (!more) {
                rc = slu_err_set(err, SLU_ENOMEM, "out of memory for %u prompts", n_max);
                break;
            }
            d.offsets = more;
        }
        d.offsets[d.n_prompts++] = offset;
        d.n_tokens_max = prompt.n_prompt > d.n_tokens_max ? prompt.n_prompt : d.n_tokens_max;
    }
    if (rc < 0) {
        free(d.offsets);
        return rc;
    }
    *data = d;
    return 0;
}

void slu_predict_data_finish(struct slu_predict_data *data)
{
    free(data->offsets);
    *data = (struct slu_predict_data){0};
}

/* sums += shares of the router's weight of tokens lo .. hi-1: 1 for each token and layer. */
static void add_weights(const struct slu_trace_shape *trace, const struct slu_trace_prompt *prompt,
                        uint32_t lo, uint32_t hi, double *sums)
{
    uint32_t k = trace->n_used;
    for (size_t i = (size_t)lo * trace->n_routed; i < (size_t)hi * trace->n_routed; i++) {
        double *at = sums + (size_t)trace->layers[i % trace->n_routed] * trace->n_experts;
        double sum = 0;
        for (uint32_t j = 0; j < k; j++) {
            sum += prompt->weights[i * k + j];
        }
        for (uint32_t j = 0; j < k && sum > 0; j++) {
            at[prompt->experts[i * k + j]] += prompt->weights[i * k + j] / sum;
        }
    }
}

int slu_predict_hottest(const struct slu_predict_data *data, float *ret_scores, struct slu_err *err)
{
    const struct slu_trace_shape *trace = slu_trace_reader_shape(data->reader);
    size_t out = (size_t)trace->n_layers * trace->n_experts;
    double *sums = calloc(out, sizeof *sums);
    int rc = sums ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory for counts of experts");
    for (uint32_t i = 0; i < data->n_prompts && rc >= 0; i++) {
        struct slu_trace_prompt prompt;
        if (slu_predict_is_held_out(i)) {
            continue;
        }
        slu_trace_reader_seek(data->reader, data->offsets[i]);
        rc = slu_trace_reader_next(data->reader, &prompt, err);
        if (rc > 0) {
            add_weights(trace, &prompt, 0, prompt.n_tokens, sums);
        }
    }
    for (uint32_t l = 0; l < trace->n_layers && rc >= 0; l++) {
        double total = 0;
        for (uint32_t e = 0; e < trace->n_experts; e++) {
            total += sums[(size_t)l * trace->n_experts + e];
        }
        for (uint32_t e = 0; e < trace->n_experts; e++) {
            size_t at = (size_t)l * trace->n_experts + e;
            ret_scores[at] = total > 0 ? (float)(sums[at] / total) : 0;
        }
    }
    free(sums);
    return rc < 0 ? rc : 0;
}

struct measuring {
    const struct slu_trace_shape *trace;
    uint32_t n_chosen;              /* of each layer's experts */
    double *prompt, *answer, *both; /* layers * experts */
    float *score, *actual;          /* 3 * layers * experts: for all tokens, prompt, answer */
    uint8_t *chosen;                /* 2 * experts */
    double sums[6];
    uint32_t n[6];
};

/* Marks the n best of a layer; ties go to the lower number. */
static void choose(const float *score, uint32_t n_experts, uint32_t n, uint8_t *chosen)
{
    memset(chosen, 0, n_experts);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t e = 0; e < n_experts; e++) {
            if (!chosen[e] && (best == UINT32_MAX || score[e] > score[best])) {
                best = e;
            }
        }
        chosen[best] = 1;
    }
}

static void account(struct measuring *m, int which, double part, double whole)
{
    if (whole > 0) {
        m->sums[which] += part / whole;
        m->n[which]++;
    }
}

/* What share of the weights the set covers that the ranking makes. */
static void measure_set(struct measuring *m, const float *score, const double *weights, int which)
{
    uint32_t n = m->trace->n_experts;
    double covered = 0, all = 0;
    for (uint32_t i = 0; i < m->trace->n_routed; i++) {
        size_t first = (size_t)m->trace->layers[i] * n;
        choose(score + first, n, m->n_chosen, m->chosen);
        for (uint32_t e = 0; e < n; e++) {
            covered += m->chosen[e] ? weights[first + e] : 0;
            all += weights[first + e];
        }
    }
    account(m, which, covered, all);
}

static void measure_recall(struct measuring *m)
{
    uint32_t n = m->trace->n_experts;
    uint8_t *chosen = m->chosen, *used = m->chosen + n;
    double found = 0, wanted = 0;
    for (uint32_t i = 0; i < m->trace->n_routed; i++) {
        size_t first = (size_t)m->trace->layers[i] * n;
        choose(m->score + first, n, m->n_chosen, chosen);
        choose(m->actual + first, n, m->n_chosen, used);
        for (uint32_t e = 0; e < n; e++) {
            found += chosen[e] && used[e];
            wanted += used[e];
        }
    }
    account(m, 5, found, wanted);
}

static void measure_prompt(struct measuring *m)
{
    size_t out = (size_t)m->trace->n_layers * m->trace->n_experts;
    measure_set(m, m->score, m->both, 0);
    measure_set(m, m->score, m->prompt, 1);
    measure_set(m, m->score, m->answer, 2);
    measure_set(m, m->score + out, m->prompt, 3);
    measure_set(m, m->score + 2 * out, m->answer, 4);
    measure_recall(m);
}

/* Scores the prompt; x has room for all of its embeddings. */
static int rank(const struct slu_predict_data *data, const struct slu_predict_measure *measure,
                const struct slu_trace_prompt *prompt, float *x, struct measuring *m,
                struct slu_err *err)
{
    size_t out = (size_t)m->trace->n_layers * m->trace->n_experts;
    int rc = 0;
    if (measure->kind == SLU_PREDICT_HOTTEST) {
        for (int i = 0; i < 3; i++) {
            memcpy(m->score + i * out, measure->scores, out * sizeof *m->score);
        }
    } else if (measure->kind == SLU_PREDICT_HINDSIGHT) {
        memcpy(m->score, m->actual, 3 * out * sizeof *m->score);
    } else {
        rc = data->embed(data->arg, prompt->ids, prompt->n_prompt, x, err);
        if (rc == 0) {
            slu_predictor_run(measure->predictor, x, prompt->n_prompt, m->score);
            memcpy(m->score + out, slu_predictor_prompt(measure->predictor),
                   out * sizeof *m->score);
            memcpy(m->score + 2 * out, slu_predictor_answer(measure->predictor),
                   out * sizeof *m->score);
        }
    }
    return rc;
}

static int measure_all(const struct slu_predict_data *data,
                       const struct slu_predict_measure *measure, struct measuring *m, float *x,
                       struct slu_err *err)
{
    size_t out = (size_t)m->trace->n_layers * m->trace->n_experts;
    for (uint32_t i = 0; i < data->n_prompts; i++) {
        struct slu_trace_prompt prompt;
        if (measure->held_out_only && !slu_predict_is_held_out(i)) {
            continue;
        }
        slu_trace_reader_seek(data->reader, data->offsets[i]);
        int rc = slu_trace_reader_next(data->reader, &prompt, err);
        if (rc < 0) {
            return rc;
        }
        if (prompt.n_prompt == 0) {
            continue;
        }
        memset(m->prompt, 0, out * sizeof *m->prompt);
        memset(m->answer, 0, out * sizeof *m->answer);
        add_weights(m->trace, &prompt, 0, prompt.n_prompt, m->prompt);
        add_weights(m->trace, &prompt, prompt.n_prompt, prompt.n_tokens, m->answer);
        for (size_t j = 0; j < out; j++) {
            m->both[j] = m->prompt[j] + m->answer[j];
            m->actual[j] = (float)m->both[j];
            m->actual[out + j] = (float)m->prompt[j];
            m->actual[2 * out + j] = (float)m->answer[j];
        }
        rc = rank(data, measure, &prompt, x, m, err);
        if (rc < 0) {
            return rc;
        }
        measure_prompt(m);
    }
    return m->n[0] ? 0 : slu_err_set(err, SLU_EINVAL, "there is no prompt to measure");
}

int slu_predict_measure(const struct slu_predict_data *data,
                        const struct slu_predict_measure *measure,
                        struct slu_predict_quality *ret_quality, struct slu_err *err)
{
    const struct slu_trace_shape *trace = slu_trace_reader_shape(data->reader);
    size_t out = (size_t)trace->n_layers * trace->n_experts;
    struct measuring m = {
        .trace = trace,
        .n_chosen = (uint32_t)(measure->share * trace->n_experts + 0.5),
        .prompt = calloc(3 * out, sizeof *m.prompt),
        .score = calloc(6 * out, sizeof *m.score),
        .chosen = calloc(2 * (size_t)trace->n_experts, 1),
    };
    float *x = malloc(((size_t)data->n_tokens_max * data->n_embd + 1) * sizeof *x);
    m.n_chosen = m.n_chosen > trace->n_experts ? trace->n_experts : m.n_chosen;
    m.answer = m.prompt ? m.prompt + out : NULL;
    m.both = m.prompt ? m.prompt + 2 * out : NULL;
    m.actual = m.score ? m.score + 3 * out : NULL;
    int rc = m.prompt && m.score && m.chosen && x
                 ? measure_all(data, measure, &m, x, err)
                 : slu_err_set(err, SLU_ENOMEM, "out of memory to measure a predictor");
    if (rc == 0) {
        double mean[6];
        for (int i = 0; i < 6; i++) {
            mean[i] = m.n[i] ? m.sums[i] / m.n[i] : 0;
        }
        *ret_quality = (struct slu_predict_quality){.all = mean[0],
                                                    .prompt = mean[1],
                                                    .answer = mean[2],
                                                    .prompt_alone = mean[3],
                                                    .answer_alone = mean[4],
                                                    .recall = mean[5]};
    }
    free(m.prompt);
    free(m.score);
    free(m.chosen);
    free(x);
    return rc;
}
