/*
 * Byte sources: where files are read from. Readers of formats go through this, so that tests and
 * fuzzers need no disk and faults can be played in. Writers have their own file (io/pack_writer.h).
 *
 * Thread safety: read_at may be called from any thread; destroy when nobody reads any more.
 */
#ifndef SLU_IO_SOURCE_H
#define SLU_IO_SOURCE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct slu_source {
    /* Reads exactly `bytes` at `offset`; SLU_EIO with a sentence otherwise (short files too). */
    int (*read_at)(struct slu_source *source, uint64_t offset, void *buffer, size_t bytes,
                   struct slu_err *err);
    void (*destroy)(struct slu_source *source);
    uint64_t size_bytes;
    const char *name; /* for messages; owned by the source */
};

/* Buffered reads of a regular file. SLU_ENOENT, SLU_EIO. */
int slu_source_open_file(const char *path, struct slu_source **ret_source, struct slu_err *err);

/* The same for a file that is read here and there: the system is told to read nothing ahead, which
 * nobody would ask for and which would stay in the page cache, where it counts as memory. */
int slu_source_open_scattered(const char *path, struct slu_source **ret_source,
                              struct slu_err *err);

/* A view of memory that outlives the source. */
int slu_source_open_memory(const void *data, size_t bytes, const char *name,
                           struct slu_source **ret_source);

void slu_source_destroy(struct slu_source *source); /* NULL is fine */

#endif
