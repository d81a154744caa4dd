#include "tools/divergence.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define RAM_BYTES ((uint64_t)1 << 30)

void slu_divergence_random(const struct slu_divergence_text *text, uint32_t n_vocab, uint64_t seed)
{
    uint64_t state = seed;
    for (size_t i = 0; i < (size_t)text->n_sequences * text->n_tokens; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        text->ids[i] = (int32_t)((state >> 33) % n_vocab);
    }
}

struct sink {
    float *at; /* NULL: nobody wants them */
    uint32_t n_vocab;
};

static int keep(void *arg, uint32_t position, const float *logits)
{
    struct sink *sink = arg;
    if (sink->at) {
        memcpy(sink->at + (size_t)position * sink->n_vocab, logits, sink->n_vocab * sizeof *logits);
    }
    return 0;
}

int slu_divergence_eval(struct slu_engine *engine, const struct slu_divergence_text *text,
                        float *ret_logits, struct slu_err *err)
{
    uint32_t n_vocab = slu_engine_n_vocab(engine);
    int code = 0;
    for (uint32_t s = 0; s < text->n_sequences && code == 0; s++) {
        size_t first = (size_t)s * text->n_tokens;
        struct sink sink = {.at = ret_logits ? ret_logits + first * n_vocab : NULL,
                            .n_vocab = n_vocab};
        struct slu_session *session = NULL;
        code = slu_session_create(engine, NULL, &session, err);
        if (code == 0) {
            code = slu_session_tokens(session, text->ids + first, text->n_tokens, err);
        }
        if (code == 0) {
            code = slu_session_eval(session, keep, &sink, err);
        }
        slu_session_destroy(session);
    }
    return code;
}

int slu_divergence_logits(const char *pack, const struct slu_divergence_text *text,
                          float **ret_logits, uint32_t *ret_n_vocab, struct slu_err *err)
{
    /* Models are small and other work may be going on: threads would wait for each other. */
    const struct slu_engine_params params = {
        .ram_bytes = RAM_BYTES, .ctx = text->n_tokens + 1, .n_threads = 1};
    struct slu_engine *engine = NULL;
    int code = slu_engine_open(pack, &params, &engine, err);
    if (code < 0) {
        return code;
    }
    uint32_t n_vocab = slu_engine_n_vocab(engine);
    float *logits =
        calloc((size_t)text->n_sequences * text->n_tokens, (size_t)n_vocab * sizeof *logits);
    code = logits ? slu_divergence_eval(engine, text, logits, err)
                  : slu_err_set(err, SLU_ENOMEM, "%s: out of memory for %u x %u x %u logits", pack,
                                text->n_sequences, text->n_tokens, n_vocab);
    slu_engine_close(engine);
    if (code < 0) {
        free(logits);
        return code;
    }
    *ret_logits = logits;
    *ret_n_vocab = n_vocab;
    return 0;
}

double slu_log_sum_exp(const float *logits, uint32_t n)
{
    double most = logits[0], sum = 0;
    for (uint32_t i = 1; i < n; i++) {
        most = logits[i] > most ? logits[i] : most;
    }
    for (uint32_t i = 0; i < n; i++) {
        sum += exp(logits[i] - most);
    }
    return most + log(sum);
}

double slu_divergence_token(const float *reference, const float *logits, uint32_t n_vocab)
{
    const float *x = reference, *y = logits;
    double x_log = slu_log_sum_exp(x, n_vocab), y_log = slu_log_sum_exp(y, n_vocab), kl = 0;
    for (uint32_t i = 0; i < n_vocab; i++) {
        kl += exp(x[i] - x_log) * ((x[i] - x_log) - (y[i] - y_log));
    }
    return kl;
}

struct slu_divergence slu_divergence_of(const struct slu_divergence_text *text, uint32_t n_vocab,
                                        const float *reference, const float *logits)
{
    double sum = 0, squares = 0, n = text->n_sequences;
    for (uint32_t s = 0; s < text->n_sequences; s++) {
        double mean = 0;
        for (uint32_t t = 0; t < text->n_tokens; t++) {
            size_t at = ((size_t)s * text->n_tokens + t) * n_vocab;
            mean += slu_divergence_token(reference + at, logits + at, n_vocab) / text->n_tokens;
        }
        sum += mean;
        squares += mean * mean;
    }
    double variance = n > 1 ? (squares - sum * sum / n) / (n - 1) : 0;
    return (struct slu_divergence){.mean = sum / n, .spread = variance > 0 ? sqrt(variance) : 0};
}
