#include "io/source.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Page cache counts against the memory that the user granted, so what a large read left there is
 * dropped piece by piece; small reads (headers, rows) may stay, since they are likely to recur. */
#define DROP_BYTES_MIN (64u << 10)
#define PIECE_BYTES    (8u << 20)
#define PAGE_BYTES     4096u

struct file_source {
    struct slu_source base;
    int fd;
    char name[];
};

struct memory_source {
    struct slu_source base;
    const uint8_t *data;
    char name[];
};

/* Both kinds refuse a range past the end with the same sentence. */
static int check_range(const struct slu_source *source, uint64_t offset, size_t bytes,
                       struct slu_err *err)
{
    if (offset > source->size_bytes || bytes > source->size_bytes - offset) {
        return slu_err_set(err, SLU_EIO,
                           "%s: %zu bytes at offset %llu lie past its end at %llu; it may be "
                           "truncated",
                           source->name, bytes, (unsigned long long)offset,
                           (unsigned long long)source->size_bytes);
    }
    return 0;
}

static int read_piece(struct file_source *file, uint64_t offset, uint8_t *buffer, size_t bytes,
                      struct slu_err *err)
{
    size_t done = 0;
    while (done < bytes) {
        ssize_t n = pread(file->fd, buffer + done, bytes - done, (off_t)(offset + done));
        if (n > 0) {
            done += (size_t)n;
        } else if (n == 0) {
            return slu_err_set(err, SLU_EIO,
                               "%s: ends at byte %llu, though it was longer when "
                               "opened; something has truncated it",
                               file->name, (unsigned long long)(offset + done));
        } else if (errno != EINTR) {
            return slu_err_set(err, SLU_EIO, "%s: reading at byte %llu failed: %s", file->name,
                               (unsigned long long)(offset + done), strerror(errno));
        }
    }
    return 0;
}

static int file_read_at(struct slu_source *source, uint64_t offset, void *buffer, size_t bytes,
                        struct slu_err *err)
{
    struct file_source *file = (struct file_source *)source;
    int rc = check_range(source, offset, bytes, err);
    uint8_t *out = buffer;
    bool drop = bytes >= DROP_BYTES_MIN;
    while (rc == 0 && bytes > 0) {
        size_t n = bytes < PIECE_BYTES ? bytes : PIECE_BYTES;
        rc = read_piece(file, offset, out, n, err);
        if (rc == 0 && drop) {
            /* Only whole pages are dropped, so the range is widened to them. */
            uint64_t lo = offset / PAGE_BYTES * PAGE_BYTES;
            uint64_t hi = (offset + n + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
            posix_fadvise(file->fd, (off_t)lo, (off_t)(hi - lo), POSIX_FADV_DONTNEED);
        }
        offset += n;
        out += n;
        bytes -= n;
    }
    return rc;
}

static void file_destroy(struct slu_source *source)
{
    struct file_source *file = (struct file_source *)source;
    close(file->fd);
    free(file);
}

int slu_source_open_file(const char *path, struct slu_source **ret_source, struct slu_err *err)
{
    int rc = 0;
    struct file_source *file = NULL;
    /* Non-blocking, so that a named pipe is refused below instead of waited for. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        rc = errno == ENOENT || errno == ENOTDIR ? SLU_ENOENT : SLU_EIO;
        return slu_err_set(err, rc, "%s: cannot be opened: %s", path, strerror(errno));
    }
    struct stat st;
    if (fstat(fd, &st) != 0) {
        rc = slu_err_set(err, SLU_EIO, "%s: cannot be examined: %s", path, strerror(errno));
        goto fail;
    }
    if (!S_ISREG(st.st_mode)) {
        rc = slu_err_set(err, SLU_EIO, "%s: is %s, not a regular file", path,
                         S_ISDIR(st.st_mode) ? "a directory" : "a device or pipe");
        goto fail;
    }
    size_t name_bytes = strlen(path) + 1;
    file = malloc(sizeof *file + name_bytes);
    if (!file) {
        rc = slu_err_set(err, SLU_ENOMEM, "%s: no memory to open it", path);
        goto fail;
    }
    memcpy(file->name, path, name_bytes);
    file->fd = fd;
    file->base = (struct slu_source){
        .read_at = file_read_at,
        .destroy = file_destroy,
        .size_bytes = (uint64_t)st.st_size,
        .name = file->name,
    };
    *ret_source = &file->base;
    return 0;
fail:
    close(fd);
    return rc;
}

int slu_source_open_scattered(const char *path, struct slu_source **ret_source, struct slu_err *err)
{
    int rc = slu_source_open_file(path, ret_source, err);
    if (rc == 0) {
        posix_fadvise(((struct file_source *)*ret_source)->fd, 0, 0, POSIX_FADV_RANDOM);
    }
    return rc;
}

static int memory_read_at(struct slu_source *source, uint64_t offset, void *buffer, size_t bytes,
                          struct slu_err *err)
{
    struct memory_source *memory = (struct memory_source *)source;
    int rc = check_range(source, offset, bytes, err);
    if (rc == 0 && bytes > 0) {
        memcpy(buffer, memory->data + offset, bytes);
    }
    return rc;
}

static void memory_destroy(struct slu_source *source)
{
    free(source);
}

int slu_source_open_memory(const void *data, size_t bytes, const char *name,
                           struct slu_source **ret_source)
{
    assert(data || bytes == 0);
    size_t name_bytes = strlen(name) + 1;
    struct memory_source *memory = malloc(sizeof *memory + name_bytes);
    if (!memory) {
        return SLU_ENOMEM;
    }
    memcpy(memory->name, name, name_bytes);
    memory->data = data;
    memory->base = (struct slu_source){
        .read_at = memory_read_at,
        .destroy = memory_destroy,
        .size_bytes = bytes,
        .name = memory->name,
    };
    *ret_source = &memory->base;
    return 0;
}

void slu_source_destroy(struct slu_source *source)
{
    if (source) {
        source->destroy(source);
    }
}
