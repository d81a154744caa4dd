/*
 * Shared by the files of the importer (tools/adapter_import.h) and of no use elsewhere: the halves
 * of pairs that a source has, sorted and put together, and written as a .sla. The readers of
 * sources (lora_gguf.c, peft.c) only name things; nothing of a matrix is read before everything is
 * known to fit together.
 *
 * Thread safety: as tools/adapter_import.h.
 */
#ifndef SLU_TOOLS_ADAPTER_PARTS_H
#define SLU_TOOLS_ADAPTER_PARTS_H

#include "adapters/adapter.h"
#include "io/printable.h"

/* A matrix, or a stack of n, as it lies in a source; rows tightly packed. */
struct slu_import_matrix {
    struct slu_source *source; /* outlives the import */
    uint64_t offset;
    enum slu_fmt_id fmt; /* F32, F16 or BF16 */
    uint32_t rows, cols, n;
    bool is_transposed; /* lies there as cols x rows */
};

#define SLU_IMPORT_NO_EXPERT UINT32_MAX

/* A or B of one map. */
struct slu_import_half {
    struct slu_printable name; /* in the source, for messages */
    enum slu_target target;
    uint32_t layer;
    uint32_t expert; /* whose alone it is, in sources that keep experts apart */
    bool is_b;
    double scale;
    struct slu_import_matrix matrix;
};

struct slu_import {
    struct slu_adapter_info info; /* name, description, arch, base_fingerprint, is_hf_order */
    struct slu_import_half *halves;
    size_t n_halves, room;
    uint32_t n_experts; /* of the base, 0: not known */
};

/* Copies the half. SLU_ENOMEM. */
int slu_import_add(struct slu_import *import, const struct slu_import_half *half,
                   struct slu_err *err);
void slu_import_finish(struct slu_import *import); /* zeroed is fine */

/* Sorts the halves into pairs and checks that each is whole. base may be NULL. */
int slu_import_check(struct slu_import *import, const struct slu_base *base, struct slu_err *err);

/* Writes what was checked. */
int slu_import_write(const struct slu_import *import, const char *path, struct slu_err *err);

/* The target with such a name behind "blk.N.", and for "ffn_gate.E" and its like the expert; false
 * if there is none. Of embedding and head the name is whole. */
bool slu_import_target(const char *name, size_t len, enum slu_target *ret_target,
                       uint32_t *ret_expert);

/* A number without sign that ends at anything else; returns the bytes it took, 0 if there is none
 * or it is too large to be a layer or an expert. */
size_t slu_import_number(const char *at, size_t len, uint32_t *ret);

/* Fills the import from a GGUF LoRA, whose source must outlive it. */
int slu_import_gguf(struct slu_source *source, struct slu_import *import, struct slu_err *err);

/* The same from a PEFT adapter's .safetensors and the text of its adapter_config.json. */
int slu_import_peft(struct slu_source *source, const char *config, size_t config_len,
                    const char *config_name, struct slu_import *import, struct slu_err *err);

#endif
