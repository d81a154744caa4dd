/*
 * The ledger: every byte that the engine holds is reserved here before it is allocated, against
 * one root limit and under one account. What doesn't fit is refused before anything is touched.
 * It counts bytes and knows nothing of who allocates them, or how.
 *
 * Thread safety: all functions may be called from any thread; create and destroy from one.
 */
#ifndef SLU_BASE_LEDGER_H
#define SLU_BASE_LEDGER_H

#include <stdint.h>

#include "base/err.h"

enum slu_account {
    SLU_ACCOUNT_DENSE,    /* weights that every token needs */
    SLU_ACCOUNT_EXPERTS,  /* slots of expert blocks */
    SLU_ACCOUNT_KV,       /* keys and values of sessions */
    SLU_ACCOUNT_ADAPTERS, /* LoRA matrices */
    SLU_ACCOUNT_SCRATCH,  /* activations and partial results */
    SLU_ACCOUNT_IO,       /* staging of compressed blocks, rows read from flash */
    SLU_ACCOUNT_TEXT,     /* tokenizer and metadata */
    SLU_ACCOUNTS
};

struct slu_ledger;

/* limit_bytes 0 means no limit. Returns NULL when out of memory. */
struct slu_ledger *slu_ledger_create(uint64_t limit_bytes);

/* Asserts that every account is back to zero. NULL is fine. */
void slu_ledger_destroy(struct slu_ledger *ledger);

/* Takes `bytes` from the root's limit for `account`, all or nothing.
 * SLU_EBUDGET with a sentence that gives the number that would have done. */
int slu_ledger_reserve(struct slu_ledger *ledger, enum slu_account account, uint64_t bytes,
                       struct slu_err *err);

/* Gives back bytes reserved before under the same account; asserts that it had them. */
void slu_ledger_release(struct slu_ledger *ledger, enum slu_account account, uint64_t bytes);

uint64_t slu_ledger_limit(const struct slu_ledger *ledger);
uint64_t slu_ledger_used(const struct slu_ledger *ledger);
uint64_t slu_ledger_peak(const struct slu_ledger *ledger);
uint64_t slu_ledger_account_used(const struct slu_ledger *ledger, enum slu_account account);

/* "dense", "experts", ...; static storage. */
const char *slu_account_name(enum slu_account account);

#endif
