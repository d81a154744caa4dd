#include "io/pack.h"

#include <assert.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "io/pack_check.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "structs are read as they are stored");

uint64_t slu_pack_header_checksum(const struct slu_pack_header *header)
{
    struct slu_pack_header copy = *header;
    /* A section leaves the fingerprint as it was. */
    copy.version = copy.version == SLU_PACK_VERSION_SECTION ? SLU_PACK_VERSION : copy.version;
    return slu_checksum(&copy, offsetof(struct slu_pack_header, checksum));
}

/* The first page has nothing but the header and the section's record. */
static bool is_zero_beside_record(const uint8_t *page)
{
    uint8_t others = 0;
    for (size_t i = sizeof(struct slu_pack_header); i < SLU_PACK_ALIGN; i++) {
        bool is_record =
            i >= SLU_PACK_SECTION_AT && i < SLU_PACK_SECTION_AT + sizeof(struct slu_pack_section);
        others |= is_record ? 0 : page[i];
    }
    return others == 0;
}

static int check_section(const struct slu_pack *pack, const struct slu_pack_section *section,
                         struct slu_err *err)
{
    const struct slu_extent *extent = &section->extent;
    if (memcmp(section->magic, SLU_PACK_SECTION_MAGIC, sizeof section->magic) != 0 ||
        slu_checksum(section, offsetof(struct slu_pack_section, checksum)) != section->checksum) {
        return slu_err_set(err, SLU_EFORMAT, "%s: the record of its section is damaged",
                           pack->source->name);
    }
    if (section->kind != SLU_SECTION_PREDICTOR || section->reserved != 0) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: its section is of kind %u, which this program doesn't know",
                           pack->source->name, section->kind);
    }
    if (section->fingerprint != pack->fingerprint) {
        return slu_err_set(err, SLU_EFORMAT, "%s: its section was made for another pack",
                           pack->source->name);
    }
    if (extent->offset % SLU_PACK_ALIGN != 0 || extent->offset < pack->header.file_bytes ||
        extent->offset > pack->source->size_bytes || extent->codec != SLU_CODEC_RAW ||
        extent->reserved != 0 || extent->stored_bytes == 0 ||
        extent->stored_bytes != extent->raw_bytes ||
        extent->stored_bytes > SLU_PACK_SECTION_BYTES_MAX ||
        extent->stored_bytes > pack->source->size_bytes - extent->offset) {
        return slu_err_set(
            err, SLU_EFORMAT, "%s: its section claims %u bytes at offset %llu, where it can't be",
            pack->source->name, extent->stored_bytes, (unsigned long long)extent->offset);
    }
    return 0;
}

/* A pack whose section is of no use is as good as one without: the sentence is kept for those who
 * want it. */
static void read_section(struct slu_pack *pack, const uint8_t *page)
{
    static const struct slu_pack_section none;
    struct slu_pack_section section;
    struct slu_err *err = &pack->section_err;
    memcpy(&section, page + SLU_PACK_SECTION_AT, sizeof section);
    if (!is_zero_beside_record(page)) {
        slu_err_set(err, SLU_EFORMAT, "%s: the page that its section's record lies in is damaged",
                    pack->source->name);
        return;
    }
    if (memcmp(&section, &none, sizeof none) == 0 || check_section(pack, &section, err) < 0) {
        return;
    }
    uint32_t bytes = section.extent.stored_bytes;
    uint8_t *data = malloc(bytes);
    if (!data) {
        slu_err_set(err, SLU_ENOMEM, "%s: no memory for its section of %u bytes",
                    pack->source->name, bytes);
    } else if (pack->source->read_at(pack->source, section.extent.offset, data, bytes, err) == 0 &&
               slu_checksum(data, bytes) != section.extent.checksum) {
        slu_err_set(err, SLU_EFORMAT,
                    "%s: its section at offset %llu is damaged: the checksum doesn't match; "
                    "sluice calibrate makes a new one",
                    pack->source->name, (unsigned long long)section.extent.offset);
    }
    if (err->code != 0) {
        free(data);
        return;
    }
    pack->section = data;
    pack->section_bytes = bytes;
}

static int read_header(struct slu_pack *pack, struct slu_err *err)
{
    struct slu_source *source = pack->source;
    struct slu_pack_header *header = &pack->header;
    uint8_t page[SLU_PACK_ALIGN];
    if (source->size_bytes < sizeof page) {
        return slu_err_set(err, SLU_EFORMAT, "%s: has %llu bytes, too few for a pack", source->name,
                           (unsigned long long)source->size_bytes);
    }
    int rc = source->read_at(source, 0, page, sizeof page, err);
    if (rc != 0) {
        return rc;
    }
    memcpy(header, page, sizeof *header);
    if (memcmp(header->magic, SLU_PACK_MAGIC, sizeof header->magic) != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: is not a pack: it doesn't begin as one; make one with sluice pack",
                           source->name);
    }
    if (header->version > SLU_PACK_VERSION_FORMATS) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: is a pack of version %u, newer than this program knows (%u)",
                           source->name, header->version, SLU_PACK_VERSION_FORMATS);
    }
    bool has_section = header->version >= SLU_PACK_VERSION_SECTION, is_zero = true;
    for (size_t i = sizeof *header; i < sizeof page && !has_section; i++) {
        is_zero = is_zero && page[i] == 0;
    }
    if (header->version == 0 || !is_zero || slu_pack_header_checksum(header) != header->checksum) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: its header is damaged (the checksum of the first "
                           "page doesn't match)",
                           source->name);
    }
    if (has_section ? header->file_bytes > source->size_bytes
                    : header->file_bytes != source->size_bytes) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: has %llu bytes where its header says %llu; it is truncated or has "
                           "grown",
                           source->name, (unsigned long long)source->size_bytes,
                           (unsigned long long)header->file_bytes);
    }
    pack->fingerprint = header->checksum;
    int checked = slu_pack_check_header(header, source->name, err);
    if (checked == 0 && has_section) {
        read_section(pack, page);
    }
    return checked;
}

/* Reads and decodes an extent of any place in the file. */
static int read_extent(struct slu_source *source, struct slu_decoder *decoder,
                       const struct slu_extent *extent, void *staging, void *out,
                       struct slu_err *err)
{
    void *stored = extent->codec == SLU_CODEC_RAW ? out : staging;
    int rc = source->read_at(source, extent->offset, stored, extent->stored_bytes, err);
    if (rc != 0) {
        return rc;
    }
    return slu_decode(decoder, (enum slu_codec_id)extent->codec, stored, extent->stored_bytes,
                      extent->checksum, out, extent->raw_bytes, err);
}

/* The metadata or the index into memory of its own. */
static int load_extent(struct slu_source *source, struct slu_decoder *decoder,
                       const struct slu_extent *extent, const char *what, uint8_t **ret_raw,
                       struct slu_err *err)
{
    uint8_t *raw = malloc(extent->raw_bytes);
    uint8_t *staging = extent->codec == SLU_CODEC_RAW ? NULL : malloc(extent->stored_bytes);
    int rc;
    if (!raw || (!staging && extent->codec != SLU_CODEC_RAW)) {
        rc = slu_err_set(err, SLU_ENOMEM, "%s: no memory for %s (%u bytes)", source->name, what,
                         extent->raw_bytes);
    } else {
        rc = read_extent(source, decoder, extent, staging, raw, err);
        if (rc == SLU_EFORMAT) {
            slu_err_prefix(err, "%s: %s at offset %llu", source->name, what,
                           (unsigned long long)extent->offset);
        }
    }
    free(staging);
    if (rc != 0) {
        free(raw);
        return rc;
    }
    *ret_raw = raw;
    return 0;
}

static int read_meta(struct slu_pack *pack, struct slu_decoder *decoder, struct slu_err *err)
{
    const struct slu_pack_header *header = &pack->header;
    const char *name = pack->source->name;
    size_t used = 0;
    int rc = load_extent(pack->source, decoder, &header->meta, "the metadata", &pack->meta, err);
    if (rc == 0) {
        rc = slu_kvs_parse(pack->meta, header->meta.raw_bytes, header->n_kvs, &pack->kvs, &used,
                           name, err);
    }
    if (rc == 0 && used != header->meta.raw_bytes) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: %zu bytes follow its %llu metadata keys", name,
                         header->meta.raw_bytes - used, (unsigned long long)header->n_kvs);
    }
    return rc;
}

static int read_index(struct slu_pack *pack, struct slu_decoder *decoder, struct slu_err *err)
{
    const struct slu_pack_header *header = &pack->header;
    int rc = load_extent(pack->source, decoder, &header->index, "the index", &pack->index, err);
    if (rc != 0) {
        return rc;
    }
    /* 96 and 48 bytes a record keep the extents, which hold 64-bit fields, aligned. */
    uint8_t *at = pack->index;
    pack->tensors = (struct slu_pack_tensor *)at;
    at += header->n_tensors * sizeof *pack->tensors;
    pack->banks = (struct slu_pack_bank *)at;
    at += header->n_banks * sizeof *pack->banks;
    pack->extents = (struct slu_extent *)at;
    return slu_pack_check_index(header, pack->tensors, pack->banks, pack->extents,
                                pack->source->name, err);
}

int slu_pack_open(struct slu_source *source, struct slu_pack **ret_pack, struct slu_err *err)
{
    struct slu_decoder *decoder = NULL;
    struct slu_pack *pack = calloc(1, sizeof *pack);
    if (!pack) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to open it", source->name);
    }
    pack->source = source;
    int rc = slu_decoder_create(&decoder, err);
    if (rc == 0) {
        rc = read_header(pack, err);
    }
    if (rc == 0) {
        rc = read_index(pack, decoder, err);
    }
    if (rc == 0) {
        rc = read_meta(pack, decoder, err);
    }
    slu_decoder_destroy(decoder);
    if (rc != 0) {
        pack->source = NULL; /* it stays the caller's */
        slu_pack_close(pack);
        return rc;
    }
    *ret_pack = pack;
    return 0;
}

int slu_pack_open_file(const char *path, struct slu_pack **ret_pack, struct slu_err *err)
{
    struct slu_source *source;
    int rc = slu_source_open_scattered(path, &source, err);
    if (rc != 0) {
        return rc;
    }
    rc = slu_pack_open(source, ret_pack, err);
    if (rc != 0) {
        slu_source_destroy(source);
    }
    return rc;
}

void slu_pack_close(struct slu_pack *pack)
{
    if (pack) {
        slu_kvs_finish(&pack->kvs);
        free(pack->meta);
        free(pack->index);
        free(pack->section);
        slu_source_destroy(pack->source);
        free(pack);
    }
}

void slu_pack_drop_section(struct slu_pack *pack)
{
    free(pack->section);
    pack->section = NULL;
    pack->section_bytes = 0;
}

uint64_t slu_pack_memory_bytes(const struct slu_pack *pack)
{
    return sizeof *pack + (uint64_t)pack->header.meta.raw_bytes + pack->header.index.raw_bytes +
           pack->section_bytes + pack->kvs.n * (uint64_t)sizeof *pack->kvs.pairs;
}

const struct slu_pack_tensor *slu_pack_find(const struct slu_pack *pack, const char *name)
{
    for (uint32_t i = 0; i < pack->header.n_tensors; i++) {
        if (strcmp(pack->tensors[i].name, name) == 0) {
            return &pack->tensors[i];
        }
    }
    return NULL;
}

const struct slu_pack_bank *slu_pack_find_bank(const struct slu_pack *pack, uint32_t layer,
                                               enum slu_bank_kind kind)
{
    for (uint32_t i = 0; i < pack->header.n_banks; i++) {
        if (pack->banks[i].layer == layer && pack->banks[i].kind == (uint32_t)kind) {
            return &pack->banks[i];
        }
    }
    return NULL;
}

int slu_pack_read_extent(const struct slu_pack *pack, struct slu_decoder *decoder, uint32_t extent,
                         void *staging, void *out, struct slu_err *err)
{
    assert(extent < pack->header.n_extents);
    const struct slu_extent *at = &pack->extents[extent];
    assert(at->stored_bytes > 0); /* else it marks rows, which are not read as a whole */
    int rc = read_extent(pack->source, decoder, at, staging, out, err);
    if (rc == SLU_EFORMAT) {
        slu_err_prefix(err, "%s: extent %u at offset %llu", pack->source->name, extent,
                       (unsigned long long)at->offset);
    }
    return rc;
}
