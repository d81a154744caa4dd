/*
 * The ways to route beside each other, for bench/predict.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_BENCH_PREDICT_MODES_H
#define SLU_BENCH_PREDICT_MODES_H

#include "slu.h"

struct bench_modes {
    const char *model;
    const char *prompts; /* JSON lines, as sluice calibrate takes them */
    uint32_t n_prompts;  /* of these, at most */
    bool is_json;
};

/* Prints a row for each mode, predictor and cache size. */
int bench_modes_run(const struct bench_modes *params, struct slu_err *err);

#endif
