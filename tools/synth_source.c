/*
 * A generated model as bytes: written to a file from its first to its last, or made on demand where
 * somebody reads. The header lies in memory; behind it each tensor starts at a multiple of 32.
 */
#include <stdlib.h>
#include <string.h>

#include "tools/planes.h"
#include "tools/synth_parts.h"

#define ALIGN       32u
#define WRITE_BYTES (1u << 20)

struct synth_source {
    struct slu_source base; /* first: callers hold this */
    struct slu_synth_plan plan;
    struct slu_synth_codes codes;
    uint8_t *head;
    size_t head_bytes;
    uint64_t *offsets; /* of tensors, n_tensors + 1: the last is the end */
};

static uint64_t padded(uint64_t bytes)
{
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

/* Bytes from .. from+n-1 of a tensor. Whole rows are made where they belong, others in `row`. */
static void make(const struct synth_source *s, const struct slu_synth_tensor *tensor, uint64_t from,
                 uint8_t *out, size_t n, float *scratch, uint8_t *row)
{
    uint64_t seed = s->plan.model.p.seed;
    while (n > 0) {
        uint64_t r = from / tensor->row_bytes;
        size_t skip = (size_t)(from - r * tensor->row_bytes);
        size_t part = (size_t)tensor->row_bytes - skip;
        part = part < n ? part : n;
        if (part == tensor->row_bytes) {
            slu_synth_row(&s->codes, seed, tensor, r, scratch, out);
        } else {
            slu_synth_row(&s->codes, seed, tensor, r, scratch, row);
            memcpy(out, row + skip, part);
        }
        from += part;
        out += part;
        n -= part;
    }
}

/* The last tensor that begins at or before `offset`. */
static size_t tensor_at(const struct synth_source *s, uint64_t offset)
{
    size_t lo = 0, hi = s->plan.n_tensors;
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (s->offsets[mid] <= offset) {
            lo = mid;
        } else {
            hi = mid;
        }
    }
    return lo;
}

static int synth_read_at(struct slu_source *base, uint64_t offset, void *buffer, size_t bytes,
                         struct slu_err *err)
{
    struct synth_source *s = (struct synth_source *)base;
    if (offset > base->size_bytes || bytes > base->size_bytes - offset) {
        return slu_err_set(err, SLU_EIO, "%s: %zu bytes at offset %llu lie past its end at %llu",
                           base->name, bytes, (unsigned long long)offset,
                           (unsigned long long)base->size_bytes);
    }
    size_t scratch_bytes = (s->plan.cols_max + SLU_SYNTH_LANES) * sizeof(float);
    float *scratch = malloc(2 * scratch_bytes); /* of numbers, and of no more bytes once packed */
    if (!scratch) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory for a row", base->name);
    }
    uint8_t *out = buffer;
    while (bytes > 0) {
        size_t n = 0;
        if (offset < s->head_bytes) {
            n = s->head_bytes - (size_t)offset < bytes ? s->head_bytes - (size_t)offset : bytes;
            memcpy(out, s->head + offset, n);
        } else {
            size_t t = tensor_at(s, offset);
            uint64_t from = offset - s->offsets[t], room = s->offsets[t + 1] - offset;
            n = room < bytes ? (size_t)room : bytes;
            uint64_t own = s->plan.tensors[t].bytes;
            size_t made = from >= own ? 0 : own - from < n ? (size_t)(own - from) : n;
            make(s, &s->plan.tensors[t], from, out, made, scratch,
                 (uint8_t *)scratch + scratch_bytes);
            memset(out + made, 0, n - made);
        }
        offset += n;
        out += n;
        bytes -= n;
    }
    free(scratch);
    return 0;
}

static void synth_destroy(struct slu_source *base)
{
    struct synth_source *s = (struct synth_source *)base;
    slu_synth_codes_finish(&s->codes);
    slu_synth_plan_finish(&s->plan);
    free(s->offsets);
    free(s->head);
    free(s);
}

static int make_head(struct synth_source *s, struct slu_err *err)
{
    struct slu_gguf_writer *writer;
    int code = slu_gguf_writer_create(NULL, &writer, err);
    if (code < 0) {
        return code;
    }
    slu_synth_write_kvs(writer, &s->plan.model);
    for (size_t i = 0; i < s->plan.n_tensors; i++) {
        const struct slu_synth_tensor *tensor = &s->plan.tensors[i];
        slu_gguf_writer_tensor(writer, tensor->name, slu_planes_ggml_type(tensor->fmt),
                               tensor->n_dims, tensor->dims, tensor->bytes);
    }
    code = slu_gguf_writer_head(writer, &s->head, &s->head_bytes, err);
    slu_gguf_writer_destroy(writer);
    return code;
}

int slu_synth_open(const struct slu_synth_params *params, struct slu_source **ret_source,
                   struct slu_err *err)
{
    struct synth_source *s = calloc(1, sizeof *s);
    if (!s) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for a model");
    }
    s->base = (struct slu_source){
        .read_at = synth_read_at, .destroy = synth_destroy, .name = "the generated model"};
    int code = slu_synth_plan_make(params, &s->plan, err);
    if (code == 0) {
        code = slu_synth_codes_init(&s->codes, s->plan.tensors, s->plan.n_tensors, err);
    }
    if (code == 0) {
        code = make_head(s, err);
    }
    if (code == 0) {
        s->offsets = malloc((s->plan.n_tensors + 1) * sizeof *s->offsets);
        code = s->offsets ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory for a model");
    }
    if (code < 0) {
        synth_destroy(&s->base);
        return code;
    }
    s->offsets[0] = s->head_bytes;
    for (size_t i = 0; i < s->plan.n_tensors; i++) {
        s->offsets[i + 1] = s->offsets[i] + padded(s->plan.tensors[i].bytes);
    }
    s->base.size_bytes = s->offsets[s->plan.n_tensors];
    *ret_source = &s->base;
    return 0;
}

static int copy(struct slu_source *source, const struct slu_synth_params *params,
                struct slu_gguf_writer *writer, struct slu_err *err)
{
    uint8_t *buffer = malloc(WRITE_BYTES);
    int code = buffer ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory to write a model");
    for (uint64_t at = 0; at < source->size_bytes && code == 0; at += WRITE_BYTES) {
        uint64_t left = source->size_bytes - at;
        size_t n = left < WRITE_BYTES ? (size_t)left : WRITE_BYTES;
        if (params->cancel && atomic_load_explicit(params->cancel, memory_order_relaxed)) {
            code = slu_err_set(err, SLU_ECANCEL, "stopped; nothing was written");
        }
        code = code < 0 ? code : source->read_at(source, at, buffer, n, err);
        code = code < 0 ? code : slu_gguf_writer_raw(writer, buffer, n, err);
        if (code == 0 && params->progress) {
            params->progress(params->arg, at + n, source->size_bytes);
        }
    }
    free(buffer);
    return code;
}

int slu_synth_write(const char *path, const struct slu_synth_params *params, struct slu_err *err)
{
    struct slu_source *source;
    struct slu_gguf_writer *writer = NULL;
    int code = slu_synth_open(params, &source, err);
    if (code < 0) {
        return code;
    }
    code = slu_gguf_writer_create(path, &writer, err);
    code = code < 0 ? code : copy(source, params, writer, err);
    code = code < 0 ? code : slu_gguf_writer_finish(writer, err);
    slu_gguf_writer_destroy(writer);
    slu_source_destroy(source);
    return code;
}
