/*
 * Expert blocks through a mapping of the pack, for comparison: the system's page cache decides what
 * stays in memory and what is read when. It has no slots, no policy and no reads of its own. Raw
 * blocks are used where they lie, unchecked, since that would take another pass over them at each
 * use; compressed ones are decoded into a worker's buffer each time.
 * A file that is cut short while it is mapped ends the process, as with any mapping.
 *
 * Thread safety: each worker its own number; the rest from one thread.
 */
#ifndef SLU_EXPERTS_MAPPED_H
#define SLU_EXPERTS_MAPPED_H

#include "base/ledger.h"
#include "io/pack.h"

struct slu_mapped;

struct slu_mapped_params {
    const char *path;
    const struct slu_extent *extents; /* kept */
    uint32_t n_extents;
    size_t slot_bytes; /* of the largest block, raw */
    uint32_t n_workers;
    struct slu_ledger *ledger;
};

/* SLU_EIO, SLU_ENOENT, SLU_EBUDGET, SLU_ENOMEM. */
int slu_mapped_open(const struct slu_mapped_params *params, struct slu_mapped **ret_mapped,
                    struct slu_err *err);
void slu_mapped_close(struct slu_mapped *mapped); /* NULL is fine */

/* What open will charge to SLU_ACCOUNT_IO; extents NULL counts as compressed. The mapping itself is
 * the system's, and not charged. */
uint64_t slu_mapped_charge_bytes(const struct slu_mapped_params *params);

/* A block's raw bytes, until the worker's next call; NULL where it is compressed and corrupt, or
 * lies past the file's end, which slu_mapped_error then tells. */
const void *slu_mapped_block(struct slu_mapped *mapped, unsigned worker, uint32_t block);

/* The first error since the last call, 0 if there was none. While no worker is at work. */
int slu_mapped_error(struct slu_mapped *mapped, struct slu_err *err);

/* Bytes that this process has caused to be read from devices, by whatever means; 0 if the system
 * doesn't tell. */
uint64_t slu_mapped_device_bytes(void);

#endif
