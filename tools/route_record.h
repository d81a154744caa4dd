/*
 * Records what the routers choose while an engine computes one session's tokens, for a trace.
 *
 * Thread safety: one thread; nothing else may compute on the engine meanwhile.
 */
#ifndef SLU_TOOLS_ROUTE_RECORD_H
#define SLU_TOOLS_ROUTE_RECORD_H

#include "slu.h"
#include "tools/trace_file.h"

struct slu_route_record;

/* Has room for so many tokens of context, at most the engine's, which is charged to its ledger:
 * slu_engine_params.records_routing leaves it. SLU_EINVAL for a model without experts; SLU_EBUDGET,
 * SLU_ENOMEM. To be destroyed before the engine is closed. */
int slu_route_record_create(struct slu_engine *engine, uint32_t ctx,
                            struct slu_route_record **ret_record, struct slu_err *err);
void slu_route_record_destroy(struct slu_route_record *record); /* NULL is fine */

/* What the trace's header says of the model. */
const struct slu_trace_shape *slu_route_record_shape(const struct slu_route_record *record);

/* Forgets everything. To be called before a new session's first token. */
void slu_route_record_begin(struct slu_route_record *record);
/* What was computed of ids[n], of which the first n_prompt were given; false if nothing was. The
 * ids are the caller's, the choices valid until begin. */
bool slu_route_record_end(const struct slu_route_record *record, const int32_t *ids, size_t n,
                          size_t n_prompt, struct slu_trace_prompt *ret_prompt);

#endif
