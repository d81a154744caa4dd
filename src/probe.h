/*
 * Reading memory to see how fast it is. Internal to src.
 *
 * Thread safety: as slu_pool_run.
 */
#ifndef SLU_PROBE_H
#define SLU_PROBE_H

#include <stddef.h>
#include <stdint.h>

#include "base/pool.h"

/* Memory of which little can be left in caches from the pass before. */
size_t slu_probe_ram_bytes(void);

/* Reads memory with all threads of a pool, each 1, 2 or 4 streams at a time. data is 64-byte
 * aligned, bytes are a multiple of SLU_PROBE_GRAIN. Returns how long that took, in ns. */
#define SLU_PROBE_GRAIN ((size_t)1 << 20)
uint64_t slu_probe_read(struct slu_pool *pool, const char *kernels, const void *data, size_t bytes,
                        unsigned n_streams);

#endif
