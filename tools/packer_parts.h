/*
 * Shared by the files of the packer (tools/packer.h) and of no use elsewhere: the opened input, the
 * plan made from it, and the job that carries the plan out. All checks happen while planning, so
 * that a file that can't be packed is refused before anything is written.
 *
 * Thread safety: as tools/packer.h.
 */
#ifndef SLU_TOOLS_PACKER_PARTS_H
#define SLU_TOOLS_PACKER_PARTS_H

#include "base/pool.h"
#include "io/pack_writer.h"
#include "kern/block.h"
#include "model/config.h"
#include "tools/ecq.h"
#include "tools/importance.h"
#include "tools/packer.h"
#include "tools/planes.h"

/* ---- input: packer_input.c ---------------------------------------------------------------- */

struct slu_packer_part {
    struct slu_source *source;
    bool is_borrowed; /* the source is the caller's */
    struct slu_gguf *gguf;
    bool *is_claimed; /* one for each tensor */
};

struct slu_packer_input {
    struct slu_packer_part *parts; /* parts[0] has the metadata */
    uint32_t n_parts;
    uint64_t file_bytes, weight_bytes;
};

/* A tensor of the input as n matrices of rows x cols. */
struct slu_packer_ref {
    struct slu_source *source;
    uint64_t offset;
    const struct slu_fmt *fmt; /* as in the file */
    bool as_f32;               /* read as F32, to which fmt converts exactly */
    uint32_t rows, cols, n;
    uint64_t bytes; /* in the file */
    char name[SLU_PACK_NAME_BYTES];
};

/* Opens a file or, given any part of a split set, all of its parts; or looks into a source that is
 * one whole file and stays the caller's. */
int slu_packer_input_open(const char *path, struct slu_source *source,
                          struct slu_packer_input *ret_input, struct slu_err *err);
void slu_packer_input_close(struct slu_packer_input *input); /* zeroed is fine */

/* Is there a tensor of that name? */
bool slu_packer_input_has(const struct slu_packer_input *input, const char *name);

/* Finds a tensor that must be there, checks its type and shape, and marks it as claimed.
 * SLU_ENOENT, SLU_EUNSUP, SLU_EFORMAT. */
int slu_packer_claim(struct slu_packer_input *input, const char *name, uint32_t rows, uint32_t cols,
                     uint32_t n, struct slu_packer_ref *ret_ref, struct slu_err *err);

/* The same for plain numbers that the pack keeps as F32. */
int slu_packer_claim_f32(struct slu_packer_input *input, const char *name, uint32_t rows,
                         uint32_t cols, struct slu_packer_ref *ret_ref, struct slu_err *err);

/* Refuses by name what is there but changes results in ways that aren't supported, and, in the
 * second, whatever was not claimed. */
int slu_packer_check_known(const struct slu_packer_input *input, struct slu_err *err);
int slu_packer_check_claimed(const struct slu_packer_input *input, enum slu_arch arch,
                             struct slu_err *err);

/* The format that reading gives, and the bytes of one row of it. */
const struct slu_fmt *slu_packer_ref_fmt(const struct slu_packer_ref *ref);
size_t slu_packer_ref_row_bytes(const struct slu_packer_ref *ref);

/* Reads rows first .. first+n_rows-1, counted through the whole stack, in the format of
 * slu_packer_ref_fmt. */
int slu_packer_read_rows(const struct slu_packer_ref *ref, uint64_t first, uint64_t n_rows,
                         void *out, struct slu_err *err);

/* ---- plan: packer_plan.c ------------------------------------------------------------------ */

struct slu_packer_dense {
    char name[SLU_PACK_NAME_BYTES];
    enum slu_pack_kind kind;
    struct slu_packer_ref ref;
};

/* Gate, up or down of all experts of a layer: one stack, or one tensor for each expert. */
struct slu_packer_experts {
    struct slu_packer_ref *refs;
    uint32_t n_refs;
};

struct slu_packer_bank {
    uint32_t layer, n_experts;
    enum slu_bank_kind kind;
    struct slu_bank_shape shape;
    struct slu_packer_experts gate, up, down;
    struct slu_packer_ref gate_bias, up_bias, down_bias; /* if shape.has_bias; rows: experts */
};

struct slu_packer_plan {
    struct slu_config config;
    struct slu_packer_dense *dense;
    size_t n_dense;
    struct slu_packer_bank *banks;
    size_t n_banks;
};

/* Claims every tensor of the input for one place in the pack. */
int slu_packer_plan_make(struct slu_packer_input *input, uint32_t block_bytes,
                         struct slu_packer_plan *ret_plan, struct slu_err *err);
void slu_packer_plan_finish(struct slu_packer_plan *plan); /* zeroed is fine */

/* ---- job: packer_dense.c, packer_banks.c -------------------------------------------------- */

/* Threads that quantize, and their buffers; zeroed until something is quantized. */
struct slu_packer_crew {
    struct slu_pool *pool;
    uint32_t rows_max, cols_max;
    float *floats;    /* cols_max for each thread */
    uint8_t *scratch; /* slu_ecq_scratch_bytes(cols_max) for each, in whole cache lines */
    union slu_packer_row_sum *row_sums; /* rows_max */
};

struct slu_packer_job {
    const struct slu_packer_params *params;
    struct slu_pack_writer *writer;
    uint64_t done_bytes, total_bytes;
    struct slu_packer_report report;
    struct slu_importance *importance; /* NULL: none */
    double quant_error2;               /* sum of weights times squared errors */
    enum slu_codec_id codec;           /* of all but the blocks among which is chosen */
    struct slu_packer_crew crew;
};

/* ---- quantization: packer_quant.c, packer_rows.c ------------------------------------------- */

/* Whether a matrix is one that is quantized when that is asked for. */
bool slu_packer_quantizes(const struct slu_packer_quant *quant, const struct slu_packer_ref *ref);

/* Columns first_col .. first_col+n-1 of a row of the input as floats. False if one isn't finite. */
bool slu_packer_floats(const struct slu_packer_ref *ref, const uint8_t *row, uint32_t first_col,
                       uint32_t n, float *out);
/* Sets the error for that, by the tensor's name, and returns it: SLU_EFORMAT. */
int slu_packer_not_finite(const struct slu_packer_ref *ref, struct slu_err *err);

/* How much columns matter, with a mean of 1; all 1 where nothing is known. */
void slu_packer_weights(struct slu_packer_job *job, const struct slu_packer_ref *ref,
                        uint32_t expert, float *ret_weights);

/* Fits a quantizer on rows out of all of the matrices, cut to `width` columns. */
int slu_packer_fit(struct slu_packer_job *job, const struct slu_packer_quant *quant,
                   const struct slu_packer_ref *refs, uint32_t n_refs, uint32_t width,
                   struct slu_ecq *ret_ecq, struct slu_err *err);

/* Columns of rows as they are in the input. */
struct slu_packer_rows {
    const struct slu_packer_ref *ref;
    const uint8_t *raw; /* n whole rows */
    uint32_t n, first_col, n_cols;
};

/* In packer_rows.c, by all of the job's threads. The first adds what the rows ask for to *scales;
 * the second makes them the rows of planes, whose columns weigh as `weights` says from first_col
 * on, and adds to *sums. SLU_EFORMAT as above, SLU_ENOMEM. */
int slu_packer_scales_add(struct slu_packer_job *job, const struct slu_packer_rows *rows,
                          const struct slu_ecq *ecq, struct slu_ecq_scales *scales,
                          struct slu_err *err);
int slu_packer_rows_put(struct slu_packer_job *job, const struct slu_packer_rows *rows,
                        const struct slu_ecq *ecq, float unit, const float *weights,
                        struct slu_planes *planes, struct slu_ecq_sums *sums, struct slu_err *err);
void slu_packer_crew_finish(struct slu_packer_crew *crew); /* zeroed is fine */

/* So many weights were quantized, with these sums of squares: for the report. */
void slu_packer_quantized(struct slu_packer_job *job, const struct slu_packer_quant *quant,
                          uint64_t n_weights, const struct slu_ecq_sums *sums);

/* For planes: 64-byte aligned, freed with free(). NULL when out of memory. */
void *slu_packer_alloc(size_t bytes);

/* Reports progress, done_bytes being what came before plus `more`. SLU_ECANCEL. */
int slu_packer_step(struct slu_packer_job *job, uint64_t more, struct slu_err *err);

int slu_packer_write_dense(struct slu_packer_job *job, const struct slu_packer_dense *dense,
                           struct slu_err *err);
int slu_packer_write_bank(struct slu_packer_job *job, const struct slu_packer_bank *bank,
                          struct slu_err *err);

/* How a block's planes are told apart, in which cuts are pointed to. */
#define SLU_PACKER_CUTS (3 * SLU_PLANES_CUTS)
struct slu_parts slu_packer_block_parts(const struct slu_bank_shape *shape,
                                        const struct slu_block_layout *at,
                                        size_t cuts[SLU_PACKER_CUTS]);

/* One block as it would be written. */
struct slu_packer_sample {
    struct slu_bank_shape shape;
    struct slu_block_layout at;
    uint8_t *raw; /* 64-byte aligned; the caller frees it, on error too */
};

/* Makes the first blocks of n experts from all over the bank; n is at most the bank's experts. The
 * report stays as it was. */
int slu_packer_sample_bank(struct slu_packer_job *job, const struct slu_packer_bank *bank,
                           uint32_t n, struct slu_packer_sample *ret_samples, struct slu_err *err);

/* ---- codec: packer_codec.c ---------------------------------------------------------------- */

/* Measures blocks of the plan, and flash if it isn't given, and sets the report's choice. */
int slu_packer_choose_codec(struct slu_packer_job *job, const struct slu_packer_input *input,
                            const struct slu_packer_plan *plan, struct slu_err *err);

/* The metadata of a GGUF and behind them the keys that tell the choice; freed by the caller. */
int slu_packer_codec_kvs(const struct slu_packer_choice *choice, const struct slu_gguf *gguf,
                         uint8_t **ret_kvs, size_t *ret_bytes, uint64_t *ret_n,
                         struct slu_err *err);

#endif
