/*
 * The codec of extents: raw bytes or one zstd frame, with an XXH3 64-bit checksum over the stored
 * bytes. The compressor is set up to act as a Huffman coder, since that is all that weights have
 * to give.
 *
 * Thread safety: one codec per thread; slu_checksum is pure.
 */
#ifndef SLU_IO_CODEC_H
#define SLU_IO_CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* Values are stored in packs. */
enum slu_codec_id { SLU_CODEC_RAW = 0, SLU_CODEC_ZSTD = 1, SLU_CODECS };

uint64_t slu_checksum(const void *data, size_t bytes);

struct slu_decoder;
int slu_decoder_create(struct slu_decoder **ret_decoder, struct slu_err *err);
void slu_decoder_destroy(struct slu_decoder *decoder);
/* What a decoder holds on the heap, for the ledger. */
size_t slu_decoder_bytes(void);

/* Decodes one whole extent to exactly raw_bytes at out: checks the checksum, that there is exactly
 * one frame, and that it yields exactly raw_bytes, never writing past them. SLU_EFORMAT otherwise.
 * Raw extents may be checked in place, with out == stored. Allocates nothing. */
int slu_decode(struct slu_decoder *decoder, enum slu_codec_id codec, const void *stored,
               size_t stored_bytes, uint64_t checksum, void *out, size_t raw_bytes,
               struct slu_err *err);

struct slu_encoder;
int slu_encoder_create(struct slu_encoder **ret_encoder, struct slu_err *err);
void slu_encoder_destroy(struct slu_encoder *encoder);
size_t slu_encode_bound(size_t raw_bytes);
/* Compresses to one frame; returns its size (> 0) or a negative error. */
int64_t slu_encode(struct slu_encoder *encoder, const void *raw, size_t raw_bytes, void *out,
                   size_t out_bytes, struct slu_err *err);

/* Parts with a table of symbols each: they begin at 0 and at cuts[i], which ascend and are below
 * the whole's end. For planes of different kinds, none of them small: a table costs about 100
 * bytes. A part of 64 KiB and more that saves less than one byte in `least_gain` stays as it is
 * within the frame, which is decoded as fast as it is copied; 0: all that saves any is compressed.
 */
struct slu_parts {
    const size_t *cuts;
    size_t n_cuts;
    unsigned least_gain;
};

/* For blocks whose codes are made without regard to compression, which decode at some 1.4 GB/s a
 * core: to save a twentieth of them takes nine tenths of a block's decoding. Of scales, half and
 * more is saved. */
#define SLU_PARTS_LEAST_GAIN 20u

/* The same for parts, for which so many bytes of room do. */
size_t slu_encode_parts_bound(size_t raw_bytes, const struct slu_parts *parts);
int64_t slu_encode_parts(struct slu_encoder *encoder, const void *raw, size_t raw_bytes,
                         const struct slu_parts *parts, void *out, size_t out_bytes,
                         struct slu_err *err);

#endif
