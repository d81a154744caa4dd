/* Opening the input, and finding tensors in it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "io/printable.h"
#include "tools/packer_parts.h"

#define PARTS_MAX 512u

/* ---- files -------------------------------------------------------------------------------- */

/* A source that is there already is the caller's. */
static int open_part(const char *path, struct slu_packer_part *part, struct slu_err *err)
{
    int code = part->source ? 0 : slu_source_open_file(path, &part->source, err);
    if (code < 0) {
        return code;
    }
    code = slu_gguf_open(part->source, &part->gguf, err);
    if (code < 0) {
        return code;
    }
    part->is_claimed = calloc(part->gguf->n_tensors + 1, sizeof *part->is_claimed);
    return part->is_claimed ? 0 : slu_err_set(err, SLU_ENOMEM, "%s: out of memory", path);
}

static void close_part(struct slu_packer_part *part)
{
    free(part->is_claimed);
    slu_gguf_close(part->gguf);
    if (!part->is_borrowed) {
        slu_source_destroy(part->source);
    }
}

void slu_packer_input_close(struct slu_packer_input *input)
{
    for (uint32_t i = 0; input->parts && i < input->n_parts; i++) {
        close_part(&input->parts[i]);
    }
    free(input->parts);
    *input = (struct slu_packer_input){0};
}

/* A key of the split set; `otherwise` where it is absent. */
static int split_key(const struct slu_packer_part *part, const char *key, uint64_t otherwise,
                     uint64_t *ret_value, struct slu_err *err)
{
    *ret_value = otherwise;
    int code = slu_kvs_u64(&part->gguf->kvs, key, ret_value, err);
    if (code < 0 && code != SLU_ENOENT) {
        slu_err_prefix(err, "%s", part->source->name);
        return code;
    }
    return 0;
}

/* The name of part `no` (from 0) of a set of `count`, from the name of any of them. NULL if that
 * doesn't end as the names of parts do. Freed by the caller. */
static char *part_path(const char *path, uint32_t no, uint32_t count)
{
    size_t n = strlen(path), tail = strlen("-00001-of-00002.gguf");
    unsigned its_no, its_count;
    int used = 0;
    if (n <= tail ||
        sscanf(path + n - tail, "-%5u-of-%5u.gguf%n", &its_no, &its_count, &used) != 2 ||
        (size_t)used != tail || its_count != count) {
        return NULL;
    }
    char *sibling;
    if (asprintf(&sibling, "%.*s-%05u-of-%05u.gguf", (int)(n - tail), path, no + 1, count) < 0) {
        return NULL;
    }
    return sibling;
}

static int open_sibling(const char *path, uint32_t no, uint32_t count, struct slu_packer_part *part,
                        struct slu_err *err)
{
    char *sibling = part_path(path, no, count);
    if (!sibling) {
        return slu_err_set(err, SLU_EINVAL,
                           "%s: is one of a set of %u files, but its name doesn't end in "
                           "-00001-of-%05u.gguf, by which the others would be found",
                           path, count, count);
    }
    int code = open_part(sibling, part, err);
    if (code == SLU_ENOENT && !part->gguf) {
        slu_err_set(err, code, "%s: is missing; the model is a set of %u files, all in one folder",
                    sibling, count);
    }
    uint64_t its_no = 0, its_count = 0;
    if (code == 0) {
        code = split_key(part, "split.no", UINT64_MAX, &its_no, err);
    }
    if (code == 0) {
        code = split_key(part, "split.count", 1, &its_count, err);
    }
    if (code == 0 && (its_no != no || its_count != count)) {
        code = slu_err_set(err, SLU_EFORMAT,
                           "%s: its metadata doesn't say that it is part %u of %u, as its name "
                           "does; the files are of different sets",
                           sibling, no + 1, count);
    }
    free(sibling);
    return code;
}

/* Replaces the one opened part by all of its set. */
static int open_set(const char *path, uint32_t count, struct slu_packer_input *input,
                    struct slu_err *err)
{
    struct slu_packer_part *parts = calloc(count, sizeof *parts);
    if (!parts) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", path);
    }
    slu_packer_input_close(input);
    input->parts = parts;
    input->n_parts = count;
    uint64_t n_tensors = 0, n_claimed;
    for (uint32_t i = 0; i < count; i++) {
        int code = open_sibling(path, i, count, &parts[i], err);
        if (code < 0) {
            return code;
        }
        n_tensors += parts[i].gguf->n_tensors;
    }
    int code = split_key(&parts[0], "split.tensors.count", n_tensors, &n_claimed, err);
    if (code == 0 && n_claimed != n_tensors) {
        code = slu_err_set(
            err, SLU_EFORMAT, "%s: says that its set has %llu tensors, but there are %llu",
            parts[0].source->name, (unsigned long long)n_claimed, (unsigned long long)n_tensors);
    }
    return code;
}

static const struct slu_gguf_tensor *find(const struct slu_packer_input *input, const char *name,
                                          uint32_t *ret_part)
{
    for (uint32_t i = 0; i < input->n_parts; i++) {
        const struct slu_gguf_tensor *tensor = slu_gguf_find(input->parts[i].gguf, name);
        if (tensor) {
            *ret_part = i;
            return tensor;
        }
    }
    return NULL;
}

/* Within a file the reader has checked that; here across the files of a set. */
static int check_unique(const struct slu_packer_input *input, struct slu_err *err)
{
    for (uint32_t i = 1; i < input->n_parts; i++) {
        const struct slu_gguf *gguf = input->parts[i].gguf;
        for (uint64_t t = 0; t < gguf->n_tensors; t++) {
            char name[SLU_PACK_NAME_BYTES];
            struct slu_str str = gguf->tensors[t].name;
            uint32_t part;
            if (str.len >= sizeof name) {
                continue; /* longer than any that is ever claimed */
            }
            memcpy(name, str.at, str.len);
            name[str.len] = 0;
            if (find(input, name, &part) && part != i) {
                return slu_err_set(
                    err, SLU_EFORMAT, "%s: tensor '%s' is also in %s", input->parts[i].source->name,
                    slu_printable(str.at, str.len).text, input->parts[part].source->name);
            }
        }
    }
    return 0;
}

int slu_packer_input_open(const char *path, struct slu_source *source,
                          struct slu_packer_input *ret_input, struct slu_err *err)
{
    struct slu_packer_input input = {.parts = calloc(1, sizeof *input.parts), .n_parts = 1};
    if (!input.parts) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", path);
    }
    uint64_t count = 0;
    input.parts[0].source = source;
    input.parts[0].is_borrowed = source != NULL;
    int code = open_part(path, &input.parts[0], err);
    if (code == 0) {
        code = split_key(&input.parts[0], "split.count", 1, &count, err);
    }
    if (code == 0 && count > PARTS_MAX) {
        code = slu_err_set(err, SLU_EUNSUP, "%s: is one of a set of %llu files; %u are supported",
                           path, (unsigned long long)count, PARTS_MAX);
    }
    if (code == 0 && count > 1) {
        code = open_set(path, (uint32_t)count, &input, err);
    }
    if (code == 0) {
        code = check_unique(&input, err);
    }
    if (code < 0) {
        slu_packer_input_close(&input);
        return code;
    }
    for (uint32_t i = 0; i < input.n_parts; i++) {
        input.file_bytes += input.parts[i].source->size_bytes;
        for (uint64_t t = 0; t < input.parts[i].gguf->n_tensors; t++) {
            input.weight_bytes += input.parts[i].gguf->tensors[t].bytes;
        }
    }
    *ret_input = input;
    return 0;
}

/* ---- tensors ------------------------------------------------------------------------------ */

bool slu_packer_input_has(const struct slu_packer_input *input, const char *name)
{
    uint32_t part;
    return find(input, name, &part) != NULL;
}

static bool shape_is(const struct slu_gguf_tensor *tensor, uint32_t rows, uint32_t cols, uint32_t n)
{
    const uint64_t *dims = tensor->dims;
    return dims[0] == cols && dims[1] == rows && dims[2] == n && dims[3] == 1;
}

/* "[64, 96, 8]", without the trailing ones. */
static void shape_text(const uint64_t *dims, char *ret_text, size_t bytes)
{
    uint32_t n = SLU_GGUF_DIMS_MAX;
    while (n > 1 && dims[n - 1] == 1) {
        n--;
    }
    size_t at = 0;
    for (uint32_t i = 0; i < n && at < bytes; i++) {
        at += (size_t)snprintf(ret_text + at, bytes - at, "%s%llu%s", i == 0 ? "[" : ", ",
                               (unsigned long long)dims[i], i + 1 == n ? "]" : "");
    }
}

int slu_packer_claim(struct slu_packer_input *input, const char *name, uint32_t rows, uint32_t cols,
                     uint32_t n, struct slu_packer_ref *ret_ref, struct slu_err *err)
{
    uint32_t at;
    const struct slu_gguf_tensor *tensor = find(input, name, &at);
    if (!tensor) {
        return slu_err_set(err, SLU_ENOENT,
                           "%s: tensor '%s' is missing, which the model's metadata calls for",
                           input->parts[0].source->name, name);
    }
    struct slu_packer_part *part = &input->parts[at];
    if (!shape_is(tensor, rows, cols, n)) {
        char is[112], wanted[112];
        shape_text(tensor->dims, is, sizeof is);
        shape_text((const uint64_t[]){cols, rows, n, 1}, wanted, sizeof wanted);
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: tensor '%s' has the shape %s, but the model's metadata calls for "
                           "%s",
                           part->source->name, name, is, wanted);
    }
    const struct slu_fmt *fmt;
    int code = slu_planes_fmt(tensor->type, &fmt, err);
    if (code < 0) {
        slu_err_prefix(err, "%s: tensor '%s' cannot be packed", part->source->name, name);
        return code;
    }
    struct slu_mat_layout layout;
    if (!slu_mat_layout(fmt, rows, cols, &layout)) {
        return slu_err_set(err, SLU_EFORMAT, "%s: tensor '%s' has a shape that %s cannot have",
                           part->source->name, name, fmt->name);
    }
    part->is_claimed[tensor - part->gguf->tensors] = true;
    *ret_ref = (struct slu_packer_ref){
        .source = part->source,
        .offset = tensor->offset,
        .fmt = fmt,
        .rows = rows,
        .cols = cols,
        .n = n,
        .bytes = tensor->bytes,
    };
    snprintf(ret_ref->name, sizeof ret_ref->name, "%s", name);
    return 0;
}

int slu_packer_claim_f32(struct slu_packer_input *input, const char *name, uint32_t rows,
                         uint32_t cols, struct slu_packer_ref *ret_ref, struct slu_err *err)
{
    struct slu_packer_ref ref;
    int code = slu_packer_claim(input, name, rows, cols, 1, &ref, err);
    if (code < 0) {
        return code;
    }
    if (ref.fmt->group != 0) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: tensor '%s' is %s; norms and biases must be F32, F16 or BF16",
                           ref.source->name, name, ref.fmt->name);
    }
    ref.as_f32 = true;
    *ret_ref = ref;
    return 0;
}

static bool contains(struct slu_str str, const char *what)
{
    return memmem(str.at, str.len, what, strlen(what)) != NULL;
}

int slu_packer_check_known(const struct slu_packer_input *input, struct slu_err *err)
{
    static const struct {
        const char *part, *why;
    } known[] = {
        {"rope_freqs", "scales the frequencies of RoPE one by one"},
        {"rope_factors_", "scales the frequencies of RoPE one by one"},
        {"ffn_gate_up_exps", "has gate and up weights fused; convert the model with the two apart"},
    };
    for (uint32_t i = 0; i < input->n_parts; i++) {
        const struct slu_gguf *gguf = input->parts[i].gguf;
        for (uint64_t t = 0; t < gguf->n_tensors; t++) {
            struct slu_str name = gguf->tensors[t].name;
            for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
                if (contains(name, known[k].part)) {
                    return slu_err_set(err, SLU_EUNSUP, "%s: tensor '%s' is not supported: it %s",
                                       input->parts[i].source->name,
                                       slu_printable(name.at, name.len).text, known[k].why);
                }
            }
        }
    }
    return 0;
}

int slu_packer_check_claimed(const struct slu_packer_input *input, enum slu_arch arch,
                             struct slu_err *err)
{
    for (uint32_t i = 0; i < input->n_parts; i++) {
        const struct slu_packer_part *part = &input->parts[i];
        for (uint64_t t = 0; t < part->gguf->n_tensors; t++) {
            struct slu_str name = part->gguf->tensors[t].name;
            if (!part->is_claimed[t]) {
                return slu_err_set(err, SLU_EUNSUP,
                                   "%s: tensor '%s' is not one that a %s model with this metadata "
                                   "has, so leaving it out could change results",
                                   part->source->name, slu_printable(name.at, name.len).text,
                                   slu_arch_name(arch));
            }
        }
    }
    return 0;
}

const struct slu_fmt *slu_packer_ref_fmt(const struct slu_packer_ref *ref)
{
    return ref->as_f32 ? slu_fmt_get(SLU_FMT_F32) : ref->fmt;
}

size_t slu_packer_ref_row_bytes(const struct slu_packer_ref *ref)
{
    return slu_planes_row_bytes(slu_packer_ref_fmt(ref), ref->cols);
}

/* n 16-bit floats in the upper half of `out` become n F32 in all of it. Going upward, number i is
 * written below or onto the place of number i itself, never onto a later one. */
static void widen(uint8_t *out, size_t n, enum slu_fmt_id id)
{
    const uint8_t *in = out + 2 * n;
    for (size_t i = 0; i < n; i++) {
        uint16_t half = (uint16_t)(in[2 * i] | in[2 * i + 1] << 8);
        float value = 0;
        uint32_t bits = (uint32_t)half << 16;
        if (id == SLU_FMT_F16) {
            value = slu_f16_to_f32(half);
        } else {
            memcpy(&value, &bits, sizeof value);
        }
        memcpy(out + 4 * i, &value, sizeof value);
    }
}

int slu_packer_read_rows(const struct slu_packer_ref *ref, uint64_t first, uint64_t n_rows,
                         void *out, struct slu_err *err)
{
    size_t row_bytes = slu_planes_row_bytes(ref->fmt, ref->cols);
    uint64_t offset = ref->offset + first * row_bytes;
    size_t bytes = (size_t)n_rows * row_bytes;
    bool is_half = ref->as_f32 && ref->fmt->id != SLU_FMT_F32;
    uint8_t *to = is_half ? (uint8_t *)out + bytes : out;
    int code = ref->source->read_at(ref->source, offset, to, bytes, err);
    if (code < 0) {
        return code;
    }
    if (is_half) {
        widen(out, (size_t)n_rows * ref->cols, ref->fmt->id);
    }
    return 0;
}
