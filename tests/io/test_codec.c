#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "io/codec.h"
#include "make.h"

static struct slu_decoder *decoder;
static struct slu_encoder *encoder;

static void setup(void)
{
    struct slu_err err;
    cr_assert_eq(slu_decoder_create(&decoder, &err), 0);
    cr_assert_eq(slu_encoder_create(&encoder, &err), 0);
}

static void teardown(void)
{
    slu_decoder_destroy(decoder);
    slu_encoder_destroy(encoder);
}

TestSuite(codec, .init = setup, .fini = teardown);

/* Decodes with the right checksum, into exactly out_bytes of heap, so that a sanitizer sees any
 * write past them. */
static int decode(const void *stored, size_t stored_bytes, size_t out_bytes, struct slu_err *err)
{
    uint8_t *out = malloc(out_bytes);
    int rc = slu_decode(decoder, SLU_CODEC_ZSTD, stored, stored_bytes,
                        slu_checksum(stored, stored_bytes), out, out_bytes, err);
    free(out);
    return rc;
}

/* Frames of many sizes and kinds of content come back as they were, within the bound. */
Test(codec, round_trip)
{
    static const size_t sizes[] = {1, 2, 63, 1000, 65536, 131072, 131073, 1u << 20, 5000001};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (uint32_t kind = 0; kind < 2; kind++) {
            size_t n = sizes[i], bound = slu_encode_bound(n);
            uint8_t *raw = calloc(n, 1), *stored = malloc(bound), *out = malloc(n);
            if (kind == 1) {
                make_fill(raw, n, (uint32_t)i);
            }
            struct slu_err err;
            int64_t m = slu_encode(encoder, raw, n, stored, bound, &err);
            cr_assert_gt(m, 0, "%s", err.text);
            cr_assert_leq((size_t)m, bound);
            int rc = slu_decode(decoder, SLU_CODEC_ZSTD, stored, (size_t)m,
                                slu_checksum(stored, (size_t)m), out, n, &err);
            cr_assert_eq(rc, 0, "%s", err.text);
            cr_assert_eq(memcmp(raw, out, n), 0);
            free(raw);
            free(stored);
            free(out);
        }
    }
}

/* Peaked codes shrink to within 2 % of their entropy: the sum of two 16-sided dice has 4.66 bits
 * a byte. */
Test(codec, comes_near_entropy)
{
    const size_t n = 1u << 20, bound = slu_encode_bound(n);
    uint8_t *raw = malloc(n), *stored = malloc(bound);
    make_fill(raw, n, 3);
    struct slu_err err;
    int64_t m = slu_encode(encoder, raw, n, stored, bound, &err);
    cr_assert_gt(m, 0);
    cr_assert_lt((double)m * 8 / (double)n, 4.66 * 1.02);
    free(raw);
    free(stored);
}

/* An output too small for the frame is an error of the encoder, not an overrun. */
Test(codec, encoder_respects_room)
{
    uint8_t raw[4096], stored[16];
    make_fill(raw, sizeof raw, 3);
    struct slu_err err;
    cr_assert_lt(slu_encode(encoder, raw, sizeof raw, stored, sizeof stored, &err), 0);
    cr_assert_neq(err.text[0], '\0');
}

/* Raw extents are copied, or checked in place, and refused at another size or checksum. */
Test(codec, raw)
{
    uint8_t raw[100], out[100];
    make_fill(raw, sizeof raw, 3);
    uint64_t sum = slu_checksum(raw, sizeof raw);
    struct slu_err err;
    cr_assert_eq(slu_decode(decoder, SLU_CODEC_RAW, raw, 100, sum, out, 100, &err), 0);
    cr_assert_eq(memcmp(raw, out, 100), 0);
    cr_assert_eq(slu_decode(decoder, SLU_CODEC_RAW, raw, 100, sum, raw, 100, &err), 0);
    cr_assert_eq(slu_decode(decoder, SLU_CODEC_RAW, raw, 100, sum, out, 99, &err), SLU_EFORMAT);
    cr_assert_eq(slu_decode(decoder, SLU_CODEC_RAW, raw, 100, ~sum, out, 100, &err), SLU_EFORMAT);
    cr_assert_eq(slu_decode(decoder, SLU_CODECS, raw, 100, sum, out, 100, &err), SLU_EFORMAT);
}

/* A frame that yields more, or less, than promised is refused without a byte past the end. */
Test(codec, refuses_other_sizes)
{
    uint8_t raw[5000], stored[6000];
    make_fill(raw, sizeof raw, 3);
    struct slu_err err;
    int64_t m = slu_encode(encoder, raw, sizeof raw, stored, sizeof stored, &err);
    cr_assert_gt(m, 0);
    cr_assert_eq(decode(stored, (size_t)m, 5000, &err), 0);
    cr_assert_eq(decode(stored, (size_t)m, 4999, &err), SLU_EFORMAT);
    cr_assert_eq(decode(stored, (size_t)m, 5001, &err), SLU_EFORMAT);
    cr_assert_eq(decode(stored, (size_t)m, 1, &err), SLU_EFORMAT);
}

/* Anything but one plain frame with its content size is refused: something after it, a second
 * frame, a skippable frame, a frame without size, nothing at all. */
Test(codec, refuses_other_frames)
{
    uint8_t raw[1000], stored[4000] = {0};
    make_fill(raw, sizeof raw, 3);
    struct slu_err err;
    int64_t m = slu_encode(encoder, raw, sizeof raw, stored, sizeof stored, &err);
    cr_assert_gt(m, 0);
    cr_assert_eq(decode(stored, (size_t)m + 1, 1000, &err), SLU_EFORMAT);
    cr_assert_eq(slu_encode(encoder, raw, 1, stored + m, sizeof stored - (size_t)m, &err) > 0, 1);
    cr_assert_eq(decode(stored, (size_t)m + 10, 1000, &err), SLU_EFORMAT);

    uint8_t skippable[24] = {0x50, 0x2a, 0x4d, 0x18, 16};
    cr_assert_eq(decode(skippable, sizeof skippable, 16, &err), SLU_EFORMAT);
    cr_assert_eq(decode(skippable, 3, 16, &err), SLU_EFORMAT);
    cr_assert_eq(decode(skippable, 0, 16, &err), SLU_EFORMAT);

    ZSTD_CCtx *zstd = ZSTD_createCCtx();
    cr_assert(!ZSTD_isError(ZSTD_CCtx_setParameter(zstd, ZSTD_c_contentSizeFlag, 0)));
    size_t n = ZSTD_compress2(zstd, stored, sizeof stored, raw, sizeof raw);
    ZSTD_freeCCtx(zstd);
    cr_assert(!ZSTD_isError(n));
    cr_assert_eq(decode(stored, n, 1000, &err), SLU_EFORMAT);
}

/* Frames cut short anywhere and frames with any single bit turned never decode to the wrong size
 * nor break the decoder: it still decodes the good one afterwards. */
Test(codec, survives_broken_frames)
{
    uint8_t raw[600], stored[700];
    make_fill(raw, sizeof raw, 3);
    struct slu_err err;
    int64_t m = slu_encode(encoder, raw, sizeof raw, stored, sizeof stored, &err);
    cr_assert_gt(m, 0);
    for (size_t n = 0; n < (size_t)m; n++) {
        uint8_t *cut = malloc(n ? n : 1);
        memcpy(cut, stored, n);
        cr_assert_eq(decode(cut, n, sizeof raw, &err), SLU_EFORMAT);
        free(cut);
    }
    int n_refused = 0;
    for (size_t bit = 0; bit < (size_t)m * 8; bit++) {
        stored[bit / 8] ^= (uint8_t)(1u << bit % 8);
        int rc = decode(stored, (size_t)m, sizeof raw, &err);
        cr_assert(rc == 0 || rc == SLU_EFORMAT);
        n_refused += rc != 0;
        stored[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    cr_assert_gt(n_refused, 0);
    cr_assert_eq(decode(stored, (size_t)m, sizeof raw, &err), 0, "%s", err.text);
}

/* With the checksum of the good frame, any turned bit is refused. */
Test(codec, checksum_catches_every_bit)
{
    uint8_t raw[600], stored[700], out[600];
    make_fill(raw, sizeof raw, 3);
    struct slu_err err;
    int64_t m = slu_encode(encoder, raw, sizeof raw, stored, sizeof stored, &err);
    cr_assert_gt(m, 0);
    uint64_t sum = slu_checksum(stored, (size_t)m);
    for (size_t bit = 0; bit < (size_t)m * 8; bit++) {
        stored[bit / 8] ^= (uint8_t)(1u << bit % 8);
        cr_assert_eq(slu_decode(decoder, SLU_CODEC_ZSTD, stored, (size_t)m, sum, out, 600, &err),
                     SLU_EFORMAT);
        stored[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
}
