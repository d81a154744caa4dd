/*
 * The prompt predictor: from the embeddings of a prompt's tokens, before anything is computed, what
 * share of the router's weight each expert will get. A small network looks at each token, with the
 * two before it and the mean of all, and guesses that token's routing; the guesses are added up,
 * and the mean of its hidden units tells what the answer will want. It was trained on recorded
 * routing (tools/predict_train.h) and lies in a section of the pack.
 *
 * x[t] is token t's embedding over its root mean square, m the mean of x, d and h the widths of
 * embedding and hidden layer:
 *
 *   u[t] = relu(A0 x[t] + A1 x[t-1] + A2 x[t-2] + A3 m + a)        h
 *   prompt[l] = mean over t of softmax over experts of (P u[t] + p)[l]
 *   answer[l] = softmax over experts of (Q mean over t of u[t] + R m + q)[l]
 *   score     = (n prompt + n_answer answer) / (n + n_answer)
 *
 * R is there where it is small. Without a hidden layer (h = 0) it is the linear predictor that the
 * network is compared with: prompt[l] = softmax of (S m + p)[l], and answer without Q.
 *
 * Pure: no I/O, no locks, no clock. Thread safety: constant once made, but for its scratch: one
 * call of run at a time.
 */
#ifndef SLU_EXPERTS_PREDICT_H
#define SLU_EXPERTS_PREDICT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

#define SLU_PREDICT_HIDDEN_MAX 128u
#define SLU_PREDICT_BYTES_MAX  (8u << 20) /* of a section */
#define SLU_PREDICT_BEFORE     3u         /* tokens that a guess looks at, with its own */

struct slu_predict_shape {
    uint32_t n_embd, n_layers, n_experts;
    uint32_t n_hidden;     /* 0: linear */
    uint32_t has_direct;   /* R is there; where n_hidden is 0 both R and S are */
    uint32_t n_tokens_max; /* more are thinned out evenly: what bounds the time */
    float n_answer;        /* tokens that an answer has, on the average */
};

/* The parts of the network, each a matrix of rows x cols, a row for each input. */
enum slu_predict_part {
    SLU_PREDICT_A0, /* d x h, as are A1, A2 and A3 */
    SLU_PREDICT_A1,
    SLU_PREDICT_A2,
    SLU_PREDICT_A3,
    SLU_PREDICT_P, /* h x layers * experts, as is Q; S, d x layers * experts, where h is 0 */
    SLU_PREDICT_Q,
    SLU_PREDICT_R,    /* d x layers * experts */
    SLU_PREDICT_BIAS, /* 1 x (h + 2 * layers * experts): a, p, q */
    SLU_PREDICT_PARTS,
};
void slu_predict_part_shape(const struct slu_predict_shape *shape, enum slu_predict_part part,
                            uint32_t *ret_rows, uint32_t *ret_cols);

struct slu_predictor;

/* The bytes of a section, as docs/pack-format.md has them: 8 bits a number, a scale for each row.
 * Returns how many there are; writes them if they are no more than bytes_max. weights: the parts
 * one after the other. */
size_t slu_predict_store(const struct slu_predict_shape *shape, const float *weights, void *ret,
                         size_t bytes_max);

/* From such bytes, which are copied. SLU_EFORMAT, SLU_EUNSUP for a newer version, SLU_ENOMEM. */
int slu_predictor_create(const void *data, size_t bytes, struct slu_predictor **ret_predictor,
                         struct slu_err *err);
void slu_predictor_destroy(struct slu_predictor *predictor); /* NULL is fine */
const struct slu_predict_shape *slu_predictor_shape(const struct slu_predictor *predictor);
/* What create would allocate for these bytes, for the ledger; 0 if it refuses their header. */
size_t slu_predictor_bytes(const void *data, size_t bytes);

/* Of a prompt of n tokens, how many are looked at one by one. */
uint32_t slu_predictor_taken(const struct slu_predictor *predictor, uint32_t n);

/* score[n_layers * n_experts], a layer's adding up to 1. x: [n][n_embd] embeddings of all tokens in
 * a row, n > 0. Allocates nothing. */
void slu_predictor_run(struct slu_predictor *predictor, const float *x, uint32_t n, float *score);
/* The shares for prompt and for answer alone, of the last run. */
const float *slu_predictor_prompt(const struct slu_predictor *predictor);
const float *slu_predictor_answer(const struct slu_predictor *predictor);

#endif
