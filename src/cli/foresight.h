/*
 * What `sluice run` does about knowing experts in advance: rank them for a prompt, record what the
 * routers then chose, and save that as a trace or a profile.
 *
 * Thread safety: the main thread only.
 */
#ifndef SLU_CLI_FORESIGHT_H
#define SLU_CLI_FORESIGHT_H

#include "cli/args.h"
#include "slu.h"

struct slu_route_record;
struct slu_trace_writer;

struct slu_foresight {
    /* The command line. */
    struct slu_arg args[4];
    const char *profile, *save_profile, *trace;
    bool no_predictor;
    /* Of the run. */
    struct slu_engine *engine;
    struct slu_route_record *record; /* NULL unless something is to be saved */
    struct slu_trace_writer *writer; /* NULL unless a trace is */
    size_t n_scores;                 /* layers * experts */
    float *scores;                   /* for the prompt, then for the answer */
    size_t n_prompt;
};

/* Its options, pointing into *foresight; and those of them that only foresee. */
struct slu_arg_table slu_foresight_args(struct slu_foresight *foresight);
struct slu_arg_table slu_foresight_args_bench(struct slu_foresight *foresight);

/* Before the engine is opened: sees that what is to be saved can be written, and has the plan leave
 * room for recording it. A sentence otherwise. */
int slu_foresight_prepare(struct slu_foresight *foresight, struct slu_engine_params *params,
                          struct slu_err *err);

/* Before the session's pending prompt is computed: ranks experts by the profile or the pack's
 * predictor. One that can't be used is told on stderr, and the run goes on without. */
int slu_foresight_begin(struct slu_foresight *foresight, struct slu_engine *engine,
                        struct slu_session *session, struct slu_err *err);
/* After it: writes what is to be saved. */
int slu_foresight_save(struct slu_foresight *foresight, const struct slu_session *session,
                       struct slu_err *err);
/* Before the engine is closed. Removes what was begun and not saved. Zeroed is fine. */
void slu_foresight_finish(struct slu_foresight *foresight);

#endif
