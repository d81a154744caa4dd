#include "tools/retype.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/gguf.h"
#include "kern/kern.h"
#include "tools/gguf_writer.h"
#include "tools/planes.h"
#include "tools/quantize.h"

#define NAME_BYTES 128
#define COLS_MAX   (1u << 24)

struct copy {
    struct slu_source *source;
    struct slu_gguf *gguf;
    struct slu_gguf_writer *writer;
    const struct slu_retype *types;
};

static bool ends_with(const struct slu_str *s, const char *end)
{
    size_t n = strlen(end);
    return s->len >= n && !memcmp(s->at + s->len - n, end, n);
}

static bool has(const struct slu_str *s, const char *part)
{
    return memmem(s->at, s->len, part, strlen(part)) != NULL;
}

/* A stack of routed experts, or one expert's tensor as old files have it. */
static bool is_expert(const struct slu_gguf_tensor *t)
{
    return has(&t->name, "_exps.weight") ||
           ((has(&t->name, ".ffn_gate.") || has(&t->name, ".ffn_up.") ||
             has(&t->name, ".ffn_down.")) &&
            !ends_with(&t->name, ".ffn_gate.weight") && !ends_with(&t->name, ".ffn_up.weight") &&
            !ends_with(&t->name, ".ffn_down.weight"));
}

/* What a tensor becomes; NULL: what it is. */
static const struct slu_fmt *target_of(const struct copy *copy, const struct slu_gguf_tensor *t)
{
    const struct slu_fmt *from, *to = is_expert(t) ? copy->types->experts : copy->types->resident;
    bool is_matrix = t->dims[1] > 1 && ends_with(&t->name, ".weight") &&
                     !has(&t->name, "ffn_gate_inp") && t->name.len < NAME_BYTES;
    if (!to || !is_matrix || t->dims[0] % to->granule || !t->bytes ||
        slu_planes_fmt(t->type, &from, NULL) < 0) {
        return NULL;
    }
    return from->bits >= 8 && from != to ? to : NULL;
}

static uint64_t rows_of(const struct slu_gguf_tensor *t)
{
    return t->dims[1] * t->dims[2] * t->dims[3];
}

static void add_tensor(struct copy *copy, const struct slu_gguf_tensor *t)
{
    char name[NAME_BYTES];
    const struct slu_fmt *to = target_of(copy, t);
    uint64_t bytes = to ? rows_of(t) * slu_planes_row_bytes(to, (uint32_t)t->dims[0]) : t->bytes;
    snprintf(name, sizeof name, "%.*s", (int)t->name.len, t->name.at);
    slu_gguf_writer_tensor(copy->writer, name, to ? slu_planes_ggml_type(to) : t->type, t->n_dims,
                           t->dims, bytes);
}

/* Buffers of a row. */
struct row {
    uint8_t *in, *out;
    float *x;
    struct slu_planes planes; /* of the row as it is */
};

static int check_finite(const struct copy *copy, const struct slu_gguf_tensor *t, const float *x,
                        struct slu_err *err)
{
    for (uint64_t i = 0; i < t->dims[0]; i++) {
        if (!isfinite(x[i])) {
            return slu_err_set(err, SLU_EFORMAT,
                               "%s: tensor '%.*s' has a number that is infinite or none at all",
                               copy->source->name, (int)t->name.len, t->name.at);
        }
    }
    return 0;
}

static int retype_rows(struct copy *copy, const struct slu_gguf_tensor *t, const struct slu_fmt *to,
                       struct row *row, struct slu_err *err)
{
    uint32_t cols = (uint32_t)t->dims[0];
    size_t in_bytes = slu_planes_row_bytes(row->planes.fmt, cols);
    struct slu_mat mat;
    slu_mat_view(&mat, row->planes.fmt, 1, cols, row->planes.data);
    for (uint64_t r = 0; r < rows_of(t); r++) {
        uint64_t at = t->offset + r * in_bytes;
        int code = copy->source->read_at(copy->source, at, row->in, in_bytes, err);
        if (code < 0) {
            return code;
        }
        slu_planes_import(&row->planes, 0, row->in);
        slu_kern_get(0)->row_f32(row->x, &mat, 0);
        code = check_finite(copy, t, row->x, err);
        if (code < 0) {
            return code;
        }
        if (to->id == SLU_FMT_Q4_0) {
            slu_quantize_q4_0(row->x, cols, row->out);
        } else {
            slu_quantize_row(to, row->x, cols, row->out);
        }
        code = slu_gguf_writer_data(copy->writer, row->out, slu_planes_row_bytes(to, cols), err);
        if (code < 0) {
            return code;
        }
    }
    return 0;
}

static int put_retyped(struct copy *copy, const struct slu_gguf_tensor *t, const struct slu_fmt *to,
                       struct slu_err *err)
{
    const struct slu_fmt *from;
    struct row row = {0};
    int code = slu_planes_fmt(t->type, &from, err);
    if (code < 0) {
        return code;
    }
    if (t->dims[0] > COLS_MAX ||
        !slu_planes_init(&row.planes, from, 1, (uint32_t)t->dims[0], NULL)) {
        return slu_err_set(err, SLU_EUNSUP, "%s: tensor '%.*s' is too wide", copy->source->name,
                           (int)t->name.len, t->name.at);
    }
    row.in = malloc(4 * t->dims[0]);
    row.out = malloc(4 * t->dims[0]);
    row.x = malloc(sizeof(float) * t->dims[0]);
    row.planes.data = aligned_alloc(64, (row.planes.at.bytes + 63) / 64 * 64);
    if (!row.in || !row.out || !row.x || !row.planes.data) {
        code = slu_err_set(err, SLU_ENOMEM, "%s: out of memory for tensor '%.*s'",
                           copy->source->name, (int)t->name.len, t->name.at);
    } else {
        code = retype_rows(copy, t, to, &row, err);
    }
    free(row.in);
    free(row.out);
    free(row.x);
    free(row.planes.data);
    return code;
}

static int put_data(struct copy *copy, const struct slu_gguf_tensor *t, struct slu_err *err)
{
    const struct slu_fmt *to = target_of(copy, t);
    if (to) {
        return put_retyped(copy, t, to, err);
    }
    uint8_t *data = malloc(t->bytes + 1);
    if (!data) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory for tensor '%.*s'",
                           copy->source->name, (int)t->name.len, t->name.at);
    }
    int code = copy->source->read_at(copy->source, t->offset, data, t->bytes, err);
    if (code == 0) {
        code = slu_gguf_writer_data(copy->writer, data, t->bytes, err);
    }
    free(data);
    return code;
}

int slu_retype_write(const char *in, const char *out, const struct slu_retype *types,
                     struct slu_err *err)
{
    struct copy copy = {.types = types};
    int code = slu_source_open_file(in, &copy.source, err);
    if (code == 0) {
        code = slu_gguf_open(copy.source, &copy.gguf, err);
    }
    if (code == 0) {
        code = slu_gguf_writer_create(out, &copy.writer, err);
    }
    if (code < 0) {
        goto end;
    }
    slu_gguf_writer_kvs(copy.writer, copy.gguf->kv_data, copy.gguf->kv_bytes, copy.gguf->kvs.n);
    for (uint64_t i = 0; i < copy.gguf->n_tensors; i++) {
        add_tensor(&copy, &copy.gguf->tensors[i]);
    }
    code = slu_gguf_writer_begin(copy.writer, err);
    for (uint64_t i = 0; i < copy.gguf->n_tensors && code == 0; i++) {
        code = put_data(&copy, &copy.gguf->tensors[i], err);
    }
    if (code == 0) {
        code = slu_gguf_writer_finish(copy.writer, err);
    }
end:
    slu_gguf_writer_destroy(copy.writer);
    slu_gguf_close(copy.gguf);
    slu_source_destroy(copy.source);
    return code;
}
