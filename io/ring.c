#include "io/ring_backend.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Opens and reads the first page, since some file systems take O_DIRECT at open and refuse the
 * read. Returns the descriptor or a negative errno. */
static int open_and_try(const char *path, int flags)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | flags);
    if (fd < 0) {
        return -errno;
    }
    void *page = aligned_alloc(SLU_IO_ALIGN, SLU_IO_ALIGN);
    int e = page ? 0 : ENOMEM;
    while (page && pread(fd, page, SLU_IO_ALIGN, 0) < 0) {
        if (errno != EINTR) {
            e = errno;
            break;
        }
    }
    free(page);
    if (e != 0) {
        close(fd);
        return -e;
    }
    return fd;
}

static int open_file(const char *path, bool is_buffered, bool *ret_direct, struct slu_err *err)
{
    int fd = is_buffered ? -EINVAL : open_and_try(path, O_DIRECT);
    *ret_direct = fd >= 0;
    if (fd == -EINVAL || fd == -EOPNOTSUPP) {
        fd = open_and_try(path, 0);
        if (fd >= 0) {
            posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM); /* readahead would only evict others */
        }
    }
    if (fd >= 0) {
        return fd;
    }
    int code = fd == -ENOENT ? SLU_ENOENT : fd == -ENOMEM ? SLU_ENOMEM : SLU_EIO;
    return slu_err_set(err, code, "%s: can't be opened and read: %s", path, strerror(-fd));
}

static unsigned depth_of(const struct slu_ring_params *params)
{
    unsigned depth = params->depth ? params->depth : 64;
    return depth < SLU_RING_DEPTH_MAX ? depth : SLU_RING_DEPTH_MAX;
}

static unsigned threads_of(const struct slu_ring_params *params)
{
    unsigned n = params->n_threads ? params->n_threads : 4;
    return n < SLU_RING_PREAD_MAX ? n : SLU_RING_PREAD_MAX;
}

#if !defined(SLU_HAVE_URING)
int slu_ring_uring_start(const struct slu_ring_start *start, struct slu_ring **ret_ring,
                         struct slu_err *err)
{
    (void)start;
    (void)ret_ring;
    return slu_err_set(err, SLU_EUNSUP,
                       "io_uring was not built in; use the pread back end instead");
}

size_t slu_ring_uring_bytes(unsigned depth)
{
    (void)depth;
    return 0;
}
#endif

int slu_ring_open(const char *path, const struct slu_ring_params *params,
                  struct slu_ring **ret_ring, struct slu_err *err)
{
    struct slu_ring_start start = {
        .depth = depth_of(params),
        .n_threads = threads_of(params),
        .ranges = params->ranges,
        .n_ranges = params->n_ranges,
    };
    start.fd = open_file(path, params->is_buffered, &start.is_direct, err);
    if (start.fd < 0) {
        return start.fd;
    }
    int e = SLU_EUNSUP;
    if (params->backend != SLU_IO_PREAD) {
        e = slu_ring_uring_start(&start, ret_ring, err);
    }
    if (e == SLU_EUNSUP && params->backend != SLU_IO_URING) {
        e = slu_ring_pread_start(&start, ret_ring, err);
    }
    if (e < 0) {
        close(start.fd);
        slu_err_prefix(err, "%s", path);
    }
    return e;
}

void slu_ring_destroy(struct slu_ring *ring)
{
    if (ring) {
        ring->destroy(ring);
    }
}

/* The most that either back end would take, since which it will be isn't known beforehand. */
size_t slu_ring_bytes(const struct slu_ring_params *params)
{
    size_t pread_bytes = slu_ring_pread_bytes(depth_of(params), threads_of(params));
    size_t uring_bytes = slu_ring_uring_bytes(depth_of(params));
    return pread_bytes > uring_bytes ? pread_bytes : uring_bytes;
}

int slu_ring_check(const struct slu_read *read, unsigned n_in_flight, unsigned depth,
                   struct slu_err *err)
{
    if (read->bytes == 0 || read->bytes > INT32_MAX ||
        ((uintptr_t)read->buffer | read->offset | read->bytes) % SLU_IO_ALIGN != 0) {
        return slu_err_set(err, SLU_EINVAL,
                           "a read of %" PRIu32 " bytes at offset %" PRIu64
                           " into %p isn't in whole pages",
                           read->bytes, read->offset, read->buffer);
    }
    if (read->offset > (uint64_t)INT64_MAX - read->bytes) {
        return slu_err_set(err, SLU_EINVAL, "offset %" PRIu64 " lies past the end of any file",
                           read->offset);
    }
    if (n_in_flight >= depth) {
        return slu_err_set(err, SLU_EINVAL, "all of the %u reads allowed are in flight", depth);
    }
    return 0;
}

uint32_t slu_ring_kept(bool is_direct, uint32_t n)
{
    return is_direct ? n / SLU_IO_ALIGN * SLU_IO_ALIGN : n;
}

void slu_ring_used(int fd, bool is_direct, const struct slu_read *read)
{
    if (!is_direct) {
        posix_fadvise(fd, (off_t)read->offset, (off_t)read->bytes, POSIX_FADV_DONTNEED);
    }
}
