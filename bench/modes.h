/*
 * What the parts of bench/predict --modes share.
 */
#ifndef SLU_BENCH_MODES_H
#define SLU_BENCH_MODES_H

#include "bench/predict_modes.h"

#define BENCH_TASKS_MAX 8

struct bench_message {
    char *text;
    size_t bytes;
    char *expected; /* NULL without a reference */
    uint32_t task;
    int32_t *ids; /* of prompt and exact's answer */
    uint32_t n_prompt, n;
    float *logits; /* [n - n_prompt][n_vocab]: before each token of the answer */
    float *uses;   /* [2][n_scores]: shares of the router's weight in prompt and answer */
};

/* Messages with one adapter, or with none. */
struct bench_task {
    char *adapter; /* NULL: the model alone */
    uint32_t n, n_expected;
    uint32_t n_right; /* of exact's answers */
};

enum bench_ranker {
    BENCH_NONE,
    BENCH_HOTTEST, /* what the other messages used, whatever their task */
    BENCH_LINEAR,
    BENCH_NETWORK, /* the pack's */
    BENCH_PROFILE, /* what the other messages of its task used, prompt and answer together */
    BENCH_HINDSIGHT,
    BENCH_RANKERS
};

struct bench_row {
    enum slu_routing routing;
    enum bench_ranker ranker;
    double share, bias, min_coverage;
    uint64_t ram_bytes;
    /* Sums over all messages. */
    double first_s, decode_s, kl, nll;
    uint64_t n_decoded, n_scored, n_same;
    uint32_t n_right[BENCH_TASKS_MAX];
    struct slu_engine_stats stats; /* after the answers */
    /* What they come to. */
    double covered, decode_covered, flash_token, flash_prompt, of_exact, first_ms, tok_s, kl_token,
        perplexity, accuracy; /* accuracy: of all messages with a reference; NaN without any */
    char breaks[128];         /* what is lost that shouldn't be; empty: nothing */
};

struct bench_run {
    const struct bench_modes *params;
    struct bench_message *messages;
    uint32_t n, n_vocab;
    size_t n_scores; /* layers * experts */
    bool has_network;
    struct bench_task tasks[BENCH_TASKS_MAX];
    uint32_t n_tasks;
    double exact_perplexity;
    struct bench_row *rows;
    uint32_t n_rows, n_rows_max;
};

/* The messages, and which tasks they belong to. A line is an object with "prompt" and perhaps
 * "adapter", a name, and "expected", what is the right answer; or a JSON string, the prompt. */
int bench_modes_read(struct bench_run *run, struct slu_err *err);

/* What a row's sums come to, beside exact's row of the same size (NULL for itself). */
void bench_modes_finish_row(const struct bench_run *run, struct bench_row *row,
                            const struct bench_row *exact);

void bench_modes_print_head(const struct bench_run *run);
void bench_modes_print_row(const struct bench_run *run, const struct bench_row *row);
/* Where each way breaks; or the rest of the JSON. */
void bench_modes_print_end(const struct bench_run *run);
int bench_modes_plot(const struct bench_run *run, struct slu_err *err);

#endif
