/*
 * The importance file: for each matrix the second moments of its inputs, one for each column, as
 * measured by running text through a model. The quantizer weighs the error of a column with it.
 * docs/importance-format.md has the layout. Files are small beside the model, so they are read
 * whole; every byte is checked before it is used.
 *
 * Thread safety: a file that has been read is constant; writing is one call on one thread.
 */
#ifndef SLU_TOOLS_IMPORTANCE_H
#define SLU_TOOLS_IMPORTANCE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

#define SLU_IMPORTANCE_NAME_BYTES 64 /* with the terminator, as in packs */
/* The expert of a matrix that isn't one of a bank's. */
#define SLU_IMPORTANCE_NO_EXPERT UINT32_MAX

/* A matrix of the GGUF by its name ("blk.3.ffn_down_exps.weight"). A stack of experts has one entry
 * for each expert that was measured; an expert that no token chose may be left out. Matrices that
 * read the same input (q, k and v; gate and up) have an entry each. */
struct slu_importance_entry {
    const char *name;     /* at most 63 bytes of printable ASCII, at least one */
    uint32_t expert;      /* or SLU_IMPORTANCE_NO_EXPERT */
    uint32_t n_cols;      /* of the matrix: 1 to 2^24 */
    const float *moments; /* n_cols means of x^2, finite and not negative */
};

/* Writes a file, whole or not at all: under a temporary name, synced, then renamed. SLU_EINVAL for
 * an entry that breaks the rules above or comes twice; SLU_EIO. */
int slu_importance_write(const char *path, const struct slu_importance_entry *entries,
                         size_t n_entries, struct slu_err *err);

struct slu_importance;

/* Reads and checks a file. SLU_EIO, SLU_ENOENT, SLU_EFORMAT, SLU_EUNSUP (newer), SLU_ENOMEM. */
int slu_importance_read(const char *path, struct slu_importance **ret_importance,
                        struct slu_err *err);

/* The same from memory, for fuzzers and tests; takes a copy of nothing: data outlives the result.
 * `name` is what errors call it. */
int slu_importance_parse(const char *name, const void *data, size_t bytes,
                         struct slu_importance **ret_importance, struct slu_err *err);

void slu_importance_destroy(struct slu_importance *importance); /* NULL is fine */

size_t slu_importance_entries(const struct slu_importance *importance);

/* The moments of a matrix, or NULL where the file has none under this name and expert, or has them
 * for another number of columns. The importance's; it lives as long as that does. */
const float *slu_importance_find(const struct slu_importance *importance, const char *name,
                                 uint32_t expert, uint32_t n_cols);

#endif
