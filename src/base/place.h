/*
 * Where files are put that appear whole or not at all: under a name of their own beside the final
 * one, and renamed when everything is there. A killed program leaves that name behind. Of what is
 * under the final name only files are replaced, and links to files, never what these point to.
 *
 * Thread safety: any thread.
 */
#ifndef SLU_BASE_PLACE_H
#define SLU_BASE_PLACE_H

#include <stdbool.h>

#include "base/err.h"

/* Refuses a path under which there is something else than a file. SLU_EIO. */
int slu_place_check(const char *path, struct slu_err *err);

/* Makes a new file beside path; *ret_temp is its name, to be freed. The descriptor; SLU_EIO,
 * SLU_ENOMEM. */
int slu_place_open(const char *path, char **ret_temp, struct slu_err *err);

/* Closes the file (fd < 0: it is closed) and puts it under path if it is written, or else, or where
 * that fails, removes it; frees temp. Whether it is under path; errno tells why not: when nothing
 * was written, what it was before. */
bool slu_place_commit(int fd, char *temp, const char *path, bool is_written);

/* Sees that a file can be put under path when the work is done. SLU_EIO, SLU_ENOMEM. */
int slu_place_probe(const char *path, struct slu_err *err);

/* Refuses a path that is to go on with what earlier work may have left there, unless it is nothing,
 * or a file, no link to one, that is empty or begins with these 8 bytes. SLU_EIO. */
int slu_place_check_left(const char *path, const char magic[8], struct slu_err *err);

#endif
