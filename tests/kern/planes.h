/*
 * Random matrices of any format, written plane by plane from the words of format.h and from
 * nothing that the library computes, with the numbers that they stand for.
 */
#ifndef SLU_TESTS_KERN_PLANES_H
#define SLU_TESTS_KERN_PLANES_H

#include "kern/format.h"

struct planes {
    struct slu_mat mat;
    uint8_t *data;
    double *w;         /* [rows][cols], exact but for the multiplying out of two-level scales */
    double *magnitude; /* |scale * value| + |offset or minimum|: what rounding errors grow with */
};

/* A number in [0, n). The seed is advanced. */
uint32_t test_below(uint64_t *seed, uint32_t n);

/* Roughly a standard deviation of 1, in [-3.5, 3.5]. */
float test_noise(uint64_t *seed);

/* Writes the code of weight i of a row by the format's bit layout. */
void planes_put(const struct slu_mat *mat, uint8_t *data, uint32_t row, uint32_t i, unsigned code);

/* What `scale` times a weight's bare integer is: the table of the format, written out anew. */
int planes_value(const struct slu_fmt *fmt, unsigned code);

/* id is a format's number in packs. `data` NULL: allocated, and freed by planes_finish; else a
 * place of the layout's size. */
void planes_init(struct planes *planes, unsigned id, uint32_t rows, uint32_t cols, uint8_t *data,
                 uint64_t *seed);
void planes_finish(struct planes *planes);

#endif
