/*
 * How fast this machine multiplies bytes when nothing else is in the way: loops of the widest
 * instructions on registers alone, the measure of matrix products.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_BENCH_KERNELS_PEAK_H
#define SLU_BENCH_KERNELS_PEAK_H

#include <stdint.h>

/* Runs `rounds` rounds of the loop for the kernels called `name`; returns products of two bytes
 * that it added up, or 0 where there is no such loop. */
double peak_run(const char *name, uint64_t rounds);

#endif
