/*
 * The expert block: neurons lo..hi of one gated feed-forward network. It holds the gate rows and
 * the up rows of those neurons, the matching columns of every down row, and biases where the
 * model has them; it needs nothing from any other block. Here are its layout in memory, which is
 * also its layout on flash before compression, and its product.
 *
 *   | gate n x E | up n x E | down E x n | gate bias f32[n] | up bias f32[n] | down bias f32[E] |
 *
 * Each part starts at a multiple of 64 bytes. Only the first block of an expert (lo == 0) has the
 * down bias. E is the embedding width, n the block's neurons.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_KERN_BLOCK_H
#define SLU_KERN_BLOCK_H

#include "kern/kern.h"

/* Tokens that pass through a block together. It bounds the scratch, and keeps the block's weights
 * in the cache: they are read once for so many tokens. */
#define SLU_BLOCK_TOKENS 128u

/* What all blocks of a bank (the experts of one layer) share. */
struct slu_bank_shape {
    uint32_t n_embd;          /* E */
    uint32_t n_ff;            /* neurons of an expert */
    uint32_t neurons_a_block; /* the last block of an expert may have fewer */
    const struct slu_fmt *gate, *up, *down;
    bool has_bias;
};

struct slu_block_layout {
    uint32_t lo, n;                                       /* neurons lo .. lo+n-1 */
    size_t gate, up, down, gate_bias, up_bias, down_bias; /* offsets; biases 0 where absent */
    size_t bytes;                                         /* multiple of 64 */
};

/* Blocks of an expert: ceil(n_ff / neurons_a_block). */
uint32_t slu_bank_blocks(const struct slu_bank_shape *shape);

/* Picks neurons_a_block so that a block comes near target_bytes, in multiples that every format's
 * groups allow. False if n_ff or n_embd doesn't suit the formats. */
bool slu_bank_split(struct slu_bank_shape *shape, size_t target_bytes);

/* Layout of block b of an expert. False if the shape is not valid (shapes come from files). */
bool slu_block_layout(const struct slu_bank_shape *shape, uint32_t b,
                      struct slu_block_layout *ret_layout);

/* Bytes of the largest block of the bank. */
size_t slu_bank_block_bytes(const struct slu_bank_shape *shape);

/* Scratch for slu_block_mul with up to n tokens. */
size_t slu_block_scratch_bytes(const struct slu_bank_shape *shape, uint32_t n);

/* Additions to a block's linear maps, which the kernels know nothing about: what they are is the
 * caller's affair. Both may be NULL. tok holds the rows of x that the n tokens are. */
struct slu_block_hook {
    /* Before the biases and the activation: gate[i*stride + j] and up[i*stride + j] of neuron
     * at->lo + j. */
    void (*hidden)(void *arg, const struct slu_block_layout *at, float *gate, float *up,
                   size_t stride, const struct slu_acts *x, const uint32_t *tok, uint32_t n);
    /* After the down product: h[i*stride + j] is what went into it, y its n rows. */
    void (*output)(void *arg, const struct slu_block_layout *at, const float *h, size_t stride,
                   float *y, size_t y_stride, uint32_t n);
    void *arg;
};

/* y[i*y_stride + 0..E-1] = this block's part of the expert's output for token tok[i] (tok NULL: i)
 * of x, i in 0..n-1; overwritten, not added to. x has E columns. hook may be NULL. */
void slu_block_mul(const struct slu_kern *kern, const struct slu_bank_shape *shape,
                   const struct slu_block_layout *at, const void *data, enum slu_glu glu,
                   const struct slu_acts *x, const uint32_t *tok, uint32_t n, void *scratch,
                   float *y, size_t y_stride, const struct slu_block_hook *hook);

#endif
