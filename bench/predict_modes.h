/*
 * The ways to route beside each other, for bench/predict.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_BENCH_PREDICT_MODES_H
#define SLU_BENCH_PREDICT_MODES_H

#include "experts/predict.h"
#include "slu.h"

#define BENCH_MODES_LIST_MAX 8

struct bench_modes_list {
    double items[BENCH_MODES_LIST_MAX];
    uint32_t n;
};

struct bench_modes {
    const char *model;
    const char *prompts;          /* JSON lines, see bench/modes_input.c */
    const char *adapters_dir;     /* where the adapters lie that these name; NULL: nowhere */
    const char *svg;              /* a plot; NULL: none */
    struct slu_predictor *linear; /* a baseline that was fitted; NULL: without it */
    uint32_t n_prompts;           /* messages, at most */
    uint32_t n_answer;            /* tokens of an answer, at most */
    bool is_json;
    struct bench_modes_list shares;    /* of all experts, that the set holds: the sizes of cache */
    struct bench_modes_list biases;    /* prefer's */
    struct bench_modes_list coverages; /* locked's least coverage, beside none at all */
};

/* Prints a row for each mode, predictor and cache size. */
int bench_modes_run(const struct bench_modes *params, struct slu_err *err);

#endif
