/*
 * The compact trace as a struct slu_route_trace: what replays through the cache needs neither ids
 * nor where one prompt ends and the next begins.
 */
#include <stdlib.h>
#include <string.h>

#include "tools/route_trace.h"
#include "tools/trace_file.h"

#define CHOICES_MAX (UINT32_MAX / 2)

struct room {
    size_t n_visits_max, n_choices_max;
};

static int grow(struct slu_route_trace *trace, struct room *room, size_t n_visits, size_t n_choices,
                const char *name, struct slu_err *err)
{
    if (trace->n_choices + n_choices > CHOICES_MAX) {
        return slu_err_set(err, SLU_EFORMAT, "%s: a trace of that many choices can't be replayed",
                           name);
    }
    if (trace->n_visits + n_visits > room->n_visits_max) {
        size_t n = 2 * (trace->n_visits + n_visits);
        struct slu_route_visit *visits = realloc(trace->visits, n * sizeof *visits);
        if (visits) {
            trace->visits = visits;
            room->n_visits_max = n;
        }
    }
    if (trace->n_choices + n_choices > room->n_choices_max) {
        size_t n = 2 * (trace->n_choices + n_choices);
        uint32_t *experts = realloc(trace->experts, n * sizeof *experts);
        trace->experts = experts ? experts : trace->experts;
        float *weights = realloc(trace->weights, n * sizeof *weights);
        trace->weights = weights ? weights : trace->weights;
        room->n_choices_max = experts && weights ? n : room->n_choices_max;
    }
    return trace->n_visits + n_visits <= room->n_visits_max &&
                   trace->n_choices + n_choices <= room->n_choices_max
               ? 0
               : slu_err_set(err, SLU_ENOMEM, "%s: no memory for its choices", name);
}

static void add_prompt(struct slu_route_trace *trace, const struct slu_trace_shape *shape,
                       const struct slu_trace_prompt *prompt)
{
    uint32_t k = shape->n_used;
    size_t at = 0;
    for (uint32_t t = 0; t < prompt->n_tokens; t++) {
        bool is_decoding = t >= prompt->n_prompt;
        for (uint32_t i = 0; i < shape->n_routed; i++) {
            trace->visits[trace->n_visits++] = (struct slu_route_visit){
                .token = trace->n_tokens,
                .layer = shape->layers[i],
                .first = trace->n_choices,
                .n = k,
                .is_decoding = is_decoding,
            };
            for (uint32_t j = 0; j < k; j++, at++) {
                trace->experts[trace->n_choices] = prompt->experts[at];
                trace->weights[trace->n_choices++] = prompt->weights[at];
            }
        }
        trace->n_tokens++;
        trace->n_decoded_tokens += is_decoding;
    }
}

static int read_prompts(struct slu_trace_reader *reader, const char *name,
                        struct slu_route_trace *trace, struct slu_err *err)
{
    const struct slu_trace_shape *shape = slu_trace_reader_shape(reader);
    struct slu_trace_prompt prompt;
    struct room room = {0};
    int rc;
    if ((uint64_t)shape->n_layers * shape->n_experts > SLU_ROUTE_BANK_MAX) {
        return slu_err_set(err, SLU_EFORMAT, "%s: no model has as many experts as that", name);
    }
    *trace = (struct slu_route_trace){.n_layers = shape->n_layers,
                                      .n_experts = shape->n_experts,
                                      .n_routed_layers = shape->n_routed};
    while ((rc = slu_trace_reader_next(reader, &prompt, err)) > 0) {
        size_t n_visits = (size_t)prompt.n_tokens * shape->n_routed;
        rc = grow(trace, &room, n_visits, n_visits * shape->n_used, name, err);
        if (rc < 0) {
            break;
        }
        add_prompt(trace, shape, &prompt);
    }
    if (rc == 0 && trace->n_choices == 0) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: there are no choices in this trace", name);
    }
    return rc;
}

int slu_route_compact_read(struct slu_source *source, struct slu_route_trace *ret_trace,
                           struct slu_err *err)
{
    struct slu_trace_reader *reader;
    struct slu_route_trace trace = {0};
    int rc = slu_trace_reader_create(source, &reader, err);
    if (rc < 0) {
        return rc;
    }
    rc = read_prompts(reader, source->name, &trace, err);
    slu_trace_reader_destroy(reader);
    if (rc < 0) {
        slu_route_trace_finish(&trace);
        return rc;
    }
    *ret_trace = trace;
    return 0;
}
