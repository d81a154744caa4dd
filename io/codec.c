#include "io/codec.h"

#define ZSTD_STATIC_LINKING_ONLY /* for the static DCtx and the switch that forces literals */
#include <assert.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include <zstd.h>
#include <zstd_errors.h>

#ifdef SLU_HAVE_XXH_DISPATCH
#include <xxh_x86dispatch.h> /* XXH3_64bits becomes the dispatched one */
#endif

/* Frames of 64 KiB and more cost nothing over larger ones, and a window as large as zstd's block
 * is all that a coder without matches can use. */
#define WINDOW_LOG 17
/* No match is ever looked for between positions this far apart: the fast strategy strides by it. */
#define STRIDE_BYTES 131072
#define HASH_LOG     6

struct slu_decoder {
    ZSTD_DCtx *zstd; /* in the same allocation */
};

/* The context follows its owner, at a multiple of 64 bytes. */
#define DECODER_HEAD_BYTES 64u

struct slu_encoder {
    ZSTD_CCtx *zstd;
    ZSTD_DCtx *back; /* to see that frames of parts are what they should be */
};

uint64_t slu_checksum(const void *data, size_t bytes)
{
    return XXH3_64bits(data, bytes);
}

size_t slu_decoder_bytes(void)
{
    size_t bytes = DECODER_HEAD_BYTES + ZSTD_estimateDCtxSize();
    return (bytes + 63) / 64 * 64; /* aligned_alloc wants a multiple */
}

int slu_decoder_create(struct slu_decoder **ret_decoder, struct slu_err *err)
{
    size_t bytes = slu_decoder_bytes();
    struct slu_decoder *decoder = aligned_alloc(64, bytes);
    if (!decoder) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for a decoder of %zu bytes", bytes);
    }
    decoder->zstd =
        ZSTD_initStaticDCtx((char *)decoder + DECODER_HEAD_BYTES, bytes - DECODER_HEAD_BYTES);
    assert(decoder->zstd); /* it has the size that zstd asked for */
    *ret_decoder = decoder;
    return 0;
}

void slu_decoder_destroy(struct slu_decoder *decoder)
{
    free(decoder); /* static contexts need no freeing of their own */
}

/* The frame is looked at before it is decoded: exactly one, plain, of the very size promised. So
 * neither legacy formats nor skippable frames ever reach zstd's decoder. */
static int check_frame(const void *stored, size_t stored_bytes, size_t raw_bytes,
                       struct slu_err *err)
{
    uint32_t magic;
    if (stored_bytes < sizeof magic) {
        return slu_err_set(err, SLU_EFORMAT, "%zu bytes are no zstd frame", stored_bytes);
    }
    memcpy(&magic, stored, sizeof magic);
    if (magic != ZSTD_MAGICNUMBER) {
        return slu_err_set(err, SLU_EFORMAT, "the data don't begin as a zstd frame does");
    }
    unsigned long long content = ZSTD_getFrameContentSize(stored, stored_bytes);
    if (content == ZSTD_CONTENTSIZE_ERROR || content == ZSTD_CONTENTSIZE_UNKNOWN) {
        return slu_err_set(err, SLU_EFORMAT, "the zstd frame doesn't say how much it holds");
    }
    if (content != raw_bytes) {
        return slu_err_set(err, SLU_EFORMAT,
                           "the zstd frame holds %llu bytes where %zu are expected", content,
                           raw_bytes);
    }
    size_t frame = ZSTD_findFrameCompressedSize(stored, stored_bytes);
    if (ZSTD_isError(frame)) {
        return slu_err_set(err, SLU_EFORMAT, "the zstd frame is broken: %s",
                           ZSTD_getErrorName(frame));
    }
    if (frame != stored_bytes) {
        return slu_err_set(err, SLU_EFORMAT, "%zu bytes follow the zstd frame",
                           stored_bytes - frame);
    }
    return 0;
}

int slu_decode(struct slu_decoder *decoder, enum slu_codec_id codec, const void *stored,
               size_t stored_bytes, uint64_t checksum, void *out, size_t raw_bytes,
               struct slu_err *err)
{
    if (slu_checksum(stored, stored_bytes) != checksum) {
        return slu_err_set(err, SLU_EFORMAT,
                           "the checksum of %zu bytes doesn't match; the data "
                           "are damaged",
                           stored_bytes);
    }
    if (codec == SLU_CODEC_RAW) {
        if (stored_bytes != raw_bytes) {
            return slu_err_set(err, SLU_EFORMAT, "%zu raw bytes are stored where %zu are expected",
                               stored_bytes, raw_bytes);
        }
        if (out != stored) {
            memcpy(out, stored, raw_bytes);
        }
        return 0;
    }
    if (codec != SLU_CODEC_ZSTD) {
        return slu_err_set(err, SLU_EFORMAT, "codec %u is unknown", (unsigned)codec);
    }
    int rc = check_frame(stored, stored_bytes, raw_bytes, err);
    if (rc != 0) {
        return rc;
    }
    size_t n = ZSTD_decompressDCtx(decoder->zstd, out, raw_bytes, stored, stored_bytes);
    if (ZSTD_isError(n)) {
        return slu_err_set(err, SLU_EFORMAT, "the zstd frame is broken: %s", ZSTD_getErrorName(n));
    }
    if (n != raw_bytes) {
        return slu_err_set(err, SLU_EFORMAT,
                           "the zstd frame yields %zu bytes where %zu are "
                           "expected",
                           n, raw_bytes);
    }
    return 0;
}

int slu_encoder_create(struct slu_encoder **ret_encoder, struct slu_err *err)
{
    static const struct {
        ZSTD_cParameter parameter;
        int value;
    } settings[] = {
        {ZSTD_c_windowLog, WINDOW_LOG},
        {ZSTD_c_hashLog, HASH_LOG},
        {ZSTD_c_strategy, ZSTD_fast},
        {ZSTD_c_minMatch, 7},
        {ZSTD_c_targetLength, STRIDE_BYTES},
        {ZSTD_c_literalCompressionMode, ZSTD_ps_enable},
        {ZSTD_c_contentSizeFlag, 1},
        {ZSTD_c_checksumFlag, 0}, /* XXH3 covers the stored bytes */
        {ZSTD_c_dictIDFlag, 0},
    };
    struct slu_encoder *encoder = calloc(1, sizeof *encoder);
    int rc = SLU_OK;
    if (encoder) {
        encoder->zstd = ZSTD_createCCtx();
        encoder->back = ZSTD_createDCtx();
    }
    if (!encoder || !encoder->zstd || !encoder->back) {
        rc = slu_err_set(err, SLU_ENOMEM, "no memory for an encoder");
    }
    for (size_t i = 0; rc == 0 && i < sizeof settings / sizeof settings[0]; i++) {
        size_t set =
            ZSTD_CCtx_setParameter(encoder->zstd, settings[i].parameter, settings[i].value);
        if (ZSTD_isError(set)) {
            rc = slu_err_set(err, SLU_EUNSUP, "this zstd library refuses a setting: %s",
                             ZSTD_getErrorName(set));
        }
    }
    if (rc < 0) {
        slu_encoder_destroy(encoder);
        return rc;
    }
    *ret_encoder = encoder;
    return 0;
}

void slu_encoder_destroy(struct slu_encoder *encoder)
{
    if (encoder) {
        ZSTD_freeDCtx(encoder->back);
        ZSTD_freeCCtx(encoder->zstd);
        free(encoder);
    }
}

size_t slu_encode_bound(size_t raw_bytes)
{
    return ZSTD_compressBound(raw_bytes);
}

static int64_t encode_error(size_t rc, size_t raw_bytes, struct slu_err *err)
{
    int code = ZSTD_getErrorCode(rc) == ZSTD_error_memory_allocation ? SLU_ENOMEM : SLU_EINVAL;
    return slu_err_set(err, code, "%zu bytes cannot be compressed: %s", raw_bytes,
                       ZSTD_getErrorName(rc));
}

/* A frame as RFC 8878 has it: magic number, descriptor, window, content size; then blocks of a
 * header and their bytes, the last of them marked. */
#define FRAME_HEAD_BYTES 10u
#define BLOCK_HEAD_BYTES 3u
#define BLOCK_LAST       1u
#define BLOCK_TYPE_SHIFT 1
#define BLOCK_TYPE_MASK  3u
#define BLOCK_SIZE_SHIFT 3
enum block_type { BLOCK_RAW, BLOCK_RLE };

/* Smaller ones take too little time to leave them. */
#define PART_LARGE_BYTES 65536u

/* What one may cost over the whole's bound: blocks' heads, and a table of its own. */
#define PART_BYTES 1024u

struct frame {
    uint8_t *at;
    size_t n, n_max;
    size_t last; /* where the header of the last block is */
};

static bool frame_start(struct frame *f, uint32_t raw_bytes)
{
    const uint8_t four_bytes_of_size = 2 << 6, window = (WINDOW_LOG - 10) << 3;
    const uint32_t magic = ZSTD_MAGICNUMBER;
    if (f->n_max < FRAME_HEAD_BYTES) {
        return false;
    }
    memcpy(f->at, &magic, sizeof magic);
    f->at[4] = four_bytes_of_size;
    f->at[5] = window;
    memcpy(f->at + 6, &raw_bytes, sizeof raw_bytes);
    f->n = FRAME_HEAD_BYTES;
    return true;
}

static uint32_t block_head(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16;
}

static bool frame_add(struct frame *f, uint32_t head, const uint8_t *data, size_t bytes)
{
    if (f->n_max - f->n < BLOCK_HEAD_BYTES + bytes) {
        return false;
    }
    f->last = f->n;
    for (unsigned i = 0; i < BLOCK_HEAD_BYTES; i++) {
        f->at[f->n++] = (uint8_t)(head >> (8 * i));
    }
    memcpy(f->at + f->n, data, bytes);
    f->n += bytes;
    return true;
}

static bool frame_add_raw(struct frame *f, const uint8_t *raw, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += ZSTD_BLOCKSIZE_MAX) {
        size_t some = bytes - at < ZSTD_BLOCKSIZE_MAX ? bytes - at : ZSTD_BLOCKSIZE_MAX;
        uint32_t head = BLOCK_RAW << BLOCK_TYPE_SHIFT | (uint32_t)some << BLOCK_SIZE_SHIFT;
        if (!frame_add(f, head, raw + at, some)) {
            return false;
        }
    }
    return true;
}

/* The blocks of a whole frame of zstd's. */
static bool frame_add_blocks(struct frame *f, const uint8_t *frame, size_t bytes)
{
    size_t at = ZSTD_frameHeaderSize(frame, bytes);
    for (uint32_t head = 0; (head & BLOCK_LAST) == 0;) {
        assert(at + BLOCK_HEAD_BYTES <= bytes);
        head = block_head(frame + at);
        at += BLOCK_HEAD_BYTES;
        bool is_rle = (head >> BLOCK_TYPE_SHIFT & BLOCK_TYPE_MASK) == BLOCK_RLE;
        size_t size = is_rle ? 1 : head >> BLOCK_SIZE_SHIFT;
        assert(at + size <= bytes);
        if (!frame_add(f, head & ~BLOCK_LAST, frame + at, size)) {
            return false;
        }
        at += size;
    }
    return true;
}

int64_t slu_encode(struct slu_encoder *encoder, const void *raw, size_t raw_bytes, void *out,
                   size_t out_bytes, struct slu_err *err)
{
    size_t n = ZSTD_compress2(encoder->zstd, out, out_bytes, raw, raw_bytes);
    if (ZSTD_isError(n)) {
        return encode_error(n, raw_bytes, err);
    }
    return (int64_t)n;
}

size_t slu_encode_parts_bound(size_t raw_bytes, const struct slu_parts *parts)
{
    return slu_encode_bound(raw_bytes) + PART_BYTES * (parts->n_cuts + 1);
}

/* A part is a frame of its own at first, whose blocks know of no others, and then either these or
 * its bytes as they are join the others'. 0, 1 if there is no room for that, or a negative error.
 */
static int add_part(struct slu_encoder *encoder, struct frame *frame, const uint8_t *raw,
                    size_t bytes, unsigned least_gain, uint8_t *work, size_t work_bytes,
                    struct slu_err *err)
{
    size_t n = ZSTD_compress2(encoder->zstd, work, work_bytes, raw, bytes);
    if (ZSTD_isError(n)) {
        return (int)encode_error(n, bytes, err);
    }
    size_t gain = least_gain && bytes >= PART_LARGE_BYTES ? bytes / least_gain : 0;
    bool has_room =
        n <= bytes - gain ? frame_add_blocks(frame, work, n) : frame_add_raw(frame, raw, bytes);
    return !has_room;
}

int64_t slu_encode_parts(struct slu_encoder *encoder, const void *raw, size_t raw_bytes,
                         const struct slu_parts *parts, void *out, size_t out_bytes,
                         struct slu_err *err)
{
    if (raw_bytes > UINT32_MAX) {
        return slu_err_set(err, SLU_EINVAL, "%zu bytes are too many for a frame", raw_bytes);
    }
    size_t work_bytes = ZSTD_compressBound(raw_bytes), at = 0;
    uint8_t *work = malloc(work_bytes);
    if (!work) {
        return slu_err_set(err, SLU_ENOMEM, "no memory to compress %zu bytes", raw_bytes);
    }
    struct frame frame = {.at = out, .n_max = out_bytes};
    int rc = !frame_start(&frame, (uint32_t)raw_bytes);
    for (size_t i = 0; i <= parts->n_cuts && rc == 0; i++) {
        size_t end = i < parts->n_cuts ? parts->cuts[i] : raw_bytes;
        assert(end > at && end <= raw_bytes);
        rc = add_part(encoder, &frame, (const uint8_t *)raw + at, end - at, parts->least_gain, work,
                      work_bytes, err);
        at = end;
    }
    int64_t n = (int64_t)frame.n;
    if (rc > 0) {
        rc = slu_err_set(err, SLU_EINVAL, "%zu bytes cannot be compressed into %zu", raw_bytes,
                         out_bytes);
    } else if (rc == 0) {
        /* This zstd makes no matches here, so that no block refers to those before it. Should
         * another, it is one frame with no parts. */
        frame.at[frame.last] |= BLOCK_LAST;
        size_t back = ZSTD_decompressDCtx(encoder->back, work, work_bytes, out, frame.n);
        if (back != raw_bytes || memcmp(work, raw, raw_bytes) != 0) {
            n = slu_encode(encoder, raw, raw_bytes, out, out_bytes, err);
        }
    }
    free(work);
    return rc < 0 ? rc : n;
}
