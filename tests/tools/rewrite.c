#include "rewrite.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/gguf.h"
#include "tools/gguf_writer.h"

struct tensor {
    char name[128];
    uint32_t type, n_dims;
    uint64_t dims[SLU_GGUF_DIMS_MAX];
    uint64_t bytes, offset, bytes_there;
};

static bool is(const char *wanted, const char *name)
{
    return wanted && strcmp(wanted, name) == 0;
}

/* Applies the change to one tensor; false if it is left out. */
static bool change_tensor(struct tensor *tensor, uint64_t index, const struct rewrite *change,
                          unsigned *n_changes)
{
    if (change->n_parts > 0 && index % change->n_parts != change->part) {
        return false;
    }
    if (is(change->drop, tensor->name)) {
        ++*n_changes;
        return false;
    }
    if (is(change->retype, tensor->name)) {
        ++*n_changes;
        uint64_t weights = 1;
        for (uint32_t d = 0; d < tensor->n_dims; d++) {
            weights *= tensor->dims[d];
        }
        uint32_t block_weights, block_bytes;
        tensor->type = change->type;
        cr_assert(slu_ggml_type_block(change->type, &block_weights, &block_bytes));
        tensor->bytes = weights / block_weights * block_bytes;
    }
    if (is(change->transpose, tensor->name)) {
        ++*n_changes;
        uint64_t first = tensor->dims[0];
        tensor->dims[0] = tensor->dims[1];
        tensor->dims[1] = first;
        tensor->n_dims = tensor->n_dims < 2 ? 2 : tensor->n_dims;
    }
    if (is(change->rename, tensor->name)) {
        ++*n_changes;
        snprintf(tensor->name, sizeof tensor->name, "%s", change->to);
    }
    return true;
}

static void put_keys(struct slu_gguf_writer *writer, const struct slu_gguf *gguf,
                     const struct rewrite *change)
{
    slu_gguf_writer_kvs(writer, gguf->kv_data, gguf->kv_bytes, gguf->kvs.n);
    if (change->n_parts > 0) {
        slu_gguf_writer_u16(writer, "split.no", (uint16_t)(change->part + change->split_no_off));
        slu_gguf_writer_u16(writer, "split.count", (uint16_t)change->n_parts);
        if (!change->no_tensor_count) {
            slu_gguf_writer_u32(writer, "split.tensors.count",
                                (uint32_t)gguf->n_tensors + (uint32_t)change->tensor_count_off);
        }
    }
}

void rewrite_gguf(const char *in, const char *out, const struct rewrite *change)
{
    struct slu_source *source;
    struct slu_gguf *gguf;
    struct slu_gguf_writer *writer;
    struct slu_err err = {0};
    cr_assert_eq(slu_source_open_file(in, &source, &err), 0, "%s", err.text);
    cr_assert_eq(slu_gguf_open(source, &gguf, &err), 0, "%s", err.text);
    cr_assert_eq(slu_gguf_writer_create(out, &writer, &err), 0, "%s", err.text);
    put_keys(writer, gguf, change);
    struct tensor *tensors = calloc(gguf->n_tensors + 1, sizeof *tensors);
    uint64_t n = 0;
    unsigned n_changes = 0;
    for (uint64_t t = 0; t < gguf->n_tensors; t++) {
        const struct slu_gguf_tensor *from = &gguf->tensors[t];
        struct tensor *tensor = &tensors[n];
        *tensor = (struct tensor){
            .type = from->type,
            .n_dims = from->n_dims,
            .bytes = from->bytes,
            .bytes_there = from->bytes,
            .offset = from->offset,
        };
        snprintf(tensor->name, sizeof tensor->name, "%.*s", (int)from->name.len, from->name.at);
        memcpy(tensor->dims, from->dims, sizeof tensor->dims);
        n += change_tensor(tensor, t, change, &n_changes);
    }
    if (change->add) {
        tensors[n] = (struct tensor){.n_dims = 1, .dims = {32}, .bytes = 128};
        snprintf(tensors[n++].name, sizeof tensors[0].name, "%s", change->add);
    }
    cr_assert_eq(n_changes,
                 !!change->drop + !!change->rename + !!change->retype + !!change->transpose);
    for (uint64_t t = 0; t < n; t++) {
        slu_gguf_writer_tensor(writer, tensors[t].name, tensors[t].type, tensors[t].n_dims,
                               tensors[t].dims, tensors[t].bytes);
    }
    cr_assert_eq(slu_gguf_writer_begin(writer, &err), 0, "%s", err.text);
    for (uint64_t t = 0; t < n; t++) {
        uint64_t bytes = tensors[t].bytes, there = tensors[t].bytes_there;
        uint8_t *data = calloc(1, bytes);
        cr_assert(data);
        cr_assert_eq(
            source->read_at(source, tensors[t].offset, data, there < bytes ? there : bytes, &err),
            0, "%s", err.text);
        cr_assert_eq(slu_gguf_writer_data(writer, data, bytes, &err), 0, "%s", err.text);
        free(data);
    }
    cr_assert_eq(slu_gguf_writer_finish(writer, &err), 0, "%s", err.text);
    slu_gguf_writer_destroy(writer);
    free(tensors);
    slu_gguf_close(gguf);
    slu_source_destroy(source);
}
