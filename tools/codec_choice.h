/*
 * How many of a pack's blocks should be compressed. Compressed blocks are read faster and cost the
 * processor more; as both work at the same time, a token takes as long as the slower of the two.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_TOOLS_CODEC_CHOICE_H
#define SLU_TOOLS_CODEC_CHOICE_H

#include <stdbool.h>
#include <stdint.h>

/* What a machine and a model's blocks are like. Rates are in bytes of blocks before compression,
 * those of the processor for one core. */
struct slu_codec_costs {
    double flash_bytes_s;    /* of stored bytes */
    double unpack_bytes_s;   /* decoding, beyond what a raw block takes; 0: nothing to decode */
    double multiply_bytes_s; /* checking and multiplying with one token; 0: takes no time */
    double ratio; /* of stored to raw bytes if all blocks are compressed that gain by it */
    unsigned cores;
    double layer_bytes; /* that a token wants of a layer */
};

enum slu_codec_reason {
    SLU_CODEC_NO_GAIN, /* compression saves nothing on these blocks */
    SLU_CODEC_CPU,     /* raw blocks come as fast as they can be used, or decoding them would take
                        * longer than reading less saves */
    SLU_CODEC_BALANCE, /* more would cost the processor more than they save flash */
    SLU_CODEC_FLASH,   /* flash is the slower even if all blocks are compressed */
};

struct slu_codec_choice {
    double share; /* of blocks to compress, 0 to 1 */
    enum slu_codec_reason reason;
    double raw_s, zstd_s, chosen_s; /* seconds a byte of blocks: none, all, that share compressed */
};

/* Chooses the share that makes a token take the least time: the longer of flash and processor, and
 * then the decoding of what was in flight last of each layer, during which nothing is left to read.
 */
struct slu_codec_choice slu_codec_choose(const struct slu_codec_costs *costs);

/* Whether block i of a layer's routed experts (all blocks of expert 0, then of expert 1 ...) is one
 * of that share. Any stretch of n blocks has n * share of them, give or take one, and layers begin
 * at different points, so that it isn't always the same experts. */
bool slu_codec_takes(double share, uint32_t layer, uint64_t i);

/* A sentence's worth of why; static storage. */
const char *slu_codec_reason_text(enum slu_codec_reason reason);

#endif
