#include "adapters/sla.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define TEMP_TRIES 16

struct slu_sla_writer {
    char *path, *temp; /* temp: NULL once there is nothing to remove */
    int fd;
    struct slu_encoder *encoder;
    uint8_t *piece; /* room for piece_room bytes, of which n_piece are filled */
    size_t n_piece, piece_room;
    uint8_t *encoded;
    size_t piece_bytes; /* of a whole frame, or of a block */
    uint64_t offset;
    uint64_t left_bytes; /* that the current pair, or the current layer's blocks, still want */
    struct slu_sla_record *records;
    struct slu_extent *extents, *blocks;
    uint32_t n_records, n_extents, n_blocks;
    size_t records_room, extents_room, blocks_room;
};

static int system_error(const struct slu_sla_writer *writer, const char *doing, struct slu_err *err)
{
    return slu_err_set(err, SLU_EIO, "%s: %s failed: %s", writer->path, doing, strerror(errno));
}

static int write_at(struct slu_sla_writer *writer, uint64_t offset, const void *bytes, size_t n,
                    struct slu_err *err)
{
    const uint8_t *at = bytes;
    while (n > 0) {
        ssize_t done = pwrite(writer->fd, at, n, (off_t)offset);
        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done <= 0) {
            errno = done == 0 ? ENOSPC : errno;
            return system_error(writer, "writing", err);
        }
        at += done;
        offset += (uint64_t)done;
        n -= (size_t)done;
    }
    return 0;
}

static int open_temp(struct slu_sla_writer *writer, struct slu_err *err)
{
    struct stat st;
    if (stat(writer->path, &st) == 0 && !S_ISREG(st.st_mode)) {
        return slu_err_set(err, SLU_EIO, "%s: exists and is not a regular file", writer->path);
    }
    for (int i = 0; i < TEMP_TRIES; i++) {
        char *temp;
        if (asprintf(&temp, "%s.tmp-%ld-%d", writer->path, (long)getpid(), i) < 0) {
            return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", writer->path);
        }
        writer->fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (writer->fd >= 0) {
            writer->temp = temp;
            return 0;
        }
        free(temp);
        if (errno != EEXIST) {
            break;
        }
    }
    return system_error(writer, "making a file beside it", err);
}

/* From now on frames are of so many bytes. */
static int set_piece(struct slu_sla_writer *writer, size_t bytes, struct slu_err *err)
{
    writer->piece_bytes = bytes;
    if (bytes <= writer->piece_room) {
        return 0;
    }
    free(writer->piece);
    free(writer->encoded);
    writer->piece = malloc(bytes);
    writer->encoded = malloc(slu_encode_bound(bytes));
    writer->piece_room = writer->piece && writer->encoded ? bytes : 0;
    return writer->piece_room
               ? 0
               : slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", writer->path);
}

int slu_sla_writer_create(const char *path, struct slu_sla_writer **ret_writer, struct slu_err *err)
{
    struct slu_sla_writer *writer = calloc(1, sizeof *writer);
    if (!writer) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
    }
    writer->fd = -1;
    writer->offset = SLU_SLA_PAGE_BYTES; /* the header comes last */
    writer->path = strdup(path);
    int rc = writer->path ? set_piece(writer, SLU_SLA_PIECE_BYTES, err)
                          : slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
    rc = rc < 0 ? rc : slu_encoder_create(&writer->encoder, err);
    rc = rc < 0 ? rc : open_temp(writer, err);
    if (rc < 0) {
        slu_sla_writer_destroy(writer);
        return rc;
    }
    *ret_writer = writer;
    return 0;
}

void slu_sla_writer_destroy(struct slu_sla_writer *writer)
{
    if (!writer) {
        return;
    }
    if (writer->fd >= 0) {
        close(writer->fd);
    }
    if (writer->temp) {
        unlink(writer->temp);
    }
    slu_encoder_destroy(writer->encoder);
    free(writer->temp);
    free(writer->path);
    free(writer->piece);
    free(writer->encoded);
    free(writer->records);
    free(writer->extents);
    free(writer->blocks);
    free(writer);
}

/* Room for one item more. */
static int make_room(struct slu_sla_writer *writer, void **array, size_t *room, size_t n,
                     size_t item_bytes, struct slu_err *err)
{
    if (n < *room) {
        return 0;
    }
    size_t wanted = *room ? 2 * *room : 64;
    void *grown = realloc(*array, wanted * item_bytes);
    if (!grown) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for its index", writer->path);
    }
    *array = grown;
    *room = wanted;
    return 0;
}

/* A record that a reader would take, into the index. */
static int add_record(struct slu_sla_writer *writer, const struct slu_sla_record *record,
                      uint64_t *ret_pair_bytes, struct slu_err *err)
{
    const char *target = slu_target_name((enum slu_target)record->target);
    struct slu_mat_layout a, b;
    if (record->rank > SLU_SLA_RANK_MAX || record->layer >= SLU_SLA_LAYERS_MAX || !record->n ||
        record->n > SLU_SLA_EXPERTS_MAX) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s of layer %u: %u pairs of rank %u are not supported; a rank is at "
                           "most %u, a layer below %u, and there are at most %u experts",
                           target, record->layer, record->n, record->rank, SLU_SLA_RANK_MAX,
                           SLU_SLA_LAYERS_MAX, SLU_SLA_EXPERTS_MAX);
    }
    if (!slu_sla_layouts(record, &a, &b)) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s of layer %u: %u to %u with rank %u is no shape of "
                           "a pair",
                           target, record->layer, record->in, record->out, record->rank);
    }
    void *array = writer->records;
    int rc =
        make_room(writer, &array, &writer->records_room, writer->n_records, sizeof *record, err);
    writer->records = array;
    if (rc < 0) {
        return rc;
    }
    *ret_pair_bytes = (uint64_t)a.bytes + b.bytes;
    writer->records[writer->n_records] = *record;
    writer->records[writer->n_records++].n_extents = 0;
    return 0;
}

static int by_place(const void *x, const void *y)
{
    const struct slu_sla_record *a = x, *b = y;
    if (a->layer != b->layer) {
        return a->layer < b->layer ? -1 : 1;
    }
    return a->target < b->target ? -1 : a->target > b->target;
}

int slu_sla_writer_pair(struct slu_sla_writer *writer, const struct slu_sla_record *record,
                        struct slu_err *err)
{
    assert(writer->left_bytes == 0 && writer->n_blocks == 0 && record->target < SLU_TARGETS &&
           !slu_sla_is_expert(record->target) && record->n == 1);
    assert(writer->n_records == 0 || by_place(&writer->records[writer->n_records - 1], record) < 0);
    return add_record(writer, record, &writer->left_bytes, err);
}

int slu_sla_writer_experts(struct slu_sla_writer *writer, const struct slu_sla_record *records,
                           uint32_t n_records, struct slu_err *err)
{
    assert(writer->left_bytes == 0 && n_records > 0);
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < n_records; i++) {
        const struct slu_sla_record *r = &records[i];
        assert(slu_sla_is_expert(r->target) && r->layer == records->layer &&
               (i == 0 || r[-1].target < r->target));
        if (r->n != records->n) {
            return slu_err_set(err, SLU_EUNSUP,
                               "layer %u: %s has pairs for %u experts, but %s for %u", r->layer,
                               slu_target_name((enum slu_target)records->target), records->n,
                               slu_target_name((enum slu_target)r->target), r->n);
        }
        uint64_t pair_bytes = 0;
        int rc = add_record(writer, r, &pair_bytes, err);
        if (rc < 0) {
            return rc;
        }
        bytes += pair_bytes;
    }
    if (bytes > SLU_SLA_BLOCK_MAX) {
        return slu_err_set(err, SLU_EUNSUP,
                           "layer %u: the pairs of one expert have %llu bytes; up to %u are "
                           "supported",
                           records->layer, (unsigned long long)bytes, SLU_SLA_BLOCK_MAX);
    }
    if (writer->n_blocks == 0) {
        writer->offset = slu_sla_page_up(writer->offset); /* a hole, which reads as zeros */
    }
    writer->left_bytes = records->n * bytes;
    return set_piece(writer, (size_t)bytes, err);
}

/* Describes a frame or a block that has just been written. */
static int add_extent(struct slu_sla_writer *writer, const struct slu_extent *extent, bool is_block,
                      struct slu_err *err)
{
    void *array = is_block ? writer->blocks : writer->extents;
    size_t *room = is_block ? &writer->blocks_room : &writer->extents_room;
    uint32_t *n = is_block ? &writer->n_blocks : &writer->n_extents;
    int rc = make_room(writer, &array, room, *n, sizeof *extent, err);
    struct slu_extent **extents = is_block ? &writer->blocks : &writer->extents;
    *extents = array;
    if (rc == 0 && *n >= SLU_SLA_EXTENTS_MAX) {
        rc = slu_err_set(err, SLU_EUNSUP, "%s: an adapter of over 4 TiB is not supported",
                         writer->path);
    }
    if (rc == 0) {
        (*extents)[(*n)++] = *extent;
    }
    return rc;
}

/* The piece becomes a frame, or stays raw where that saves less than 1/32. */
static int flush_piece(struct slu_sla_writer *writer, struct slu_err *err)
{
    size_t raw = writer->n_piece;
    struct slu_sla_record *record = &writer->records[writer->n_records - 1];
    bool is_block = slu_sla_is_expert(record->target);
    int64_t n = slu_encode(writer->encoder, writer->piece, raw, writer->encoded,
                           slu_encode_bound(writer->piece_room), err);
    if (n < 0) {
        return (int)n;
    }
    bool is_raw = n > (int64_t)(raw - raw / 32);
    const uint8_t *stored = is_raw ? writer->piece : writer->encoded;
    size_t stored_bytes = is_raw ? raw : (size_t)n;
    const struct slu_extent extent = {
        .offset = writer->offset,
        .checksum = slu_checksum(stored, stored_bytes),
        .stored_bytes = (uint32_t)stored_bytes,
        .raw_bytes = (uint32_t)raw,
        .codec = is_raw ? SLU_CODEC_RAW : SLU_CODEC_ZSTD,
    };
    int rc = write_at(writer, writer->offset, stored, stored_bytes, err);
    rc = rc < 0 ? rc : add_extent(writer, &extent, is_block, err);
    record->n_extents += !is_block;
    writer->offset += stored_bytes;
    if (is_block) {
        writer->offset = slu_sla_page_up(writer->offset);
    }
    writer->n_piece = 0;
    return rc;
}

int slu_sla_writer_append(struct slu_sla_writer *writer, const void *bytes, size_t n,
                          struct slu_err *err)
{
    assert(n <= writer->left_bytes);
    const uint8_t *at = bytes;
    while (n > 0) {
        size_t room = writer->piece_bytes - writer->n_piece;
        size_t part = n < room ? n : room;
        memcpy(writer->piece + writer->n_piece, at, part);
        writer->n_piece += part;
        writer->left_bytes -= part;
        at += part;
        n -= part;
        if (writer->n_piece == writer->piece_bytes || writer->left_bytes == 0) {
            int rc = flush_piece(writer, err);
            if (rc < 0) {
                return rc;
            }
        }
    }
    return 0;
}

/* Copies the characters that fit. Control characters turn to blanks and other bytes that are none
 * to '?', but for a character cut off at the very end, which is dropped. */
static void copy_text(char *out, size_t out_bytes, const char *text)
{
    size_t len = strlen(text), n_out = 0;
    memset(out, 0, out_bytes);
    for (size_t i = 0; i < len;) {
        size_t n = slu_sla_char_bytes(text + i, len - i);
        bool is_cut = n == 0 && len - i < 4 && ((unsigned char)text[i] & 0xc0) == 0xc0 &&
                      slu_sla_char_bytes(text + len - 1, 1) == 0;
        if (is_cut || n_out + (n ? n : 1) > out_bytes - 1) {
            return;
        }
        if (n > 0) {
            memcpy(out + n_out, text + i, n);
        } else {
            out[n_out] = (unsigned char)text[i] < 0x80 ? ' ' : '?';
        }
        n_out += n ? n : 1;
        i += n ? n : 1;
    }
}

/* Appends raw bytes outside the index and describes them. */
static int append_raw(struct slu_sla_writer *writer, const void *bytes, size_t n,
                      struct slu_extent *ret_extent, struct slu_err *err)
{
    *ret_extent = (struct slu_extent){
        .offset = writer->offset,
        .checksum = slu_checksum(bytes, n),
        .stored_bytes = (uint32_t)n,
        .raw_bytes = (uint32_t)n,
        .codec = SLU_CODEC_RAW,
    };
    int rc = write_at(writer, writer->offset, bytes, n, err);
    writer->offset += n;
    return rc;
}

static int write_index(struct slu_sla_writer *writer, struct slu_extent *ret_extent,
                       struct slu_err *err)
{
    size_t records_bytes = writer->n_records * sizeof *writer->records;
    size_t extents_bytes = writer->n_extents * sizeof *writer->extents;
    size_t blocks_bytes = writer->n_blocks * sizeof *writer->blocks;
    uint8_t *index = malloc(records_bytes + extents_bytes + blocks_bytes);
    if (!index) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for its index", writer->path);
    }
    /* Pairs of experts were written behind all others. */
    qsort(writer->records, writer->n_records, sizeof *writer->records, by_place);
    memcpy(index, writer->records, records_bytes);
    if (extents_bytes) {
        memcpy(index + records_bytes, writer->extents, extents_bytes);
    }
    if (blocks_bytes) {
        memcpy(index + records_bytes + extents_bytes, writer->blocks, blocks_bytes);
    }
    int rc =
        append_raw(writer, index, records_bytes + extents_bytes + blocks_bytes, ret_extent, err);
    free(index);
    return rc;
}

/* Makes the new name as durable as the file. */
static int sync_folder(const struct slu_sla_writer *writer, struct slu_err *err)
{
    const char *slash = strrchr(writer->path, '/');
    char *folder = !slash                  ? strdup(".")
                   : slash == writer->path ? strdup("/")
                                           : strndup(writer->path, (size_t)(slash - writer->path));
    int fd = folder ? open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    free(folder);
    int rc = 0;
    /* Some file systems cannot sync a folder and say EINVAL; there is nothing to be done. */
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL)) {
        rc = system_error(writer, "syncing its folder", err);
    }
    if (fd >= 0) {
        close(fd);
    }
    return rc;
}

static int publish(struct slu_sla_writer *writer, struct slu_err *err)
{
    if (fsync(writer->fd) != 0) {
        return system_error(writer, "syncing", err);
    }
    int fd = writer->fd;
    writer->fd = -1;
    if (close(fd) != 0 && errno != EINTR) {
        return system_error(writer, "closing", err);
    }
    if (rename(writer->temp, writer->path) != 0) {
        return system_error(writer, "renaming", err);
    }
    free(writer->temp);
    writer->temp = NULL;
    return sync_folder(writer, err);
}

int slu_sla_writer_finish(struct slu_sla_writer *writer, const struct slu_adapter_info *info,
                          struct slu_err *err)
{
    assert(writer->left_bytes == 0 && writer->fd >= 0);
    if (writer->n_records == 0) {
        return slu_err_set(err, SLU_EFORMAT, "%s: there is no pair to write", writer->path);
    }
    struct slu_sla_meta meta = {
        .base_fingerprint = info->base_fingerprint,
        .flags = info->is_hf_order ? SLU_SLA_HF_ORDER : 0,
    };
    copy_text(meta.name, sizeof meta.name, info->name);
    copy_text(meta.description, sizeof meta.description, info->description);
    copy_text(meta.arch, sizeof meta.arch, info->arch);
    struct slu_sla_header header = {
        .version = SLU_SLA_VERSION,
        .header_bytes = sizeof header,
        .n_loras = writer->n_records,
        .n_extents = writer->n_extents,
        .n_blocks = writer->n_blocks,
    };
    memcpy(header.magic, SLU_SLA_MAGIC, sizeof header.magic);
    int rc = append_raw(writer, &meta, sizeof meta, &header.meta, err);
    rc = rc < 0 ? rc : write_index(writer, &header.index, err);
    if (rc < 0) {
        return rc;
    }
    header.file_bytes = writer->offset;
    header.checksum = slu_checksum(&header, offsetof(struct slu_sla_header, checksum));
    uint8_t page[SLU_SLA_PAGE_BYTES] = {0};
    memcpy(page, &header, sizeof header);
    rc = write_at(writer, 0, page, sizeof page, err);
    return rc < 0 ? rc : publish(writer, err);
}
