#include "io/pack_writer.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/pack_check.h"

/* Small appends (rows) gather here before they are written. */
#define BUFFER_BYTES (256u << 10)
/* What has been written is pushed to the device and dropped from the page cache in windows of this
 * size, since dirty pages count against the memory that a pack may take. */
#define WINDOW_BYTES (32ull << 20)
/* Names to try beside the final one, should earlier ones be taken. */
#define TEMP_TRIES 16

struct slu_pack_writer {
    char *path;      /* the final name */
    char *temp_path; /* NULL once there is nothing to remove */
    int fd;
    bool is_closed; /* failed or finished */
    bool in_rows;
    enum slu_codec_id codec;
    struct slu_encoder *encoder; /* NULL where all is to be raw */
    uint8_t *encoded;
    size_t encoded_bytes;
    uint8_t *buffer; /* BUFFER_BYTES; bytes written - n_buffered .. written - 1 of the file */
    size_t n_buffered;
    uint64_t offset;        /* in the file, of the next byte appended */
    uint64_t window_offset; /* where the window that is filling begins */
    uint64_t rows_offset;
    uint64_t stored_bytes, raw_bytes;
    struct slu_extent *extents;
    struct slu_pack_tensor *tensors;
    struct slu_pack_bank *banks;
    uint32_t n_extents, n_tensors, n_banks;
    uint32_t version; /* the least that knows what has been written */
    size_t extents_room, tensors_room, banks_room;
};

/* After a failure nothing more is written: the file goes at once, to give its space back. */
static int fail(struct slu_pack_writer *writer, int rc)
{
    writer->is_closed = true;
    if (writer->fd >= 0) {
        close(writer->fd);
        writer->fd = -1;
    }
    if (writer->temp_path) {
        unlink(writer->temp_path);
        free(writer->temp_path);
        writer->temp_path = NULL;
    }
    return rc;
}

static int fail_errno(struct slu_pack_writer *writer, const char *what, struct slu_err *err)
{
    int cause = errno;
    slu_err_set(err, SLU_EIO, "%s: %s failed: %s%s", writer->path, what, strerror(cause),
                cause == ENOSPC || cause == EDQUOT ? "; free some space or pack to another disk"
                                                   : "");
    return fail(writer, SLU_EIO);
}

static int check_alive(const struct slu_pack_writer *writer, struct slu_err *err)
{
    if (writer->is_closed) {
        return slu_err_set(err, SLU_EIO, "%s: an earlier write failed, or it is finished",
                           writer->path);
    }
    return 0;
}

static int write_at(struct slu_pack_writer *writer, uint64_t offset, const uint8_t *bytes, size_t n,
                    struct slu_err *err)
{
    while (n > 0) {
        ssize_t done = pwrite(writer->fd, bytes, n, (off_t)offset);
        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done <= 0) {
            errno = done == 0 ? ENOSPC : errno;
            return fail_errno(writer, "writing", err);
        }
        bytes += done;
        offset += (uint64_t)done;
        n -= (size_t)done;
    }
    return 0;
}

/* Starts the device on the window just filled, waits for the one before it, and lets that one's
 * pages go. An error of the device shows here or in the sync at the end. */
static int push_window(struct slu_pack_writer *writer, struct slu_err *err)
{
    const uint64_t at = writer->window_offset;
    int rc = sync_file_range(writer->fd, (off_t)at, (off_t)WINDOW_BYTES, SYNC_FILE_RANGE_WRITE);
    if (rc == 0 && at >= WINDOW_BYTES) {
        const off_t before = (off_t)(at - WINDOW_BYTES);
        rc = sync_file_range(writer->fd, before, (off_t)WINDOW_BYTES,
                             SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
                                 SYNC_FILE_RANGE_WAIT_AFTER);
        posix_fadvise(writer->fd, before, (off_t)WINDOW_BYTES, POSIX_FADV_DONTNEED);
    }
    writer->window_offset += WINDOW_BYTES;
    if (rc != 0 && (errno == EIO || errno == ENOSPC || errno == EDQUOT)) {
        return fail_errno(writer, "writing", err);
    }
    return 0; /* other refusals mean that the file system doesn't offer this */
}

static int flush(struct slu_pack_writer *writer, struct slu_err *err)
{
    int rc = write_at(writer, writer->offset - writer->n_buffered, writer->buffer,
                      writer->n_buffered, err);
    writer->n_buffered = 0;
    while (rc == 0 && writer->offset >= writer->window_offset + WINDOW_BYTES) {
        rc = push_window(writer, err);
    }
    return rc;
}

static int append(struct slu_pack_writer *writer, const void *bytes, size_t n, struct slu_err *err)
{
    int rc = 0;
    if (n > BUFFER_BYTES - writer->n_buffered) {
        rc = flush(writer, err);
    }
    if (rc == 0 && n > BUFFER_BYTES) {
        rc = write_at(writer, writer->offset, bytes, n, err);
    } else if (rc == 0) {
        memcpy(writer->buffer + writer->n_buffered, bytes, n);
        writer->n_buffered += n;
    }
    if (rc == 0) {
        writer->offset += n;
    }
    return rc;
}

static int append_padding(struct slu_pack_writer *writer, struct slu_err *err)
{
    static const uint8_t zeros[SLU_PACK_ALIGN];
    return append(writer, zeros, slu_pack_page_up(writer->offset) - writer->offset, err);
}

/* Room for one record more; the index as a whole must stay within 32 bits of size. */
static int make_room(struct slu_pack_writer *writer, void **array, size_t *room, size_t n,
                     size_t record_bytes, struct slu_err *err)
{
    uint64_t bytes =
        slu_pack_index_bytes(writer->n_tensors, writer->n_banks, writer->n_extents) + record_bytes;
    if (bytes > UINT32_MAX) {
        slu_err_set(err, SLU_EUNSUP, "%s: its index would pass 4 GiB", writer->path);
        return fail(writer, SLU_EUNSUP);
    }
    if (n < *room) {
        return 0;
    }
    size_t wanted = *room ? *room * 2 : 256;
    void *grown = realloc(*array, wanted * record_bytes);
    if (!grown) {
        slu_err_set(err, SLU_ENOMEM, "%s: no memory for its index", writer->path);
        return fail(writer, SLU_ENOMEM);
    }
    *array = grown;
    *room = wanted;
    return 0;
}

static int make_extent_room(struct slu_pack_writer *writer, struct slu_err *err)
{
    void *array = writer->extents;
    int rc = make_room(writer, &array, &writer->extents_room, writer->n_extents,
                       sizeof *writer->extents, err);
    writer->extents = array;
    return rc;
}

/* Opens a name beside the final one that nobody has. */
static int open_temp(struct slu_pack_writer *writer, struct slu_err *err)
{
    size_t bytes = strlen(writer->path) + 40;
    char *temp_path = malloc(bytes);
    if (!temp_path) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", writer->path);
    }
    int cause = 0;
    for (int i = 0; i < TEMP_TRIES && writer->fd < 0; i++) {
        snprintf(temp_path, bytes, "%s.tmp-%ld-%d", writer->path, (long)getpid(), i);
        writer->fd = open(temp_path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        cause = errno;
        if (writer->fd < 0 && cause != EEXIST) {
            break;
        }
    }
    if (writer->fd < 0) {
        slu_err_set(err, SLU_EIO, "%s: cannot be made: %s", temp_path, strerror(cause));
        free(temp_path);
        return SLU_EIO;
    }
    writer->temp_path = temp_path;
    return 0;
}

int slu_pack_writer_create(const char *path, enum slu_codec_id codec,
                           struct slu_pack_writer **ret_writer, struct slu_err *err)
{
    if ((unsigned)codec >= SLU_CODECS) {
        return slu_err_set(err, SLU_EINVAL, "codec %u is unknown", (unsigned)codec);
    }
    /* Better said now than by rename after hours of packing. */
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) {
        return slu_err_set(err, SLU_EIO, "%s: exists and is not a regular file", path);
    }
    struct slu_pack_writer *writer = calloc(1, sizeof *writer);
    if (!writer) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
    }
    writer->version = SLU_PACK_VERSION;
    writer->fd = -1;
    writer->codec = codec;
    writer->offset = SLU_PACK_ALIGN; /* the header comes last */
    writer->path = strdup(path);
    writer->buffer = malloc(BUFFER_BYTES);
    int rc = 0;
    if (!writer->path || !writer->buffer) {
        rc = slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
    }
    if (rc == 0 && codec == SLU_CODEC_ZSTD) {
        rc = slu_encoder_create(&writer->encoder, err);
    }
    if (rc == 0) {
        rc = open_temp(writer, err);
    }
    if (rc != 0) {
        slu_pack_writer_destroy(writer);
        return rc;
    }
    *ret_writer = writer;
    return 0;
}

void slu_pack_writer_set_codec(struct slu_pack_writer *writer, enum slu_codec_id codec)
{
    assert(codec == SLU_CODEC_RAW || writer->encoder);
    writer->codec = codec;
}

void slu_pack_writer_destroy(struct slu_pack_writer *writer)
{
    if (writer) {
        fail(writer, 0);
        slu_encoder_destroy(writer->encoder);
        free(writer->encoded);
        free(writer->buffer);
        free(writer->extents);
        free(writer->tensors);
        free(writer->banks);
        free(writer->path);
        free(writer);
    }
}

/* Compresses into writer->encoded. Returns the size, or 0 where that saves less than 1/32. */
static int64_t encode(struct slu_pack_writer *writer, const void *raw, size_t raw_bytes,
                      const struct slu_parts *parts, struct slu_err *err)
{
    if (writer->codec == SLU_CODEC_RAW) {
        return 0;
    }
    size_t bound = parts ? slu_encode_parts_bound(raw_bytes, parts) : slu_encode_bound(raw_bytes);
    if (bound > writer->encoded_bytes) {
        free(writer->encoded);
        writer->encoded_bytes = 0;
        writer->encoded = malloc(bound);
        if (!writer->encoded) {
            return slu_err_set(err, SLU_ENOMEM, "%s: no memory to compress %zu bytes", writer->path,
                               raw_bytes);
        }
        writer->encoded_bytes = bound;
    }
    int64_t n = parts ? slu_encode_parts(writer->encoder, raw, raw_bytes, parts, writer->encoded,
                                         writer->encoded_bytes, err)
                      : slu_encode(writer->encoder, raw, raw_bytes, writer->encoded,
                                   writer->encoded_bytes, err);
    return n > (int64_t)(raw_bytes - raw_bytes / 32) ? 0 : n;
}

/* Appends data as one extent, without entering it in the table. is_meta: of the
 * metadata, which may not be squeezed too far. */
static int append_extent(struct slu_pack_writer *writer, const void *raw, size_t raw_bytes,
                         const struct slu_parts *parts, bool is_meta, struct slu_extent *ret_extent,
                         struct slu_err *err)
{
    if (raw_bytes > UINT32_MAX) {
        slu_err_set(err, SLU_EUNSUP, "%s: an extent of %zu bytes passes 4 GiB", writer->path,
                    raw_bytes);
        return fail(writer, SLU_EUNSUP);
    }
    int64_t n = encode(writer, raw, raw_bytes, parts, err);
    if (n < 0) {
        return fail(writer, (int)n);
    }
    /* Readers take metadata that compress too well for a bomb. */
    if (is_meta && !slu_pack_meta_is_plausible((uint64_t)n, raw_bytes)) {
        n = 0;
    }
    const void *stored = n > 0 ? writer->encoded : raw;
    const size_t stored_bytes = n > 0 ? (size_t)n : raw_bytes;
    struct slu_extent extent = {
        .offset = writer->offset,
        .checksum = slu_checksum(stored, stored_bytes),
        .stored_bytes = (uint32_t)stored_bytes,
        .raw_bytes = (uint32_t)raw_bytes,
        .codec = n > 0 ? SLU_CODEC_ZSTD : SLU_CODEC_RAW,
    };
    int rc = append(writer, stored, stored_bytes, err);
    if (rc == 0) {
        rc = append_padding(writer, err);
    }
    if (rc == 0) {
        *ret_extent = extent;
    }
    return rc;
}

int64_t slu_pack_writer_extent_parts(struct slu_pack_writer *writer, const void *raw,
                                     size_t raw_bytes, const struct slu_parts *parts,
                                     struct slu_err *err)
{
    assert(!writer->in_rows && raw_bytes > 0);
    int rc = check_alive(writer, err);
    if (rc == 0) {
        rc = make_extent_room(writer, err);
    }
    struct slu_extent extent;
    if (rc == 0) {
        rc = append_extent(writer, raw, raw_bytes, parts, false, &extent, err);
    }
    if (rc != 0) {
        return rc;
    }
    writer->stored_bytes += extent.stored_bytes;
    writer->raw_bytes += raw_bytes;
    writer->extents[writer->n_extents] = extent;
    return writer->n_extents++;
}

int64_t slu_pack_writer_extent(struct slu_pack_writer *writer, const void *raw, size_t raw_bytes,
                               struct slu_err *err)
{
    return slu_pack_writer_extent_parts(writer, raw, raw_bytes, NULL, err);
}

int64_t slu_pack_writer_rows_begin(struct slu_pack_writer *writer, struct slu_err *err)
{
    assert(!writer->in_rows);
    int rc = check_alive(writer, err);
    if (rc == 0) {
        rc = make_extent_room(writer, err);
    }
    if (rc != 0) {
        return rc;
    }
    writer->in_rows = true;
    writer->rows_offset = writer->offset;
    writer->extents[writer->n_extents] = (struct slu_extent){.offset = writer->offset};
    return writer->n_extents++;
}

int slu_pack_writer_rows_append(struct slu_pack_writer *writer, const void *bytes, size_t n,
                                struct slu_err *err)
{
    assert(writer->in_rows);
    int rc = check_alive(writer, err);
    return rc != 0 ? rc : append(writer, bytes, n, err);
}

int slu_pack_writer_rows_end(struct slu_pack_writer *writer, struct slu_err *err)
{
    assert(writer->in_rows && writer->offset > writer->rows_offset);
    writer->in_rows = false;
    int rc = check_alive(writer, err);
    writer->stored_bytes += writer->offset - writer->rows_offset;
    writer->raw_bytes += writer->offset - writer->rows_offset;
    return rc != 0 ? rc : append_padding(writer, err);
}

static void need_version(struct slu_pack_writer *writer, uint32_t fmt)
{
    writer->version = fmt > SLU_PACK_FMT_V1_MAX ? SLU_PACK_VERSION_FORMATS : writer->version;
}

int slu_pack_writer_tensor(struct slu_pack_writer *writer, const struct slu_pack_tensor *tensor,
                           struct slu_err *err)
{
    int rc = check_alive(writer, err);
    if (rc == 0) {
        void *array = writer->tensors;
        rc = make_room(writer, &array, &writer->tensors_room, writer->n_tensors, sizeof *tensor,
                       err);
        writer->tensors = array;
    }
    if (rc == 0) {
        writer->tensors[writer->n_tensors++] = *tensor;
        need_version(writer, tensor->fmt);
    }
    return rc;
}

int slu_pack_writer_bank(struct slu_pack_writer *writer, const struct slu_pack_bank *bank,
                         struct slu_err *err)
{
    int rc = check_alive(writer, err);
    if (rc == 0) {
        void *array = writer->banks;
        rc = make_room(writer, &array, &writer->banks_room, writer->n_banks, sizeof *bank, err);
        writer->banks = array;
    }
    if (rc == 0) {
        writer->banks[writer->n_banks++] = *bank;
        need_version(writer, bank->fmt_gate);
        need_version(writer, bank->fmt_up);
        need_version(writer, bank->fmt_down);
    }
    return rc;
}

/* The three tables one after another. */
static int write_index(struct slu_pack_writer *writer, struct slu_extent *ret_extent,
                       struct slu_err *err)
{
    size_t tensors_bytes = writer->n_tensors * sizeof *writer->tensors;
    size_t banks_bytes = writer->n_banks * sizeof *writer->banks;
    size_t extents_bytes = writer->n_extents * sizeof *writer->extents;
    size_t bytes = tensors_bytes + banks_bytes + extents_bytes;
    uint8_t *index = malloc(bytes);
    if (!index) {
        slu_err_set(err, SLU_ENOMEM, "%s: no memory for an index of %zu bytes", writer->path,
                    bytes);
        return fail(writer, SLU_ENOMEM);
    }
    if (tensors_bytes > 0) {
        memcpy(index, writer->tensors, tensors_bytes);
    }
    if (banks_bytes > 0) {
        memcpy(index + tensors_bytes, writer->banks, banks_bytes);
    }
    memcpy(index + tensors_bytes + banks_bytes, writer->extents, extents_bytes);
    int rc = append_extent(writer, index, bytes, NULL, false, ret_extent, err);
    free(index);
    return rc;
}

/* A pack that its own reader would refuse never gets a name. */
static int check_whole(struct slu_pack_writer *writer, const struct slu_pack_header *header,
                       const void *kvs, size_t kvs_bytes, struct slu_err *err)
{
    struct slu_kvs pairs;
    size_t used = 0;
    int rc = slu_kvs_parse(kvs, kvs_bytes, header->n_kvs, &pairs, &used, writer->path, err);
    if (rc == 0) {
        slu_kvs_finish(&pairs);
        if (used != kvs_bytes) {
            rc = slu_err_set(err, SLU_EINVAL, "%s: %zu bytes follow its metadata keys",
                             writer->path, kvs_bytes - used);
        }
    }
    if (rc == 0) {
        rc = slu_pack_check_header(header, writer->path, err);
    }
    if (rc == 0) {
        rc = slu_pack_check_index(header, writer->tensors, writer->banks, writer->extents,
                                  writer->path, err);
    }
    return rc != 0 ? fail(writer, rc) : 0;
}

/* Makes the new name as durable as the file. */
static int sync_directory(struct slu_pack_writer *writer, struct slu_err *err)
{
    const char *slash = strrchr(writer->path, '/');
    char *directory = !slash ? strdup(".")
                      : slash == writer->path
                          ? strdup("/")
                          : strndup(writer->path, (size_t)(slash - writer->path));
    int fd = directory ? open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    /* Where a directory can't be synced, or may be written but not opened, there is nothing to be
     * done. */
    bool is_synced = fd >= 0 ? fsync(fd) == 0 || errno == EINVAL : directory && errno == EACCES;
    int cause = errno;
    free(directory);
    if (fd >= 0) {
        close(fd);
    }
    if (!is_synced) {
        return slu_err_set(err, SLU_EIO, "%s: its directory cannot be synced: %s", writer->path,
                           strerror(cause));
    }
    return 0;
}

/* From a complete temporary file to the final name. */
static int publish(struct slu_pack_writer *writer, struct slu_err *err)
{
    if (fsync(writer->fd) != 0) {
        return fail_errno(writer, "syncing", err);
    }
    posix_fadvise(writer->fd, 0, 0, POSIX_FADV_DONTNEED);
    int fd = writer->fd;
    writer->fd = -1;
    if (close(fd) != 0 && errno != EINTR) {
        return fail_errno(writer, "closing", err);
    }
    if (rename(writer->temp_path, writer->path) != 0) {
        return fail_errno(writer, "renaming", err);
    }
    free(writer->temp_path);
    writer->temp_path = NULL;
    int rc = sync_directory(writer, err);
    /* The pack is complete: it stays where it is. */
    return rc != 0 ? fail(writer, rc) : 0;
}

int slu_pack_writer_finish(struct slu_pack_writer *writer, const void *kvs, size_t kvs_bytes,
                           uint64_t n_kvs, struct slu_err *err)
{
    assert(!writer->in_rows);
    int rc = check_alive(writer, err);
    if (rc != 0) {
        return rc;
    }
    if (kvs_bytes == 0 || kvs_bytes > SLU_PACK_META_BYTES_MAX || writer->n_extents == 0) {
        slu_err_set(err, SLU_EINVAL,
                    "%s: a pack has 1 byte to %u of metadata and at least one extent, not %zu and "
                    "%u",
                    writer->path, SLU_PACK_META_BYTES_MAX, kvs_bytes, writer->n_extents);
        return fail(writer, SLU_EINVAL);
    }
    struct slu_pack_header header = {
        .version = writer->version,
        .header_bytes = sizeof header,
        .n_kvs = n_kvs,
        .n_tensors = writer->n_tensors,
        .n_banks = writer->n_banks,
        .n_extents = writer->n_extents,
    };
    memcpy(header.magic, SLU_PACK_MAGIC, sizeof header.magic);
    rc = append_extent(writer, kvs, kvs_bytes, NULL, true, &header.meta, err);
    if (rc == 0) {
        rc = write_index(writer, &header.index, err);
    }
    if (rc == 0) {
        rc = flush(writer, err);
    }
    if (rc != 0) {
        return rc;
    }
    header.file_bytes = writer->offset;
    header.checksum = slu_checksum(&header, offsetof(struct slu_pack_header, checksum));
    rc = check_whole(writer, &header, kvs, kvs_bytes, err);
    if (rc == 0) {
        /* The rest of the first page was never written, which reads as zero. */
        rc = write_at(writer, 0, (const uint8_t *)&header, sizeof header, err);
    }
    if (rc == 0) {
        rc = publish(writer, err);
    }
    writer->is_closed = true;
    return rc;
}

uint64_t slu_pack_writer_stored_bytes(const struct slu_pack_writer *writer)
{
    return writer->stored_bytes;
}

uint64_t slu_pack_writer_raw_bytes(const struct slu_pack_writer *writer)
{
    return writer->raw_bytes;
}
