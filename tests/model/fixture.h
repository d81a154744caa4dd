/*
 * What the tests of whole models share: a folder of their own, synthetic models packed into it,
 * the optional data folder, and evaluation into memory. Failures fail the running test.
 */
#ifndef SLU_TESTS_MODEL_FIXTURE_H
#define SLU_TESTS_MODEL_FIXTURE_H

#include <stdbool.h>

#include "slu.h"
#include "tools/packer.h"
#include "tools/synth.h"

struct fixture {
    char dir[64];
    char gguf[96], slu[96];
};

/* Makes a temporary folder, removed with everything in it by close. */
void fixture_open(struct fixture *f);
void fixture_close(struct fixture *f);

/* Packs a GGUF into f->slu. block_bytes 0 is the packer's own choice. */
void fixture_pack(struct fixture *f, const char *gguf, enum slu_codec_id codec,
                  uint32_t block_bytes);

/* Writes a synthetic model to f->gguf and packs it. */
void fixture_synth(struct fixture *f, const struct slu_synth_params *params,
                   enum slu_codec_id codec, uint32_t block_bytes);

/* The path of a file in the optional data folder; false, with a line that says so, if the folder
 * isn't there. */
bool fixture_data(const char *relative, char *ret_path, size_t bytes);

struct slu_engine *fixture_engine(const char *path, const struct slu_engine_params *params);

/* Logits after each of n tokens of a fresh session: n x n_vocab floats, to be freed. */
float *fixture_logits(struct slu_engine *engine, const int32_t *ids, size_t n);

/* The same under adapters. */
float *fixture_logits_with(struct slu_engine *engine, const struct slu_adapter_choice *choices,
                           size_t n_choices, const int32_t *ids, size_t n);
void fixture_greedy_with(struct slu_engine *engine, const struct slu_adapter_choice *choices,
                         size_t n_choices, const int32_t *ids, size_t n_ids, int32_t *ret_ids,
                         uint32_t n);

/* n greedy tokens after the prompt, past any end. */
void fixture_greedy(struct slu_engine *engine, const int32_t *ids, size_t n_ids, int32_t *ret_ids,
                    uint32_t n);

#endif
