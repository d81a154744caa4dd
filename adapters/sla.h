/*
 * The .sla file: its layout as structs, the reader of everything but the matrices, and the writer.
 * docs/adapter-format.md is the specification. What a pair means is adapter.h's business.
 *
 * Thread safety: an opened index is constant; a writer belongs to one thread.
 */
#ifndef SLU_ADAPTERS_SLA_H
#define SLU_ADAPTERS_SLA_H

#include "adapters/adapter.h"
#include "io/pack.h"

#define SLU_SLA_MAGIC       "SLUICELA"
#define SLU_SLA_VERSION     2u
#define SLU_SLA_PAGE_BYTES  4096u /* the header's, and what expert blocks begin at multiples of */
#define SLU_SLA_PIECE_BYTES (1u << 20)
#define SLU_SLA_BLOCK_MAX   (1u << 26) /* bytes of an expert block, raw */
#define SLU_SLA_LAYERS_MAX  512u
#define SLU_SLA_RANK_MAX    4096u
#define SLU_SLA_EXPERTS_MAX 1024u
#define SLU_SLA_EXTENTS_MAX (1u << 22)
#define SLU_SLA_HF_ORDER    1u /* a flag of slu_sla_meta */

/* First bytes of the file, little-endian; the rest of its page is zero. meta and index are raw
 * extents, as struct slu_extent, and end the file: frames, expert blocks, meta, index, and no gap
 * but the zeros that fill up the last frame's page and each block's. */
struct slu_sla_header {
    char magic[8];
    uint32_t version;
    uint32_t header_bytes;
    uint64_t file_bytes;
    uint32_t n_loras, n_extents, n_blocks;
    uint32_t reserved;
    struct slu_extent meta, index;
    uint64_t checksum; /* of everything before it */
};
_Static_assert(sizeof(struct slu_sla_header) == 112, "as stored");

/* Texts are NUL-terminated and zero-filled. */
struct slu_sla_meta {
    char name[64];
    char description[256];
    char arch[32];
    uint64_t base_fingerprint;
    uint32_t flags;
    uint32_t reserved;
};
_Static_assert(sizeof(struct slu_sla_meta) == 368, "as stored");

/* One pair, or one of each routed expert. Raw bytes of a pair are the matrix A, then B, each a
 * planar matrix (kern/format.h) of whole 64 bytes; cut into pieces of SLU_SLA_PIECE_BYTES, of
 * which the last may be shorter, an extent each. Pairs of routed experts have no such extents but
 * are in the layer's expert blocks. Records ascend by layer, then target. */
struct slu_sla_record {
    uint32_t target, layer;
    uint32_t rank, n;
    uint32_t in, out;
    uint32_t fmt_a, fmt_b;
    float scale;
    uint32_t n_extents; /* those behind the extents of the records before */
};
_Static_assert(sizeof(struct slu_sla_record) == 40, "as stored");

/* The expert blocks of one layer: block e holds the pairs of expert e, that of the first record
 * first. */
struct slu_sla_layer {
    uint32_t layer, n; /* experts, a block each */
    uint32_t first_record, n_records;
    uint32_t first_block;
    uint32_t block_bytes; /* raw */
};

/* Header, metadata and index of a file, checked. */
struct slu_sla {
    struct slu_adapter_info info;
    struct slu_sla_record *records; /* info.n_loras */
    struct slu_extent *extents;     /* n_extents frames, then info.n_blocks blocks */
    uint32_t n_extents;
    struct slu_sla_layer *layers; /* n_layers that have blocks, ascending */
    uint32_t n_layers;
    uint64_t matrix_bytes; /* of all matrices in frames, raw */
    uint32_t stored_max;   /* the largest expert block as stored, its page filled up */
    void *index;           /* owned: records and extents */
};

/* Reads no matrices. SLU_EIO, SLU_EFORMAT, SLU_EUNSUP (another version), SLU_ENOMEM. */
int slu_sla_open(struct slu_source *source, struct slu_sla *ret_sla, struct slu_err *err);
void slu_sla_finish(struct slu_sla *sla); /* zeroed is fine */

/* Pairs that lie in expert blocks. */
static inline bool slu_sla_is_expert(uint32_t target)
{
    return target >= SLU_TARGET_EXPERT_GATE && target <= SLU_TARGET_EXPERT_DOWN;
}

/* Refuses a file whose zeros between extents and pages aren't. */
int slu_sla_check_zeros(const uint8_t *bytes, size_t n, const char *name, struct slu_err *err);

/* Rounded up to a page. */
static inline uint64_t slu_sla_page_up(uint64_t bytes)
{
    return (bytes + SLU_SLA_PAGE_BYTES - 1) / SLU_SLA_PAGE_BYTES * SLU_SLA_PAGE_BYTES;
}

/* Layouts of a record's A and B; false if they aren't valid. */
bool slu_sla_layouts(const struct slu_sla_record *record, struct slu_mat_layout *ret_a,
                     struct slu_mat_layout *ret_b);
/* Bytes of the character at text[0..len), of which there is one at least; 0 where that is no
 * well-formed UTF-8 or a control character, C1's included, which no text may hold. */
size_t slu_sla_char_bytes(const char *text, size_t len);

/* Writes to a temporary name beside the final one. Call order: create; for each pair outside of
 * routed experts, ascending by layer and target, pair and then append until it has its raw bytes;
 * for each layer with pairs of routed experts, ascending, experts and then append until all of its
 * blocks have theirs; finish; destroy. */
struct slu_sla_writer;
int slu_sla_writer_create(const char *path, struct slu_sla_writer **ret_writer,
                          struct slu_err *err);
/* record->n_extents is the writer's to fill. SLU_EUNSUP, by name, for what no reader would take. */
int slu_sla_writer_pair(struct slu_sla_writer *writer, const struct slu_sla_record *record,
                        struct slu_err *err);
/* The records of one layer, one to three, ascending by target. */
int slu_sla_writer_experts(struct slu_sla_writer *writer, const struct slu_sla_record *records,
                           uint32_t n_records, struct slu_err *err);
int slu_sla_writer_append(struct slu_sla_writer *writer, const void *bytes, size_t n,
                          struct slu_err *err);
/* Of info only name, description, arch, base_fingerprint and is_hf_order are read. Syncs, renames,
 * syncs the folder. */
int slu_sla_writer_finish(struct slu_sla_writer *writer, const struct slu_adapter_info *info,
                          struct slu_err *err);
/* Removes the temporary file unless finished. NULL is fine. */
void slu_sla_writer_destroy(struct slu_sla_writer *writer);

#endif
