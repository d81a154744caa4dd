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
#define SLU_SLA_VERSION     1u
#define SLU_SLA_HEAD_BYTES  4096u
#define SLU_SLA_PIECE_BYTES (1u << 20)
#define SLU_SLA_LAYERS_MAX  512u
#define SLU_SLA_RANK_MAX    4096u
#define SLU_SLA_EXPERTS_MAX 1024u
#define SLU_SLA_EXTENTS_MAX (1u << 22)
#define SLU_SLA_HF_ORDER    1u /* a flag of slu_sla_meta */

/* First bytes of the file, little-endian; the rest of its page is zero. meta and index are raw
 * extents, as struct slu_extent, and end the file: frames, meta, index, without a gap. */
struct slu_sla_header {
    char magic[8];
    uint32_t version;
    uint32_t header_bytes;
    uint64_t file_bytes;
    uint32_t n_loras, n_extents;
    struct slu_extent meta, index;
    uint64_t checksum; /* of everything before it */
};
_Static_assert(sizeof(struct slu_sla_header) == 104, "as stored");

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

/* One pair or stack of pairs. Its raw bytes are the n matrices A, then the n matrices B, each a
 * planar matrix (kern/format.h) of whole 64 bytes; cut into pieces of SLU_SLA_PIECE_BYTES, of
 * which the last may be shorter, an extent each. Records ascend by layer, then target. */
struct slu_sla_record {
    uint32_t target, layer;
    uint32_t rank, n;
    uint32_t in, out;
    uint32_t fmt_a, fmt_b;
    float scale;
    uint32_t n_extents; /* those behind the extents of the records before */
};
_Static_assert(sizeof(struct slu_sla_record) == 40, "as stored");

/* Header, metadata and index of a file, checked. */
struct slu_sla {
    struct slu_adapter_info info;
    struct slu_sla_record *records; /* info.n_loras */
    struct slu_extent *extents;     /* n_extents, back to back from SLU_SLA_HEAD_BYTES on */
    uint32_t n_extents;
    uint64_t matrix_bytes; /* of all matrices, raw */
    uint64_t data_end;     /* where the last frame ends */
    void *index;           /* owned: records and extents */
};

/* Reads no matrices. SLU_EIO, SLU_EFORMAT, SLU_EUNSUP (a newer version), SLU_ENOMEM. */
int slu_sla_open(struct slu_source *source, struct slu_sla *ret_sla, struct slu_err *err);
void slu_sla_finish(struct slu_sla *sla); /* zeroed is fine */

/* Layouts of a record's A and B; false if they aren't valid. */
bool slu_sla_layouts(const struct slu_sla_record *record, struct slu_mat_layout *ret_a,
                     struct slu_mat_layout *ret_b);
/* n * (A + B), for a record with valid layouts. */
uint64_t slu_sla_raw_bytes(const struct slu_sla_record *record, const struct slu_mat_layout *a,
                           const struct slu_mat_layout *b);

/* Bytes of the character at text[0..len), of which there is one at least; 0 where that is no
 * well-formed UTF-8 or a control character, C1's included, which no text may hold. */
size_t slu_sla_char_bytes(const char *text, size_t len);

/* Writes to a temporary name beside the final one. Call order: create; for each pair, ascending by
 * layer and target, pair and then append until it has its raw bytes; finish; destroy. */
struct slu_sla_writer;
int slu_sla_writer_create(const char *path, struct slu_sla_writer **ret_writer,
                          struct slu_err *err);
/* record->n_extents is the writer's to fill. SLU_EUNSUP, by name, for what no reader would take. */
int slu_sla_writer_pair(struct slu_sla_writer *writer, const struct slu_sla_record *record,
                        struct slu_err *err);
int slu_sla_writer_append(struct slu_sla_writer *writer, const void *bytes, size_t n,
                          struct slu_err *err);
/* Of info only name, description, arch, base_fingerprint and is_hf_order are read. Syncs, renames,
 * syncs the folder. */
int slu_sla_writer_finish(struct slu_sla_writer *writer, const struct slu_adapter_info *info,
                          struct slu_err *err);
/* Removes the temporary file unless finished. NULL is fine. */
void slu_sla_writer_destroy(struct slu_sla_writer *writer);

#endif
