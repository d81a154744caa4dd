/*
 * Shared by the files of the generator (tools/synth.h) and of no use elsewhere.
 *
 * Thread safety: as tools/synth.h.
 */
#ifndef SLU_TOOLS_SYNTH_PARTS_H
#define SLU_TOOLS_SYNTH_PARTS_H

#include "tools/gguf_writer.h"
#include "tools/synth.h"

/* Parameters with every default filled in, and what follows from them. */
struct slu_synth_model {
    struct slu_synth_params p;
    const struct slu_fmt *expert, *down, *dense, *embd, *vector;
    uint32_t k_dim, v_dim;
    uint32_t rope_dims;
    uint32_t q_lora, kv_lora; /* deepseek2 */
    uint32_t n_ff_shared, n_ff_dense;
};

#define SLU_SYNTH_DENSE_LAYERS 1u /* of deepseek2 */

/* The least vocabulary that holds the tokenizer's own pieces. */
uint32_t slu_synth_vocab_min(enum slu_arch arch);

/* All pairs: general, the architecture's, the tokenizer's. */
void slu_synth_write_kvs(struct slu_gguf_writer *writer, const struct slu_synth_model *model);

#endif
