/*
 * Whether something pays on this machine, told by trying: tokens are computed with it or without,
 * both often enough to compare their times, and mostly with it where
 * that has been faster lately by more than chance, else without. For
 * what changes no result, only time.
 *
 * Thread safety: none.
 */
#ifndef SLU_MODEL_TRIAL_H
#define SLU_MODEL_TRIAL_H

#include <stdbool.h>
#include <stdint.h>

/* Zeroed: nothing is known. */
struct slu_trial {
    double ns[2], weight[2]; /* without, with: fading sums of times and of their number */
    uint64_t n;              /* tokens so far */
    bool is_on;              /* for the present one */
};

/* For the token to come. */
bool slu_trial_next(struct slu_trial *trial);
/* It took so long. */
void slu_trial_note(struct slu_trial *trial, uint64_t ns);

#endif
