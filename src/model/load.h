/*
 * Reading extents of a pack to their places in memory, on all threads of a pool: while one waits
 * for the flash others check and decode, and all of them have the system provide the memory, which
 * takes longer than the reading on virtual machines.
 *
 * Thread safety: a load runs on its pool; nothing here has state.
 */
#ifndef SLU_MODEL_LOAD_H
#define SLU_MODEL_LOAD_H

#include "base/ledger.h"
#include "base/pool.h"
#include "io/pack.h"

struct slu_load_piece {
    uint32_t extent;
    const char *name; /* of what it is a part of, for messages; NULL for none */
    uint8_t *at;      /* extents[extent].raw_bytes */
};

/* What a load charges for each thread, for one at least, while it runs, under SLU_ACCOUNT_IO.
 * stored_bytes_max is the size of the largest compressed piece, or 0 where none is. */
uint64_t slu_load_charge_bytes(size_t stored_bytes_max);

struct slu_load_params {
    const struct slu_pack *pack;
    const struct slu_load_piece *pieces;
    size_t n_pieces;
    size_t stored_bytes_max;
    struct slu_pool *pool;
    struct slu_ledger *ledger;
    uint64_t used_bytes_max; /* fewer threads read if the ledger's use would pass this */
};

/* Blocks. Of several pieces that can't be read the first is told of: SLU_EIO, SLU_EFORMAT; or
 * SLU_EBUDGET, SLU_ENOMEM. After a failure the places hold anything. */
int slu_load(const struct slu_load_params *params, struct slu_err *err);

#endif
