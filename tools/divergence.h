/*
 * How far what one pack says is from what another says: the Kullback-Leibler divergence of their
 * next-token distributions, over the same sequences of tokens. For benches and tests of formats.
 *
 * Thread safety: pure functions, but for logits, which opens an engine of its own.
 */
#ifndef SLU_TOOLS_DIVERGENCE_H
#define SLU_TOOLS_DIVERGENCE_H

#include "slu.h"

/* Sequences of equal length, each of which is a text of its own. */
struct slu_divergence_text {
    int32_t *ids; /* [n_sequences][n_tokens] */
    uint32_t n_sequences, n_tokens;
};

/* Fills the text with tokens that follow from nothing but the seed. */
void slu_divergence_random(const struct slu_divergence_text *text, uint32_t n_vocab, uint64_t seed);

/* Logits after each token: [n_sequences][n_tokens][n_vocab], to be freed. SLU_EFORMAT for ids that
 * the model doesn't have; else as slu_engine_open and slu_session_eval. */
int slu_divergence_logits(const char *pack, const struct slu_divergence_text *text,
                          float **ret_logits, uint32_t *ret_n_vocab, struct slu_err *err);

/* Evaluates the text on an engine that is open already; logits go to the callback, may be NULL. */
int slu_divergence_eval(struct slu_engine *engine, const struct slu_divergence_text *text,
                        float *ret_logits, struct slu_err *err);

/* The logarithm of the sum of the exponentials of n logits, n > 0. */
double slu_log_sum_exp(const float *logits, uint32_t n);

/* Of one token, in nats: sum p ln(p/q), p being the reference's probabilities. */
double slu_divergence_token(const float *reference, const float *logits, uint32_t n_vocab);

struct slu_divergence {
    double mean;   /* nats a token: of sum p ln(p/q), p being the reference's probabilities */
    double spread; /* standard deviation of the sequences' means; 0 for a single one */
};

struct slu_divergence slu_divergence_of(const struct slu_divergence_text *text, uint32_t n_vocab,
                                        const float *reference, const float *logits);

#endif
