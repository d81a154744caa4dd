/*
 * The rules that a pack's header and index obey, as far as they can be checked without knowing
 * models or weight formats. The writer holds itself to them before it gives a file its name, the
 * reader holds every file to them: docs/pack-format.md lists them.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_IO_PACK_CHECK_H
#define SLU_IO_PACK_CHECK_H

#include "io/pack.h"

#define SLU_PACK_META_BYTES_MAX (256u << 20)
/* Widths and counts of a tensor or bank. */
#define SLU_PACK_DIM_MAX (1u << 24)

/* Rounds up to the next page. */
static inline uint64_t slu_pack_page_up(uint64_t bytes)
{
    return (bytes + SLU_PACK_ALIGN - 1) / SLU_PACK_ALIGN * SLU_PACK_ALIGN;
}

/* Metadata that claim to unpack to more than this are a bomb: the limit on what is allocated for
 * them grows with what the file really holds. */
static inline bool slu_pack_meta_is_plausible(uint64_t stored_bytes, uint64_t raw_bytes)
{
    return raw_bytes <= SLU_PACK_META_BYTES_MAX && raw_bytes <= stored_bytes * 1000 + 4096;
}

/* Size of the index that these counts make; fits 64 bits whatever they are. */
uint64_t slu_pack_index_bytes(uint32_t n_tensors, uint32_t n_banks, uint32_t n_extents);

/* Everything after magic, version and checksum. name is the file's. */
int slu_pack_check_header(const struct slu_pack_header *header, const char *name,
                          struct slu_err *err);

/* The tables, whose counts the header gives. Allocates a few bytes for each extent and tensor. */
int slu_pack_check_index(const struct slu_pack_header *header,
                         const struct slu_pack_tensor *tensors, const struct slu_pack_bank *banks,
                         const struct slu_extent *extents, const char *name, struct slu_err *err);

/* Of the header's bytes before its own, whichever of the versions it has. */
uint64_t slu_pack_header_checksum(const struct slu_pack_header *header);

#endif
