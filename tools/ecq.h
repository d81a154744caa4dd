/*
 * The entropy-constrained quantizer: floats into the q*e formats (kern/format.h). A grid is laid
 * over each row, its step relative to the row's spread, and finer than a code of so few bits could
 * afford were it to reach the outliers: those are clipped, or kept apart as escapes where that is
 * worth their bits. Codes are then peaked around the middle, and Huffman coding makes them small.
 *
 * Fitting comes first, on a sample of a matrix or of a whole bank: it finds the step that meets a
 * target error, the points that codes stand for (centroids of what is rounded to them, in whole
 * multiples of a fraction of the step), and what codes cost in bits. Rounding then weighs error
 * against bits: of two near points the cheaper may win. Weights of columns (docs/
 * importance-format.md) make errors count more or less.
 *
 * All of it is deterministic. Thread safety: pure functions over the caller's structs.
 */
#ifndef SLU_TOOLS_ECQ_H
#define SLU_TOOLS_ECQ_H

#include "kern/format.h"
#include "tools/planes.h"

#define SLU_ECQ_LEVELS_MAX 64

struct slu_ecq_params {
    const struct slu_fmt *fmt; /* a q*e format */
    float step;         /* of the grid, relative to the spread of a row; 0: as target_error asks */
    float target_error; /* ||w - q|| / ||w|| to meet, errors and weights weighed alike */
    float
        lambda; /* bits against error: 1 is where a uniform quantizer stands, 0 rounds to nearest */
};

/* A fitted quantizer. */
struct slu_ecq {
    const struct slu_fmt *fmt;
    float step, lambda;
    float error;   /* that was met on the sample, */
    float rate;    /* bits a weight that codes and escapes take there by their own statistics, */
    float escapes; /* and escapes for 1024 columns */
    uint32_t n_levels;
    float fine; /* units of a row's scale in a step */
    float escape, escape_bits;
    uint8_t code[SLU_ECQ_LEVELS_MAX]; /* of levels, from the lowest point up */
    float value[SLU_ECQ_LEVELS_MAX];  /* whole numbers, in units of a row's scale */
    float bits[SLU_ECQ_LEVELS_MAX];
};

/* `rows` rows of `cols` finite floats, stride apart; weights NULL, or one for each column of each
 * row, laid out as x. Weights are relative; all zero counts as all one. */
struct slu_ecq_sample {
    const float *x, *weights;
    size_t stride;
    uint32_t rows, cols;
};

/* SLU_ENOMEM. */
int slu_ecq_fit(struct slu_ecq *ecq, const struct slu_ecq_params *params,
                const struct slu_ecq_sample *sample, struct slu_err *err);

/* Fits with the least room for escapes that the weights call for: codes of `bits` bits, a target
 * error, and lambda left to the fit. SLU_ENOMEM. */
int slu_ecq_fit_room(struct slu_ecq *ecq, unsigned bits, float target_error,
                     const struct slu_ecq_sample *sample, struct slu_err *err);

/* What the rows of a matrix ask for. Zeroed, then fed with every row. */
struct slu_ecq_scales {
    double squares, n; /* of scales over 0 */
    float most;
};

void slu_ecq_scales_add(struct slu_ecq_scales *scales, const struct slu_ecq *ecq, const float *x,
                        uint32_t cols);

/* The unit of that matrix: its common scale, or as many quarters of an octave more as its largest
 * one needs. */
float slu_ecq_unit(const struct slu_ecq_scales *scales);

/* The head of a matrix of that unit. */
void slu_ecq_head_put(const struct slu_ecq *ecq, float unit, struct slu_planes *planes);

/* Bytes of scratch for rows of so many columns. */
size_t slu_ecq_scratch_bytes(uint32_t cols);

/* Squares of rows and of their errors, weighed alike. */
struct slu_ecq_sums {
    double error, power;
};

/* Quantizes a row; weights may be NULL. The planes' format has the bits and room that the fit was
 * made for, and `unit` is that of their head. The row's bytes are written in full. Adds to sums. */
void slu_ecq_row_put(const struct slu_ecq *ecq, float unit, const float *x, const float *weights,
                     struct slu_planes *planes, uint32_t row, void *scratch,
                     struct slu_ecq_sums *sums);

#endif
