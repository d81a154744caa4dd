#include <criterion/criterion.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "faulty.h"
#include "io/pack.h"
#include "make.h"

/* A small pack in memory, to be put wrong. */
static void small_pack(struct make *make, enum slu_codec_id codec)
{
    const char *path = make_temp_path("small.slu");
    make_pack_file(path, codec, 0);
    make_read_file(make, path);
}

static int open_bytes(const void *bytes, size_t n, struct slu_pack **ret_pack, struct slu_err *err)
{
    struct slu_source *source;
    cr_assert_eq(slu_source_open_memory(bytes, n, "bytes.slu", &source), 0);
    int rc = slu_pack_open(source, ret_pack, err);
    if (rc != 0) {
        slu_source_destroy(source);
    }
    return rc;
}

static void refused(const void *bytes, size_t n, int code, const char *part)
{
    struct slu_pack *pack;
    struct slu_err err = {0};
    int rc = open_bytes(bytes, n, &pack, &err);
    cr_assert_eq(rc, code, "%s: %d %s", part, rc, err.text);
    cr_assert_not_null(strstr(err.text, part), "%s: %s", part, err.text);
    cr_assert_not_null(strstr(err.text, "bytes.slu"), "%s", err.text);
}

static struct slu_pack_header *header_of(struct make *make)
{
    return (struct slu_pack_header *)make->data;
}

/* The tables of a raw index, in place. */
static struct slu_pack_tensor *tensors_of(struct make *make)
{
    return (struct slu_pack_tensor *)(make->data + header_of(make)->index.offset);
}

static struct slu_pack_bank *banks_of(struct make *make)
{
    return (struct slu_pack_bank *)(tensors_of(make) + header_of(make)->n_tensors);
}

static struct slu_extent *extents_of(struct make *make)
{
    return (struct slu_extent *)(banks_of(make) + header_of(make)->n_banks);
}

/* Makes the checksums right again after a change, so that the change itself must be noticed. */
static void reseal(struct make *make)
{
    struct slu_pack_header *header = header_of(make);
    struct slu_extent *extents[] = {&header->meta, &header->index};
    for (int i = 0; i < 2; i++) {
        if (extents[i]->offset + extents[i]->stored_bytes <= make->bytes) {
            extents[i]->checksum =
                slu_checksum(make->data + extents[i]->offset, extents[i]->stored_bytes);
        }
    }
    header->checksum = slu_checksum(header, offsetof(struct slu_pack_header, checksum));
}

static void check_content(const struct slu_pack *pack, int is_large)
{
    struct slu_decoder *decoder;
    struct slu_err err;
    cr_assert_eq(slu_decoder_create(&decoder, &err), 0);
    const size_t room = SLU_PACK_PIECE_BYTES;
    uint8_t *wanted = malloc(2 * room), *out = malloc(room), *staging = malloc(room);

    const struct slu_pack_tensor *matrix = slu_pack_find(pack, "output.weight");
    cr_assert_not_null(matrix);
    cr_assert_eq(matrix->n_extents, is_large ? 2 : 1);
    make_fill(wanted, is_large ? SLU_PACK_PIECE_BYTES + 64 : 2048, 1);
    size_t done = 0;
    for (uint32_t i = 0; i < matrix->n_extents; i++) {
        uint32_t number = matrix->first_extent + i;
        cr_assert_eq(slu_pack_read_extent(pack, decoder, number, staging, out, &err), 0, "%s",
                     err.text);
        cr_assert_eq(memcmp(out, wanted + done, pack->extents[number].raw_bytes), 0);
        done += pack->extents[number].raw_bytes;
    }
    cr_assert_eq(done, is_large ? SLU_PACK_PIECE_BYTES + 64 : 2048);

    const struct slu_pack_tensor *rows = slu_pack_find(pack, "token_embd.weight");
    cr_assert_not_null(rows);
    cr_assert_eq(rows->kind, SLU_PACK_ROWS);
    for (uint32_t r = 0; r < rows->rows; r++) {
        uint64_t offset = pack->extents[rows->first_extent].offset + (uint64_t)r * rows->row_stride;
        cr_assert_eq(pack->source->read_at(pack->source, offset, out, rows->row_stride, &err), 0);
        make_fill(wanted, rows->row_stride, 100 + r);
        cr_assert_eq(memcmp(out, wanted, rows->row_stride), 0);
    }

    const struct slu_pack_bank *bank = slu_pack_find_bank(pack, 3, SLU_BANK_ROUTED);
    cr_assert_not_null(bank);
    for (uint32_t b = 0; b < bank->n_experts * bank->n_blocks; b++) {
        uint32_t number = bank->first_extent + b;
        cr_assert_eq(slu_pack_read_extent(pack, decoder, number, staging, out, &err), 0);
        make_fill(wanted, 3000, 200 + b);
        cr_assert_eq(memcmp(out, wanted, 3000), 0);
    }
    cr_assert_null(slu_pack_find_bank(pack, 3, SLU_BANK_SHARED));
    cr_assert_null(slu_pack_find_bank(pack, 2, SLU_BANK_ROUTED));
    cr_assert_null(slu_pack_find(pack, "output.weigh"));

    uint64_t value = 0;
    cr_assert_eq(slu_kvs_u64(&pack->kvs, "scalar.0", &value, &err), 0);
    cr_assert_eq(value, 0xfe);
    cr_assert_geq(slu_pack_memory_bytes(pack), sizeof *pack + pack->header.meta.raw_bytes);
    slu_decoder_destroy(decoder);
    free(wanted);
    free(out);
    free(staging);
}

/* What was written comes back, raw and compressed, in one piece and several, and each codec is
 * really used. */
Test(pack, round_trip)
{
    for (int is_large = 0; is_large < 2; is_large++) {
        for (int codec = 0; codec < SLU_CODECS; codec++) {
            const char *path = make_temp_path("round.slu");
            make_pack_file(path, (enum slu_codec_id)codec, is_large);
            struct slu_pack *pack;
            struct slu_err err;
            cr_assert_eq(slu_pack_open_file(path, &pack, &err), 0, "%s", err.text);
            cr_assert_eq(pack->extents[0].codec, (uint32_t)codec);
            cr_assert_neq(pack->fingerprint, 0);
            check_content(pack, is_large);
            slu_pack_close(pack);
        }
    }
    slu_pack_close(NULL);
}

/* Any bit turned in the first page, the metadata or the index makes the pack be refused. */
Test(pack, refuses_every_bit_of_its_tables)
{
    for (int codec = 0; codec < SLU_CODECS; codec++) {
        struct make make = {0};
        small_pack(&make, (enum slu_codec_id)codec);
        const struct slu_pack_header header = *header_of(&make);
        const uint64_t stretches[][2] = {{0, SLU_PACK_ALIGN},
                                         {header.meta.offset, header.meta.stored_bytes},
                                         {header.index.offset, header.index.stored_bytes}};
        for (int s = 0; s < 3; s++) {
            for (uint64_t bit = 0; bit < stretches[s][1] * 8; bit++) {
                struct slu_pack *pack;
                uint8_t *at = make.data + stretches[s][0] + bit / 8;
                *at ^= (uint8_t)(1u << bit % 8);
                int rc = open_bytes(make.data, make.bytes, &pack, NULL);
                cr_assert(rc == SLU_EFORMAT || rc == SLU_EUNSUP, "bit %d:%d", s, (int)bit);
                *at ^= (uint8_t)(1u << bit % 8);
            }
        }
        make_free(&make);
    }
}

/* A turned bit in a weight is noticed when its extent is read, and named. */
Test(pack, refuses_damaged_extents)
{
    for (int codec = 0; codec < SLU_CODECS; codec++) {
        struct make make = {0};
        small_pack(&make, (enum slu_codec_id)codec);
        struct slu_pack *pack;
        struct slu_decoder *decoder;
        struct slu_err err;
        uint8_t staging[4096], out[4096];
        cr_assert_eq(open_bytes(make.data, make.bytes, &pack, &err), 0, "%s", err.text);
        cr_assert_eq(slu_decoder_create(&decoder, &err), 0);
        const struct slu_extent *extent = &pack->extents[0];
        for (uint64_t bit = 0; bit < extent->stored_bytes * 8ull; bit++) {
            uint8_t *at = make.data + extent->offset + bit / 8;
            *at ^= (uint8_t)(1u << bit % 8);
            cr_assert_eq(slu_pack_read_extent(pack, decoder, 0, staging, out, &err), SLU_EFORMAT);
            *at ^= (uint8_t)(1u << bit % 8);
        }
        cr_assert_not_null(strstr(err.text, "extent 0"), "%s", err.text);
        cr_assert_eq(slu_pack_read_extent(pack, decoder, 0, staging, out, &err), 0);
        slu_decoder_destroy(decoder);
        slu_pack_close(pack);
        make_free(&make);
    }
}

/* A pack cut short at any length, or with something behind it, is refused. */
Test(pack, refuses_other_lengths)
{
    struct make make = {0};
    small_pack(&make, SLU_CODEC_RAW);
    for (size_t n = 0; n < make.bytes; n += n < 200 ? 1 : 97) {
        /* A copy of its own, so that a sanitizer sees any read past it. */
        uint8_t *cut = malloc(n ? n : 1);
        memcpy(cut, make.data, n);
        refused(cut, n, SLU_EFORMAT, n < SLU_PACK_ALIGN ? "too few" : "truncated");
        free(cut);
    }
    make_zeros(&make, SLU_PACK_ALIGN);
    refused(make.data, make.bytes, SLU_EFORMAT, "has grown");
    make_free(&make);
}

/* Other files and newer packs are told apart from damaged ones. */
Test(pack, names_what_it_is_given)
{
    struct make make = {0};
    small_pack(&make, SLU_CODEC_RAW);
    header_of(&make)->version = SLU_PACK_VERSION_FORMATS + 1;
    refused(make.data, make.bytes, SLU_EUNSUP, "newer");
    header_of(&make)->version = SLU_PACK_VERSION;
    memcpy(make.data, "GGUF", 4);
    refused(make.data, make.bytes, SLU_EFORMAT, "not a pack");
    make_free(&make);
}

/* A field put wrong under right checksums: where, how wide, what value, what the sentence says. */
struct wrong {
    size_t at;
    int bytes;
    uint64_t value;
    const char *part;
};

static void check_wrong(struct make *make, const struct wrong *wrong)
{
    uint8_t *kept = malloc(make->bytes);
    memcpy(kept, make->data, make->bytes);
    memcpy(make->data + wrong->at, &wrong->value, (size_t)wrong->bytes);
    reseal(make);
    refused(make->data, make->bytes, SLU_EFORMAT, wrong->part);
    memcpy(make->data, kept, make->bytes);
    free(kept);
}

#define IN_HEADER(field) offsetof(struct slu_pack_header, field)

/* Headers that make no sense are refused, whoever computed their checksum. */
Test(pack, refuses_wrong_headers)
{
    struct make make = {0};
    small_pack(&make, SLU_CODEC_RAW);
    const uint64_t file_bytes = make.bytes, end = file_bytes - SLU_PACK_ALIGN;
    const uint64_t index_at = header_of(&make)->index.offset;
    const struct wrong wrongs[] = {
        {IN_HEADER(version), 4, 0, "header is damaged"},
        {IN_HEADER(header_bytes), 4, 128, "header claims"},
        {IN_HEADER(reserved), 4, 1, "reserved"},
        {IN_HEADER(file_bytes), 8, file_bytes + SLU_PACK_ALIGN, "truncated"},
        {IN_HEADER(n_kvs), 8, 1, "follow its 1 metadata keys"},
        {IN_HEADER(n_kvs), 8, 1000, "metadata keys"},
        {IN_HEADER(n_kvs), 8, UINT64_MAX, "metadata keys"},
        {IN_HEADER(meta.offset), 8, 0, "not on a page"},
        {IN_HEADER(meta.offset), 8, 4097, "not on a page"},
        {IN_HEADER(meta.offset), 8, file_bytes, "after the file"},
        {IN_HEADER(meta.offset), 8, UINT64_MAX - 4095, "after the file"},
        {IN_HEADER(meta.offset), 8, index_at, ""},
        {IN_HEADER(meta.stored_bytes), 4, 0, "codec doesn't allow"},
        {IN_HEADER(meta.stored_bytes), 4, UINT32_MAX, "after the file"},
        {IN_HEADER(meta.raw_bytes), 4, 7, "codec doesn't allow"},
        {IN_HEADER(meta.codec), 4, SLU_CODECS, "codec"},
        {IN_HEADER(meta.reserved), 4, 1, "reserved"},
        {IN_HEADER(index.offset), 8, end + SLU_PACK_ALIGN, "after the file"},
        {IN_HEADER(index.codec), 4, SLU_CODEC_ZSTD, "as a zstd frame does"},
        {IN_HEADER(n_tensors), 4, UINT32_MAX, "more than it has room"},
        {IN_HEADER(n_banks), 4, UINT32_MAX, "more than it has room"},
        {IN_HEADER(n_extents), 4, UINT32_MAX, "more than it has room"},
        {IN_HEADER(n_extents), 4, 7, "where its counts make"},
        {IN_HEADER(n_tensors), 4, 1, "where its counts make"},
    };
    for (size_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++) {
        check_wrong(&make, &wrongs[i]);
    }
    make_free(&make);
}

/* Metadata that claim to unpack to far more than they could are refused before any memory is
 * taken for them, and so is a frame whose own claim differs from the header's. */
Test(pack, refuses_bombs)
{
    struct make make = {0};
    small_pack(&make, SLU_CODEC_ZSTD);
    cr_assert_eq(header_of(&make)->meta.codec, SLU_CODEC_ZSTD);
    const uint64_t stored = header_of(&make)->meta.stored_bytes;
    const struct wrong wrongs[] = {
        {IN_HEADER(meta.raw_bytes), 4, UINT32_MAX, "not plausible"},
        {IN_HEADER(meta.raw_bytes), 4, 256u << 20, "not plausible"},
        {IN_HEADER(meta.raw_bytes), 4, stored * 1000 + 4097, "not plausible"},
        {IN_HEADER(meta.raw_bytes), 4, 100000, "the zstd frame holds"},
        {IN_HEADER(meta.raw_bytes), 4, 1, "the zstd frame holds"},
    };
    for (size_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++) {
        check_wrong(&make, &wrongs[i]);
    }
    make_free(&make);
}

#define TENSOR(i, field)                                                                           \
    (index_at + (i) * sizeof(struct slu_pack_tensor) + offsetof(struct slu_pack_tensor, field))
#define BANK(field) (banks_at + offsetof(struct slu_pack_bank, field))
#define EXTENT(i, field)                                                                           \
    (extents_at + (i) * sizeof(struct slu_extent) + offsetof(struct slu_extent, field))

/* Index records that make no sense are refused likewise: the matrix is tensor 0 with extent 0,
 * the rows are tensor 1 with extent 1, the bank has extents 2 to 5. */
Test(pack, refuses_wrong_records)
{
    struct make make = {0};
    small_pack(&make, SLU_CODEC_RAW);
    const uint64_t index_at = header_of(&make)->index.offset;
    const uint64_t banks_at = (uint64_t)((uint8_t *)banks_of(&make) - make.data);
    const uint64_t extents_at = (uint64_t)((uint8_t *)extents_of(&make) - make.data);
    const uint64_t file_bytes = make.bytes, meta_at = header_of(&make)->meta.offset;
    const struct wrong wrongs[] = {
        {TENSOR(0, name), 1, 0, "empty"},
        {TENSOR(0, name), 1, '\033', "unprintable"},
        {TENSOR(0, name) + 63, 1, 'x', "not ended"},
        {TENSOR(0, kind), 4, 2, "unknown kind"},
        {TENSOR(0, rows), 4, 0, "out of bounds"},
        {TENSOR(0, rows), 4, (1u << 24) + 1, "out of bounds"},
        {TENSOR(0, cols), 4, 0, "out of bounds"},
        {TENSOR(0, cols), 4, UINT32_MAX, "out of bounds"},
        {TENSOR(0, n), 4, 0, "out of bounds"},
        {TENSOR(0, row_stride), 4, 64, "row stride"},
        {TENSOR(0, first_extent), 4, 6, "claims 1 extents"},
        {TENSOR(0, first_extent), 4, UINT32_MAX, "claims 1 extents"},
        {TENSOR(0, n_extents), 4, 0, "claims 0 extents"},
        {TENSOR(0, n_extents), 4, UINT32_MAX, "claims"},
        {TENSOR(0, n_extents), 4, 2, "extent 1 "},
        {TENSOR(1, kind), 4, SLU_PACK_MATRIX, "row stride"},
        {TENSOR(1, n), 4, 2, "stored by rows"},
        {TENSOR(1, n_extents), 4, 2, "claims 2 extents"},
        {TENSOR(1, row_stride), 4, 0, "multiple of 64"},
        {TENSOR(1, row_stride), 4, 100, "multiple of 64"},
        {TENSOR(1, row_stride), 4, 1u << 20, "end after the file"},
        {TENSOR(1, row_stride), 4, 1024, "overlap"},
        {TENSOR(1, rows), 4, 1u << 24, "end after the file"},
        {TENSOR(1, first_extent), 4, 0, "which another has"},
        {TENSOR(1, first_extent), 4, 2, "has sizes"},
        {BANK(kind), 4, 3, "makes no sense"},
        {BANK(kind), 4, SLU_BANK_SHARED, "makes no sense"},
        {BANK(has_bias), 4, 2, "makes no sense"},
        {BANK(n_experts), 4, 0, "out of bounds"},
        {BANK(n_experts), 4, 3, "claims 6 extents"},
        {BANK(n_experts), 4, 1u << 24, "extents from"},
        {BANK(n_experts), 4, UINT32_MAX, "out of bounds"},
        {BANK(n_experts), 4, 1, "belongs to no"},
        {BANK(n_embd), 4, 0, "out of bounds"},
        {BANK(n_ff), 4, 0, "out of bounds"},
        {BANK(n_ff), 4, UINT32_MAX, "out of bounds"},
        {BANK(neurons_a_block), 4, 0, "out of bounds"},
        {BANK(neurons_a_block), 4, UINT32_MAX, "out of bounds"},
        {BANK(neurons_a_block), 4, 60, "blocks an expert"},
        {BANK(n_blocks), 4, 1, "blocks an expert"},
        {BANK(n_blocks), 4, UINT32_MAX, "blocks an expert"},
        {BANK(first_extent), 4, 1, "which another has"},
        {BANK(first_extent), 4, 3, "claims 4 extents"},
        {BANK(first_extent), 4, UINT32_MAX, "claims 4 extents"},
        {EXTENT(0, offset), 8, 0, "not on a page"},
        {EXTENT(0, offset), 8, 4095, "not on a page"},
        {EXTENT(0, offset), 8, file_bytes, "after the file"},
        {EXTENT(0, offset), 8, UINT64_MAX - 4095, "after the file"},
        {EXTENT(0, offset), 8, meta_at, "overlap"},
        {EXTENT(0, offset), 8, index_at, "overlap"},
        {EXTENT(0, offset), 8, extents_of(&make)[2].offset, "overlap"},
        {EXTENT(0, stored_bytes), 4, 0, "codec doesn't allow"},
        {EXTENT(0, stored_bytes), 4, UINT32_MAX, "after the file"},
        {EXTENT(0, raw_bytes), 4, 1, "codec doesn't allow"},
        {EXTENT(0, codec), 4, SLU_CODECS, "codec"},
        {EXTENT(0, reserved), 4, 1, "reserved"},
        {EXTENT(1, stored_bytes), 4, 64, "has sizes"},
        {EXTENT(1, checksum), 8, 1, "has sizes"},
        {EXTENT(1, codec), 4, SLU_CODEC_ZSTD, "has sizes"},
        {EXTENT(1, offset), 8, file_bytes - 4096, "overlap"},
        {EXTENT(2, raw_bytes), 4, 0, "codec doesn't allow"},
    };
    for (size_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++) {
        check_wrong(&make, &wrongs[i]);
    }
    memcpy(tensors_of(&make)[1].name, tensors_of(&make)[0].name, SLU_PACK_NAME_BYTES);
    reseal(&make);
    refused(make.data, make.bytes, SLU_EFORMAT, "two tensors have the name");
    make_free(&make);
}

/* A matrix of several pieces whose pieces are not whole is refused. */
Test(pack, refuses_odd_pieces)
{
    struct make make = {0};
    make_pack_file(make_temp_path("large.slu"), SLU_CODEC_RAW, 1);
    make_read_file(&make, make_temp_path("large.slu"));
    struct slu_extent *extent = &extents_of(&make)[0];
    extent->stored_bytes = extent->raw_bytes = SLU_PACK_PIECE_BYTES - 64;
    reseal(&make);
    refused(make.data, make.bytes, SLU_EFORMAT, "piece 0");
    make_free(&make);
}

/* A read that fails while opening, or later, is reported as such; the pack stays usable. */
Test(pack, reports_failed_reads)
{
    struct make make = {0};
    small_pack(&make, SLU_CODEC_ZSTD);
    struct slu_source *source;
    struct faulty faulty;
    struct slu_pack *pack;
    struct slu_err err;
    cr_assert_eq(slu_source_open_memory(make.data, make.bytes, "bytes.slu", &source), 0);
    int rc, i = 0;
    do {
        faulty_init(&faulty, source, i++);
        rc = slu_pack_open(&faulty.base, &pack, &err);
        cr_assert(rc == 0 || rc == SLU_EIO);
    } while (rc != 0);
    cr_assert_eq(i, 4, "header, index and metadata are a read each");

    struct slu_decoder *decoder;
    uint8_t staging[4096], out[4096];
    cr_assert_eq(slu_decoder_create(&decoder, &err), 0);
    faulty.fail_at = faulty.n_reads;
    cr_assert_eq(slu_pack_read_extent(pack, decoder, 0, staging, out, &err), SLU_EIO);
    cr_assert_eq(slu_pack_read_extent(pack, decoder, 0, staging, out, &err), 0);
    slu_decoder_destroy(decoder);
    slu_pack_close(pack);
    slu_source_destroy(source);
    make_free(&make);
}

/* An absent file is said to be absent. */
Test(pack, reports_absent_file)
{
    struct slu_pack *pack;
    struct slu_err err;
    cr_assert_eq(slu_pack_open_file(make_temp_path("absent.slu"), &pack, &err), SLU_ENOENT);
    cr_assert_not_null(strstr(err.text, "absent.slu"));
}
