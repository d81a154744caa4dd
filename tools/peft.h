/*
 * PEFT's adapter_config.json, as far as it decides what a LoRA computes. Settings that change
 * results and aren't supported are refused by name, and so is any setting that isn't known here
 * unless it is off. After the LoraConfig of https://github.com/huggingface/peft.
 *
 * Thread safety: one thread at a time for each.
 */
#ifndef SLU_TOOLS_PEFT_H
#define SLU_TOOLS_PEFT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct slu_peft;

/* name is the file's, for messages. SLU_EFORMAT, SLU_EUNSUP, SLU_ENOMEM. */
int slu_peft_open(const char *text, size_t len, const char *name, struct slu_peft **ret_peft,
                  struct slu_err *err);
void slu_peft_close(struct slu_peft *peft); /* NULL is fine */

/* Rank and scale of a module ("model.layers.0.self_attn.q_proj"), with rank_pattern and
 * alpha_pattern. SLU_EUNSUP if a pattern can't be matched with reasonable effort. */
int slu_peft_module(const struct slu_peft *peft, const char *module, size_t len, uint32_t *ret_rank,
                    double *ret_scale, struct slu_err *err);

/* False if target_modules is a list in which the module isn't: PEFT would leave it alone. */
bool slu_peft_has_module(const struct slu_peft *peft, const char *module, size_t len);

#endif
