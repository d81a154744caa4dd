/*
 * `sluice pack`: a mixture-of-experts GGUF (one file or a split set) becomes a pack. Weights are
 * taken apart into the format family without loss; what cannot be kept exactly is refused by name.
 * Memory stays bounded by one expert's largest tensor and a few blocks, whatever the model's size.
 *
 * Thread safety: one call at a time uses one thread.
 */
#ifndef SLU_TOOLS_PACKER_H
#define SLU_TOOLS_PACKER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "io/codec.h"
#include "io/source.h"

struct slu_packer_params {
    const char *in;            /* MODEL.gguf, or the first of a split set */
    struct slu_source *source; /* read in place of `in`; the caller's to destroy. NULL: the file */
    const char *out;           /* MODEL.slu */
    enum slu_codec_id codec;
    uint32_t block_bytes; /* target size of a block; 0: 1 MiB */
    /* Called now and then with weights done and in all, in bytes of the GGUF; may be NULL. */
    void (*progress)(void *arg, uint64_t done_bytes, uint64_t total_bytes);
    void *arg;
    const atomic_bool *cancel; /* set from a signal handler or a thread: SLU_ECANCEL; may be NULL */
};

struct slu_packer_report {
    uint64_t in_bytes, out_bytes;
    uint64_t expert_raw_bytes, expert_stored_bytes;
    uint32_t n_blocks, n_blocks_compressed;
    uint64_t block_bytes_max;
};

/* Nothing is left under the final name, or any other, unless it returns 0. */
int slu_packer_run(const struct slu_packer_params *params, struct slu_packer_report *ret_report,
                   struct slu_err *err);

#endif
