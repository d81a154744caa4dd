/*
 * What the trace's reader and writer share: the layout of header and records. Internal to tools.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_TOOLS_TRACE_PARTS_H
#define SLU_TOOLS_TRACE_PARTS_H

#include "tools/trace_file.h"

struct slu_trace_header {
    char magic[8];
    uint32_t version;
    uint32_t header_bytes; /* with the list of layers and the checksum */
    uint64_t fingerprint, input;
    uint32_t n_layers, n_experts, n_used, n_vocab, n_routed;
    uint32_t reserved; /* 0 */
    /* u32 layers[n_routed], zeros up to a multiple of 8, u64 checksum of everything before it */
};
_Static_assert(sizeof(struct slu_trace_header) == 56, "as stored");

#define SLU_TRACE_RECORD_MAGIC 0x544d5250u /* "PRMT" */
struct slu_trace_record {
    uint32_t magic;
    uint32_t n_tokens, n_prompt;
    uint32_t reserved; /* 0 */
    uint64_t checksum; /* of the payload, xor that of the 16 bytes before */
};
_Static_assert(sizeof(struct slu_trace_record) == 24, "as stored");

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "structs are stored as they are");

static inline size_t slu_trace_header_bytes(uint32_t n_routed)
{
    return sizeof(struct slu_trace_header) + (4 * (size_t)n_routed + 7) / 8 * 8 + 8;
}

/* The choices of one token at one layer: the weights' sum, then experts, then shares. */
static inline size_t slu_trace_visit_bytes(const struct slu_trace_shape *shape)
{
    return 2 + (size_t)shape->n_used * ((shape->n_experts > 256 ? 2 : 1) + 1);
}

static inline uint64_t slu_trace_payload_bytes(const struct slu_trace_shape *shape,
                                               uint32_t n_tokens)
{
    return (uint64_t)n_tokens * (4 + (uint64_t)shape->n_routed * slu_trace_visit_bytes(shape));
}

uint64_t slu_trace_record_checksum(const struct slu_trace_record *record, const void *payload,
                                   size_t bytes);

#endif
