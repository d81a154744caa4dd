/*
 * Calibration: runs texts through a model, records how they are routed, fits the prompt predictor
 * and puts it into the pack. Memory is that of the engine, the predictor and one prompt. The trace
 * is written as it goes, so that a run that was interrupted or killed is gone on with by the next
 * one with the same texts.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_TOOLS_CALIBRATE_H
#define SLU_TOOLS_CALIBRATE_H

#include <stdatomic.h>

#include "slu.h"
#include "tools/predict_train.h"

struct slu_calibrate_params {
    const char *model;
    const struct slu_engine_params *engine;
    const char *prompts, *text; /* either may be NULL */
    const char *trace;          /* kept under this name; NULL: it goes when all is done */
    const char *importance;     /* how much each matrix's inputs matter; NULL: not wanted */
    const char *profile;        /* what was used most, as a profile; NULL: not wanted */
    uint32_t n_answer;          /* tokens that the model answers a prompt with, at most; 0: 64 */
    uint64_t seed;              /* of the predictor's training */
    bool no_predictor;          /* the pack stays as it is */
    /* May be NULL; what: "recording", "fitting". */
    void (*progress)(void *arg, const char *what, uint64_t done, uint64_t total);
    void *arg;
    const atomic_bool *cancel; /* may be NULL */
};

struct slu_calibrate_report {
    uint32_t n_prompts, n_resumed, n_skipped; /* skipped: longer than the context */
    uint64_t n_tokens;
    size_t section_bytes; /* 0: no predictor */
    /* With half of each layer's experts, on the prompts that were held out. */
    struct slu_predict_quality hottest, predictor, hindsight;
    bool has_quality;
};

/* SLU_ECANCEL: what was recorded is kept for the next run. SLU_EINVAL; else as slu_engine_open and
 * slu_pack_section_write. */
int slu_calibrate_run(const struct slu_calibrate_params *params,
                      struct slu_calibrate_report *ret_report, struct slu_err *err);

#endif
