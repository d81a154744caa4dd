/*
 * A file that appears whole or not at all: written under a temporary name beside the final one, and
 * renamed when everything is there. Names that exist and aren't regular files (/dev/stdout, a
 * pipe) are written directly.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_CLI_OUTFILE_H
#define SLU_CLI_OUTFILE_H

#include <stdio.h>

#include "base/err.h"

struct slu_outfile {
    FILE *file;
    const char *path; /* the caller's */
    char *temporary;  /* NULL where written directly */
};

/* SLU_EIO, SLU_ENOMEM. */
int slu_outfile_open(struct slu_outfile *out, const char *path, struct slu_err *err);
/* Flushes and renames. On failure nothing is left. */
int slu_outfile_commit(struct slu_outfile *out, struct slu_err *err);
/* Removes what isn't committed. Fine on a zeroed or committed one. */
void slu_outfile_finish(struct slu_outfile *out);

#endif
