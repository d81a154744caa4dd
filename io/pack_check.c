#include "io/pack_check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The tables under examination; passed about instead of six arguments. */
struct tables {
    const struct slu_pack_header *header;
    const struct slu_pack_tensor *tensors;
    const struct slu_pack_bank *banks;
    const struct slu_extent *extents;
    uint8_t *owned; /* per extent: belongs to a tensor or bank already */
    const char *name;
};

/* A stretch of the file, in whole pages. */
struct span {
    uint64_t start, end;
};

uint64_t slu_pack_index_bytes(uint32_t n_tensors, uint32_t n_banks, uint32_t n_extents)
{
    return n_tensors * (uint64_t)sizeof(struct slu_pack_tensor) +
           n_banks * (uint64_t)sizeof(struct slu_pack_bank) +
           n_extents * (uint64_t)sizeof(struct slu_extent);
}

static int check_place(const struct slu_pack_header *header, const struct slu_extent *extent,
                       const char *what, const char *name, struct slu_err *err)
{
    if (extent->offset % SLU_PACK_ALIGN != 0 || extent->offset < SLU_PACK_ALIGN) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s lies at offset %llu, not on a page after the header", name, what,
                           (unsigned long long)extent->offset);
    }
    if (extent->offset >= header->file_bytes ||
        slu_pack_page_up(extent->stored_bytes) > header->file_bytes - extent->offset) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s (%u bytes at offset %llu) ends after the file, which has %llu "
                           "bytes",
                           name, what, extent->stored_bytes, (unsigned long long)extent->offset,
                           (unsigned long long)header->file_bytes);
    }
    if (extent->codec >= SLU_CODECS || extent->reserved != 0) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %s has the unknown codec %u or reserved bits set",
                           name, what, extent->codec);
    }
    return 0;
}

static int check_extent(const struct slu_pack_header *header, const struct slu_extent *extent,
                        const char *what, const char *name, struct slu_err *err)
{
    int rc = check_place(header, extent, what, name, err);
    if (rc != 0) {
        return rc;
    }
    if (extent->stored_bytes == 0 || extent->raw_bytes == 0 ||
        (extent->codec == SLU_CODEC_RAW && extent->raw_bytes != extent->stored_bytes)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s claims %u bytes stored for %u, which its codec doesn't allow",
                           name, what, extent->stored_bytes, extent->raw_bytes);
    }
    return 0;
}

int slu_pack_check_header(const struct slu_pack_header *header, const char *name,
                          struct slu_err *err)
{
    if (header->header_bytes != sizeof *header || header->reserved != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: its header claims %u bytes where version %u has %zu, or sets "
                           "reserved bits",
                           name, header->header_bytes, SLU_PACK_VERSION, sizeof *header);
    }
    if (header->file_bytes % SLU_PACK_ALIGN != 0) {
        return slu_err_set(err, SLU_EFORMAT, "%s: claims %llu bytes, not a whole number of pages",
                           name, (unsigned long long)header->file_bytes);
    }
    int rc = check_extent(header, &header->meta, "the metadata", name, err);
    if (rc == 0) {
        rc = check_extent(header, &header->index, "the index", name, err);
    }
    if (rc != 0) {
        return rc;
    }
    if (!slu_pack_meta_is_plausible(header->meta.stored_bytes, header->meta.raw_bytes)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: claims metadata of %u bytes in %u stored; that is not plausible",
                           name, header->meta.raw_bytes, header->meta.stored_bytes);
    }
    /* Each extent has a page of the file, and each tensor or bank an extent, at the least. */
    if (header->n_extents > header->file_bytes / SLU_PACK_ALIGN ||
        (uint64_t)header->n_tensors + header->n_banks > header->n_extents) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: claims %u tensors, %u banks and %u extents, more than it has room "
                           "for",
                           name, header->n_tensors, header->n_banks, header->n_extents);
    }
    uint64_t wanted = slu_pack_index_bytes(header->n_tensors, header->n_banks, header->n_extents);
    if (header->index.raw_bytes != wanted) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: claims an index of %u bytes where its counts make %llu", name,
                           header->index.raw_bytes, (unsigned long long)wanted);
    }
    return 0;
}

/* Gives extents first .. first+n-1 an owner; each may have but one. is_marker: the single record
 * that marks where rows begin, which alone has no bytes of its own. */
static int own_extents(struct tables *tables, uint32_t first, uint64_t n, bool is_marker,
                       const char *owner, struct slu_err *err)
{
    if (n == 0 || first >= tables->header->n_extents || n > tables->header->n_extents - first) {
        return slu_err_set(
            err, SLU_EFORMAT, "%s: %s claims %llu extents from number %u on; the index has %u",
            tables->name, owner, (unsigned long long)n, first, tables->header->n_extents);
    }
    for (uint32_t i = first; i < first + (uint32_t)n; i++) {
        const struct slu_extent *extent = &tables->extents[i];
        if (tables->owned[i]) {
            return slu_err_set(err, SLU_EFORMAT, "%s: %s claims extent %u, which another has",
                               tables->name, owner, i);
        }
        tables->owned[i] = 1;
        char what[40];
        snprintf(what, sizeof what, "extent %u", i);
        int rc = is_marker ? check_place(tables->header, extent, what, tables->name, err)
                           : check_extent(tables->header, extent, what, tables->name, err);
        if (rc != 0) {
            return rc;
        }
    }
    return 0;
}

static int check_tensor_name(const struct tables *tables, uint32_t index, struct slu_err *err)
{
    const char *at = tables->tensors[index].name;
    size_t len = 0;
    while (len < SLU_PACK_NAME_BYTES && at[len] > 0x20 && at[len] < 0x7f) {
        len++;
    }
    size_t end = len;
    while (end < SLU_PACK_NAME_BYTES && at[end] == '\0') {
        end++;
    }
    if (len == 0 || len == SLU_PACK_NAME_BYTES || end < SLU_PACK_NAME_BYTES) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: tensor %u has a name that is empty, unprintable or not ended",
                           tables->name, index);
    }
    return 0;
}

/* Matrices are cut into whole pieces, of which the last alone may be shorter. */
static int check_pieces(const struct tables *tables, const struct slu_pack_tensor *tensor,
                        const char *owner, struct slu_err *err)
{
    for (uint32_t i = 0; i < tensor->n_extents; i++) {
        uint32_t raw_bytes = tables->extents[tensor->first_extent + i].raw_bytes;
        bool is_last = i + 1 == tensor->n_extents;
        if (raw_bytes > SLU_PACK_PIECE_BYTES || (!is_last && raw_bytes != SLU_PACK_PIECE_BYTES)) {
            return slu_err_set(err, SLU_EFORMAT, "%s: piece %u of %s has %u bytes instead of %u",
                               tables->name, i, owner, raw_bytes, SLU_PACK_PIECE_BYTES);
        }
    }
    return 0;
}

/* Rows have one extent record, which gives their place and nothing else. */
static int check_rows(const struct tables *tables, const struct slu_pack_tensor *tensor,
                      const char *owner, struct slu_err *err)
{
    const struct slu_extent *extent = &tables->extents[tensor->first_extent];
    if (tensor->n != 1 || tensor->row_stride == 0 || tensor->row_stride % 64 != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s is stored by rows, with a stride of %u bytes and %u matrices; "
                           "the stride must be a multiple of 64, the matrix one",
                           tables->name, owner, tensor->row_stride, tensor->n);
    }
    if (extent->codec != SLU_CODEC_RAW || extent->stored_bytes != 0 || extent->raw_bytes != 0 ||
        extent->checksum != 0) {
        return slu_err_set(err, SLU_EFORMAT, "%s: the record of where the rows of %s lie has sizes",
                           tables->name, owner);
    }
    uint64_t bytes = slu_pack_page_up((uint64_t)tensor->rows * tensor->row_stride);
    if (bytes > tables->header->file_bytes - extent->offset) {
        return slu_err_set(err, SLU_EFORMAT, "%s: the rows of %s end after the file", tables->name,
                           owner);
    }
    return 0;
}

static int check_tensor(struct tables *tables, uint32_t index, struct slu_err *err)
{
    const struct slu_pack_tensor *tensor = &tables->tensors[index];
    int rc = check_tensor_name(tables, index, err);
    if (rc != 0) {
        return rc;
    }
    char owner[SLU_PACK_NAME_BYTES + 16];
    snprintf(owner, sizeof owner, "tensor '%s'", tensor->name);
    if (tensor->rows == 0 || tensor->rows > SLU_PACK_DIM_MAX || tensor->cols == 0 ||
        tensor->cols > SLU_PACK_DIM_MAX || tensor->n == 0 || tensor->n > SLU_PACK_DIM_MAX) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %s has a shape of %u x %u x %u, out of bounds",
                           tables->name, owner, tensor->n, tensor->rows, tensor->cols);
    }
    switch (tensor->kind) {
    case SLU_PACK_MATRIX:
        if (tensor->row_stride != 0) {
            return slu_err_set(err, SLU_EFORMAT, "%s: %s is a matrix but has a row stride",
                               tables->name, owner);
        }
        rc = own_extents(tables, tensor->first_extent, tensor->n_extents, false, owner, err);
        return rc != 0 ? rc : check_pieces(tables, tensor, owner, err);
    case SLU_PACK_ROWS:
        if (tensor->n_extents != 1) {
            return slu_err_set(err, SLU_EFORMAT, "%s: %s is stored by rows but claims %u extents",
                               tables->name, owner, tensor->n_extents);
        }
        rc = own_extents(tables, tensor->first_extent, 1, true, owner, err);
        return rc != 0 ? rc : check_rows(tables, tensor, owner, err);
    default:
        return slu_err_set(err, SLU_EFORMAT, "%s: %s is of the unknown kind %u", tables->name,
                           owner, tensor->kind);
    }
}

static int check_bank(struct tables *tables, uint32_t index, struct slu_err *err)
{
    const struct slu_pack_bank *bank = &tables->banks[index];
    char owner[48];
    snprintf(owner, sizeof owner, "bank %u (layer %u)", index, bank->layer);
    if (bank->kind > SLU_BANK_DENSE || bank->has_bias > 1 ||
        (bank->kind != SLU_BANK_ROUTED && bank->n_experts != 1)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s is of kind %u with %u experts and a bias of %u, which makes no "
                           "sense",
                           tables->name, owner, bank->kind, bank->n_experts, bank->has_bias);
    }
    if (bank->n_experts == 0 || bank->n_experts > SLU_PACK_DIM_MAX || bank->n_embd == 0 ||
        bank->n_embd > SLU_PACK_DIM_MAX || bank->n_ff == 0 || bank->n_ff > SLU_PACK_DIM_MAX ||
        bank->neurons_a_block == 0 || bank->neurons_a_block > bank->n_ff) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s has %u experts of %u neurons, %u wide, %u to a block: out of "
                           "bounds",
                           tables->name, owner, bank->n_experts, bank->n_ff, bank->n_embd,
                           bank->neurons_a_block);
    }
    /* In 64 bits, as n_ff + neurons_a_block must not wrap. */
    uint64_t n_blocks = ((uint64_t)bank->n_ff + bank->neurons_a_block - 1) / bank->neurons_a_block;
    if (bank->n_blocks != n_blocks) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %s claims %u blocks an expert where %llu make it",
                           tables->name, owner, bank->n_blocks, (unsigned long long)n_blocks);
    }
    return own_extents(tables, bank->first_extent, (uint64_t)bank->n_experts * bank->n_blocks,
                       false, owner, err);
}

static int by_start(const void *a, const void *b)
{
    const struct span *x = a;
    const struct span *y = b;
    return (x->start > y->start) - (x->start < y->start);
}

static struct span span_of(const struct slu_extent *extent)
{
    return (struct span){extent->offset, extent->offset + slu_pack_page_up(extent->stored_bytes)};
}

/* No two things share a page: header, metadata, index, extents, rows. */
static int check_overlap(const struct tables *tables, struct slu_err *err)
{
    const struct slu_pack_header *header = tables->header;
    size_t n = (size_t)header->n_extents + 3;
    struct span *spans = malloc(n * sizeof *spans);
    if (!spans) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to check %u extents", tables->name,
                           header->n_extents);
    }
    for (uint32_t i = 0; i < header->n_extents; i++) {
        spans[i] = span_of(&tables->extents[i]);
    }
    for (uint32_t i = 0; i < header->n_tensors; i++) {
        const struct slu_pack_tensor *tensor = &tables->tensors[i];
        if (tensor->kind == SLU_PACK_ROWS) {
            spans[tensor->first_extent].end +=
                slu_pack_page_up((uint64_t)tensor->rows * tensor->row_stride);
        }
    }
    spans[n - 3] = (struct span){0, SLU_PACK_ALIGN};
    spans[n - 2] = span_of(&header->meta);
    spans[n - 1] = span_of(&header->index);
    qsort(spans, n, sizeof *spans, by_start);
    int rc = 0;
    for (size_t i = 1; rc == 0 && i < n; i++) {
        if (spans[i].start < spans[i - 1].end) {
            rc = slu_err_set(err, SLU_EFORMAT, "%s: what lies at offsets %llu and %llu overlaps",
                             tables->name, (unsigned long long)spans[i - 1].start,
                             (unsigned long long)spans[i].start);
        }
    }
    free(spans);
    return rc;
}

static int by_tensor_name(const void *a, const void *b)
{
    const struct slu_pack_tensor *const *x = a;
    const struct slu_pack_tensor *const *y = b;
    return memcmp((*x)->name, (*y)->name, SLU_PACK_NAME_BYTES);
}

static int by_bank_place(const void *a, const void *b)
{
    const struct slu_pack_bank *const *x = a;
    const struct slu_pack_bank *const *y = b;
    if ((*x)->layer != (*y)->layer) {
        return (*x)->layer < (*y)->layer ? -1 : 1;
    }
    return ((*x)->kind > (*y)->kind) - ((*x)->kind < (*y)->kind);
}

/* Tensors' names differ, and so do banks' layer and kind. */
static int check_unique(const struct tables *tables, struct slu_err *err)
{
    const uint32_t n_tensors = tables->header->n_tensors, n_banks = tables->header->n_banks;
    const size_t n = (size_t)(n_tensors > n_banks ? n_tensors : n_banks) + 1;
    const void **sorted = malloc(n * sizeof *sorted);
    if (!sorted) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to check its names", tables->name);
    }
    int rc = 0;
    for (uint32_t i = 0; i < n_tensors; i++) {
        sorted[i] = &tables->tensors[i];
    }
    qsort(sorted, n_tensors, sizeof *sorted, by_tensor_name);
    for (uint32_t i = 1; rc == 0 && i < n_tensors; i++) {
        if (by_tensor_name(&sorted[i - 1], &sorted[i]) == 0) {
            rc = slu_err_set(err, SLU_EFORMAT, "%s: two tensors have the name '%s'", tables->name,
                             ((const struct slu_pack_tensor *)sorted[i])->name);
        }
    }
    for (uint32_t i = 0; i < n_banks; i++) {
        sorted[i] = &tables->banks[i];
    }
    qsort(sorted, n_banks, sizeof *sorted, by_bank_place);
    for (uint32_t i = 1; rc == 0 && i < n_banks; i++) {
        if (by_bank_place(&sorted[i - 1], &sorted[i]) == 0) {
            rc = slu_err_set(err, SLU_EFORMAT, "%s: layer %u has two banks of one kind",
                             tables->name, ((const struct slu_pack_bank *)sorted[i])->layer);
        }
    }
    free(sorted);
    return rc;
}

int slu_pack_check_index(const struct slu_pack_header *header,
                         const struct slu_pack_tensor *tensors, const struct slu_pack_bank *banks,
                         const struct slu_extent *extents, const char *name, struct slu_err *err)
{
    struct tables tables = {
        .header = header,
        .tensors = tensors,
        .banks = banks,
        .extents = extents,
        .owned = calloc((size_t)header->n_extents + 1, 1),
        .name = name,
    };
    if (!tables.owned) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to check %u extents", name,
                           header->n_extents);
    }
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < header->n_tensors; i++) {
        rc = check_tensor(&tables, i, err);
    }
    for (uint32_t i = 0; rc == 0 && i < header->n_banks; i++) {
        rc = check_bank(&tables, i, err);
    }
    for (uint32_t i = 0; rc == 0 && i < header->n_extents; i++) {
        if (!tables.owned[i]) {
            rc = slu_err_set(err, SLU_EFORMAT, "%s: extent %u belongs to no tensor or bank", name,
                             i);
        }
    }
    if (rc == 0) {
        rc = check_overlap(&tables, err);
    }
    if (rc == 0) {
        rc = check_unique(&tables, err);
    }
    free(tables.owned);
    return rc;
}
