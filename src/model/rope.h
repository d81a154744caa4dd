/*
 * Rotary position embedding, with linear and YaRN scaling. Frequencies are computed once for a
 * model, angles once for a chunk of positions, and then applied to each layer's queries and keys.
 * YaRN: Peng et al., arXiv:2309.00071, in the form that GGUF's lineage gives it.
 *
 * Thread safety: apply is pure.
 */
#ifndef SLU_MODEL_ROPE_H
#define SLU_MODEL_ROPE_H

#include "model/config.h"

/* freqs[rope_dims / 2]: radians a position. */
void slu_rope_freqs(const struct slu_config *config, double *freqs);

/* cos and sin of position times frequency, times the configuration's magnitude: n_pairs each. */
void slu_rope_angles(const struct slu_config *config, const double *freqs, uint32_t position,
                     float *ret_cos, float *ret_sin);

/* Turns the first rope_dims of x in place. */
void slu_rope_apply(const struct slu_config *config, float *x, const float *cos_row,
                    const float *sin_row);

#endif
