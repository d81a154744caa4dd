#include "model/trial.h"

/* The first tokens take turns; after that the way that isn't chosen has one in so many. Times of
 * tokens differ by a tenth and more from one to the next, and the memory holds some thirty of the
 * rarer kind, which tell a difference of 2 %: what gains less is left off, so that a mistake costs
 * little, and trying what costs a tenth comes to less than 1 %. */
#define TOKENS_IN_TURNS 16u
#define TRY_EVERY       16u
#define KEPT            0.998
#define WORTH           0.98

bool slu_trial_next(struct slu_trial *t)
{
    bool is_better = t->weight[0] > 0 && t->weight[1] > 0 &&
                     t->ns[1] * t->weight[0] < WORTH * t->ns[0] * t->weight[1];
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
