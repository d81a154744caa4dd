/*
 * Tensors outside the experts. A matrix is stored plane after plane, but read row after row, and it
 * may be larger than the memory at hand. So each piece of the pack is made by itself: for every
 * plane that it overlaps, the rows concerned are read, taken apart, and that plane of them is kept.
 * A matrix is thus read once for each plane it has, in exchange for buffers of fixed size.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "tools/packer_parts.h"

#define CHUNK_BYTES (1u << 20)
#define PLANES_MAX  7

/* Rows on their way from the input into planes. */
struct chunk {
    const struct slu_packer_ref *ref;
    uint32_t rows_max;
    uint8_t *raw;
    struct slu_planes planes; /* of rows_max rows */
    /* Where the rows are quantized on the way: */
    const struct slu_ecq *ecq; /* else NULL */
    float unit;
    float *weights;
    struct slu_ecq_sums sums; /* of rows as often as they were read */
};

static void chunk_finish(struct chunk *chunk)
{
    free(chunk->raw);
    free(chunk->planes.data);
    free(chunk->weights);
}

static int no_memory(const struct slu_packer_ref *ref, struct slu_err *err)
{
    return slu_err_set(err, SLU_ENOMEM, "%s: out of memory for rows of %u weights",
                       ref->source->name, ref->cols);
}

static int chunk_init(struct chunk *chunk, const struct slu_packer_ref *ref,
                      const struct slu_ecq *ecq, struct slu_err *err)
{
    size_t row_bytes = slu_packer_ref_row_bytes(ref);
    size_t rows = CHUNK_BYTES / row_bytes;
    rows = rows < 1 ? 1 : rows > ref->rows ? ref->rows : rows;
    *chunk = (struct chunk){.ref = ref, .rows_max = (uint32_t)rows, .ecq = ecq};
    const struct slu_fmt *fmt = ecq ? ecq->fmt : slu_packer_ref_fmt(ref);
    bool is_valid = slu_planes_init(&chunk->planes, fmt, chunk->rows_max, ref->cols, NULL);
    assert(is_valid); /* fewer rows than the claimed shape has */
    (void)is_valid;
    chunk->raw = malloc(rows * row_bytes);
    chunk->planes.data = slu_packer_alloc(chunk->planes.at.bytes);
    chunk->weights = malloc(ref->cols * sizeof(float));
    if (!chunk->raw || !chunk->planes.data || !chunk->weights) {
        chunk_finish(chunk);
        return no_memory(ref, err);
    }
    return 0;
}

/* The first n of the rows that lie in chunk->raw. */
static struct slu_packer_rows chunk_rows(const struct chunk *chunk, uint32_t n)
{
    return (struct slu_packer_rows){
        .ref = chunk->ref, .raw = chunk->raw, .n = n, .n_cols = chunk->ref->cols};
}

/* Reads rows first .. first+n-1 of the stack into the chunk's planes. */
static int chunk_read(struct slu_packer_job *job, struct chunk *chunk, uint64_t first, uint32_t n,
                      struct slu_err *err)
{
    int code = slu_packer_read_rows(chunk->ref, first, n, chunk->raw, err);
    if (code == 0 && chunk->ecq) {
        const struct slu_packer_rows rows = chunk_rows(chunk, n);
        return slu_packer_rows_put(job, &rows, chunk->ecq, chunk->unit, chunk->weights,
                                   &chunk->planes, &chunk->sums, err);
    }
    size_t row_bytes = slu_packer_ref_row_bytes(chunk->ref);
    for (uint32_t i = 0; i < n && code == 0; i++) {
        slu_planes_import(&chunk->planes, i, chunk->raw + i * row_bytes);
    }
    return code;
}

/* The unit of the tensor's rows, and how its columns matter. */
static int chunk_prepare(struct slu_packer_job *job, struct chunk *chunk, struct slu_err *err)
{
    const struct slu_packer_ref *ref = chunk->ref;
    uint64_t all = (uint64_t)ref->rows * ref->n;
    slu_packer_weights(job, ref, SLU_IMPORTANCE_NO_EXPERT, chunk->weights);
    struct slu_ecq_scales scales = {0};
    int code = 0;
    for (uint64_t row = 0; row < all && code == 0; row += chunk->rows_max) {
        uint32_t n = all - row < chunk->rows_max ? (uint32_t)(all - row) : chunk->rows_max;
        const struct slu_packer_rows rows = chunk_rows(chunk, n);
        code = slu_packer_read_rows(ref, row, n, chunk->raw, err);
        code = code < 0 ? code : slu_packer_scales_add(job, &rows, chunk->ecq, &scales, err);
    }
    chunk->unit = slu_ecq_unit(&scales);
    return code;
}

/* ---- matrices ----------------------------------------------------------------------------- */

/* A plane of one matrix: where it starts in the matrix, and in the chunk's planes. */
struct plane {
    size_t offset, row_bytes;
    size_t chunk_offset;
};

static unsigned list_planes(const struct slu_mat_layout *at, const struct slu_mat_layout *chunk,
                            struct plane ret_planes[PLANES_MAX])
{
    const struct plane all[PLANES_MAX] = {
        {at->codes, at->codes_row, chunk->codes},     {at->high, at->high_row, chunk->high},
        {at->scales, at->scales_row, chunk->scales},  {at->mins, at->mins_row, chunk->mins},
        {at->supers, at->supers_row, chunk->supers},  {at->gaps, at->escapes_row, chunk->gaps},
        {at->values, at->escapes_row, chunk->values},
    };
    unsigned n = 0;
    for (unsigned i = 0; i < PLANES_MAX; i++) {
        if (all[i].row_bytes > 0) {
            ret_planes[n++] = all[i];
        }
    }
    return n;
}

/* Copies what bytes lo .. hi-1 of matrix k have of one plane to out, where byte lo goes. */
static int fill_plane(struct slu_packer_job *job, struct chunk *chunk, const struct plane *plane,
                      uint32_t k, uint64_t lo, uint64_t hi, uint8_t *out, struct slu_err *err)
{
    uint32_t rows = chunk->ref->rows;
    uint64_t end = plane->offset + (uint64_t)rows * plane->row_bytes;
    uint64_t from = lo > plane->offset ? lo : plane->offset;
    uint64_t to = hi < end ? hi : end;
    if (from >= to) {
        return 0;
    }
    uint64_t row = (from - plane->offset) / plane->row_bytes;
    uint64_t row_end = (to - plane->offset + plane->row_bytes - 1) / plane->row_bytes;
    while (row < row_end) {
        uint64_t left = row_end - row;
        uint32_t n = left < chunk->rows_max ? (uint32_t)left : chunk->rows_max;
        int code = chunk_read(job, chunk, (uint64_t)k * rows + row, n, err);
        if (code < 0) {
            return code;
        }
        /* The rows at either end may belong to the piece only in part. */
        uint64_t have = plane->offset + row * plane->row_bytes;
        uint64_t have_end = have + n * plane->row_bytes;
        uint64_t a = from > have ? from : have;
        uint64_t b = to < have_end ? to : have_end;
        memcpy(out + (a - lo), chunk->planes.data + plane->chunk_offset + (a - have),
               (size_t)(b - a));
        row += n;
    }
    return 0;
}

/* Copies what bytes lo .. hi-1 of a matrix have of its head. */
static void fill_head(const struct chunk *chunk, size_t head_at, uint64_t lo, uint64_t hi,
                      uint8_t *out)
{
    struct slu_ecq_head head;
    struct slu_planes planes = {.data = (uint8_t *)&head};
    slu_ecq_head_put(chunk->ecq, chunk->unit, &planes);
    uint64_t from = lo > head_at ? lo : head_at, end = head_at + sizeof head;
    uint64_t to = hi < end ? hi : end;
    if (from < to) {
        memcpy(out + (from - lo), planes.data + (from - head_at), (size_t)(to - from));
    }
}

/* Bytes lo .. hi-1 of the stack of matrices, each of mat->bytes. */
static int fill_piece(struct slu_packer_job *job, struct chunk *chunk,
                      const struct slu_mat_layout *mat, uint64_t lo, uint64_t hi, uint8_t *out,
                      struct slu_err *err)
{
    struct plane planes[PLANES_MAX];
    unsigned n_planes = list_planes(mat, &chunk->planes.at, planes);
    memset(out, 0, (size_t)(hi - lo));
    for (uint64_t at = lo; at < hi;) {
        uint32_t k = (uint32_t)(at / mat->bytes);
        uint64_t start = k * (uint64_t)mat->bytes;
        uint64_t stop = start + mat->bytes < hi ? start + mat->bytes : hi;
        for (unsigned p = 0; p < n_planes; p++) {
            int code = fill_plane(job, chunk, &planes[p], k, at - start, stop - start,
                                  out + (at - lo), err);
            if (code < 0) {
                return code;
            }
        }
        if (chunk->ecq) {
            fill_head(chunk, mat->head, at - start, stop - start, out + (at - lo));
        }
        at = stop;
    }
    return 0;
}

/* Where planes of the piece lo .. hi-1 begin that are worth telling the encoder. */
static size_t piece_cuts(const struct slu_mat_layout *mat, const struct slu_packer_ref *ref,
                         uint64_t lo, uint64_t hi, size_t cuts[SLU_PLANES_CUTS])
{
    enum { APART_MIN = 1024 }; /* nearer to the piece's ends, a part would be too small */
    size_t all[SLU_PLANES_CUTS], n_all = 0, n = 0;
    if (ref->n > 1) {
        return 0;
    }
    slu_planes_cuts(mat, ref->rows, 0, all, &n_all);
    for (size_t i = 0; i < n_all; i++) {
        if (all[i] >= lo + APART_MIN && all[i] + APART_MIN <= hi) {
            cuts[n++] = (size_t)(all[i] - lo);
        }
    }
    return n;
}

static int write_matrix(struct slu_packer_job *job, const struct slu_packer_dense *dense,
                        struct slu_pack_tensor *tensor, struct slu_err *err)
{
    const struct slu_packer_ref *ref = &dense->ref;
    struct slu_mat_layout mat;
    struct slu_ecq ecq;
    bool is_quantized = slu_packer_quantizes(&job->params->resident, ref);
    int code = is_quantized
                   ? slu_packer_fit(job, &job->params->resident, ref, 1, ref->cols, &ecq, err)
                   : 0;
    if (code < 0) {
        return code;
    }
    const struct slu_fmt *fmt = is_quantized ? ecq.fmt : slu_packer_ref_fmt(ref);
    tensor->fmt = fmt->stored;
    if (!slu_mat_layout(fmt, ref->rows, ref->cols, &mat)) {
        return slu_err_set(err, SLU_EUNSUP, "%s: tensor '%s' is too large", ref->source->name,
                           dense->name);
    }
    struct chunk chunk;
    code = chunk_init(&chunk, ref, is_quantized ? &ecq : NULL, err);
    if (code < 0) {
        return code;
    }
    code = is_quantized ? chunk_prepare(job, &chunk, err) : 0;
    uint64_t bytes = (uint64_t)mat.bytes * ref->n;
    size_t piece_bytes = bytes < SLU_PACK_PIECE_BYTES ? (size_t)bytes : SLU_PACK_PIECE_BYTES;
    uint8_t *piece = malloc(piece_bytes);
    if (!piece) {
        code = no_memory(ref, err);
    }
    for (uint64_t lo = 0; lo < bytes && code == 0; lo += piece_bytes) {
        uint64_t hi = bytes - lo < piece_bytes ? bytes : lo + piece_bytes;
        code = fill_piece(job, &chunk, &mat, lo, hi, piece, err);
        if (code < 0) {
            break;
        }
        size_t cuts[SLU_PLANES_CUTS];
        /* Read once, when a model is loaded: whatever saves bytes is good. */
        const struct slu_parts parts = {.cuts = cuts,
                                        .n_cuts = piece_cuts(&mat, ref, lo, hi, cuts)};
        int64_t extent =
            slu_pack_writer_extent_parts(job->writer, piece, (size_t)(hi - lo), &parts, err);
        if (extent < 0) {
            code = (int)extent;
            break;
        }
        if (lo == 0) {
            tensor->first_extent = (uint32_t)extent;
        }
        tensor->n_extents++;
        code =
            slu_packer_step(job, (uint64_t)((double)ref->bytes * (double)hi / (double)bytes), err);
    }
    if (is_quantized && code == 0) {
        uint64_t n = (uint64_t)ref->rows * ref->n * ref->cols;
        slu_packer_quantized(job, &job->params->resident, n, &chunk.sums);
    }
    free(piece);
    chunk_finish(&chunk);
    return code;
}

/* ---- rows --------------------------------------------------------------------------------- */

static int append_row(struct slu_packer_job *job, struct slu_planes *record, uint32_t stride,
                      const uint8_t *row, struct slu_err *err)
{
    memset(record->data, 0, stride);
    slu_planes_import(record, 0, row);
    uint64_t checksum = slu_checksum(record->data, record->at.bytes);
    for (unsigned i = 0; i < 4; i++) {
        record->data[record->at.bytes + i] = (uint8_t)(checksum >> (8 * i));
    }
    return slu_pack_writer_rows_append(job->writer, record->data, stride, err);
}

static int append_rows(struct slu_packer_job *job, const struct slu_packer_ref *ref,
                       struct slu_planes *record, uint32_t stride, struct slu_err *err)
{
    size_t row_bytes = slu_packer_ref_row_bytes(ref);
    uint32_t rows_max = (uint32_t)(CHUNK_BYTES / row_bytes);
    rows_max = rows_max < 1 ? 1 : rows_max;
    uint8_t *raw = malloc(rows_max * row_bytes);
    int code = raw ? 0 : no_memory(ref, err);
    for (uint32_t row = 0; row < ref->rows && code == 0;) {
        uint32_t n = ref->rows - row < rows_max ? ref->rows - row : rows_max;
        code = slu_packer_read_rows(ref, row, n, raw, err);
        for (uint32_t i = 0; i < n && code == 0; i++) {
            code = append_row(job, record, stride, raw + i * row_bytes, err);
        }
        row += n;
        if (code == 0) {
            code = slu_packer_step(job, row * (uint64_t)row_bytes, err);
        }
    }
    free(raw);
    return code;
}

static int write_rows(struct slu_packer_job *job, const struct slu_packer_dense *dense,
                      struct slu_pack_tensor *tensor, struct slu_err *err)
{
    const struct slu_packer_ref *ref = &dense->ref;
    struct slu_planes record;
    bool is_valid = slu_planes_init(&record, slu_packer_ref_fmt(ref), 1, ref->cols, NULL);
    assert(is_valid);
    (void)is_valid;
    uint32_t stride = (uint32_t)((record.at.bytes + sizeof(uint32_t) + 63) / 64 * 64);
    record.data = slu_packer_alloc(stride);
    if (!record.data) {
        return no_memory(ref, err);
    }
    int code = 0;
    int64_t extent = slu_pack_writer_rows_begin(job->writer, err);
    if (extent < 0) {
        code = (int)extent;
        goto out;
    }
    tensor->first_extent = (uint32_t)extent;
    tensor->n_extents = 1;
    tensor->row_stride = stride;
    if ((code = append_rows(job, ref, &record, stride, err)) < 0) {
        goto out;
    }
    code = slu_pack_writer_rows_end(job->writer, err);

out:
    free(record.data);
    return code;
}

int slu_packer_write_dense(struct slu_packer_job *job, const struct slu_packer_dense *dense,
                           struct slu_err *err)
{
    const struct slu_packer_ref *ref = &dense->ref;
    struct slu_pack_tensor tensor = {
        .kind = dense->kind,
        .fmt = slu_packer_ref_fmt(ref)->stored,
        .rows = ref->rows,
        .cols = ref->cols,
        .n = ref->n,
    };
    memcpy(tensor.name, dense->name, sizeof tensor.name);
    int code = dense->kind == SLU_PACK_ROWS ? write_rows(job, dense, &tensor, err)
                                            : write_matrix(job, dense, &tensor, err);
    if (code < 0) {
        return code;
    }
    job->done_bytes += ref->bytes;
    return slu_pack_writer_tensor(job->writer, &tensor, err);
}
