/*
 * The matrices of a base model that adapters can be for, from its metadata alone: what imports are
 * checked against, and what generated adapters are made for.
 *
 * Thread safety: constant once opened.
 */
#ifndef SLU_TOOLS_ADAPTER_BASE_H
#define SLU_TOOLS_ADAPTER_BASE_H

#include "adapters/adapter.h"
#include "model/config.h"

struct slu_adapter_base {
    struct slu_config config;
    bool has_q;           /* attn_q, not attn_q_a and attn_q_b: matters with MLA */
    uint64_t fingerprint; /* of a pack; 0 for a GGUF */
};

/* A pack or a GGUF; which of the two shows in its first bytes. */
int slu_adapter_base_open(const char *path, struct slu_adapter_base *ret_base, struct slu_err *err);

/* A view of it for slu_adapter_open and the like; base must outlive it. */
struct slu_base slu_adapter_base_view(const struct slu_adapter_base *base);

#endif
