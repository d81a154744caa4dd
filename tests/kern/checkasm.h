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

enum acts { ACTS_SANE, ACTS_LARGEST, ACTS_SPARSE, ACTS_TINY, ACTS_ODD, N_ACTS };

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

/* A buffer whose last byte is the last one of a page, with a forbidden page after it. */
struct guarded {
    uint8_t *map, *data;
    size_t map_bytes;
};
void guarded_init(struct guarded *g, size_t bytes, size_t align);
void guarded_finish(struct guarded *g);

#define CANARY 0x7fc0dead /* a NaN that no kernel makes */
void fill_canary(float *y, size_t n);

/* Equal bits, or both NaN. */
bool same(const float *a, const float *b, size_t n);

/* Prints a line if not ok, and returns ok. */
bool report(bool ok, const struct slu_kern *kern, const char *what);

/* The kernels of attention (checkasm_attn.c). */
bool check_attn(const struct slu_kern *c_kern, const struct slu_kern *kern);
void bench_attn(const struct slu_kern *kern, const char *filter);

/* Times all kernels whose name has `filter` (nullable) in it. Returns the exit status. */
int bench_all(const struct slu_kern *const *kerns, int n_kerns, const char *filter);

#endif
