/*
 * Reading an adapter's frames and blocks: by a few threads, since decoding is slower than good
 * flash and who asks for an adapter waits for it. Private to adapters.
 *
 * Thread safety: a load runs threads of its own and is over when the call returns.
 */
#ifndef SLU_ADAPTERS_LOAD_H
#define SLU_ADAPTERS_LOAD_H

#include "adapters/sla.h"

struct slu_load_params {
    struct slu_source *source;
    const struct slu_sla *sla;
    uint8_t *matrices;         /* sla->matrix_bytes: what is in frames, record after record */
    const uint64_t *record_at; /* where in them each record begins */
    uint8_t *experts;          /* sla->info.expert_bytes: blocks, one behind another; NULL: they
                                  are read and checked only */
    struct slu_ledger *ledger;
};

/* Each frame's and each block's checksum, its size, its numbers, and the zeros behind it are
 * checked. SLU_EIO, SLU_EFORMAT, SLU_EBUDGET, SLU_ENOMEM. */
int slu_load_run(const struct slu_load_params *params, struct slu_err *err);

/* What it needs at least, under SLU_ACCOUNT_IO, while it runs. */
uint64_t slu_load_bytes(const struct slu_sla *sla, bool is_check_only);

#endif
