/*
 * The compact routing trace: for each prompt the ids of its tokens, which of them were the prompt
 * and which were decoded, and for each token and layer the experts chosen and their weights.
 * docs/trace-format.md is the specification. Prompts are appended as they come and each has a
 * checksum of its own, so that what a killed run left is of use to the next.
 *
 * Thread safety: one thread at a time.
 */
#ifndef SLU_TOOLS_TRACE_FILE_H
#define SLU_TOOLS_TRACE_FILE_H

#include <stdbool.h>

#include "io/source.h"

#define SLU_TRACE_MAGIC      "SLUTRACE"
#define SLU_TRACE_VERSION    1u
#define SLU_TRACE_LAYERS_MAX 4096u
#define SLU_TRACE_USED_MAX   256u
#define SLU_TRACE_TOKENS_MAX (1u << 22) /* of a prompt */

/* Of which model a trace is. */
struct slu_trace_shape {
    uint64_t fingerprint; /* of its pack */
    uint64_t input;       /* a checksum of what was run, for resuming; 0: not known */
    uint32_t n_layers, n_experts, n_used, n_vocab;
    uint32_t n_routed;                     /* layers that have a router */
    uint32_t layers[SLU_TRACE_LAYERS_MAX]; /* [n_routed] ascending */
};

/* One prompt with its answer. The choices of token t at the i-th routed layer begin at
 * (t * n_routed + i) * n_used. */
struct slu_trace_prompt {
    uint32_t n_tokens, n_prompt; /* the first n_prompt were given, the others decoded */
    const int32_t *ids;          /* [n_tokens] */
    const uint16_t *experts;
    const float *weights;
};

struct slu_trace_writer;

/* Appends to PATH.part, which finish syncs and renames to PATH. With ret_n_done, a PATH.part that
 * an earlier run left and that has the same shape is gone on with: *ret_n_done comes as the most
 * prompts that are of use, and becomes how many whole ones are kept; what follows them is cut off.
 * Without, it is begun anew. SLU_EIO. */
int slu_trace_writer_create(const char *path, const struct slu_trace_shape *shape,
                            uint32_t *ret_n_done, struct slu_trace_writer **ret_writer,
                            struct slu_err *err);
/* Weights are stored to 1 part in 255 of their sum. SLU_EIO, SLU_ENOMEM; SLU_EINVAL for a number
 * beyond the shape. */
int slu_trace_writer_append(struct slu_trace_writer *writer, const struct slu_trace_prompt *prompt,
                            struct slu_err *err);
/* Lets the system write out what was appended, and waits for it. */
int slu_trace_writer_sync(struct slu_trace_writer *writer, struct slu_err *err);
int slu_trace_writer_finish(struct slu_trace_writer *writer, struct slu_err *err);
/* What isn't finished stays as PATH.part if `keep`. NULL is fine. */
void slu_trace_writer_destroy(struct slu_trace_writer *writer, bool keep);
/* The file that is being written, for reading it; valid as long as the writer. */
const char *slu_trace_writer_path(const struct slu_trace_writer *writer);

struct slu_trace_reader;

/* Whether the source begins as a compact trace. */
bool slu_trace_is(struct slu_source *source);

/* source stays the caller's and outlives the reader. SLU_EFORMAT, SLU_EUNSUP for a newer version,
 * SLU_EIO, SLU_ENOMEM. */
int slu_trace_reader_create(struct slu_source *source, struct slu_trace_reader **ret_reader,
                            struct slu_err *err);
void slu_trace_reader_destroy(struct slu_trace_reader *reader); /* NULL is fine */
const struct slu_trace_shape *slu_trace_reader_shape(const struct slu_trace_reader *reader);
/* 1 with the next prompt, valid until the next call; 0 at the end; SLU_EFORMAT for what is damaged
 * or cut off, SLU_EIO, SLU_ENOMEM. */
int slu_trace_reader_next(struct slu_trace_reader *reader, struct slu_trace_prompt *ret_prompt,
                          struct slu_err *err);
/* Where the next prompt begins, in bytes. */
uint64_t slu_trace_reader_offset(const struct slu_trace_reader *reader);
/* The next prompt is the one at `offset`, which slu_trace_reader_offset gave. */
void slu_trace_reader_seek(struct slu_trace_reader *reader, uint64_t offset);

#endif
