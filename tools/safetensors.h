/*
 * The header of a .safetensors file: names, types, shapes and places of tensors. Format after
 * https://github.com/huggingface/safetensors: a u64 length, so many bytes of JSON, then the data,
 * which the tensors cover without overlap or hole. Nothing here reads tensor data.
 *
 * Thread safety: constant once opened.
 */
#ifndef SLU_TOOLS_SAFETENSORS_H
#define SLU_TOOLS_SAFETENSORS_H

#include <stdint.h>

#include "io/source.h"

#define SLU_SAFETENSORS_DIMS_MAX 8

struct slu_safetensors_tensor {
    const char *name;  /* owned by the file; NUL-terminated UTF-8 */
    const char *dtype; /* "BF16"; static storage */
    uint32_t n_dims;
    uint64_t dims[SLU_SAFETENSORS_DIMS_MAX]; /* slowest first, as the file has them */
    uint64_t offset, bytes;                  /* offset from the start of the file */
};

struct slu_safetensors {
    struct slu_safetensors_tensor *tensors; /* in the order of their data */
    size_t n;
    void *json; /* owns the names */
};

/* SLU_EIO, SLU_EFORMAT, SLU_ENOMEM; SLU_EUNSUP for a type whose size isn't known. */
int slu_safetensors_open(struct slu_source *source, struct slu_safetensors *ret_file,
                         struct slu_err *err);
void slu_safetensors_close(struct slu_safetensors *file); /* zeroed is fine */

#endif
