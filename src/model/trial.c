#include "model/trial.h"

/*
 * Off at first, and after that the way that isn't chosen has a stretch of tokens now and then.
 * Stretches, since a token may pay for what the one before it read: a rate of flash that is held
 * over tenths of a second makes tokens that take turns look the wrong way round. The first tokens
 * of a stretch aren't counted for the same reason. Times of tokens differ by a tenth and more from
 * one to the next, and the memory holds some forty of the rarer kind, which tell a difference of 2
 * %: what gains less is left off. So what costs a tenth costs 1.3 % while it is tried.
 */
#define PERIOD        64u
#define STRETCH_FIRST 12u
#define STRETCH       8u
#define STRETCH_EARLY 12u /* in the first period: enough for an answer by its 24th token */
#define NOT_COUNTED   2u
#define KEPT          0.998
#define COUNTED_MIN   9.0 /* of each way, before one is believed */
#define WORTH         0.98

bool slu_trial_next(struct slu_trial *t)
{
    bool is_better = t->weight[0] >= COUNTED_MIN && t->weight[1] >= COUNTED_MIN &&
                     t->ns[1] * t->weight[0] < WORTH * t->ns[0] * t->weight[1];
    uint64_t at = t->n % PERIOD;
    uint32_t stretch = t->n < PERIOD ? STRETCH_EARLY : STRETCH;
    bool is_try = at >= STRETCH_FIRST && at < STRETCH_FIRST + stretch;
    bool was_on = t->is_on;
    t->is_on = is_try ? !t->is_better : is_better;
    t->is_better = is_try ? t->is_better : is_better; /* nothing changes within a stretch */
    t->n_same = t->is_on == was_on ? t->n_same + 1 : 0;
    return t->is_on;
}

void slu_trial_note(struct slu_trial *t, uint64_t ns)
{
    t->n++;
    if (t->n_same < NOT_COUNTED) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        t->ns[i] *= KEPT;
        t->weight[i] *= KEPT;
    }
    t->ns[t->is_on] += (double)ns;
    t->weight[t->is_on] += 1;
}
