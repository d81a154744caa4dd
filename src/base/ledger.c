#include "base/ledger.h"

#include <assert.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>

struct slu_ledger {
    uint64_t limit_bytes;
    /* All relaxed: the counters order nothing but themselves; memory is published by whoever
     * reserved it. */
    _Atomic uint64_t used_bytes;
    _Atomic uint64_t peak_bytes;
    _Atomic uint64_t account_bytes[SLU_ACCOUNTS];
};

struct slu_ledger *slu_ledger_create(uint64_t limit_bytes)
{
    struct slu_ledger *ledger = calloc(1, sizeof *ledger);
    if (ledger) {
        ledger->limit_bytes = limit_bytes ? limit_bytes : UINT64_MAX;
    }
    return ledger;
}

void slu_ledger_destroy(struct slu_ledger *ledger)
{
    if (!ledger) {
        return;
    }
    for (int i = 0; i < SLU_ACCOUNTS; i++) {
        assert(atomic_load_explicit(&ledger->account_bytes[i], memory_order_relaxed) == 0);
    }
    assert(slu_ledger_used(ledger) == 0);
    free(ledger);
}

static void raise_peak(struct slu_ledger *ledger, uint64_t used)
{
    uint64_t peak = atomic_load_explicit(&ledger->peak_bytes, memory_order_relaxed);
    while (used > peak &&
           !atomic_compare_exchange_weak_explicit(&ledger->peak_bytes, &peak, used,
                                                  memory_order_relaxed, memory_order_relaxed)) {
    }
}

int slu_ledger_reserve(struct slu_ledger *ledger, enum slu_account account, uint64_t bytes,
                       struct slu_err *err)
{
    assert(account < SLU_ACCOUNTS);
    uint64_t used = atomic_load_explicit(&ledger->used_bytes, memory_order_relaxed);
    do {
        if (bytes > ledger->limit_bytes - used) {
            return slu_err_set(err, SLU_EBUDGET,
                               "%" PRIu64 " bytes for %s don't fit: %" PRIu64 " of %" PRIu64
                               " are in use",
                               bytes, slu_account_name(account), used, ledger->limit_bytes);
        }
    } while (!atomic_compare_exchange_weak_explicit(&ledger->used_bytes, &used, used + bytes,
                                                    memory_order_relaxed, memory_order_relaxed));
    atomic_fetch_add_explicit(&ledger->account_bytes[account], bytes, memory_order_relaxed);
    raise_peak(ledger, used + bytes);
    return 0;
}

void slu_ledger_release(struct slu_ledger *ledger, enum slu_account account, uint64_t bytes)
{
    assert(account < SLU_ACCOUNTS);
    uint64_t had =
        atomic_fetch_sub_explicit(&ledger->account_bytes[account], bytes, memory_order_relaxed);
    assert(had >= bytes);
    had = atomic_fetch_sub_explicit(&ledger->used_bytes, bytes, memory_order_relaxed);
    assert(had >= bytes);
    (void)had;
}

uint64_t slu_ledger_limit(const struct slu_ledger *ledger)
{
    return ledger->limit_bytes;
}

uint64_t slu_ledger_used(const struct slu_ledger *ledger)
{
    return atomic_load_explicit(&ledger->used_bytes, memory_order_relaxed);
}

uint64_t slu_ledger_peak(const struct slu_ledger *ledger)
{
    return atomic_load_explicit(&ledger->peak_bytes, memory_order_relaxed);
}

uint64_t slu_ledger_account_used(const struct slu_ledger *ledger, enum slu_account account)
{
    assert(account < SLU_ACCOUNTS);
    return atomic_load_explicit(&ledger->account_bytes[account], memory_order_relaxed);
}

const char *slu_account_name(enum slu_account account)
{
    static const char *const names[SLU_ACCOUNTS] = {
        "dense weights", "expert slots", "KV cache", "adapters", "scratch", "I/O staging", "text",
    };
    assert(account < SLU_ACCOUNTS);
    return names[account];
}
