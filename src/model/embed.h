/*
 * Embedding rows. Where the model has a head of its own, the embedding stays on flash and a chunk's
 * rows are read directly, all at once; where it is tied to the head, rows are taken from there.
 *
 * Thread safety: none; one forward pass at a time. flash_bytes may be read meanwhile.
 */
#ifndef SLU_MODEL_EMBED_H
#define SLU_MODEL_EMBED_H

#include <stdatomic.h>

#include "io/ring.h"
#include "model/weights.h"

struct slu_embed {
    const struct slu_weights *weights;
    const struct slu_kern *kern;
    struct slu_ring *ring; /* NULL where tied */
    uint8_t *staging;      /* n_slots x slot_bytes */
    uint32_t n_slots;      /* rows read at once */
    uint32_t slot_bytes;          /* pages that a row can lie across */
    _Atomic uint64_t flash_bytes; /* read so far; relaxed, a statistic that orders nothing */
    struct slu_ledger *ledger;
    uint64_t ring_bytes;
};

/* What init will charge to SLU_ACCOUNT_IO. */
uint64_t slu_embed_charge_bytes(const struct slu_weights *weights, uint32_t n_slots,
                                enum slu_io_backend backend);

int slu_embed_init(struct slu_embed *embed, const struct slu_weights *weights, const char *path,
                   uint32_t n_slots, enum slu_io_backend backend, const struct slu_kern *kern,
                   struct slu_ledger *ledger, struct slu_err *err);
void slu_embed_finish(struct slu_embed *embed);

/* x[n x E] = the embeddings of ids, scaled. ids are within the vocabulary. SLU_EIO; SLU_EFORMAT
 * where a row's checksum doesn't match. */
int slu_embed_rows(struct slu_embed *embed, const int32_t *ids, uint32_t n, float *x,
                   struct slu_err *err);

#endif
