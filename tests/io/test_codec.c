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

/* 70000 bytes each: one value, 16 of them alike, 16 of which one is as likely as the others
 * together, and all. */
#define KIND_BYTES 70000u

static void fill_parts(uint8_t *raw)
{
    uint32_t state = 1;
    for (size_t i = 0; i < 4 * KIND_BYTES; i++) {
        state = state * 1664525u + 1013904223u;
        uint8_t byte = (uint8_t)(state >> 24);
        const uint8_t values[] = {42, byte & 15, byte & 16 ? byte & 15 : 3, byte};
        raw[i] = values[i / KIND_BYTES];
    }
}

static int64_t encode_parts(const uint8_t *raw, const struct slu_parts *parts, size_t room)
{
    uint8_t *stored = malloc(room), *out = malloc(4 * KIND_BYTES);
    struct slu_err err = {0};
    int64_t n = slu_encode_parts(encoder, raw, 4 * KIND_BYTES, parts, stored, room, &err);
    if (n > 0) {
        cr_assert_eq(ZSTD_findFrameCompressedSize(stored, (size_t)n), (size_t)n);
        int rc = slu_decode(decoder, SLU_CODEC_ZSTD, stored, (size_t)n,
                            slu_checksum(stored, (size_t)n), out, 4 * KIND_BYTES, &err);
        cr_assert_eq(rc, 0, "%s", err.text);
        cr_assert_eq(memcmp(raw, out, 4 * KIND_BYTES), 0);
    }
    free(stored);
    free(out);
    return n;
}

/* Parts that gain less than they are asked to stay as they are, and no others. */
Test(codec, parts_stay_raw_that_gain_little)
{
    uint8_t *raw = malloc(4 * KIND_BYTES);
    fill_parts(raw);
    const size_t cuts[] = {KIND_BYTES, 2 * KIND_BYTES, 3 * KIND_BYTES};
    struct slu_parts parts = {.cuts = cuts, .n_cuts = 3};
    const size_t room = slu_encode_parts_bound(4 * KIND_BYTES, &parts);
    /* Of four parts nothing, a half and a table, a third and all are left. */
    int64_t all = encode_parts(raw, &parts, room);
    cr_assert(all > 128000 && all < 133000, "%lld", (long long)all);
    parts.least_gain = 3;
    cr_assert_eq(encode_parts(raw, &parts, room), all);
    parts.least_gain = 2;
    int64_t fewer = encode_parts(raw, &parts, room);
    cr_assert(fewer > 163000 && fewer < 168000, "%lld", (long long)fewer);
    /* Nothing gains all of it; but what is small is compressed. */
    const size_t small_cuts[] = {KIND_BYTES, 2 * KIND_BYTES - 4000, 2 * KIND_BYTES, 3 * KIND_BYTES};
    parts = (struct slu_parts){.cuts = small_cuts, .n_cuts = 4, .least_gain = 1};
    int64_t small = encode_parts(raw, &parts, room);
    cr_assert(small > 4 * (int64_t)KIND_BYTES - 2000 && small < 4 * (int64_t)KIND_BYTES - 1800,
              "%lld", (long long)small);
    parts.cuts = cuts;
    parts.n_cuts = 3;
    cr_assert_eq(encode_parts(raw, &parts, room), 10 + 4 * (3 + (int64_t)KIND_BYTES));
    cr_assert_eq(encode_parts(raw, &parts, 3 * KIND_BYTES), SLU_EINVAL);
    free(raw);
}

/* Parts of more than one block, with what repeats within the window and across it: a frame of
 * them is what it was, whatever its neighbours are. */
Test(codec, parts_of_many_blocks)
{
    enum { BYTES = 700000 };
    uint8_t *raw = malloc(BYTES);
    make_fill(raw, BYTES, 3);
    for (size_t i = 300; i < 290000; i++) {
        raw[i] = raw[i - 300];
    }
    for (size_t i = 290000 + 131072; i < BYTES; i++) {
        raw[i] = raw[i - 131072];
    }
    const size_t cuts[] = {1, 290000, 290000 + 131072};
    struct slu_parts parts = {.cuts = cuts, .n_cuts = 3};
    const size_t room = slu_encode_parts_bound(BYTES, &parts);
    uint8_t *stored = malloc(room), *out = malloc(BYTES);
    for (parts.least_gain = 0; parts.least_gain < 3; parts.least_gain++) {
        struct slu_err err = {0};
        int64_t n = slu_encode_parts(encoder, raw, BYTES, &parts, stored, room, &err);
        cr_assert_gt(n, 0, "%s", err.text);
        cr_assert_eq(slu_decode(decoder, SLU_CODEC_ZSTD, stored, (size_t)n,
                                slu_checksum(stored, (size_t)n), out, BYTES, &err),
                     0, "%s", err.text);
        cr_assert_eq(memcmp(raw, out, BYTES), 0);
    }
    free(raw);
    free(stored);
    free(out);
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
