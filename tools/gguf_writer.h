/*
 * Writes a GGUF v3 file: pairs, then the list of tensors, then their data as a stream. For the
 * generator of random models, and for tests. Everything goes to a temporary name beside the final
 * one, which finish renames.
 *
 * Call order: create, any pairs and tensors, begin, data for each tensor in the order in which they
 * were added, finish, destroy. Failures to allocate while pairs and tensors are added are kept and
 * returned by begin.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_TOOLS_GGUF_WRITER_H
#define SLU_TOOLS_GGUF_WRITER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct slu_gguf_writer;

/* SLU_EIO if the file cannot be made, SLU_ENOMEM. path NULL: no file, for slu_gguf_writer_head
 * alone. */
int slu_gguf_writer_create(const char *path, struct slu_gguf_writer **ret_writer,
                           struct slu_err *err);
/* Removes the temporary file unless finished. NULL is fine. */
void slu_gguf_writer_destroy(struct slu_gguf_writer *writer);

void slu_gguf_writer_u32(struct slu_gguf_writer *writer, const char *key, uint32_t value);
void slu_gguf_writer_u16(struct slu_gguf_writer *writer, const char *key, uint16_t value);
void slu_gguf_writer_f32(struct slu_gguf_writer *writer, const char *key, float value);
void slu_gguf_writer_bool(struct slu_gguf_writer *writer, const char *key, bool value);
void slu_gguf_writer_str(struct slu_gguf_writer *writer, const char *key, const char *value);
/* Values NULL counts as a failed allocation. */
void slu_gguf_writer_i32s(struct slu_gguf_writer *writer, const char *key, const int32_t *values,
                          size_t n);
void slu_gguf_writer_f32s(struct slu_gguf_writer *writer, const char *key, const float *values,
                          size_t n);

/* An array of n strings, one after another: begin, then exactly n items. */
void slu_gguf_writer_strs_begin(struct slu_gguf_writer *writer, const char *key, size_t n);
void slu_gguf_writer_strs_item(struct slu_gguf_writer *writer, const char *value);

/* n_kvs pairs that are encoded already, as struct slu_gguf has them. */
void slu_gguf_writer_kvs(struct slu_gguf_writer *writer, const void *kvs, size_t bytes,
                         uint64_t n_kvs);

/* dims fastest first; `bytes` is the size of its data. */
void slu_gguf_writer_tensor(struct slu_gguf_writer *writer, const char *name, uint32_t ggml_type,
                            uint32_t n_dims, const uint64_t *dims, uint64_t bytes);

/* Everything before the tensors' data, padded, to be freed; in place of begin, data and finish.
 * SLU_ENOMEM. */
int slu_gguf_writer_head(struct slu_gguf_writer *writer, uint8_t **ret_head, size_t *ret_bytes,
                         struct slu_err *err);

/* Writes the header. */
int slu_gguf_writer_begin(struct slu_gguf_writer *writer, struct slu_err *err);

/* Appends to the current tensor; when it has its bytes, pads and goes on to the next. A call never
 * crosses from one tensor into the next. */
int slu_gguf_writer_data(struct slu_gguf_writer *writer, const void *data, size_t bytes,
                         struct slu_err *err);

/* In place of pairs, tensors, begin and data: bytes of a whole GGUF as they are. */
int slu_gguf_writer_raw(struct slu_gguf_writer *writer, const void *data, size_t bytes,
                        struct slu_err *err);

/* All data must have been written. */
int slu_gguf_writer_finish(struct slu_gguf_writer *writer, struct slu_err *err);

#endif
