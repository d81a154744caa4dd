/*
 * `sluice adapter import`: a PEFT folder, a .safetensors file or a GGUF LoRA becomes a .sla. What
 * isn't supported (DoRA, modules_to_save, LoKr, ...) is refused by name; nothing is dropped in
 * silence.
 *
 * Thread safety: one call uses one thread.
 */
#ifndef SLU_TOOLS_ADAPTER_IMPORT_H
#define SLU_TOOLS_ADAPTER_IMPORT_H

#include "adapters/adapter.h"

struct slu_adapter_import_params {
    const char *in;          /* folder with adapter_config.json and adapter_model.safetensors,
                                FILE.safetensors beside its adapter_config.json, or FILE.gguf */
    const char *out;         /* NAME.sla */
    const char *name;        /* NULL: from the file or the folder */
    const char *description; /* NULL: the source's, or none */
    const char *base;        /* MODEL.slu: bind to this very pack, and check; NULL: any that fits */
};

/* Written to a temporary name, synced, renamed. SLU_EUNSUP names what isn't supported. */
int slu_adapter_import(const struct slu_adapter_import_params *params,
                       struct slu_adapter_info *ret_info, struct slu_err *err);

/* What a .sla holds, as slu_adapter_inspect. */
int slu_adapter_inspect_file(const char *path, struct slu_adapter_info *ret_info,
                             struct slu_err *err);

#endif
