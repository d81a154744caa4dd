/*
 * A GGUF with matrices of another type: what the divergence of formats is measured on
 * (tools/divergence.h). Everything else is copied as it is.
 *
 * Thread safety: one call uses one thread; calls share nothing.
 */
#ifndef SLU_TOOLS_RETYPE_H
#define SLU_TOOLS_RETYPE_H

#include "base/err.h"
#include "kern/format.h"

/* What matrices of F32, F16, BF16 and Q8_0 become: types of GGUF, or NULL to leave them. Matrices
 * whose width doesn't suit the type, routers, norms and biases stay. */
struct slu_retype {
    const struct slu_fmt *experts;  /* routed ones */
    const struct slu_fmt *resident; /* all else, embeddings included */
};

/* Writes the copy through a temporary name. Numbers are rounded by tools/quantize.h, Q4_0 by
 * slu_quantize_q4_0. SLU_EIO, SLU_ENOENT, SLU_EFORMAT, SLU_EUNSUP, SLU_ENOMEM. */
int slu_retype_write(const char *in, const char *out, const struct slu_retype *types,
                     struct slu_err *err);

#endif
