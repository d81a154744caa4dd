/*
 * Builds small GGUF files and packs for tests, byte by byte, so that each byte can be put wrong.
 * Failures end the test.
 */
#ifndef SLU_TESTS_IO_MAKE_H
#define SLU_TESTS_IO_MAKE_H

#include <stddef.h>
#include <stdint.h>

#include "io/codec.h"

/* Bytes that grow; zero-initialize, and free with make_free. */
struct make {
    uint8_t *data;
    size_t bytes, room;
};

void make_free(struct make *make);
void make_bytes(struct make *make, const void *bytes, size_t n);
void make_zeros(struct make *make, size_t n);
void make_align(struct make *make, size_t align);
void make_u8(struct make *make, uint8_t value);
void make_u32(struct make *make, uint32_t value);
void make_u64(struct make *make, uint64_t value);
void make_f32(struct make *make, float value);
void make_str(struct make *make, const char *text); /* u64 length and bytes */

/* Pairs in GGUF's encoding. */
void make_kv_u32(struct make *make, const char *key, uint32_t value);
void make_kv_str(struct make *make, const char *key, const char *value);
/* One pair of every type and array type; returns how many pairs. */
uint64_t make_kv_all(struct make *make);

void make_gguf_preamble(struct make *make, uint64_t n_tensors, uint64_t n_kvs);
/* dims up to n_dims. offset counts from the data's start. */
void make_gguf_tensor(struct make *make, const char *name, uint32_t type, uint32_t n_dims,
                      const uint64_t *dims, uint64_t offset);
/* A whole GGUF: every type of pair, and tensors a (F32 8x4), b (Q4_0 64x2), c (of type 99). */
void make_gguf(struct make *make);

/* A new directory for the test's files, and a path in it. The directory goes when the test's
 * process ends well. */
const char *make_temp_path(const char *name);
size_t make_temp_count(void); /* of files in that directory */

void make_read_file(struct make *make, const char *path);
void make_write_file(const char *path, const void *bytes, size_t n);

/* Writes a small pack: metadata, a matrix of two pieces when is_large, else one, a rows tensor,
 * and a bank of 2 experts x 2 blocks. */
void make_pack_file(const char *path, enum slu_codec_id codec, int is_large);
/* The raw bytes that extents were made from: reproducible, compressible. */
void make_fill(uint8_t *out, size_t n, uint32_t seed);

#endif
