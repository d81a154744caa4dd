#include "tools/calibrate.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/place.h"
#include "engine.h"
#include "io/pack_section.h"
#include "tools/calibrate_input.h"
#include "tools/importance_record.h"
#include "tools/route_record.h"

#define PIECE_BYTES 2048u
/* Prompts between two times that the system is asked to write the trace out. */
#define SYNC_EVERY 64u

struct calibration {
    const struct slu_calibrate_params *params;
    struct slu_engine *engine;
    struct slu_calibrate_input *input;
    struct slu_route_record *record;
    struct slu_trace_writer *writer;
    struct slu_importance_record *importance; /* NULL unless wanted */
    char *sums_path;                          /* where its sums are kept meanwhile */
    uint64_t input_checksum;
    struct slu_calibrate_report report;
    uint32_t n_skip; /* prompts that an earlier run recorded */
};

static bool is_cancelled(const struct calibration *c)
{
    return c->params->cancel && atomic_load_explicit(c->params->cancel, memory_order_relaxed);
}

static int no_text(void *arg, const char *text, size_t len, int32_t token)
{
    const struct calibration *c = arg;
    (void)text, (void)len, (void)token;
    return is_cancelled(c);
}

static int put_prompt(struct slu_session *session, const struct slu_calibrate_item *item,
                      struct slu_err *err)
{
    return item->is_chat ? slu_session_chat(session, item->prompt, item->prompt_bytes, err)
                         : slu_session_text(session, item->prompt, item->prompt_bytes, err);
}

static int compute(struct calibration *c, struct slu_session *session,
                   const struct slu_calibrate_item *item, struct slu_err *err)
{
    if (item->answer) {
        int rc = slu_session_text(session, item->answer, item->answer_bytes, err);
        return rc < 0 ? rc : slu_session_eval(session, NULL, NULL, err);
    }
    struct slu_result result = {0};
    const struct slu_generate_params params = {
        .n_max = c->params->n_answer ? c->params->n_answer : 64, .text = no_text, .arg = c};
    int rc = slu_session_generate(session, &params, &result, err);
    return rc == 0 && is_cancelled(c) ? slu_err_set(err, SLU_ECANCEL, "interrupted") : rc;
}

/* What there is so far, for a run that goes on from here. */
static int keep(struct calibration *c, struct slu_err *err)
{
    int rc = slu_trace_writer_sync(c->writer, err);
    return rc < 0 || !c->importance
               ? rc
               : slu_importance_record_save(c->importance, c->sums_path, c->input_checksum,
                                            c->report.n_prompts, err);
}

static int append(struct calibration *c, struct slu_session *session, size_t n_prompt,
                  struct slu_err *err)
{
    struct slu_trace_prompt prompt;
    size_t n;
    const int32_t *ids = slu_session_ids(session, &n);
    if (!slu_route_record_end(c->record, ids, n, n_prompt, &prompt)) {
        return 0;
    }
    int rc = slu_trace_writer_append(c->writer, &prompt, err);
    c->report.n_prompts++;
    c->report.n_tokens += prompt.n_tokens;
    return rc < 0 || c->report.n_prompts % SYNC_EVERY != 0 ? rc : keep(c, err);
}

/* A text that is longer than the context is passed over; so is what an earlier run has recorded,
 * once it is known not to be such a one. */
static int run_item(struct calibration *c, const struct slu_calibrate_item *item,
                    struct slu_err *err)
{
    struct slu_session *session;
    int rc = slu_session_create(c->engine, NULL, &session, err);
    if (rc < 0) {
        return rc;
    }
    size_t n_prompt;
    slu_route_record_begin(c->record);
    rc = put_prompt(session, item, err);
    slu_session_ids(session, &n_prompt);
    bool is_empty = rc == 0 && n_prompt == 0;
    if (rc == 0 && !is_empty && c->n_skip == 0) {
        rc = compute(c, session, item, err);
    } else if (rc == 0 && item->answer) {
        rc = slu_session_text(session, item->answer, item->answer_bytes, err);
    }
    if (rc == SLU_ERANGE || is_empty) {
        c->report.n_skipped++;
        rc = 0;
    } else if (rc == 0 && c->n_skip > 0) {
        c->n_skip--;
        c->report.n_prompts++;
    } else if (rc == 0) {
        rc = append(c, session, n_prompt, err);
    }
    slu_session_destroy(session);
    return rc;
}

static int record_all(struct calibration *c, struct slu_err *err)
{
    struct slu_calibrate_item item;
    int rc;
    while ((rc = slu_calibrate_input_next(c->input, &item, err)) > 0) {
        if (is_cancelled(c)) {
            rc = keep(c, err);
            return rc < 0 ? rc
                          : slu_err_set(
                                err, SLU_ECANCEL,
                                "interrupted after %u prompts; the same command goes on from there",
                                c->report.n_prompts);
        }
        rc = run_item(c, &item, err);
        if (rc < 0) {
            return rc;
        }
        if (c->params->progress) {
            c->params->progress(c->params->arg, "recording", slu_calibrate_input_done(c->input),
                                slu_calibrate_input_bytes(c->input));
        }
    }
    if (rc == 0 && c->report.n_prompts == 0) {
        rc = slu_err_set(err, SLU_EINVAL, "there is no text that fits the context");
    }
    return rc;
}

static int embed(void *arg, const int32_t *ids, uint32_t n, float *x, struct slu_err *err)
{
    return slu_engine_embed(arg, ids, n, x, err);
}

static void on_fitting(void *arg, uint64_t done, uint64_t total)
{
    const struct calibration *c = arg;
    if (c->params->progress) {
        c->params->progress(c->params->arg, "fitting", done, total);
    }
}

static int measure(struct calibration *c, const struct slu_predict_data *data, const float *hottest,
                   const void *section, size_t bytes, struct slu_err *err)
{
    struct slu_predict_measure m = {.share = .5, .held_out_only = true, .scores = hottest};
    struct slu_predictor *predictor;
    if (data->n_prompts < 10) {
        return 0; /* none is held out */
    }
    int rc = slu_predictor_create(section, bytes, &predictor, err);
    if (rc < 0) {
        return rc;
    }
    m.predictor = predictor;
    rc = slu_predict_measure(data, &m, &c->report.hottest, err);
    m.kind = SLU_PREDICT_BY_PROMPT;
    rc = rc < 0 ? rc : slu_predict_measure(data, &m, &c->report.predictor, err);
    m.kind = SLU_PREDICT_HINDSIGHT;
    rc = rc < 0 ? rc : slu_predict_measure(data, &m, &c->report.hindsight, err);
    slu_predictor_destroy(predictor);
    c->report.has_quality = rc == 0;
    return rc;
}

/* Recording and fitting take a while, in which the file may have been replaced: what was learned of
 * one model is of no use to another. */
static int check_model(const struct calibration *c, struct slu_err *err)
{
    struct slu_pack *pack;
    int rc = slu_pack_open_file(c->params->model, &pack, err);
    if (rc < 0) {
        return rc;
    }
    if (pack->fingerprint != c->engine->pack->fingerprint) {
        rc = slu_err_set(err, SLU_EINVAL,
                         "%s: was replaced by another model while it was calibrated",
                         c->params->model);
    }
    slu_pack_close(pack);
    return rc;
}

/* Fits the predictor to the trace and puts it into the pack. */
static int fit_section(struct calibration *c, const struct slu_predict_data *data,
                       const float *hottest, struct slu_err *err)
{
    const struct slu_predict_train_params train = {
        .seed = c->params->seed, .progress = on_fitting, .arg = c, .cancel = c->params->cancel};
    void *section = NULL;
    size_t bytes = 0;
    int rc = slu_predict_train(data, &train, &section, &bytes, err);
    rc = rc < 0 ? rc : measure(c, data, hottest, section, bytes, err);
    rc = rc < 0 ? rc : check_model(c, err);
    if (rc == 0) {
        rc = slu_pack_section_write(c->params->model, SLU_SECTION_PREDICTOR, section, bytes, err);
        c->report.section_bytes = bytes;
    }
    free(section);
    return rc;
}

static int learn(struct calibration *c, struct slu_trace_reader *reader, struct slu_err *err)
{
    struct slu_engine_info info;
    struct slu_predict_data data;
    slu_engine_info(c->engine, &info);
    float *hottest = calloc((size_t)info.n_layers * info.n_experts, sizeof *hottest);
    if (!hottest) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for scores");
    }
    int rc = slu_predict_data_init(&data, reader, embed, c->engine,
                                   c->engine->weights.config.n_embd, err);
    if (rc == 0) {
        rc = slu_predict_hottest(&data, hottest, err);
        if (rc == 0 && c->params->profile) {
            rc = slu_profile_save(c->params->profile, c->engine, hottest, err);
        }
        if (rc == 0 && !c->params->no_predictor) {
            rc = fit_section(c, &data, hottest, err);
        }
        slu_predict_data_finish(&data);
    }
    free(hottest);
    return rc;
}

static int learn_from_trace(struct calibration *c, struct slu_err *err)
{
    struct slu_source *source;
    struct slu_trace_reader *reader;
    int rc = slu_source_open_file(slu_trace_writer_path(c->writer), &source, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_trace_reader_create(source, &reader, err);
    if (rc == 0) {
        rc = learn(c, reader, err);
        slu_trace_reader_destroy(reader);
    }
    slu_source_destroy(source);
    return rc;
}

static int start_over(struct calibration *c, const char *trace, const struct slu_trace_shape *shape,
                      struct slu_err *err)
{
    slu_trace_writer_destroy(c->writer, true);
    c->writer = NULL;
    slu_importance_record_destroy(c->importance);
    c->importance = NULL;
    c->n_skip = 0;
    int rc = slu_importance_record_create(c->engine, &c->importance, err);
    return rc < 0 ? rc : slu_trace_writer_create(trace, shape, NULL, &c->writer, err);
}

/* What is to be written at the end can be written: better said now than then. */
static int probe_outputs(const struct slu_calibrate_params *p, struct slu_err *err)
{
    int rc = p->profile ? slu_place_probe(p->profile, err) : 0;
    return rc < 0 || !p->importance ? rc : slu_place_probe(p->importance, err);
}

static int begin(struct calibration *c, const char *trace, struct slu_err *err)
{
    const struct slu_calibrate_params *p = c->params;
    struct slu_engine_params params = *p->engine;
    params.records_routing = true;
    int rc = probe_outputs(p, err);
    rc = rc < 0 ? rc : slu_engine_open(p->model, &params, &c->engine, err);
    if (rc == 0 && !p->no_predictor && access(p->model, W_OK) != 0) {
        rc = slu_err_set(err, SLU_EIO,
                         "%s: cannot be written, so a predictor has no place in it: %s; "
                         "--no-predictor only records",
                         p->model, strerror(errno));
    }
    if (rc == 0) {
        /* A token is a byte at the least, and there are marks. */
        uint32_t ctx = slu_engine_plan(c->engine)->ctx;
        size_t piece_bytes = ctx < 64 ? 32 : ctx - 8 < PIECE_BYTES ? ctx - 8 : PIECE_BYTES;
        rc = slu_calibrate_input_open(p->prompts, p->text, piece_bytes, &c->input, err);
    }
    rc = rc < 0
             ? rc
             : slu_route_record_create(c->engine, slu_engine_plan(c->engine)->ctx, &c->record, err);
    if (rc < 0) {
        return rc;
    }
    struct slu_trace_shape shape = *slu_route_record_shape(c->record);
    shape.input = slu_calibrate_input_checksum(c->input) * 31 + p->n_answer +
                  ((uint64_t)slu_engine_plan(c->engine)->ctx << 32);
    c->input_checksum = shape.input;
    c->n_skip = UINT32_MAX;
    if (p->importance) {
        if (asprintf(&c->sums_path, "%s.part", p->importance) < 0) {
            c->sums_path = NULL;
            return slu_err_set(err, SLU_ENOMEM, "out of memory for a file's name");
        }
        rc = slu_importance_record_check(c->sums_path, err);
        rc = rc < 0 ? rc : slu_importance_record_create(c->engine, &c->importance, err);
        if (rc < 0) {
            return rc;
        }
        c->n_skip = slu_importance_record_load(c->importance, c->sums_path, shape.input);
    }
    uint32_t n_sums = c->n_skip;
    rc = slu_trace_writer_create(trace, &shape, &c->n_skip, &c->writer, err);
    if (rc == 0 && p->importance && c->n_skip < n_sums) {
        /* The trace is gone, so its sums would count twice. */
        return start_over(c, trace, &shape, err);
    }
    c->report.n_resumed = c->n_skip;
    return rc;
}

int slu_calibrate_run(const struct slu_calibrate_params *params,
                      struct slu_calibrate_report *ret_report, struct slu_err *err)
{
    struct calibration c = {.params = params};
    char *beside = NULL;
    if (!params->trace && asprintf(&beside, "%s.trace", params->model) < 0) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for a file's name");
    }
    int rc = begin(&c, params->trace ? params->trace : beside, err);
    rc = rc < 0 ? rc : record_all(&c, err);
    rc = rc < 0 ? rc : keep(&c, err);
    rc = rc < 0 || !c.importance
             ? rc
             : slu_importance_record_write(c.importance, params->importance, err);
    rc = rc < 0 ? rc : learn_from_trace(&c, err);
    rc = rc < 0 || !params->trace ? rc : slu_trace_writer_finish(c.writer, err);
    if (rc == 0 && c.sums_path) {
        unlink(c.sums_path);
    }
    slu_importance_record_destroy(c.importance);
    slu_route_record_destroy(c.record);
    slu_engine_close(c.engine);
    slu_calibrate_input_close(c.input);
    /* What was recorded is kept for the next run, or under its name already. */
    bool has_record = c.report.n_prompts > 0 || c.report.n_resumed > 0;
    slu_trace_writer_destroy(c.writer, has_record && (rc < 0 || params->trace));
    free(beside);
    free(c.sums_path);
    if (rc == 0) {
        *ret_report = c.report;
    }
    return rc;
}
