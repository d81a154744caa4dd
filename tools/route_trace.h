/*
 * A recorded routing trace: which experts the router of each layer chose for each token, and with
 * what weight. Text, as real runs leave it:
 *
 *     # route_trace v1
 *     # model=NAME arch=NAME n_layer=L n_expert=E n_expert_used=K
 *     turn,phase,step,layer,slot,expert,weight,...
 *     0,0,0,0,0,83,0.529533,...
 *
 * One line for each token (step), layer and chosen expert. Phase 0 is the prompt, phase 1 decoding.
 * The columns may come in any order and others may be among them; turn, slot and weight may be
 * missing. Lines may come in any order: a prompt is recorded layer by layer. In memory all is
 * sorted by token, then by layer, as decoding goes.
 *
 * The compact form (tools/trace_file.h, docs/trace-format.md) is told by its first bytes and read
 * too; its prompts follow one another.
 *
 * Thread safety: constant once opened.
 */
#ifndef SLU_TOOLS_ROUTE_TRACE_H
#define SLU_TOOLS_ROUTE_TRACE_H

#include <stdbool.h>

#include "io/source.h"

#define SLU_ROUTE_LAYERS_MAX  4096u
#define SLU_ROUTE_EXPERTS_MAX 65536u
#define SLU_ROUTE_BANK_MAX    (1u << 20) /* of all layers together */

/* One token at one layer. */
struct slu_route_visit {
    uint32_t token; /* counted from 0 over the whole trace */
    uint32_t layer;
    uint32_t first, n; /* its choices: n > 0 from first */
    bool is_decoding;
};

struct slu_route_trace {
    uint32_t n_layers, n_experts; /* as the header has them; every number below is within them */
    uint32_t n_routed_layers;     /* those that the trace visits at all */
    uint32_t n_tokens, n_decoded_tokens;
    uint32_t n_visits, n_choices;
    struct slu_route_visit *visits; /* [n_visits] */
    uint32_t *experts;              /* [n_choices], distinct within a visit, by slot */
    float *weights;                 /* [n_choices], finite, not negative; 1 where not recorded */
};

/* Reads all of source, text or compact, which stays the caller's. SLU_EFORMAT with the line, SLU_EIO, SLU_ENOMEM. */
int slu_route_trace_read(struct slu_source *source, struct slu_route_trace *ret_trace,
                         struct slu_err *err);
int slu_route_trace_open(const char *path, struct slu_route_trace *ret_trace, struct slu_err *err);
/* What slu_route_trace_read does with the compact form. */
int slu_route_compact_read(struct slu_source *source, struct slu_route_trace *ret_trace,
                           struct slu_err *err);
void slu_route_trace_finish(struct slu_route_trace *trace); /* zeroed is fine */

#endif
