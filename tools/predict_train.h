/*
 * Fits the prompt predictor (experts/predict.h) to recorded routing: Adam on the cross entropy of
 * each prompt token's routing, and of the answer's. The same data, seed and machine give the same
 * bytes. Prompts are read from the trace as they are needed, so memory is that of the network.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_TOOLS_PREDICT_TRAIN_H
#define SLU_TOOLS_PREDICT_TRAIN_H

#include <stdatomic.h>

#include "experts/predict.h"
#include "tools/trace_file.h"

/* x[n x n_embd] = embeddings of n ids. */
typedef int (*slu_predict_embed_fn)(void *arg, const int32_t *ids, uint32_t n, float *x,
                                    struct slu_err *err);

/* Where prompts are: every tenth is held out. */
struct slu_predict_data {
    struct slu_trace_reader *reader;
    slu_predict_embed_fn embed;
    void *arg;
    uint32_t n_embd;
    uint32_t n_prompts;
    uint64_t *offsets; /* [n_prompts] */
    uint32_t n_tokens_max;
};
/* Goes over the trace once. The reader stays the caller's. SLU_EFORMAT, SLU_EIO, SLU_ENOMEM. */
int slu_predict_data_init(struct slu_predict_data *data, struct slu_trace_reader *reader,
                          slu_predict_embed_fn embed, void *arg, uint32_t n_embd,
                          struct slu_err *err);
void slu_predict_data_finish(struct slu_predict_data *data);
bool slu_predict_is_held_out(uint32_t prompt);

struct slu_predict_train_params {
    bool is_linear;    /* the baseline: no hidden layer */
    uint32_t n_hidden; /* 0: as many as a few hundred KB allow, 96 at most */
    uint32_t n_epochs; /* 0: 5, or more where prompts are few */
    uint64_t seed;
    bool use_held_out;                                          /* for training too */
    void (*progress)(void *arg, uint64_t done, uint64_t total); /* may be NULL */
    void *arg;
    const atomic_bool *cancel; /* may be NULL */
};

/* *ret_section, to be freed, is what slu_predictor_create takes. SLU_EINVAL where there is nothing
 * to learn from; SLU_ECANCEL, SLU_EIO, SLU_EFORMAT, SLU_ENOMEM. */
int slu_predict_train(const struct slu_predict_data *data,
                      const struct slu_predict_train_params *params, void **ret_section,
                      size_t *ret_bytes, struct slu_err *err);

/* What the best `share` of each layer's experts by a ranking get of the router's weight, on the
 * average over prompts; and how many of the experts that were used most, as many, are among
 * them. */
struct slu_predict_quality {
    double all, prompt, answer;        /* with one set for all of a prompt's tokens */
    double prompt_alone, answer_alone; /* with a set for these tokens alone */
    double recall;
};
enum slu_predict_kind {
    SLU_PREDICT_HOTTEST,   /* `scores`, the same for every prompt */
    SLU_PREDICT_BY_PROMPT, /* `predictor` */
    SLU_PREDICT_HINDSIGHT, /* the prompt's own counts: what none can beat */
};
struct slu_predict_measure {
    enum slu_predict_kind kind;
    const float *scores;
    struct slu_predictor *predictor;
    double share;
    bool held_out_only;
};
/* SLU_EINVAL without any prompt to measure. */
int slu_predict_measure(const struct slu_predict_data *data,
                        const struct slu_predict_measure *measure,
                        struct slu_predict_quality *ret_quality, struct slu_err *err);

/* scores[n_layers * n_experts]: shares of the router's weight over all prompts that aren't held
 * out. */
int slu_predict_hottest(const struct slu_predict_data *data, float *ret_scores,
                        struct slu_err *err);

#endif
