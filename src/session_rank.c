/* A ranking of experts, from outside, for the text that is about to be computed. */
#include <inttypes.h>
#include <math.h>

#include "session.h"

static int check(const struct slu_config *c, const struct slu_ranking *ranking, struct slu_err *err)
{
    if (ranking->n_layers != c->n_layers || ranking->n_experts != c->n_experts) {
        return slu_err_set(err, SLU_EINVAL,
                           "a ranking for %" PRIu32 " layers of %" PRIu32
                           " experts doesn't fit a model with %" PRIu32 " of %" PRIu32,
                           ranking->n_layers, ranking->n_experts, c->n_layers, c->n_experts);
    }
    for (uint32_t l = 0; l < c->n_layers; l++) {
        for (uint32_t e = 0; e < c->n_experts; e++) {
            float score = ranking->score[(size_t)l * c->n_experts + e];
            if (!(score >= 0) || !isfinite(score)) {
                return slu_err_set(err, SLU_EINVAL,
                                   "the ranking's score of expert %" PRIu32 " of layer %" PRIu32
                                   " is negative or no finite number",
                                   e, l);
            }
        }
    }
    return 0;
}

int slu_session_rank(struct slu_session *s, const struct slu_ranking *ranking, struct slu_err *err)
{
    struct slu_engine *e = s->engine;
    int rc = check(&e->weights.config, ranking, err);
    if (rc == 0 && e->model.residency) {
        pthread_mutex_lock(&e->compute);
        slu_model_rank(&e->model, ranking);
        pthread_mutex_unlock(&e->compute);
    }
    return rc;
}
