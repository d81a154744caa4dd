/*
 * The routed experts' blocks of an adapter that are not all in memory: a stream of its own over the
 * .sla, with as many slots as the adapters' share of the ledger allows. A round brings the blocks
 * of some experts of one layer in, and keeps them there until it ends; so it has no more of them
 * than there are slots.
 *
 *     begin --reads go out--> take, on each worker --> bytes, as often as wanted --> end
 *
 * Of an adapter that is all in memory only slu_expert_bytes is of use.
 *
 * Thread safety: begin and end by one thread; take by each worker between them; bytes by any thread
 * once all workers are back from take. Whoever computes with adapters lets one forward pass run at
 * a time.
 */
#ifndef SLU_ADAPTERS_EXPERT_STREAM_H
#define SLU_ADAPTERS_EXPERT_STREAM_H

#include "adapters/sla.h"

/* SLU_EBUDGET, SLU_EIO, SLU_ENOMEM. Everything is charged to SLU_ACCOUNT_ADAPTERS. */
int slu_expert_stream_create(const struct slu_sla *sla,
                             const struct slu_adapter_streaming *streaming,
                             struct slu_ledger *ledger, struct slu_expert_stream **ret_stream,
                             struct slu_err *err);
void slu_expert_stream_destroy(struct slu_expert_stream *stream); /* NULL is fine */

/* Exactly what create will charge. */
uint64_t slu_expert_stream_bytes(const struct slu_sla *sla,
                                 const struct slu_adapter_streaming *streaming);

/* Experts of one round at most; UINT32_MAX for an adapter in memory. */
uint32_t slu_expert_stream_slots(const struct slu_adapter *adapter);

/* Begins a round with n distinct experts of a layer that the adapter has blocks for. */
int slu_expert_stream_begin(const struct slu_adapter *adapter, uint32_t layer,
                            const uint32_t *experts, uint32_t n, struct slu_err *err);
/* Waits for blocks and unpacks them, until the round's are all there, or it has failed. */
void slu_expert_stream_take(const struct slu_adapter *adapter, unsigned worker);
/* 0, or why not all blocks came: to be asked before any is used. */
int slu_expert_stream_check(const struct slu_adapter *adapter);
/* Ends the round: 0 or its error, with a sentence that names the file. */
int slu_expert_stream_end(const struct slu_adapter *adapter, struct slu_err *err);

/* The block of an expert of the round, or any of an adapter in memory. NULL: it has none for that
 * layer. */
const uint8_t *slu_expert_bytes(const struct slu_adapter *adapter, uint32_t layer, uint32_t expert);

/* Bytes read from flash so far. */
uint64_t slu_expert_stream_flash_bytes(const struct slu_adapter *adapter);

#endif
