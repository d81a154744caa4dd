#include "model/trial.h"

/* The first tokens take turns; after that the slower way has one in so many. Times of tokens differ
 * by a tenth from one to the next, so that some sixty of them tell a difference of 2 %, which is
 * how many of the rarer kind the memory holds. */
#define TOKENS_IN_TURNS 32u
#define TRY_EVERY       8u
#define KEPT            0.998

bool slu_trial_next(struct slu_trial *t)
{
    bool is_better =
        t->weight[0] > 0 && t->weight[1] > 0 && t->ns[1] * t->weight[0] < t->ns[0] * t->weight[1];
    if (t->n < TOKENS_IN_TURNS) {
        t->is_on = t->n % 2 == 0;
    } else {
        t->is_on = t->n % TRY_EVERY == 0 ? !is_better : is_better;
    }
    return t->is_on;
}

void slu_trial_note(struct slu_trial *t, uint64_t ns)
{
    for (int i = 0; i < 2; i++) {
        t->ns[i] *= KEPT;
        t->weight[i] *= KEPT;
    }
    t->ns[t->is_on] += (double)ns;
    t->weight[t->is_on] += 1;
    t->n++;
}
