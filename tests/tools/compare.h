/*
 * Does a pack hold exactly what a GGUF does? Reads both whole and compares every weight bit for
 * bit, by putting the pack's planes together into GGUF rows again.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_TESTS_TOOLS_COMPARE_H
#define SLU_TESTS_TOOLS_COMPARE_H

/* Asserts. ggufs: n paths, the first of which has the metadata. */
void compare_pack(const char *pack_path, const char *const *ggufs, unsigned n_ggufs);

#endif
