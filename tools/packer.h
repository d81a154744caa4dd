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
#include "tools/codec_choice.h"

/* What to make of weights of 8 bits and more. */
struct slu_packer_quant {
    unsigned bits; /* of codes, 3 to 6; 0: keep what is there */
    float error;   /* relative, to aim at; 0: slu_packer_quant_error */
};

/* The error that codes of so many bits are aimed at by default: what is the best trade for them,
 * and for 4 bits less than what Q4_0 leaves. */
float slu_packer_quant_error(unsigned bits);

/* Which blocks of routed experts to compress is chosen for a machine (tools/codec_choice.h). */
struct slu_packer_auto {
    bool is_on;           /* then params.codec doesn't count */
    double flash_bytes_s; /* 0: measured in the folder of the output */
    unsigned cores;       /* 0: those of this machine */
};

/* What was chosen, and from what. */
struct slu_packer_choice {
    struct slu_codec_costs costs;
    struct slu_codec_choice choice;
    bool is_flash_measured;
};

struct slu_packer_params {
    const char *in;            /* MODEL.gguf, or the first of a split set */
    struct slu_source *source; /* read in place of `in`; the caller's to destroy. NULL: the file */
    const char *out;           /* MODEL.slu */
    enum slu_codec_id codec;
    struct slu_packer_auto automatic;
    uint32_t block_bytes; /* target size of a block; 0: 1 MiB */
    /* Quantization of routed experts, and of what is resident: matrices of F32, F16, BF16 and Q8_0
     * become q*e formats. Others, norms, routers, biases and rows of embeddings stay. */
    struct slu_packer_quant experts, resident;
    const char *importance; /* file of what columns matter (tools/importance.h); may be NULL */
    unsigned n_threads;     /* that quantize; 0: one for each CPU. The pack is the same */
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
    struct slu_packer_choice codec;      /* zero unless it was automatic */
    uint64_t quant_weights;              /* that were quantized, */
    double quant_error;                  /* with this relative error, */
    uint64_t quant_missed;               /* so many of them with more than was aimed at */
    uint32_t n_important, n_unimportant; /* matrices that the importance file had, and had not */
};

/* Nothing is left under the final name, or any other, unless it returns 0, or the pack is complete
 * but its folder couldn't be synced. */
int slu_packer_run(const struct slu_packer_params *params, struct slu_packer_report *ret_report,
                   struct slu_err *err);

#endif
