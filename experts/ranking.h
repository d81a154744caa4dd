/*
 * A ranking of experts from outside: what a predictor or a saved profile expects of a text before
 * any router has run. The locked set begins with it, as if it had been observed for a while, and
 * what the routers then choose wears it off.
 *
 * Scores are shares of the router's weight that an expert is expected to get within its layer:
 * finite, not negative, of any scale, since each layer's are divided by their sum. A layer whose
 * scores are all 0, as that of a layer without experts, says nothing.
 *
 * Thread safety: constant data.
 */
#ifndef SLU_EXPERTS_RANKING_H
#define SLU_EXPERTS_RANKING_H

#include <stdint.h>

struct slu_ranking {
    uint32_t n_layers, n_experts; /* as slu_engine_info has them */
    const float *score;           /* [n_layers][n_experts] */
};

#endif
