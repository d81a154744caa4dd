#include <criterion/criterion.h>

#include "base/ledger.h"

/* A reservation past the limit is refused whole and leaves the ledger as it was. */
Test(ledger, refuses_past_limit)
{
    struct slu_ledger *ledger = slu_ledger_create(100);
    struct slu_err err;
    cr_assert_eq(slu_ledger_reserve(ledger, SLU_ACCOUNT_KV, 60, &err), 0);
    cr_assert_eq(slu_ledger_reserve(ledger, SLU_ACCOUNT_IO, 41, &err), SLU_EBUDGET);
    cr_assert_eq(slu_ledger_used(ledger), 60);
    cr_assert_eq(slu_ledger_account_used(ledger, SLU_ACCOUNT_IO), 0);
    cr_assert_eq(slu_ledger_reserve(ledger, SLU_ACCOUNT_IO, 40, &err), 0);
    slu_ledger_release(ledger, SLU_ACCOUNT_KV, 60);
    slu_ledger_release(ledger, SLU_ACCOUNT_IO, 40);
    cr_assert_eq(slu_ledger_used(ledger), 0);
    cr_assert_eq(slu_ledger_peak(ledger), 100);
    slu_ledger_destroy(ledger);
}
