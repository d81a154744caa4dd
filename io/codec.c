#include "io/codec.h"

#define ZSTD_STATIC_LINKING_ONLY /* for the static DCtx and the switch that forces literals */
#include <assert.h>
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
    struct slu_encoder *encoder = malloc(sizeof *encoder);
    ZSTD_CCtx *zstd = ZSTD_createCCtx();
    if (!encoder || !zstd) {
        goto fail;
    }
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++) {
        size_t rc = ZSTD_CCtx_setParameter(zstd, settings[i].parameter, settings[i].value);
        if (ZSTD_isError(rc)) {
            slu_err_set(err, SLU_EUNSUP, "this zstd library refuses a setting: %s",
                        ZSTD_getErrorName(rc));
            ZSTD_freeCCtx(zstd);
            free(encoder);
            return SLU_EUNSUP;
        }
    }
    encoder->zstd = zstd;
    *ret_encoder = encoder;
    return 0;
fail:
    ZSTD_freeCCtx(zstd);
    free(encoder);
    return slu_err_set(err, SLU_ENOMEM, "no memory for an encoder");
}

void slu_encoder_destroy(struct slu_encoder *encoder)
{
    if (encoder) {
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

int64_t slu_encode_parts(struct slu_encoder *encoder, const void *raw, size_t raw_bytes,
                         const size_t *cuts, size_t n_cuts, void *out, size_t out_bytes,
                         struct slu_err *err)
{
    ZSTD_outBuffer to = {.dst = out, .size = out_bytes};
    ZSTD_CCtx_reset(encoder->zstd, ZSTD_reset_session_only);
    size_t rc = ZSTD_CCtx_setPledgedSrcSize(encoder->zstd, raw_bytes), at = 0;
    for (size_t i = 0; i <= n_cuts && !ZSTD_isError(rc); i++) {
        /* A flush ends the block, and the next one starts with statistics of its own. */
        size_t end = i < n_cuts ? cuts[i] : raw_bytes;
        assert(end > at && end <= raw_bytes);
        ZSTD_inBuffer from = {.src = (const uint8_t *)raw + at, .size = end - at};
        rc =
            ZSTD_compressStream2(encoder->zstd, &to, &from, i < n_cuts ? ZSTD_e_flush : ZSTD_e_end);
        if (!ZSTD_isError(rc) && rc != 0) {
            return slu_err_set(err, SLU_EINVAL, "%zu bytes cannot be compressed into %zu",
                               raw_bytes, out_bytes);
        }
        at = end;
    }
    return ZSTD_isError(rc) ? encode_error(rc, raw_bytes, err) : (int64_t)to.pos;
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
