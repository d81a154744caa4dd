#include "tools/flash_rate.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "io/ring.h"

#define READ_BYTES (1u << 20)
#define DEPTH      4u /* what the stream has in flight */
#define FILE_READS 64u
#define WARM_NS    200000000u /* until bursts that a throttle grants are over */
#define TIMED_NS   600000000u

/* xorshift64 (Marsaglia). */
static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Keeps DEPTH reads in flight; counts from the end of the warming up on. */
static int time_reads(struct slu_ring *ring, const char *path, uint8_t *buffers, uint64_t n_places,
                      double *ret_bytes_s, struct slu_err *err)
{
    uint64_t random = slu_now_ns() | 1, start = slu_now_ns(), from = 0, now = start, n_done = 0;
    unsigned slots[DEPTH], n_free = DEPTH;
    for (unsigned i = 0; i < DEPTH; i++) {
        slots[i] = i;
    }
    while (from == 0 || now - from < TIMED_NS) {
        while (n_free > 0) {
            unsigned slot = slots[n_free - 1];
            struct slu_read read = {.buffer = buffers + (size_t)slot * READ_BYTES,
                                    .offset = next_random(&random) % n_places * READ_BYTES,
                                    .bytes = READ_BYTES,
                                    .tag = slot};
            int code = ring->submit(ring, &read, err);
            if (code < 0) {
                return code;
            }
            n_free--;
        }
        struct slu_read_done done[DEPTH];
        int n = ring->wait(ring, done, DEPTH, true);
        now = slu_now_ns();
        for (int i = 0; i < n; i++) {
            if (done[i].result < 0) {
                return slu_err_set(err, SLU_EIO,
                                   "%s: can't be read, so the flash's rate isn't "
                                   "known; give it with --flash-mbps",
                                   path);
            }
            slots[n_free++] = (unsigned)done[i].tag;
            n_done++;
        }
        if (from == 0 && now - start >= WARM_NS) {
            from = now;
            n_done = 0;
        }
    }
    *ret_bytes_s = 1e9 * (double)n_done * READ_BYTES / (double)(now - from);
    return 0;
}

static int fill(int fd, const char *name, uint8_t *buffer, struct slu_err *err)
{
    uint64_t random = 88172645463325252u;
    for (unsigned i = 0; i < FILE_READS; i++) {
        for (size_t at = 0; at < READ_BYTES; at += sizeof random) {
            uint64_t bits = next_random(&random);
            memcpy(buffer + at, &bits, sizeof bits);
        }
        for (size_t at = 0; at < READ_BYTES;) {
            ssize_t n = write(fd, buffer + at, READ_BYTES - at);
            if (n < 0 && errno != EINTR) {
                return slu_err_set(err, SLU_EIO,
                                   "%s: cannot be written: %s; the rate of the flash "
                                   "can be given with --flash-mbps instead",
                                   name, strerror(errno));
            }
            at += n > 0 ? (size_t)n : 0;
        }
    }
    return fdatasync(fd) == 0
               ? 0
               : slu_err_set(err, SLU_EIO, "%s: cannot be synced: %s", name, strerror(errno));
}

/* A file beside `out` to read; opened, and without a name by the time that this returns. */
static int open_own(const char *out, const struct slu_ring_params *params, uint8_t *buffer,
                    struct slu_ring **ret_ring, struct slu_err *err)
{
    char *name;
    if (asprintf(&name, "%s.rate-XXXXXX", out) < 0) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", out);
    }
    int fd = mkstemp(name);
    int code = 0;
    if (fd < 0) {
        code = slu_err_set(err, SLU_EIO, "%s: cannot be made: %s", name, strerror(errno));
    } else {
        code = fill(fd, name, buffer, err);
        code = code < 0 ? code : slu_ring_open(name, params, ret_ring, err);
        unlink(name);
        close(fd);
    }
    free(name);
    return code;
}

/* Whether `there` is a file on the device that `out` will lie on, large enough to read. */
static bool is_beside(const char *out, const char *there, uint64_t *ret_bytes)
{
    struct stat file, folder;
    const char *slash = strrchr(out, '/');
    char *name = !slash         ? strdup(".")
                 : slash == out ? strdup("/")
                                : strndup(out, (size_t)(slash - out));
    bool is_same = name && there && stat(there, &file) == 0 && stat(name, &folder) == 0 &&
                   S_ISREG(file.st_mode) && file.st_dev == folder.st_dev &&
                   file.st_size >= (off_t)FILE_READS * READ_BYTES;
    *ret_bytes = is_same ? (uint64_t)file.st_size : (uint64_t)FILE_READS * READ_BYTES;
    free(name);
    return is_same;
}

int slu_flash_rate(const char *out, const char *there, double *ret_bytes_s, struct slu_err *err)
{
    uint64_t bytes;
    bool is_there = is_beside(out, there, &bytes);
    uint8_t *buffers = aligned_alloc(SLU_IO_ALIGN, (size_t)DEPTH * READ_BYTES);
    if (!buffers) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", out);
    }
    struct slu_io_range range = {buffers, (size_t)DEPTH * READ_BYTES};
    struct slu_ring_params params = {.depth = DEPTH, .ranges = &range, .n_ranges = 1};
    struct slu_ring *ring = NULL;
    int code = is_there ? slu_ring_open(there, &params, &ring, err)
                        : open_own(out, &params, buffers, &ring, err);
    if (code == 0) {
        code =
            time_reads(ring, is_there ? there : out, buffers, bytes / READ_BYTES, ret_bytes_s, err);
    }
    slu_ring_destroy(ring);
    free(buffers);
    return code;
}
