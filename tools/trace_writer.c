#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "base/place.h"
#include "io/codec.h"
#include "tools/trace_parts.h"

struct slu_trace_writer {
    struct slu_trace_shape shape;
    int fd;
    char *path, *part;
    uint8_t *payload;
    size_t payload_bytes;
};

uint64_t slu_trace_record_checksum(const struct slu_trace_record *record, const void *payload,
                                   size_t bytes)
{
    return slu_checksum(payload, bytes) ^ slu_checksum(record, 16);
}

static int failed(const struct slu_trace_writer *w, struct slu_err *err)
{
    return slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", w->part, strerror(errno));
}

static int write_all(const struct slu_trace_writer *w, const void *data, size_t bytes,
                     struct slu_err *err)
{
    for (const uint8_t *at = data; bytes > 0;) {
        ssize_t n = write(w->fd, at, bytes);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return failed(w, err);
        }
        at += n;
        bytes -= (size_t)n;
    }
    return 0;
}

static int write_header(const struct slu_trace_writer *w, struct slu_err *err)
{
    const struct slu_trace_shape *shape = &w->shape;
    size_t bytes = slu_trace_header_bytes(shape->n_routed);
    uint8_t *data = calloc(1, bytes);
    if (!data) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", w->part);
    }
    const struct slu_trace_header header = {
        .magic = SLU_TRACE_MAGIC,
        .version = SLU_TRACE_VERSION,
        .header_bytes = (uint32_t)bytes,
        .fingerprint = shape->fingerprint,
        .input = shape->input,
        .n_layers = shape->n_layers,
        .n_experts = shape->n_experts,
        .n_used = shape->n_used,
        .n_vocab = shape->n_vocab,
        .n_routed = shape->n_routed,
    };
    memcpy(data, &header, sizeof header);
    memcpy(data + sizeof header, shape->layers, shape->n_routed * sizeof *shape->layers);
    uint64_t sum = slu_checksum(data, bytes - 8);
    memcpy(data + bytes - 8, &sum, sizeof sum);
    int rc = write_all(w, data, bytes, err);
    free(data);
    return rc;
}

static bool is_same(const struct slu_trace_shape *a, const struct slu_trace_shape *b)
{
    return a->fingerprint == b->fingerprint && a->input == b->input && a->n_layers == b->n_layers &&
           a->n_experts == b->n_experts && a->n_used == b->n_used && a->n_vocab == b->n_vocab &&
           a->n_routed == b->n_routed &&
           memcmp(a->layers, b->layers, a->n_routed * sizeof *a->layers) == 0;
}

/* How much of what is there can be gone on with; 0 bytes: nothing. */
static uint64_t usable_bytes(const struct slu_trace_writer *w, uint32_t *ret_n_done)
{
    struct slu_source *source;
    struct slu_trace_reader *reader = NULL;
    struct slu_trace_prompt prompt;
    uint64_t bytes = 0;
    uint32_t n_done = 0;
    if (slu_source_open_file(w->part, &source, NULL) < 0) {
        *ret_n_done = 0;
        return 0;
    }
    if (slu_trace_reader_create(source, &reader, NULL) == 0 &&
        is_same(slu_trace_reader_shape(reader), &w->shape)) {
        bytes = slu_trace_reader_offset(reader);
        while (n_done < *ret_n_done && slu_trace_reader_next(reader, &prompt, NULL) > 0) {
            bytes = slu_trace_reader_offset(reader);
            n_done++;
        }
    }
    slu_trace_reader_destroy(reader);
    slu_source_destroy(source);
    *ret_n_done = n_done;
    return bytes;
}

int slu_trace_writer_create(const char *path, const struct slu_trace_shape *shape,
                            uint32_t *ret_n_done, struct slu_trace_writer **ret_writer,
                            struct slu_err *err)
{
    struct slu_trace_writer *w = calloc(1, sizeof *w);
    if (!w) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
    }
    w->fd = -1;
    w->shape = *shape;
    w->path = strdup(path);
    if (!w->path || asprintf(&w->part, "%s.part", path) < 0) {
        w->part = NULL;
        slu_trace_writer_destroy(w, true);
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
    }
    int rc = slu_place_check(path, err);
    uint32_t n_done = ret_n_done ? *ret_n_done : 0;
    rc = rc < 0 ? rc : slu_place_check_left(w->part, SLU_TRACE_MAGIC, err);
    if (rc < 0) {
        slu_trace_writer_destroy(w, true);
        return rc;
    }
    w->fd = open(w->part, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (w->fd >= 0 && flock(w->fd, LOCK_EX | LOCK_NB) != 0) {
        rc = slu_err_set(err, SLU_EIO, "%s: another program is writing it", w->part);
        slu_trace_writer_destroy(w, true);
        return rc;
    }
    uint64_t bytes = ret_n_done && w->fd >= 0 ? usable_bytes(w, &n_done) : 0;
    if (w->fd < 0 || ftruncate(w->fd, (off_t)bytes) != 0 || lseek(w->fd, 0, SEEK_END) < 0) {
        rc = slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", path, strerror(errno));
    } else if (bytes == 0) {
        rc = write_header(w, err);
    }
    if (rc < 0) {
        slu_trace_writer_destroy(w, bytes > 0); /* what can be gone on with, if anything */
        return rc;
    }
    if (ret_n_done) {
        *ret_n_done = n_done;
    }
    *ret_writer = w;
    return 0;
}

/* The upper half of a float, rounded. */
static uint16_t bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x8000u) >> 16);
}

/* One token at one layer; false where the model has no such expert. */
static bool put_visit(const struct slu_trace_shape *shape, uint8_t *at, const uint16_t *experts,
                      const float *weights)
{
    uint32_t k = shape->n_used, id_bytes = shape->n_experts > 256 ? 2 : 1;
    float sum = 0;
    for (uint32_t i = 0; i < k; i++) {
        sum += weights[i] > 0 ? weights[i] : 0;
    }
    sum = isfinite(sum) && sum < 1e30f ? sum : 0;
    uint16_t total = bf16(sum);
    memcpy(at, &total, 2);
    for (uint32_t i = 0; i < k; i++) {
        if (experts[i] >= shape->n_experts) {
            return false;
        }
        float share = sum > 0 && weights[i] > 0 ? weights[i] / sum : 0;
        memcpy(at + 2 + (size_t)i * id_bytes, &experts[i], id_bytes);
        at[2 + (size_t)k * id_bytes + i] = (uint8_t)(share * 255.0f + 0.5f);
    }
    return true;
}

static int reserve(struct slu_trace_writer *w, size_t bytes, struct slu_err *err)
{
    if (bytes > w->payload_bytes) {
        uint8_t *more = realloc(w->payload, bytes);
        if (!more) {
            return slu_err_set(err, SLU_ENOMEM, "%s: no memory for a prompt of %zu bytes", w->part,
                               bytes);
        }
        w->payload = more;
        w->payload_bytes = bytes;
    }
    return 0;
}

int slu_trace_writer_append(struct slu_trace_writer *w, const struct slu_trace_prompt *prompt,
                            struct slu_err *err)
{
    const struct slu_trace_shape *shape = &w->shape;
    if (prompt->n_tokens == 0 || prompt->n_tokens > SLU_TRACE_TOKENS_MAX ||
        prompt->n_prompt > prompt->n_tokens) {
        return slu_err_set(err, SLU_EINVAL, "%s: a prompt of %u tokens can't be recorded", w->part,
                           prompt->n_tokens);
    }
    size_t bytes = (size_t)slu_trace_payload_bytes(shape, prompt->n_tokens);
    size_t visit_bytes = slu_trace_visit_bytes(shape);
    int rc = reserve(w, bytes, err);
    if (rc < 0) {
        return rc;
    }
    memcpy(w->payload, prompt->ids, 4 * (size_t)prompt->n_tokens);
    uint8_t *at = w->payload + 4 * (size_t)prompt->n_tokens;
    for (size_t i = 0; i < (size_t)prompt->n_tokens * shape->n_routed; i++, at += visit_bytes) {
        if (!put_visit(shape, at, prompt->experts + i * shape->n_used,
                       prompt->weights + i * shape->n_used)) {
            return slu_err_set(err, SLU_EINVAL, "%s: the model has no such expert", w->part);
        }
    }
    struct slu_trace_record record = {.magic = SLU_TRACE_RECORD_MAGIC,
                                      .n_tokens = prompt->n_tokens,
                                      .n_prompt = prompt->n_prompt};
    record.checksum = slu_trace_record_checksum(&record, w->payload, bytes);
    rc = write_all(w, &record, sizeof record, err);
    return rc < 0 ? rc : write_all(w, w->payload, bytes, err);
}

int slu_trace_writer_sync(struct slu_trace_writer *w, struct slu_err *err)
{
    return fdatasync(w->fd) == 0 || errno == EINVAL ? 0 : failed(w, err);
}

int slu_trace_writer_finish(struct slu_trace_writer *w, struct slu_err *err)
{
    int rc = slu_trace_writer_sync(w, err);
    if (rc == 0 && rename(w->part, w->path) != 0) {
        rc = slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", w->path, strerror(errno));
    }
    return rc;
}

const char *slu_trace_writer_path(const struct slu_trace_writer *w)
{
    return w->part;
}

void slu_trace_writer_destroy(struct slu_trace_writer *w, bool keep)
{
    if (!w) {
        return;
    }
    if (w->fd >= 0) {
        close(w->fd);
        if (!keep) {
            unlink(w->part);
        }
    }
    free(w->payload);
    free(w->part);
    free(w->path);
    free(w);
}
