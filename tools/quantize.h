/*
 * Floats into GGUF rows, by the simplest rule for each type (the largest magnitude of a group sets
 * its scale). For generated models, whose weights are noise anyway; not meant for real ones.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_TOOLS_QUANTIZE_H
#define SLU_TOOLS_QUANTIZE_H

#include "kern/format.h"

/* n finite floats, a multiple of the format's granule, into slu_planes_row_bytes(fmt, n) bytes. */
void slu_quantize_row(const struct slu_fmt *fmt, const float *x, uint32_t n, uint8_t *out);

/* Q4_0 by the rule that llama.cpp's tools have: the number of largest magnitude becomes code 0, so
 * that all 16 codes are used. The simple rule has 15, and leaves .097 of Gaussian numbers for .086.
 * n is a multiple of 32. */
void slu_quantize_q4_0(const float *x, uint32_t n, uint8_t *out);

#endif
