/*
 * What a file holds, pack or GGUF, from its header and metadata alone.
 *
 * Thread safety: pure functions over what they are given.
 */
#ifndef SLU_TOOLS_INSPECT_H
#define SLU_TOOLS_INSPECT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "model/config.h"

/* Text from the file may hold any bytes but NUL; whoever prints it sees to that. */
struct slu_inspect_tensor {
    char name[64];      /* cut if longer */
    const char *format; /* "Q4_K"; static storage */
    uint64_t dims[4];   /* fastest first, 1 beyond n_dims */
    uint32_t n_dims;
    uint64_t bytes;
};

/* How much of the model is in one format. */
struct slu_inspect_format {
    const char *name; /* static storage */
    uint64_t n_tensors, n_weights, bytes;
};
#define SLU_INSPECT_FORMATS_MAX 48

/* What an automatic choice of blocks to compress was made from, as the pack's metadata tell it. */
struct slu_inspect_codec {
    bool is_auto; /* else all of this is zero */
    char reason[128];
    double share, ratio;
    double flash_mbps, unpack_mbps, multiply_mbps; /* the last two for one core */
    uint64_t cores;
};

struct slu_inspect {
    bool is_pack; /* else GGUF */
    uint32_t version;
    uint64_t file_bytes;
    uint64_t n_kvs;
    uint32_t n_splits; /* files that the GGUF is split into; 1: not split */

    char arch[64], name[128]; /* general.architecture, general.name; empty if absent */
    bool is_supported;        /* config is valid */
    struct slu_config config;
    struct slu_err problem; /* else why not */

    char tokenizer[32], pre[32]; /* tokenizer.ggml.model and .pre; empty if absent */
    uint64_t n_tokens;           /* of its vocabulary */
    const char *chat;            /* the template's family; static storage */

    struct slu_inspect_format formats[SLU_INSPECT_FORMATS_MAX];
    uint32_t n_formats;
    struct slu_inspect_tensor *tensors; /* owned; in packs without those of experts */
    uint64_t n_tensors;
    uint64_t expert_bytes; /* of routed experts, before compression */

    /* Packs only: */
    uint64_t fingerprint;
    uint64_t n_blocks, n_blocks_compressed; /* of routed experts */
    uint64_t block_bytes_max;               /* the largest, before compression */
    uint64_t expert_stored_bytes;
    struct slu_inspect_codec codec;
};

/* SLU_ENOENT, SLU_EIO, SLU_EFORMAT, SLU_EUNSUP (version), SLU_ENOMEM. An architecture that sluice
 * doesn't run is no error. */
int slu_inspect_file(const char *path, struct slu_inspect *ret_inspect, struct slu_err *err);
/* Frees what it owns; fine on a zeroed one. */
void slu_inspect_finish(struct slu_inspect *inspect);

#endif
