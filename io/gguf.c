#include "io/gguf.h"

#include <stdio.h>
#include <stdlib.h>

#include "io/cursor.h"
#include "io/printable.h"

#define MAGIC_BYTES       4u
#define VERSION           3u
#define HEADER_BYTES_MAX  (1ull << 30)
#define READ_FIRST_BYTES  (1ull << 20)
#define ALIGNMENT_DEFAULT 32u
#define ALIGNMENT_MAX     (1u << 20)
/* The largest models have some tens of thousands of tensors where each expert is one of its own. */
#define TENSORS_MAX (1u << 20)
/* The shortest entry: an empty name's length, n_dims, one dimension, type, offset. */
#define TENSOR_BYTES_MIN 32u
/* Products of dimensions stay below this, so that bytes fit in 63 bits for every type. */
#define WEIGHTS_MAX (1ull << 58)

/* What a caller holds is the first member; the order by name serves slu_gguf_find. */
struct opened {
    struct slu_gguf gguf;
    const struct slu_gguf_tensor **by_name;
};

static struct slu_printable tensor_name(const struct slu_gguf_tensor *tensor)
{
    return slu_printable(tensor->name.at, tensor->name.len);
}

static int truncated(const struct slu_cursor *cursor, const char *what, const char *name,
                     struct slu_err *err)
{
    return slu_err_set(err, SLU_EFORMAT,
                       "%s: ends at byte %llu, in the middle of %s; it is truncated or "
                       "corrupt",
                       name, (unsigned long long)cursor->whole_bytes, what);
}

static int parse_preamble(struct slu_cursor *cursor, uint64_t *ret_n_tensors, uint64_t *ret_n_kvs,
                          const char *name, struct slu_err *err)
{
    uint32_t version;
    const uint8_t *magic = slu_cursor_take(cursor, MAGIC_BYTES);
    if (!magic || memcmp(magic, "GGUF", MAGIC_BYTES) != 0) {
        return slu_err_set(err, SLU_EFORMAT, "%s: is not a GGUF file: it doesn't begin with 'GGUF'",
                           name);
    }
    if (!slu_cursor_u32(cursor, &version)) {
        return truncated(cursor, "its header", name, err);
    }
    if (version != 0 && (version & 0xffff) == 0) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: is a big-endian GGUF file; convert it to little-endian first",
                           name);
    }
    if (version != VERSION) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: is GGUF version %u; only version 3 is supported, so convert the "
                           "model anew",
                           name, version);
    }
    if (!slu_cursor_u64(cursor, ret_n_tensors) || !slu_cursor_u64(cursor, ret_n_kvs)) {
        return truncated(cursor, "its header", name, err);
    }
    return 0;
}

/* type and dims are known: sets bytes, if the type's size is. */
static int size_tensor(struct slu_gguf_tensor *tensor, const char *name, struct slu_err *err)
{
    uint64_t weights = 1;
    for (uint32_t d = 0; d < tensor->n_dims; d++) {
        if (tensor->dims[d] == 0) {
            return slu_err_set(err, SLU_EFORMAT, "%s: dimension %u of tensor '%s' is zero", name, d,
                               tensor_name(tensor).text);
        }
        if (__builtin_mul_overflow(weights, tensor->dims[d], &weights) || weights > WEIGHTS_MAX) {
            return slu_err_set(err, SLU_EFORMAT, "%s: the dimensions of tensor '%s' are too large",
                               name, tensor_name(tensor).text);
        }
    }
    uint32_t block_weights, block_bytes;
    if (!slu_ggml_type_block(tensor->type, &block_weights, &block_bytes)) {
        return 0;
    }
    if (tensor->dims[0] % block_weights != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: rows of tensor '%s' have %llu weights, not a multiple of the %u "
                           "that type %s needs",
                           name, tensor_name(tensor).text, (unsigned long long)tensor->dims[0],
                           block_weights, slu_ggml_type_name(tensor->type));
    }
    if (__builtin_mul_overflow(weights / block_weights, block_bytes, &tensor->bytes)) {
        return slu_err_set(err, SLU_EFORMAT, "%s: tensor '%s' is too large", name,
                           tensor_name(tensor).text);
    }
    return 0;
}

static int parse_tensor(struct slu_cursor *cursor, uint64_t index, struct slu_gguf_tensor *tensor,
                        const char *name, struct slu_err *err)
{
    char what[48];
    snprintf(what, sizeof what, "the entry of tensor %llu", (unsigned long long)index);
    if (!slu_cursor_str(cursor, &tensor->name) || !slu_cursor_u32(cursor, &tensor->n_dims)) {
        return truncated(cursor, what, name, err);
    }
    if (tensor->name.len == 0) {
        return slu_err_set(err, SLU_EFORMAT, "%s: tensor %llu has no name", name,
                           (unsigned long long)index);
    }
    if (tensor->n_dims == 0 || tensor->n_dims > SLU_GGUF_DIMS_MAX) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: tensor '%s' has %u dimensions; 1 to %u make sense", name,
                           tensor_name(tensor).text, tensor->n_dims, SLU_GGUF_DIMS_MAX);
    }
    for (uint32_t d = 0; d < SLU_GGUF_DIMS_MAX; d++) {
        tensor->dims[d] = 1;
        if (d < tensor->n_dims && !slu_cursor_u64(cursor, &tensor->dims[d])) {
            return truncated(cursor, what, name, err);
        }
    }
    if (!slu_cursor_u32(cursor, &tensor->type) || !slu_cursor_u64(cursor, &tensor->offset)) {
        return truncated(cursor, what, name, err);
    }
    return size_tensor(tensor, name, err);
}

static int read_alignment(const struct slu_kvs *kvs, uint64_t *ret_alignment, const char *name,
                          struct slu_err *err)
{
    uint64_t alignment = ALIGNMENT_DEFAULT;
    if (slu_kvs_find(kvs, "general.alignment")) {
        int rc = slu_kvs_u64(kvs, "general.alignment", &alignment, err);
        if (rc != 0) {
            slu_err_prefix(err, "%s", name);
            return rc;
        }
    }
    if (alignment == 0 || alignment > ALIGNMENT_MAX || (alignment & (alignment - 1)) != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: general.alignment is %llu, not a power of two up to %u", name,
                           (unsigned long long)alignment, ALIGNMENT_MAX);
    }
    *ret_alignment = alignment;
    return 0;
}

/* Offsets in the file count from the start of the data; callers get them from the file's start. */
static int place_tensors(struct slu_gguf *gguf, uint64_t alignment, uint64_t file_bytes,
                         const char *name, struct slu_err *err)
{
    if (gguf->n_tensors > 0 && gguf->data_offset > file_bytes) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: ends at byte %llu, before its tensor data; the file is truncated",
                           name, (unsigned long long)file_bytes);
    }
    for (uint64_t i = 0; i < gguf->n_tensors; i++) {
        struct slu_gguf_tensor *tensor = &gguf->tensors[i];
        uint64_t room = file_bytes - gguf->data_offset;
        if (tensor->offset % alignment != 0) {
            return slu_err_set(err, SLU_EFORMAT,
                               "%s: tensor '%s' lies at offset %llu, not a multiple of %llu", name,
                               tensor_name(tensor).text, (unsigned long long)tensor->offset,
                               (unsigned long long)alignment);
        }
        if (tensor->offset > room || tensor->bytes > room - tensor->offset) {
            return slu_err_set(err, SLU_EFORMAT,
                               "%s: tensor '%s' (%llu bytes at offset %llu of the data) ends after "
                               "the file, which has %llu bytes; the file is truncated or corrupt",
                               name, tensor_name(tensor).text, (unsigned long long)tensor->bytes,
                               (unsigned long long)tensor->offset, (unsigned long long)file_bytes);
        }
        tensor->offset += gguf->data_offset;
    }
    return 0;
}

static int by_name(const void *a, const void *b)
{
    const struct slu_gguf_tensor *const *x = a;
    const struct slu_gguf_tensor *const *y = b;
    return slu_str_cmp((*x)->name, (*y)->name);
}

static int by_offset(const void *a, const void *b)
{
    const struct slu_gguf_tensor *const *x = a;
    const struct slu_gguf_tensor *const *y = b;
    if ((*x)->offset != (*y)->offset) {
        return (*x)->offset < (*y)->offset ? -1 : 1;
    }
    /* Those of unknown size come first, where they are in nobody's way. */
    return ((*x)->bytes > (*y)->bytes) - ((*x)->bytes < (*y)->bytes);
}

/* No two tensors overlap or share a name; leaves by_name sorted. */
static int check_apart(struct opened *opened, const char *name, struct slu_err *err)
{
    const struct slu_gguf *gguf = &opened->gguf;
    const size_t n = (size_t)gguf->n_tensors;
    const struct slu_gguf_tensor **sorted = opened->by_name;
    if (n == 0) {
        return 0; /* there is no list to sort, as in files of a vocabulary alone */
    }
    for (size_t i = 0; i < n; i++) {
        sorted[i] = &gguf->tensors[i];
    }
    qsort(sorted, n, sizeof *sorted, by_offset);
    uint64_t end = 0;
    for (size_t i = 0; i < n; i++) {
        if (sorted[i]->offset < end) {
            return slu_err_set(err, SLU_EFORMAT, "%s: tensors '%s' and '%s' overlap", name,
                               tensor_name(sorted[i - 1]).text, tensor_name(sorted[i]).text);
        }
        end = sorted[i]->offset + sorted[i]->bytes;
    }
    qsort(sorted, n, sizeof *sorted, by_name);
    for (size_t i = 1; i < n; i++) {
        if (slu_str_cmp(sorted[i - 1]->name, sorted[i]->name) == 0) {
            return slu_err_set(err, SLU_EFORMAT, "%s: two tensors have the name '%s'", name,
                               tensor_name(sorted[i]).text);
        }
    }
    return 0;
}

/* Makes the list of n_tensors entries from where the cursor stands. */
static int parse_tensors(struct slu_cursor *cursor, uint64_t n_tensors, struct opened *opened,
                         const char *name, struct slu_err *err)
{
    struct slu_gguf *gguf = &opened->gguf;
    uint64_t left = cursor->whole_bytes - cursor->at;
    if (n_tensors > TENSORS_MAX || n_tensors > left / TENSOR_BYTES_MIN) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: claims %llu tensors, which is too many%s; the file is truncated or "
                           "corrupt",
                           name, (unsigned long long)n_tensors,
                           n_tensors > TENSORS_MAX ? "" : " for its size");
    }
    if (n_tensors == 0) {
        return 0;
    }
    gguf->tensors = calloc((size_t)n_tensors, sizeof *gguf->tensors);
    opened->by_name = calloc((size_t)n_tensors, sizeof(*opened->by_name));
    if (!gguf->tensors || !opened->by_name) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for a list of %llu tensors", name,
                           (unsigned long long)n_tensors);
    }
    gguf->n_tensors = n_tensors;
    for (uint64_t i = 0; i < n_tensors; i++) {
        int rc = parse_tensor(cursor, i, &gguf->tensors[i], name, err);
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

/* Everything but the header's bytes goes: a further try with more of them starts afresh. */
static void reset(struct opened *opened)
{
    uint8_t *header = opened->gguf.header;
    slu_kvs_finish(&opened->gguf.kvs);
    free(opened->gguf.tensors);
    free(opened->by_name);
    *opened = (struct opened){.gguf.header = header};
}

static int parse_header(struct opened *opened, struct slu_cursor *cursor, const char *name,
                        uint64_t file_bytes, struct slu_err *err)
{
    struct slu_gguf *gguf = &opened->gguf;
    uint64_t n_tensors = 0, n_kvs = 0, alignment = 0;
    int rc = parse_preamble(cursor, &n_tensors, &n_kvs, name, err);
    if (rc != 0) {
        return rc;
    }
    gguf->kv_data = cursor->data + cursor->at;
    rc = slu_kvs_parse_at(cursor, n_kvs, &gguf->kvs, name, err);
    if (rc != 0) {
        return rc;
    }
    gguf->kv_bytes = (size_t)(cursor->data + cursor->at - gguf->kv_data);
    rc = read_alignment(&gguf->kvs, &alignment, name, err);
    if (rc != 0) {
        return rc;
    }
    rc = parse_tensors(cursor, n_tensors, opened, name, err);
    if (rc != 0) {
        return rc;
    }
    gguf->data_offset = (cursor->at + alignment - 1) / alignment * alignment;
    rc = place_tensors(gguf, alignment, file_bytes, name, err);
    return rc != 0 ? rc : check_apart(opened, name, err);
}

/* Reads on up to want bytes of the header, keeping the have bytes that are there. */
static int read_more(struct slu_source *source, struct opened *opened, size_t have, size_t want,
                     struct slu_err *err)
{
    uint8_t *header = realloc(opened->gguf.header, want);
    if (!header) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for a header of %zu bytes", source->name,
                           want);
    }
    opened->gguf.header = header;
    return source->read_at(source, have, header + have, want - have, err);
}

int slu_gguf_open(struct slu_source *source, struct slu_gguf **ret_gguf, struct slu_err *err)
{
    if (source->size_bytes == 0) {
        return slu_err_set(err, SLU_EFORMAT, "%s: is empty", source->name);
    }
    struct opened *opened = calloc(1, sizeof *opened);
    if (!opened) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to open it", source->name);
    }
    uint64_t most = source->size_bytes < HEADER_BYTES_MAX ? source->size_bytes : HEADER_BYTES_MAX;
    size_t have = 0;
    size_t want = (size_t)(most < READ_FIRST_BYTES ? most : READ_FIRST_BYTES);
    int rc;
    /* Where the header ends is known only once it is parsed, so pieces four times as large are
     * tried, but only while what was missing can be in one of them; so this ends. */
    for (;;) {
        rc = read_more(source, opened, have, want, err);
        if (rc != 0) {
            break;
        }
        have = want;
        struct slu_cursor cursor = {
            .data = opened->gguf.header,
            .bytes = have,
            .whole_bytes = most,
        };
        rc = parse_header(opened, &cursor, source->name, source->size_bytes, err);
        if (rc == 0 || !cursor.is_short) {
            break;
        }
        reset(opened);
        slu_err_set(err, SLU_OK, "%s", ""); /* it may yet go well */
        want = (size_t)(most / 4 < have ? most : have * 4);
    }
    if (rc != 0) {
        slu_gguf_close(&opened->gguf);
        return rc;
    }
    *ret_gguf = &opened->gguf;
    return 0;
}

void slu_gguf_close(struct slu_gguf *gguf)
{
    if (gguf) {
        struct opened *opened = (struct opened *)gguf;
        reset(opened);
        free(opened->gguf.header);
        free(opened);
    }
}

const struct slu_gguf_tensor *slu_gguf_find(const struct slu_gguf *gguf, const char *name)
{
    const struct opened *opened = (const struct opened *)gguf;
    const struct slu_str wanted = {.at = name, .len = strlen(name)};
    size_t lo = 0, hi = (size_t)gguf->n_tensors;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int order = slu_str_cmp(opened->by_name[mid]->name, wanted);
        if (order == 0) {
            return opened->by_name[mid];
        }
        if (order < 0) {
            lo = mid + 1;
        } else {
            hi = mid;
        }
    }
    return NULL;
}
