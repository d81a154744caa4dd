/*
 * What the tests of adapters share: a folder, small models to be adapted, adapters made for them,
 * hand-made PEFT folders, and opening. Failures fail the running test.
 */
#ifndef SLU_TESTS_ADAPTERS_MAKE_H
#define SLU_TESTS_ADAPTERS_MAKE_H

#include "adapters/sla.h"
#include "tools/adapter_base.h"
#include "tools/adapter_import.h"
#include "tools/adapter_synth.h"
#include "tools/synth.h"

struct lab {
    char dir[64];
    char model[96]; /* a GGUF, once made */
    struct slu_adapter_base base;
};

void lab_open(struct lab *lab);
void lab_close(struct lab *lab); /* removes everything */
/* "dir/name", in one of a few rotating buffers. */
const char *lab_path(const struct lab *lab, const char *name);

/* A synthetic model, and its shapes in lab->base. */
void lab_model(struct lab *lab, const struct slu_synth_params *params);
/* An adapter for it: generated in a form, imported to path. */
void lab_adapter(struct lab *lab, const struct slu_adapter_synth_params *params, const char *path);
/* Imports, which must succeed. */
struct slu_adapter_info lab_import(const char *in, const char *out, const char *base);

/* Opens against a base; on success the ledger has exactly info.memory_bytes more. */
int lab_try(const char *path, const struct slu_base *base, struct slu_ledger *ledger,
            struct slu_adapter **ret_adapter, struct slu_err *err);
struct slu_adapter *lab_load(const char *path, const struct slu_base *base,
                             struct slu_ledger *ledger);

/* Pair by pair and byte by byte; names and the order of rows in files aside. */
void lab_expect_equal(const struct slu_adapter *a, const struct slu_adapter *b);

/* The pair with the matrices of expert e, where it is for experts; what is streamed must be there.
 */
struct slu_lora lab_pair(const struct slu_adapter *adapter, const struct slu_lora *lora,
                         uint32_t e);

/* A sentence of one line, with these words in it. */
void lab_expect_refusal(int rc, const struct slu_err *err, int code, const char *words);

/* Number i of a tensor is fill + i * step, as its dtype has it. */
struct lab_tensor {
    const char *name, *dtype;
    uint32_t rows, cols;
    float fill, step;
};
/* dir/adapter_config.json and dir/adapter_model.safetensors. */
void lab_peft(const char *dir, const char *config, const struct lab_tensor *tensors, size_t n);
/* A .safetensors of a header and so many bytes of zeros. */
void lab_safetensors(const char *path, uint64_t claimed_bytes, const char *header,
                     size_t data_bytes);
void lab_write(const char *path, const void *data, size_t bytes);
uint8_t *lab_read(const char *path, size_t *ret_bytes); /* to be freed */

#endif
