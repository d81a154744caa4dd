/*
 * Makes GGUF files that are wrong in one chosen way, or split into parts, out of a good one.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_TESTS_TOOLS_REWRITE_H
#define SLU_TESTS_TOOLS_REWRITE_H

#include <stdbool.h>
#include <stdint.h>

/* What to change. NULL or zero: nothing of that kind. */
struct rewrite {
    const char *drop;        /* leave this tensor out */
    const char *rename, *to; /* give a tensor another name */
    const char *retype;      /* give a tensor another type, with data of the right size */
    uint32_t type;
    const char *transpose;    /* exchange its first two dimensions */
    const char *add;          /* one more tensor: 32 F32 */
    uint32_t part, n_parts;   /* only every n-th tensor, with the keys of a split set */
    bool no_tensor_count;     /* of those keys, leave out split.tensors.count */
    int32_t tensor_count_off; /* or make it wrong by this */
    uint16_t split_no_off;    /* likewise split.no */
};

/* Asserts that everything named is there. */
void rewrite_gguf(const char *in, const char *out, const struct rewrite *change);

#endif
