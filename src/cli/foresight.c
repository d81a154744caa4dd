#include "cli/foresight.h"

#include <stdlib.h>
#include <string.h>

#include "base/place.h"
#include "cli/cli.h"
#include "tools/route_record.h"

struct slu_arg_table slu_foresight_args(struct slu_foresight *f)
{
    const struct slu_arg args[] = {
        {
            .name = "--profile",
            .value = "FILE",
            .type = SLU_ARG_TEXT,
            .target = &f->profile,
            .help = "expect of the prompt what is saved here, not what the\n"
                    "pack's predictor says",
        },
        {
            .name = "--no-predictor",
            .type = SLU_ARG_FLAG,
            .target = &f->no_predictor,
            .help = "expect nothing",
        },
        {
            .name = "--save-profile",
            .value = "OUT",
            .type = SLU_ARG_TEXT,
            .target = &f->save_profile,
            .help = "save which experts this run used, for --profile",
        },
        {
            .name = "--trace",
            .value = "OUT",
            .type = SLU_ARG_TEXT,
            .target = &f->trace,
            .help = "record what the routers chose (docs/trace-format.md)",
        },
    };
    _Static_assert(sizeof args == sizeof f->args, "one for each");
    memcpy(f->args, args, sizeof args);
    return (struct slu_arg_table){
        .title = "Knowing experts in advance", .args = f->args, .n = sizeof args / sizeof *args};
}

struct slu_arg_table slu_foresight_args_bench(struct slu_foresight *f)
{
    struct slu_arg_table table = slu_foresight_args(f);
    table.n = 2;
    return table;
}

int slu_foresight_prepare(struct slu_foresight *f, struct slu_engine_params *params,
                          struct slu_err *err)
{
    params->records_routing = f->trace || f->save_profile;
    return f->save_profile ? slu_place_probe(f->save_profile, err) : 0;
}

/* 1 with scores, 0 without. */
static int foresee(struct slu_foresight *f, struct slu_session *session, struct slu_err *err)
{
    const char *why = NULL;
    if (f->profile) {
        struct slu_err refused = {0};
        if (slu_profile_load(f->profile, f->engine, f->scores, &refused) == 0) {
            return 1;
        }
        slu_cli_error("%s; going on without it", refused.text);
    }
    slu_engine_has_predictor(f->engine, &why);
    if (why && !f->no_predictor) {
        slu_cli_error("%s; going on without it", why);
    }
    if (f->no_predictor) {
        return 0;
    }
    float *answer = f->scores + f->n_scores;
    int rc = slu_session_predict(session, f->scores, answer, err);
    if (rc > 0) {
        struct slu_engine_info info;
        slu_engine_info(f->engine, &info);
        const struct slu_ranking ranking = {info.n_layers, info.n_experts, answer};
        int ranked = slu_session_rank_answer(session, &ranking, err);
        rc = ranked < 0 ? ranked : rc;
    }
    return rc;
}

int slu_foresight_begin(struct slu_foresight *f, struct slu_engine *engine,
                        struct slu_session *session, struct slu_err *err)
{
    struct slu_engine_info info;
    slu_engine_info(engine, &info);
    f->engine = engine;
    slu_session_ids(session, &f->n_prompt);
    f->n_scores = (size_t)info.n_layers * info.n_experts;
    f->scores = calloc(2 * f->n_scores + 1, sizeof *f->scores);
    if (!f->scores) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for a ranking of experts");
    }
    int rc = foresee(f, session, err);
    if (rc > 0) {
        const struct slu_ranking ranking = {info.n_layers, info.n_experts, f->scores};
        rc = slu_session_rank(session, &ranking, err);
    }
    if (rc == 0 && (f->trace || f->save_profile)) {
        rc = slu_route_record_create(engine, slu_engine_plan(engine)->ctx, &f->record, err);
    }
    if (rc == 0 && f->trace) {
        rc = slu_trace_writer_create(f->trace, slu_route_record_shape(f->record), NULL, &f->writer,
                                     err);
    }
    return rc;
}

static int save_trace(struct slu_foresight *f, const struct slu_trace_prompt *prompt,
                      struct slu_err *err)
{
    int rc = slu_trace_writer_append(f->writer, prompt, err);
    rc = rc < 0 ? rc : slu_trace_writer_finish(f->writer, err);
    slu_trace_writer_destroy(f->writer, rc == 0);
    f->writer = NULL;
    return rc;
}

/* Each expert's share of its layer's router weight. */
static void sum_up(const struct slu_trace_shape *shape, const struct slu_trace_prompt *prompt,
                   float *scores)
{
    uint32_t k = shape->n_used;
    memset(scores, 0, (size_t)shape->n_layers * shape->n_experts * sizeof *scores);
    for (size_t i = 0; i < (size_t)prompt->n_tokens * shape->n_routed; i++) {
        float *at = scores + (size_t)shape->layers[i % shape->n_routed] * shape->n_experts;
        float sum = 0;
        for (uint32_t j = 0; j < k; j++) {
            sum += prompt->weights[i * k + j];
        }
        for (uint32_t j = 0; j < k && sum > 0; j++) {
            at[prompt->experts[i * k + j]] +=
                prompt->weights[i * k + j] / sum / (float)prompt->n_tokens;
        }
    }
}

int slu_foresight_save(struct slu_foresight *f, const struct slu_session *session,
                       struct slu_err *err)
{
    struct slu_trace_prompt prompt;
    size_t n;
    const int32_t *ids = slu_session_ids(session, &n);
    if (!f->record || !slu_route_record_end(f->record, ids, n, f->n_prompt, &prompt)) {
        return 0;
    }
    int rc = f->trace ? save_trace(f, &prompt, err) : 0;
    if (rc == 0 && f->save_profile) {
        sum_up(slu_route_record_shape(f->record), &prompt, f->scores);
        rc = slu_profile_save(f->save_profile, f->engine, f->scores, err);
    }
    return rc;
}

void slu_foresight_finish(struct slu_foresight *f)
{
    slu_route_record_destroy(f->record);
    slu_trace_writer_destroy(f->writer, false);
    free(f->scores);
    f->record = NULL;
    f->writer = NULL;
    f->scores = NULL;
}
