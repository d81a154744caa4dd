/*
 * The pack: a model in the form that sluice runs from. docs/pack-format.md is the specification;
 * this header is its view in memory. The reader checks everything that it can without reading
 * weights: magic, version, checksums of header, metadata and index, every extent inside the file,
 * aligned, and overlapping no other.
 *
 * It knows banks of blocks, and tensors, by name and number; what they mean to a model is not its
 * business.
 *
 * Thread safety: an opened pack is constant.
 */
#ifndef SLU_IO_PACK_H
#define SLU_IO_PACK_H

#include "io/codec.h"
#include "io/gguf.h"
#include "io/source.h"

#define SLU_PACK_MAGIC "SLUICE\r\n"
#define SLU_PACK_ALIGN 4096u
/* A pack is written with the least version that will do. */
#define SLU_PACK_VERSION         1u
#define SLU_PACK_VERSION_SECTION 2u /* of a pack that a section was put into */
#define SLU_PACK_VERSION_FORMATS 3u /* formats over SLU_PACK_FMT_V1_MAX; with or without a section */
#define SLU_PACK_FMT_V1_MAX      12u

/* Bytes of the file with a codec and a checksum over exactly stored_bytes. offset is a multiple of
 * SLU_PACK_ALIGN; the file is zero-filled up to the next multiple, so that aligned reads of whole
 * pages never pass its end. */
struct slu_extent {
    uint64_t offset;
    uint64_t checksum;
    uint32_t stored_bytes; /* > 0 */
    uint32_t raw_bytes;    /* > 0; equal to stored_bytes where codec is raw */
    uint32_t codec;        /* enum slu_codec_id */
    uint32_t reserved;     /* 0 */
};
_Static_assert(sizeof(struct slu_extent) == 32, "as stored");

enum slu_pack_kind {
    SLU_PACK_MATRIX = 0, /* one planar matrix (kern/format.h), in one or more extents */
    SLU_PACK_ROWS = 1, /* planar one-row matrices back to back, each followed by a checksum: read a
                          row at a time and never resident */
};

#define SLU_PACK_NAME_BYTES 64

/* A tensor: n matrices of rows x cols, one after another (n > 1 for stacks such as attn_k_b).
 * MATRIX data of all n, 64-byte aligned each, are cut into pieces of SLU_PACK_PIECE_BYTES of raw
 * bytes (the last is shorter), one extent each, extents first_extent .. +n_extents-1.
 * ROWS: one raw extent record gives the offset; row r is at offset + r * row_stride; a row record
 * is a slu_mat_layout(fmt, 1, cols) followed by the low 32 bits of its slu_checksum, zero-padded to
 * a multiple of 64. (Its extent's raw/stored sizes are 0 and unused: total is rows * row_stride.)
 */
struct slu_pack_tensor {
    char name[SLU_PACK_NAME_BYTES]; /* as in the GGUF, NUL-terminated and -padded */
    uint32_t kind;
    uint32_t fmt; /* enum slu_fmt_id */
    uint32_t rows, cols, n;
    uint32_t row_stride; /* ROWS only, else 0 */
    uint32_t first_extent, n_extents;
};
_Static_assert(sizeof(struct slu_pack_tensor) == SLU_PACK_NAME_BYTES + 32, "as stored");
#define SLU_PACK_PIECE_BYTES (4u << 20)

enum slu_bank_kind {
    SLU_BANK_ROUTED = 0, /* streamed as the router asks */
    SLU_BANK_SHARED = 1, /* one expert, always active, resident */
    SLU_BANK_DENSE = 2,  /* a dense feed-forward network, likewise */
};

/* The experts of one layer. Block b of expert e is extent first_extent + e * n_blocks + b. */
struct slu_pack_bank {
    uint32_t layer;
    uint32_t kind;
    uint32_t n_experts;
    uint32_t n_embd, n_ff, neurons_a_block;
    uint32_t fmt_gate, fmt_up, fmt_down;
    uint32_t has_bias;
    uint32_t n_blocks; /* of an expert */
    uint32_t first_extent;
};
_Static_assert(sizeof(struct slu_pack_bank) == 48, "as stored");

/* First bytes of the file, little-endian; the rest of its page is zero, but for the record of a
 * section. */
struct slu_pack_header {
    char magic[8];
    uint32_t version;
    uint32_t header_bytes; /* sizeof this */
    uint64_t file_bytes;
    uint64_t n_kvs;
    struct slu_extent meta;  /* key-value pairs in GGUF's encoding */
    struct slu_extent index; /* tensors, then banks, then extents */
    uint32_t n_tensors, n_banks, n_extents;
    uint32_t reserved;
    uint64_t checksum; /* of everything before it, version 2 taken as 1 */
};
_Static_assert(sizeof(struct slu_pack_header) == 120, "as stored");

/* Where the section lies, in the header's page: bytes behind those that file_bytes counts, which
 * can be added, replaced and taken away without the model's being touched (io/pack_section.h). All
 * zero: there is none. */
#define SLU_PACK_SECTION_AT        128u
#define SLU_PACK_SECTION_MAGIC     "SECTION\n"
#define SLU_PACK_SECTION_BYTES_MAX (8u << 20)
struct slu_pack_section {
    char magic[8];
    struct slu_extent extent; /* raw */
    uint32_t kind;            /* enum slu_section_kind */
    uint32_t reserved;        /* 0 */
    uint64_t fingerprint;     /* of the pack that it was made for */
    uint64_t checksum;        /* of everything before it */
};
_Static_assert(sizeof(struct slu_pack_section) == 64, "as stored");

enum slu_section_kind { SLU_SECTION_PREDICTOR = 1 };

struct slu_pack {
    struct slu_pack_header header;
    struct slu_kvs kvs;
    struct slu_pack_tensor *tensors;
    struct slu_pack_bank *banks;
    struct slu_extent *extents;
    uint64_t fingerprint; /* of header (hence of meta and index): names this very pack but for
                             rows of embeddings, whatever section it has */
    /* The section, whose bytes are owned; NULL where there is none or it can't be used, in which
     * case section_err has a sentence that says why. */
    uint8_t *section;
    uint32_t section_bytes;
    struct slu_err section_err;
    /* owned */
    struct slu_source *source;
    uint8_t *meta;
    uint8_t *index;
};

/* Takes the source over on success only. SLU_EIO, SLU_EFORMAT, SLU_EUNSUP (a newer version),
 * SLU_ENOMEM. The pack keeps meta and index in memory: slu_pack_memory_bytes. */
int slu_pack_open(struct slu_source *source, struct slu_pack **ret_pack, struct slu_err *err);
int slu_pack_open_file(const char *path, struct slu_pack **ret_pack, struct slu_err *err);
void slu_pack_close(struct slu_pack *pack); /* NULL is fine */

/* Gives the section's memory back; the pack is then as one without. */
void slu_pack_drop_section(struct slu_pack *pack);

uint64_t slu_pack_memory_bytes(const struct slu_pack *pack);

const struct slu_pack_tensor *slu_pack_find(const struct slu_pack *pack, const char *name);
/* NULL if the layer has none of that kind. */
const struct slu_pack_bank *slu_pack_find_bank(const struct slu_pack *pack, uint32_t layer,
                                               enum slu_bank_kind kind);

/* Reads and decodes one extent through the source into out, which has raw_bytes; staging must hold
 * stored_bytes (not used for raw). Blocks. */
int slu_pack_read_extent(const struct slu_pack *pack, struct slu_decoder *decoder, uint32_t extent,
                         void *staging, void *out, struct slu_err *err);

#endif
