/*
 * Random adapters, for tests, benches and demonstrations: from one seed the same numbers as a GGUF
 * LoRA and as a PEFT folder. And GGUF LoRAs rewritten as PEFT folders, so that what is known of one
 * form can be held against the other.
 *
 * The same parameters give the same bytes on every machine.
 *
 * Thread safety: one call uses one thread; calls share nothing.
 */
#ifndef SLU_TOOLS_ADAPTER_SYNTH_H
#define SLU_TOOLS_ADAPTER_SYNTH_H

#include "adapters/adapter.h"

enum slu_adapter_form { SLU_ADAPTER_GGUF, SLU_ADAPTER_PEFT };

#define SLU_ADAPTER_ATTENTION ((1u << (SLU_TARGET_KV_B + 1)) - 1)
#define SLU_ADAPTER_EXPERTS                                                                        \
    (1u << SLU_TARGET_EXPERT_GATE | 1u << SLU_TARGET_EXPERT_UP | 1u << SLU_TARGET_EXPERT_DOWN)

/* Zero means the default. */
struct slu_adapter_synth_params {
    enum slu_adapter_form form;
    const char *base;    /* GGUF or pack of the model; only its metadata are read */
    uint32_t rank;       /* 8 */
    float alpha;         /* 2 * rank */
    float gain;          /* deviation of B times sqrt(rank), that of A being 1 / sqrt(inputs): .5 */
    uint32_t targets;    /* bits 1 << enum slu_target, of which those count that the model has;
                            SLU_ADAPTER_ATTENTION */
    enum slu_fmt_id fmt; /* F32, F16 or BF16 */
    uint64_t seed;
};

/* GGUF: path is a file. PEFT: path is a folder, made if need be. SLU_EINVAL for parameters that
 * make no adapter. */
int slu_adapter_synth_write(const char *path, const struct slu_adapter_synth_params *params,
                            struct slu_err *err);

/* Rewrites a GGUF LoRA as a PEFT folder (made if need be): names, and the order of the rows of q
 * and k, as Hugging Face has them for that base. */
int slu_lora_gguf_to_peft(const char *gguf, const char *base, const char *dir, struct slu_err *err);

#endif
