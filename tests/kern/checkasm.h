/*
 * What the parts of checkasm share: reproducible random numbers, and the filling of matrices and
 * activations with ordinary and adversarial ones.
 */
#ifndef SLU_TESTS_KERN_CHECKASM_H
#define SLU_TESTS_KERN_CHECKASM_H

#include "kern/kern.h"

/* What the bytes of a matrix are like. */
enum weights {
    WEIGHTS_SANE,
    WEIGHTS_ANY,
    WEIGHTS_ONES,
    WEIGHTS_ZERO,
    WEIGHTS_EXTREME,
    WEIGHTS_TINY,
    N_WEIGHTS
};

enum acts { ACTS_SANE, ACTS_LARGEST, ACTS_SPARSE, ACTS_ODD, N_ACTS };

void rng_seed(uint64_t seed);

/* A number in [0, n). */
uint32_t below(uint32_t n);

/* A number near 0, mostly within [-2, 2]. */
float noise(void);

void fill_random(uint8_t *data, size_t bytes);
void fill_halves(uint8_t *plane, size_t bytes, float scale);

/* Scales and numbers of the size that models have; codes stay as they are. */
void make_sane(const struct slu_mat *w, uint8_t *data);

/* All bytes of a matrix. */
void fill_weights(const struct slu_mat *w, uint8_t *data, enum weights kind);

void fill_acts(float *x, size_t n, enum acts kind);

/* Times all kernels whose name has `filter` (nullable) in it. Returns the exit status. */
int bench_all(const struct slu_kern *const *kerns, int n_kerns, const char *filter);

#endif
