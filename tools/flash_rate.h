/*
 * How fast the device under a folder reads, as the stream of experts would read it.
 *
 * Thread safety: may be called from any thread.
 */
#ifndef SLU_TOOLS_FLASH_RATE_H
#define SLU_TOOLS_FLASH_RATE_H

#include "base/err.h"

/* Bytes a second of direct reads of 1 MiB, here and there in a file, for most of a second. The file
 * is `there` (may be NULL) if it lies on the same device as `out` will and is large enough, else
 * one of 64 MiB that is written beside `out` and has lost its name before the first read. */
int slu_flash_rate(const char *out, const char *there, double *ret_bytes_s, struct slu_err *err);

#endif
