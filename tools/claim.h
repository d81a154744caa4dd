/*
 * Claims on files that will be written when the work is done: that they can be is found out before
 * it is begun. What is claimed is PATH.part, the name under which writers put it first.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_TOOLS_CLAIM_H
#define SLU_TOOLS_CLAIM_H

#include <stdbool.h>

#include "base/err.h"

struct slu_claim {
    char *part; /* NULL: nothing is claimed */
    bool is_new;
};

/* Sees that PATH is no directory, and makes PATH.part unless it is there. SLU_EIO, SLU_ENOMEM. */
int slu_claim_open(const char *path, struct slu_claim *ret_claim, struct slu_err *err);
/* Removes PATH.part if it was made here and is still empty. A zeroed claim is fine. */
void slu_claim_release(struct slu_claim *claim);

#endif
