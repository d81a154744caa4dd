/*
 * Shared by the files of the generator (tools/synth.h) and of no use elsewhere.
 *
 * Thread safety: as tools/synth.h.
 */
#ifndef SLU_TOOLS_SYNTH_PARTS_H
#define SLU_TOOLS_SYNTH_PARTS_H

#include "kern/format.h"
#include "tools/gguf_writer.h"
#include "tools/synth.h"

/* Parameters with every default filled in, and what follows from them. */
struct slu_synth_model {
    struct slu_synth_params p;
    const struct slu_fmt *expert, *down, *dense, *embd, *vector;
    const struct slu_fmt *better; /* for what has_more_bits improves; NULL without */
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

/* ---- tensors: synth.c --------------------------------------------------------------------- */

struct slu_synth_tensor {
    char name[64];
    const struct slu_fmt *fmt;
    uint32_t n_dims;
    uint64_t dims[3];      /* fastest first */
    float mean, deviation; /* the mean of quantized matrices is 0 */
    uint64_t number;       /* names its random numbers */
    uint64_t row_bytes, bytes;
};

/* A model ready to be generated. */
struct slu_synth_plan {
    struct slu_synth_model model;
    struct slu_synth_tensor *tensors;
    size_t n_tensors;
    uint64_t bytes;    /* of all tensors, unpadded */
    uint32_t cols_max; /* of the widest */
};

/* SLU_EINVAL for parameters that make no model; SLU_ENOMEM. */
int slu_synth_plan_make(const struct slu_synth_params *params, struct slu_synth_plan *ret_plan,
                        struct slu_err *err);
void slu_synth_plan_finish(struct slu_synth_plan *plan); /* zeroed is fine */

/* ---- weights: synth_rows.c ---------------------------------------------------------------- */

#define SLU_SYNTH_LANES 8

/* For formats with a short cut, what their codes are drawn from. */
struct slu_synth_codes {
    uint8_t *table[SLU_FMT_GGUFS];
    float rms[SLU_FMT_GGUFS];
};

/* For the formats of n tensors. SLU_ENOMEM, after which finish is due all the same. */
int slu_synth_codes_init(struct slu_synth_codes *codes, const struct slu_synth_tensor *tensors,
                         size_t n, struct slu_err *err);
void slu_synth_codes_finish(struct slu_synth_codes *codes); /* zeroed is fine */

/* Row `row` of the tensor, all its matrices counted through, as GGUF stores it: row_bytes bytes.
 * scratch has room for its columns and SLU_SYNTH_LANES more. */
void slu_synth_row(const struct slu_synth_codes *codes, uint64_t seed,
                   const struct slu_synth_tensor *tensor, uint64_t row, float *scratch,
                   uint8_t *out);

#endif
