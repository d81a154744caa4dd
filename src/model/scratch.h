/*
 * Scratch of the forward pass: every buffer that computing a chunk needs, carved from one mapping
 * that is charged to the ledger, so that the token loop allocates nothing. Sizes follow from the
 * configuration, the chunk and the number of threads alone, and the same code carves and plans.
 * For a longer chunk the same buffers may be carved from memory that is somebody else's.
 *
 * Thread safety: none; one forward pass at a time.
 */
#ifndef SLU_MODEL_SCRATCH_H
#define SLU_MODEL_SCRATCH_H

#include "base/ledger.h"
#include "model/sums.h"
#include "model/weights.h"

/* Logits computed together: the head's weights are read once for them. */
#define SLU_LOGIT_ROWS_MAX 4u

/* One expert block and the tokens that want it. */
struct slu_moe_task {
    const struct slu_bank *bank;
    uint32_t extent;     /* of the block, in the pack's table */
    uint32_t b;          /* which block of its expert */
    uint32_t n;          /* tokens */
    const uint32_t *tok; /* rows of the chunk; NULL: all that are needed */
    const float *weight; /* n router weights */
};

/* Experts that were named, and those of them that came true: in all layers, fading. */
struct slu_named {
    float n, n_true;
};

/* See lookahead.h. */
struct slu_lookahead {
    uint32_t layer;    /* that the router's guess is for; 0: there is none */
    uint32_t *experts; /* K, best first */
    float *weights;    /* K */
    float *h;          /* E */
    float *shares;     /* layers x K: how often a rank's guess came true, lately */
    struct slu_named by_router;

    uint32_t n_recalled; /* what was named for recalled_layer instead, from past tokens */
    uint32_t recalled_layer;
    uint32_t *recalled; /* K */
    struct slu_named by_memory;
};

/* T tokens, E embedding width, H query heads, X experts, K chosen ones. */
struct slu_scratch {
    uint32_t chunk;     /* T */
    uint32_t own_chunk; /* T in memory of its own */
    uint32_t n_threads;
    float *x;         /* T x E, the residual stream */
    float *h;         /* T x E, normed */
    float *y;         /* T x E, a sublayer's output */
    void *h_acts;     /* T x E quantized */
    float *q, *k, *v; /* T x their widths; with MLA q is [latent | rope] a head */
    float *q_raw;     /* MLA: T x H*k_dim */
    float *q_lora;    /* MLA: T x q_lora */
    void *q_lora_acts;
    float *nope; /* MLA: T*H x nope */
    void *nope_acts;
    float *latent; /* MLA: T*H x kv_lora, what attention gives */
    void *latent_acts;
    float *kv_out; /* MLA: T x H*(nope + v_dim) */
    float *row;    /* MLA: a thread's row of kv_b, n_threads x kv_lora */
    float *att;    /* T x H*v_dim */
    void *att_acts;
    float *lora;   /* between an adapter's two products: T x ranks, a linear */
    float *attend; /* n_threads x attend_stride, see attend.c */
    size_t attend_stride;
    float *cos, *sin;     /* T x rope_dims/2 */
    float *router;        /* T x X */
    uint32_t *chosen;     /* T x K */
    float *chosen_weight; /* T x K */
    uint32_t *expert_n;   /* X + 1: tokens of each expert, then where its list starts */
    uint32_t *expert_tok; /* T*K: rows of the chunk, expert after expert */
    float *expert_weight; /* T*K */
    float *ones;          /* T: weight of resident banks */
    struct slu_moe_task *tasks;
    uint32_t n_tasks_max;
    uint32_t *round;      /* block numbers of a round */
    struct slu_sums sums; /* of T tokens, what blocks add up to */
    float *out;           /* n_threads x out_stride, which is tokens x E: a block's results */
    size_t out_stride;
    void *block; /* a thread's scratch for a block, n_threads x block_stride */
    size_t block_stride;
    float *logits; /* SLU_LOGIT_ROWS_MAX x n_vocab */
    struct slu_lookahead lookahead;
    size_t bytes;

    struct slu_ledger *ledger;
    void *memory;
};

/* What init will charge to SLU_ACCOUNT_SCRATCH. */
uint64_t slu_scratch_charge_bytes(const struct slu_weights *weights, uint32_t chunk,
                                  uint32_t n_threads);
/* What of it is a chunk's, and so may be elsewhere. */
size_t slu_scratch_chunk_bytes(const struct slu_weights *weights, uint32_t chunk,
                               uint32_t n_threads);

int slu_scratch_init(struct slu_scratch *scratch, const struct slu_weights *weights, uint32_t chunk,
                     uint32_t n_threads, struct slu_ledger *ledger, struct slu_err *err);
void slu_scratch_finish(struct slu_scratch *scratch);

/* Between chunks: the buffers are those of `chunk` tokens in memory (64-byte aligned, of
 * slu_scratch_chunk_bytes), or where it is NULL the scratch's own again. Only what look-ahead has
 * learned stays. */
void slu_scratch_move(struct slu_scratch *scratch, const struct slu_weights *weights,
                      uint32_t chunk, void *memory);

/* Tasks that a layer can have with `chunk` tokens, at most: the longest round. */
uint32_t slu_scratch_tasks_max(const struct slu_weights *weights, uint32_t chunk);

#endif
