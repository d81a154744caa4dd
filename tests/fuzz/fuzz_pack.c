/* Any bytes as a pack. As they are, the checksums stop nearly all of them at the door, so each
 * input is tried a second time with its sizes and checksums put right: then the rules behind the
 * checksums have to hold by themselves. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/pack.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What the loader would take for a block or a piece at most. */
#define RAW_BYTES_MAX (8u << 20)

static void read_extents(const struct slu_pack *pack, struct slu_decoder *decoder)
{
    struct slu_err err;
    for (uint32_t i = 0; i < pack->header.n_extents && i < 64; i++) {
        const struct slu_extent *extent = &pack->extents[i];
        if (extent->stored_bytes == 0 || extent->raw_bytes > RAW_BYTES_MAX) {
            continue;
        }
        uint8_t *staging = malloc(extent->stored_bytes);
        uint8_t *out = malloc(extent->raw_bytes);
        if (staging && out) {
            slu_pack_read_extent(pack, decoder, i, staging, out, &err);
        }
        free(staging);
        free(out);
    }
}

static void try_open(const uint8_t *data, size_t size)
{
    struct slu_source *source;
    struct slu_decoder *decoder;
    struct slu_pack *pack;
    struct slu_err err = {0};
    if (slu_source_open_memory(data, size, "fuzz", &source) != 0) {
        return;
    }
    int rc = slu_pack_open(source, &pack, &err);
    if (rc != 0) {
        if (err.code != rc || err.text[0] == '\0' || strchr(err.text, '\n')) {
            abort();
        }
        slu_source_destroy(source);
        return;
    }
    for (uint32_t i = 0; i < pack->header.n_tensors; i++) {
        if (slu_pack_find(pack, pack->tensors[i].name) != &pack->tensors[i]) {
            abort();
        }
    }
    if (slu_decoder_create(&decoder, &err) == 0) {
        read_extents(pack, decoder);
        slu_decoder_destroy(decoder);
    }
    slu_pack_close(pack);
}

/* Makes a checksum right if what it covers is in the file. */
static void seal(uint8_t *data, size_t size, struct slu_extent *extent)
{
    if (extent->offset <= size && extent->stored_bytes <= size - extent->offset) {
        extent->checksum = slu_checksum(data + extent->offset, extent->stored_bytes);
    }
}

/* As above, where the index is stored raw: the extents that it lists. */
static void seal_listed(uint8_t *data, size_t size, const struct slu_pack_header *header)
{
    uint64_t skip = header->n_tensors * (uint64_t)sizeof(struct slu_pack_tensor) +
                    header->n_banks * (uint64_t)sizeof(struct slu_pack_bank);
    for (uint64_t i = 0; i < header->n_extents && i < 64; i++) {
        uint64_t at = skip + i * sizeof(struct slu_extent);
        struct slu_extent extent;
        if (header->index.codec != SLU_CODEC_RAW || header->index.offset > size ||
            at + sizeof extent > size - header->index.offset) {
            return;
        }
        memcpy(&extent, data + header->index.offset + at, sizeof extent);
        if (extent.stored_bytes > 0) {
            seal(data, size, &extent);
            memcpy(data + header->index.offset + at, &extent, sizeof extent);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    try_open(data, size);
    size_t whole = (size + SLU_PACK_ALIGN - 1) / SLU_PACK_ALIGN * SLU_PACK_ALIGN;
    uint8_t *sealed = calloc(whole + 1, 1);
    if (!sealed || whole == 0) {
        free(sealed);
        return 0;
    }
    memcpy(sealed, data, size);
    struct slu_pack_header header;
    memcpy(&header, sealed, sizeof header);
    memset(sealed, 0, SLU_PACK_ALIGN);
    memcpy(header.magic, SLU_PACK_MAGIC, sizeof header.magic);
    header.version = SLU_PACK_VERSION;
    header.header_bytes = sizeof header;
    header.file_bytes = whole;
    seal_listed(sealed, whole, &header);
    seal(sealed, whole, &header.meta);
    seal(sealed, whole, &header.index);
    header.checksum = slu_checksum(&header, offsetof(struct slu_pack_header, checksum));
    memcpy(sealed, &header, sizeof header);
    try_open(sealed, whole);
    free(sealed);
    return 0;
}
