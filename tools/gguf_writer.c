#include "tools/gguf_writer.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/place.h"
#include "io/gguf.h"

#define ALIGN        32u
#define STREAM_BYTES (1u << 20)

/* Growing bytes; once an allocation has failed it stays failed. */
struct bytes {
    uint8_t *at;
    size_t n, room;
    bool failed;
};

struct slu_gguf_writer {
    char *path, *temp;
    FILE *file; /* NULL once finished */
    struct bytes kvs, infos;
    uint64_t n_kvs, n_tensors;
    uint64_t *tensor_bytes; /* n_tensors, grown with `infos` */
    size_t tensor_room;
    uint64_t data_bytes; /* of all tensors, padded */
    uint64_t current, current_done;
};

static void put(struct bytes *bytes, const void *data, size_t n)
{
    if (bytes->failed || n == 0) {
        return;
    }
    if (n > bytes->room - bytes->n) {
        size_t room = bytes->room ? bytes->room : 4096;
        while (room - bytes->n < n) {
            room *= 2;
        }
        uint8_t *at = realloc(bytes->at, room);
        if (!at) {
            bytes->failed = true;
            return;
        }
        bytes->at = at;
        bytes->room = room;
    }
    memcpy(bytes->at + bytes->n, data, n);
    bytes->n += n;
}

static void put_u32(struct bytes *bytes, uint32_t value)
{
    uint8_t le[4];
    for (unsigned i = 0; i < 4; i++) {
        le[i] = (uint8_t)(value >> (8 * i));
    }
    put(bytes, le, sizeof le);
}

static void put_u64(struct bytes *bytes, uint64_t value)
{
    put_u32(bytes, (uint32_t)value);
    put_u32(bytes, (uint32_t)(value >> 32));
}

static void put_f32(struct bytes *bytes, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    put_u32(bytes, bits);
}

static void put_str(struct bytes *bytes, const char *text)
{
    size_t n = strlen(text);
    put_u64(bytes, n);
    put(bytes, text, n);
}

static int system_error(struct slu_gguf_writer *writer, const char *doing, struct slu_err *err)
{
    return slu_err_set(err, SLU_EIO, "%s: cannot %s: %s", writer->path, doing, strerror(errno));
}

int slu_gguf_writer_create(const char *path, struct slu_gguf_writer **ret_writer,
                           struct slu_err *err)
{
    struct slu_gguf_writer *writer = calloc(1, sizeof *writer);
    if (!writer) {
        goto no_memory;
    }
    if (!path) {
        *ret_writer = writer;
        return 0;
    }
    writer->path = strdup(path);
    if (!writer->path) {
        goto no_memory;
    }
    int fd = slu_place_open(path, &writer->temp, err);
    if (fd < 0) {
        slu_gguf_writer_destroy(writer);
        return fd;
    }
    writer->file = fdopen(fd, "wb");
    if (!writer->file) {
        close(fd);
        goto no_memory;
    }
    setvbuf(writer->file, NULL, _IOFBF, STREAM_BYTES);
    *ret_writer = writer;
    return 0;

no_memory:
    slu_gguf_writer_destroy(writer);
    return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", path ? path : "GGUF");
}

void slu_gguf_writer_destroy(struct slu_gguf_writer *writer)
{
    if (!writer) {
        return;
    }
    if (writer->file) {
        fclose(writer->file);
        unlink(writer->temp);
    }
    free(writer->kvs.at);
    free(writer->infos.at);
    free(writer->tensor_bytes);
    free(writer->path);
    free(writer->temp);
    free(writer);
}

static void put_key(struct slu_gguf_writer *writer, const char *key, enum slu_kv_type type)
{
    put_str(&writer->kvs, key);
    put_u32(&writer->kvs, type);
    writer->n_kvs++;
}

static void put_array(struct slu_gguf_writer *writer, const char *key, enum slu_kv_type type,
                      size_t n)
{
    put_key(writer, key, SLU_KV_ARRAY);
    put_u32(&writer->kvs, type);
    put_u64(&writer->kvs, n);
}

void slu_gguf_writer_u32(struct slu_gguf_writer *writer, const char *key, uint32_t value)
{
    put_key(writer, key, SLU_KV_U32);
    put_u32(&writer->kvs, value);
}

void slu_gguf_writer_u16(struct slu_gguf_writer *writer, const char *key, uint16_t value)
{
    put_key(writer, key, SLU_KV_U16);
    uint8_t le[2] = {(uint8_t)value, (uint8_t)(value >> 8)};
    put(&writer->kvs, le, sizeof le);
}

void slu_gguf_writer_f32(struct slu_gguf_writer *writer, const char *key, float value)
{
    put_key(writer, key, SLU_KV_F32);
    put_f32(&writer->kvs, value);
}

void slu_gguf_writer_bool(struct slu_gguf_writer *writer, const char *key, bool value)
{
    put_key(writer, key, SLU_KV_BOOL);
    uint8_t byte = value;
    put(&writer->kvs, &byte, 1);
}

void slu_gguf_writer_str(struct slu_gguf_writer *writer, const char *key, const char *value)
{
    put_key(writer, key, SLU_KV_STRING);
    put_str(&writer->kvs, value);
}

void slu_gguf_writer_i32s(struct slu_gguf_writer *writer, const char *key, const int32_t *values,
                          size_t n)
{
    put_array(writer, key, SLU_KV_I32, n);
    writer->kvs.failed |= !values;
    for (size_t i = 0; values && i < n; i++) {
        put_u32(&writer->kvs, (uint32_t)values[i]);
    }
}

void slu_gguf_writer_f32s(struct slu_gguf_writer *writer, const char *key, const float *values,
                          size_t n)
{
    put_array(writer, key, SLU_KV_F32, n);
    writer->kvs.failed |= !values;
    for (size_t i = 0; values && i < n; i++) {
        put_f32(&writer->kvs, values[i]);
    }
}

void slu_gguf_writer_strs_begin(struct slu_gguf_writer *writer, const char *key, size_t n)
{
    put_array(writer, key, SLU_KV_STRING, n);
}

void slu_gguf_writer_strs_item(struct slu_gguf_writer *writer, const char *value)
{
    put_str(&writer->kvs, value);
}

void slu_gguf_writer_kvs(struct slu_gguf_writer *writer, const void *kvs, size_t bytes,
                         uint64_t n_kvs)
{
    put(&writer->kvs, kvs, bytes);
    writer->n_kvs += n_kvs;
}

static uint64_t padded(uint64_t bytes)
{
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

void slu_gguf_writer_tensor(struct slu_gguf_writer *writer, const char *name, uint32_t ggml_type,
                            uint32_t n_dims, const uint64_t *dims, uint64_t bytes)
{
    assert(n_dims >= 1 && n_dims <= SLU_GGUF_DIMS_MAX);
    if (writer->n_tensors == writer->tensor_room) {
        size_t room = writer->tensor_room ? 2 * writer->tensor_room : 64;
        uint64_t *sizes = realloc(writer->tensor_bytes, room * sizeof *sizes);
        if (!sizes) {
            writer->infos.failed = true;
            return;
        }
        writer->tensor_bytes = sizes;
        writer->tensor_room = room;
    }
    put_str(&writer->infos, name);
    put_u32(&writer->infos, n_dims);
    for (uint32_t i = 0; i < n_dims; i++) {
        put_u64(&writer->infos, dims[i]);
    }
    put_u32(&writer->infos, ggml_type);
    put_u64(&writer->infos, writer->data_bytes);
    writer->tensor_bytes[writer->n_tensors++] = bytes;
    writer->data_bytes += padded(bytes);
}

static int write_bytes(struct slu_gguf_writer *writer, const void *data, size_t n,
                       struct slu_err *err)
{
    if (n && fwrite(data, 1, n, writer->file) != n) {
        return system_error(writer, "write", err);
    }
    return 0;
}

static int write_padding(struct slu_gguf_writer *writer, uint64_t n, struct slu_err *err)
{
    static const uint8_t zeros[ALIGN];
    return write_bytes(writer, zeros, (size_t)(padded(n) - n), err);
}

int slu_gguf_writer_head(struct slu_gguf_writer *writer, uint8_t **ret_head, size_t *ret_bytes,
                         struct slu_err *err)
{
    static const uint8_t zeros[ALIGN];
    struct bytes head = {0};
    put(&head, "GGUF", 4);
    put_u32(&head, 3);
    put_u64(&head, writer->n_tensors);
    put_u64(&head, writer->n_kvs);
    put(&head, writer->kvs.at, writer->kvs.n);
    put(&head, writer->infos.at, writer->infos.n);
    put(&head, zeros, (size_t)(padded(head.n) - head.n));
    if (head.failed || writer->kvs.failed || writer->infos.failed) {
        free(head.at);
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory for the header",
                           writer->path ? writer->path : "GGUF");
    }
    *ret_head = head.at;
    *ret_bytes = head.n;
    return 0;
}

int slu_gguf_writer_begin(struct slu_gguf_writer *writer, struct slu_err *err)
{
    uint8_t *head;
    size_t bytes;
    int code = slu_gguf_writer_head(writer, &head, &bytes, err);
    if (code == 0) {
        code = write_bytes(writer, head, bytes, err);
        free(head);
    }
    return code;
}

int slu_gguf_writer_data(struct slu_gguf_writer *writer, const void *data, size_t bytes,
                         struct slu_err *err)
{
    assert(writer->current < writer->n_tensors);
    uint64_t size = writer->tensor_bytes[writer->current];
    assert(bytes <= size - writer->current_done);
    int code = write_bytes(writer, data, bytes, err);
    if (code < 0) {
        return code;
    }
    writer->current_done += bytes;
    if (writer->current_done < size) {
        return 0;
    }
    writer->current++;
    writer->current_done = 0;
    return write_padding(writer, size, err);
}

int slu_gguf_writer_raw(struct slu_gguf_writer *writer, const void *data, size_t bytes,
                        struct slu_err *err)
{
    return write_bytes(writer, data, bytes, err);
}

int slu_gguf_writer_finish(struct slu_gguf_writer *writer, struct slu_err *err)
{
    assert(writer->current == writer->n_tensors);
    FILE *file = writer->file;
    writer->file = NULL;
    /* No sync: what is written here can be generated again. */
    if (fclose(file) != 0 || rename(writer->temp, writer->path) != 0) {
        int code = system_error(writer, "write", err);
        unlink(writer->temp);
        return code;
    }
    return 0;
}
