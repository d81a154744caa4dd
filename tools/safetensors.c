#include "tools/safetensors.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "io/printable.h"

/* A hundred thousand tensors take a tenth of this. */
#define HEADER_BYTES_MAX (64u << 20)
#define LENGTH_BYTES     8u

static const struct dtype {
    const char *name;
    uint32_t bytes;
} dtypes[] = {
    {"F32", 4},     {"F16", 2},  {"BF16", 2}, {"F64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1},
    {"F8_E8M0", 1}, {"BOOL", 1}, {"U8", 1},   {"I8", 1},  {"U16", 2},     {"I16", 2},
    {"U32", 4},     {"I32", 4},  {"U64", 8},  {"I64", 8},
};

static struct slu_printable shown(const char *name)
{
    return slu_printable(name, strlen(name));
}

static int broken(const struct slu_source *source, const char *tensor, const char *what,
                  struct slu_err *err)
{
    return slu_err_set(err, SLU_EFORMAT, "%s: tensor %s %s; the file is corrupt", source->name,
                       shown(tensor).text, what);
}

static int read_dtype(const struct slu_source *source, const json_t *value,
                      struct slu_safetensors_tensor *tensor, uint32_t *ret_bytes,
                      struct slu_err *err)
{
    const char *text = json_string_value(json_object_get(value, "dtype"));
    if (!text) {
        return broken(source, tensor->name, "has no dtype", err);
    }
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        if (strcmp(dtypes[i].name, text) == 0) {
            tensor->dtype = dtypes[i].name;
            *ret_bytes = dtypes[i].bytes;
            return 0;
        }
    }
    return slu_err_set(err, SLU_EUNSUP, "%s: tensor %s is of the unknown type %s", source->name,
                       shown(tensor->name).text, shown(text).text);
}

/* An array's number that is no less than zero. */
static bool whole_at(const json_t *array, size_t i, uint64_t *ret)
{
    const json_t *item = json_array_get(array, i);
    if (!json_is_integer(item) || json_integer_value(item) < 0) {
        return false;
    }
    *ret = (uint64_t)json_integer_value(item);
    return true;
}

static int read_tensor(const struct slu_source *source, const char *name, const json_t *value,
                       uint64_t data_offset, struct slu_safetensors_tensor *tensor,
                       struct slu_err *err)
{
    const json_t *shape = json_object_get(value, "shape");
    const json_t *offsets = json_object_get(value, "data_offsets");
    uint32_t item_bytes = 0;
    uint64_t begin, end;
    tensor->name = name;
    int rc = read_dtype(source, value, tensor, &item_bytes, err);
    if (rc < 0) {
        return rc;
    }
    if (!json_is_array(shape) || json_array_size(shape) > SLU_SAFETENSORS_DIMS_MAX) {
        return broken(source, name, "has no shape, or one of too many dimensions", err);
    }
    uint64_t bytes = item_bytes;
    tensor->n_dims = (uint32_t)json_array_size(shape);
    for (uint32_t d = 0; d < tensor->n_dims; d++) {
        if (!whole_at(shape, d, &tensor->dims[d]) ||
            __builtin_mul_overflow(bytes, tensor->dims[d], &bytes)) {
            return broken(source, name, "has a shape that can't be", err);
        }
    }
    if (json_array_size(offsets) != 2 || !whole_at(offsets, 0, &begin) ||
        !whole_at(offsets, 1, &end) || begin > end || end > source->size_bytes - data_offset) {
        return broken(source, name, "has offsets that don't lie in the file", err);
    }
    if (end - begin != bytes) {
        return broken(source, name, "has a shape and type that don't make its number of bytes",
                      err);
    }
    tensor->offset = data_offset + begin;
    tensor->bytes = bytes;
    return 0;
}

static int by_offset(const void *a, const void *b)
{
    const struct slu_safetensors_tensor *x = a, *y = b;
    if (x->offset != y->offset) {
        return x->offset < y->offset ? -1 : 1;
    }
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static int check_cover(const struct slu_source *source, const struct slu_safetensors *file,
                       uint64_t data_offset, struct slu_err *err)
{
    uint64_t at = data_offset;
    for (size_t i = 0; i < file->n; i++) {
        const struct slu_safetensors_tensor *tensor = &file->tensors[i];
        if (tensor->offset != at) {
            return broken(source, tensor->name,
                          tensor->offset < at ? "overlaps another" : "follows bytes of nobody's",
                          err);
        }
        at += tensor->bytes;
    }
    if (at != source->size_bytes) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %llu bytes after its tensors belong to none; the file is corrupt",
                           source->name, (unsigned long long)(source->size_bytes - at));
    }
    return 0;
}

static int read_tensors(const struct slu_source *source, uint64_t data_offset,
                        struct slu_safetensors *file, struct slu_err *err)
{
    const char *name;
    json_t *value;
    file->tensors = calloc(json_object_size(file->json) + 1, sizeof *file->tensors);
    if (!file->tensors) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for its list of tensors", source->name);
    }
    json_object_foreach((json_t *)file->json, name, value)
    {
        if (strcmp(name, "__metadata__") == 0) {
            continue;
        }
        int rc = read_tensor(source, name, value, data_offset, &file->tensors[file->n], err);
        if (rc < 0) {
            return rc;
        }
        file->n++;
    }
    qsort(file->tensors, file->n, sizeof *file->tensors, by_offset);
    return check_cover(source, file, data_offset, err);
}

/* The JSON, parsed. */
static int read_header(struct slu_source *source, uint64_t *ret_data_offset, json_t **ret_json,
                       struct slu_err *err)
{
    uint8_t le[LENGTH_BYTES];
    uint64_t bytes = 0;
    if (source->size_bytes < sizeof le) {
        return slu_err_set(err, SLU_EFORMAT, "%s: is too short for a safetensors file",
                           source->name);
    }
    int rc = source->read_at(source, 0, le, sizeof le, err);
    if (rc < 0) {
        return rc;
    }
    for (unsigned i = 0; i < sizeof le; i++) {
        bytes |= (uint64_t)le[i] << (8 * i);
    }
    if (bytes < 2 || bytes > HEADER_BYTES_MAX || bytes > source->size_bytes - sizeof le) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: claims a header of %llu bytes; it is no safetensors file, or "
                           "truncated",
                           source->name, (unsigned long long)bytes);
    }
    char *text = malloc((size_t)bytes);
    if (!text) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for its header", source->name);
    }
    rc = source->read_at(source, sizeof le, text, (size_t)bytes, err);
    if (rc == 0) {
        json_error_t error;
        json_t *json = json_loadb(text, (size_t)bytes, JSON_REJECT_DUPLICATES, &error);
        if (!json_is_object(json)) {
            rc = slu_err_set(err, SLU_EFORMAT, "%s: its header is no JSON object: %s", source->name,
                             json ? "another value" : shown(error.text).text);
            json_decref(json);
        } else {
            *ret_json = json;
            *ret_data_offset = sizeof le + bytes;
        }
    }
    free(text);
    return rc;
}

int slu_safetensors_open(struct slu_source *source, struct slu_safetensors *ret_file,
                         struct slu_err *err)
{
    struct slu_safetensors file = {0};
    json_t *json = NULL;
    uint64_t data_offset = 0;
    int rc = read_header(source, &data_offset, &json, err);
    if (rc < 0) {
        return rc;
    }
    file.json = json;
    rc = read_tensors(source, data_offset, &file, err);
    if (rc < 0) {
        slu_safetensors_close(&file);
        return rc;
    }
    *ret_file = file;
    return 0;
}

void slu_safetensors_close(struct slu_safetensors *file)
{
    free(file->tensors);
    json_decref(file->json);
    *file = (struct slu_safetensors){0};
}
