/*
 * The section of a pack: something learned about the model after the pack was made, a prompt
 * predictor say. It lies behind the model's own bytes and is named by a record in the first page,
 * so that it can be put in, replaced and taken away without rewriting a pack of many gigabytes, and
 * without changing the pack's fingerprint, which adapters are bound to.
 *
 * Order makes it safe against a crash at any point: the bytes are written where nothing refers to
 * them, and synced; then one write of the header and the record, which lie in the file's first 192
 * bytes and hence in one sector of any device, makes them count; synced again. Before it there is
 * the old section or none, after it the new one.
 *
 * Thread safety: one writer at a time, which a lock on the file sees to. Readers that have the pack
 * open are not disturbed: they have read the section already.
 */
#ifndef SLU_IO_PACK_SECTION_H
#define SLU_IO_PACK_SECTION_H

#include "io/pack.h"

/* Puts the section into the pack at path, in place of what it has. A pack of version 1 becomes one
 * of version 2, which programs that don't know sections refuse by name; others keep their number.
 * SLU_EIO (a full disk too: the pack is then as it was), SLU_EFORMAT, SLU_ENOENT; SLU_EINVAL for
 * too many bytes or none. */
int slu_pack_section_write(const char *path, enum slu_section_kind kind, const void *data,
                           size_t bytes, struct slu_err *err);

/* Takes the section away; the pack is then, byte for byte, what it was before it had one. */
int slu_pack_section_remove(const char *path, struct slu_err *err);

/* For tests: write stops, as if the process were killed, after so many of its steps (writes, syncs
 * and truncations). UINT_MAX: never. */
int slu_pack_section_write_steps(const char *path, enum slu_section_kind kind, const void *data,
                                 size_t bytes, unsigned n_steps, struct slu_err *err);

#endif
