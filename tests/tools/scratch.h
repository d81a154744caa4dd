/*
 * A folder for one test's files, and whole files at once.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_TESTS_TOOLS_SCRATCH_H
#define SLU_TESTS_TOOLS_SCRATCH_H

#include <stddef.h>
#include <stdint.h>

struct scratch {
    char folder[64];
};

void scratch_init(struct scratch *scratch);
/* Removes the files in it, then the folder. */
void scratch_finish(struct scratch *scratch);

/* The path of a file in it, in one of a few static buffers that take turns. */
const char *scratch_path(const struct scratch *scratch, const char *name);

/* How many files are in it. */
size_t scratch_count(const struct scratch *scratch);

/* A whole file; freed by the caller. */
uint8_t *scratch_read(const char *path, size_t *ret_bytes);
void scratch_write(const char *path, const void *data, size_t bytes);

#endif
