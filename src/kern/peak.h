/*
 * What the processor can do at most, for bounds: its byte products from registers alone, and
 * reading memory with its widest loads. Which instructions those are goes by the kernels' name, so
 * that a peak is that of the instructions that the kernels have.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_KERN_PEAK_H
#define SLU_KERN_PEAK_H

#include <stddef.h>
#include <stdint.h>

/* Makes int8 multiply-adds into int32 sums for `rounds` rounds, loading nothing. Returns how many
 * it made; 0, at once, for kernels that have no byte instructions. */
uint64_t slu_peak_macs(const char *kernels, uint64_t rounds);

/* Reads `bytes` (a multiple of 4096) of memory, 64-byte aligned, as n_streams (1, 2 or 4) equal
 * parts side by side. Returns a sum, so that a compiler can't leave it out. */
uint64_t slu_peak_read(const char *kernels, const void *data, size_t bytes, unsigned n_streams);

#endif
