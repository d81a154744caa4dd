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

#endif
