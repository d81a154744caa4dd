/*
 * Writes a pack: extents are appended as they come, the index follows at the end, and the header
 * last. Everything goes to a temporary name beside the final one; finish syncs the file, renames
 * it and syncs the directory, so that the final name never holds half a pack. Memory: the index
 * and one extent.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_IO_PACK_WRITER_H
#define SLU_IO_PACK_WRITER_H

#include "io/pack.h"

struct slu_pack_writer;

/* codec: SLU_CODEC_RAW stores all extents raw; ZSTD compresses each and stores it raw where less
 * than 1/32 would be saved. SLU_EIO if the file cannot be made. */
int slu_pack_writer_create(const char *path, enum slu_codec_id codec,
                           struct slu_pack_writer **ret_writer, struct slu_err *err);
/* The codec of what is written from here on, metadata and index included; ZSTD only where the
 * writer was created with it. */
void slu_pack_writer_set_codec(struct slu_pack_writer *writer, enum slu_codec_id codec);
/* Removes the temporary file unless finished. NULL is fine. */
void slu_pack_writer_destroy(struct slu_pack_writer *writer);

/* Appends one extent; returns its number (>= 0) or a negative error. */
int64_t slu_pack_writer_extent(struct slu_pack_writer *writer, const void *raw, size_t raw_bytes,
                               struct slu_err *err);

/* The same in parts, where it is compressed: as slu_encode_parts has it. NULL: one part. */
int64_t slu_pack_writer_extent_parts(struct slu_pack_writer *writer, const void *raw,
                                     size_t raw_bytes, const struct slu_parts *parts,
                                     struct slu_err *err);

/* Rows: begin returns the number of the extent record that marks the place; then append row
 * records of the stride in any sizes; end pads to the page. */
int64_t slu_pack_writer_rows_begin(struct slu_pack_writer *writer, struct slu_err *err);
int slu_pack_writer_rows_append(struct slu_pack_writer *writer, const void *bytes, size_t n,
                                struct slu_err *err);
int slu_pack_writer_rows_end(struct slu_pack_writer *writer, struct slu_err *err);

/* Copies the record. */
int slu_pack_writer_tensor(struct slu_pack_writer *writer, const struct slu_pack_tensor *tensor,
                           struct slu_err *err);
int slu_pack_writer_bank(struct slu_pack_writer *writer, const struct slu_pack_bank *bank,
                         struct slu_err *err);

/* Writes metadata (n_kvs pairs in GGUF's encoding), index and header; sync, rename, sync. */
int slu_pack_writer_finish(struct slu_pack_writer *writer, const void *kvs, size_t kvs_bytes,
                           uint64_t n_kvs, struct slu_err *err);

/* Bytes stored and bytes they stand for, so far. */
uint64_t slu_pack_writer_stored_bytes(const struct slu_pack_writer *writer);
uint64_t slu_pack_writer_raw_bytes(const struct slu_pack_writer *writer);

#endif
