/*
 * The dense weights of a model: everything that every token needs, read from a pack into one
 * mapping that is charged to the ledger, and the banks of experts, of which shared and dense ones
 * are read too and routed ones only described. Every tensor and bank is checked against the
 * configuration before a byte is read.
 *
 * Thread safety: constant once opened.
 */
#ifndef SLU_MODEL_WEIGHTS_H
#define SLU_MODEL_WEIGHTS_H

#include "base/ledger.h"
#include "base/pool.h"
#include "io/pack.h"
#include "kern/block.h"
#include "model/config.h"

/* Experts of one layer. Block b of expert e is block number first_extent + e * n_blocks + b. */
struct slu_bank {
    struct slu_bank_shape shape;
    uint32_t n_experts; /* 0: the layer has no such bank */
    uint32_t n_blocks;  /* of an expert */
    uint32_t first_extent;
    const uint8_t *data; /* resident banks: blocks back to back, each data_stride bytes */
    size_t data_stride;
};

/* Matrices whose fmt is NULL and vectors that are NULL are not part of this model. Shapes are
 * [rows x cols]; E embedding, H query heads, G key-value heads. */
struct slu_layer {
    const float *attn_norm; /* E */
    const float *ffn_norm;  /* E */
    struct slu_mat q;       /* H*k_dim x E */
    struct slu_mat k;       /* G*k_dim x E */
    struct slu_mat v;       /* G*v_dim x E */
    struct slu_mat out;     /* E x H*v_dim */
    const float *q_bias, *k_bias, *v_bias, *out_bias;
    const float *q_norm, *k_norm; /* k_dim, or the full width */
    const float *sinks;           /* H */

    struct slu_mat q_a, q_b; /* q_lora x E, H*k_dim x q_lora */
    struct slu_mat kv_a;     /* kv_lora + rope x E */
    struct slu_mat kv_b;     /* H*(nope + v_dim) x kv_lora, or k_b and v_b instead */
    struct slu_mat k_b, v_b; /* of head 0: kv_lora x nope, v_dim x kv_lora; others follow */
    const float *q_a_norm, *kv_a_norm;

    struct slu_mat router;                /* n_experts x E */
    const float *router_bias, *gate_bias; /* n_experts */
    const float *shared_gate;             /* E */
    struct slu_bank routed;
    struct slu_bank resident; /* the shared expert, or a dense layer's network */
};

struct slu_weights {
    struct slu_config config;
    struct slu_layer *layers; /* n_layers */
    const float *output_norm; /* E */
    struct slu_mat head;      /* n_vocab x E; the embedding itself where tied */
    bool is_tied;
    struct slu_pack_tensor embedding; /* ROWS unless tied */
    uint64_t embedding_offset;

    uint32_t n_blocks;               /* routed blocks of all layers */
    uint32_t first_block, end_block; /* extents that routed banks lie within */
    uint32_t layer_blocks_max;       /* routed blocks that one token uses in a layer, at most */
    uint32_t token_blocks;           /* routed blocks that one token uses in all layers */
    size_t block_bytes_max;          /* routed, raw */
    size_t block_bytes_small; /* the size of those layers whose blocks are smaller, if that is
                                 worth slots of their own, or 0 */
    uint32_t n_blocks_small;  /* that fit it; it is whole pages */

    uint32_t n_pieces;       /* extents that loading reads */
    size_t stored_bytes_max; /* the largest compressed one of them; 0: all are raw */

    struct slu_ledger *ledger;
    void *memory;
    size_t memory_bytes;
    uint64_t heap_bytes;
};

/* Checks the pack against its configuration and fills everything but the data pointers: enough to
 * plan with. SLU_EFORMAT with the tensor that doesn't fit; SLU_EUNSUP. */
int slu_weights_describe(const struct slu_pack *pack, struct slu_weights *ret_weights,
                         struct slu_err *err);

/* What load will charge: for good under SLU_ACCOUNT_DENSE, and at least, while it runs, under
 * SLU_ACCOUNT_IO. */
uint64_t slu_weights_charge_bytes(const struct slu_weights *weights);
uint64_t slu_weights_loading_bytes(const struct slu_weights *weights);

/* Reads the data, on as many threads of the pool as the ledger's use stays within used_bytes_max
 * with. Blocks. After a failure weights can only be finished. */
int slu_weights_load(struct slu_weights *weights, const struct slu_pack *pack,
                     struct slu_pool *pool, struct slu_ledger *ledger, uint64_t used_bytes_max,
                     struct slu_err *err);

void slu_weights_finish(struct slu_weights *weights);

#endif
