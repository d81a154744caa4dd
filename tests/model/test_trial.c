#include <criterion/criterion.h>

#include "model/trial.h"

/* Tokens whose times differ by chance, and by `cost` where it is on; returns what the trial lost
 * beside the better way, as a share of all time. */
static double lose(double cost, unsigned n, unsigned *ret_n_on)
{
    struct slu_trial trial = {0};
    double spent = 0, best = 0;
    uint64_t random = 5;
    *ret_n_on = 0;
    for (unsigned i = 0; i < n; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        double ns = 1e8 * (0.85 + 0.3 * (double)(random >> 40) / (double)(1 << 24));
        bool is_on = slu_trial_next(&trial);
        double took = is_on ? ns * (1 + cost) : ns;
        slu_trial_note(&trial, (uint64_t)took);
        spent += took;
        best += cost < 0 ? ns * (1 + cost) : ns;
        *ret_n_on += is_on;
    }
    return spent / best - 1;
}

/* What costs is turned off, and costs no more than 2 % in all while it is tried; what gains stays
 * on. */
Test(trial, turns_off_what_does_not_pay)
{
    unsigned n_on;
    cr_expect_lt(lose(0.1, 1000, &n_on), 0.02);
    cr_expect_lt(n_on, 200);
    cr_expect_lt(lose(0.05, 1000, &n_on), 0.015);
    cr_expect_lt(lose(0.1, 64, &n_on), 0.02);
    cr_expect_lt(lose(-0.1, 1000, &n_on), 0.03);
    cr_expect_gt(n_on, 800);
}

/* A short answer has some of the gain too. */
Test(trial, decides_early)
{
    unsigned n_on;
    (void)lose(-0.15, 64, &n_on);
    cr_expect_gt(n_on, 40);
}

/* When the machine changes, so does the answer. */
Test(trial, changes_its_mind)
{
    struct slu_trial trial = {0};
    unsigned n_on = 0;
    for (unsigned i = 0; i < 4000; i++) {
        bool is_on = slu_trial_next(&trial);
        bool is_slower = i < 1000;
        slu_trial_note(&trial, is_on == is_slower ? 110 : 100);
        n_on += i >= 3000 && is_on;
    }
    cr_expect_gt(n_on, 800);
}
