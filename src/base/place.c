#include "base/place.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define TRIES_MAX 100 /* of names that others may have */

static int refuse(const char *path, int cause, struct slu_err *err)
{
    return slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", path, strerror(cause));
}

int slu_place_check(const char *path, struct slu_err *err)
{
    struct stat st;
    if (stat(path, &st) != 0 || S_ISREG(st.st_mode)) {
        return 0;
    }
    return S_ISDIR(st.st_mode)
               ? refuse(path, EISDIR, err)
               : slu_err_set(err, SLU_EIO, "%s: is there and not a file, so none can replace it",
                             path);
}

int slu_place_open(const char *path, char **ret_temp, struct slu_err *err)
{
    int rc = slu_place_check(path, err);
    if (rc < 0) {
        return rc;
    }
    for (int i = 0;; i++) {
        uint32_t number = 0;
        char *temp;
        if (getrandom(&number, sizeof number, GRND_NONBLOCK) < 0) {
            number = (uint32_t)getpid() + (uint32_t)i; /* early after a boot */
        }
        if (asprintf(&temp, "%s.%08" PRIx32 ".tmp", path, number) < 0) {
            return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
        }
        int fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0) {
            *ret_temp = temp;
            return fd;
        }
        int cause = errno;
        free(temp);
        if (cause != EEXIST || i == TRIES_MAX) {
            return refuse(path, cause, err);
        }
    }
}

bool slu_place_commit(int fd, char *temp, const char *path, bool is_written)
{
    int cause = errno;
    if (fd >= 0 && close(fd) != 0 && is_written) {
        cause = errno;
        is_written = false;
    }
    if (is_written && rename(temp, path) != 0) {
        cause = errno;
        is_written = false;
    }
    if (!is_written) {
        unlink(temp);
    }
    free(temp);
    errno = cause;
    return is_written;
}

int slu_place_probe(const char *path, struct slu_err *err)
{
    char *temp;
    int fd = slu_place_open(path, &temp, err);
    if (fd < 0) {
        return fd;
    }
    slu_place_commit(fd, temp, path, false);
    return 0;
}

int slu_place_check_left(const char *path, const char magic[8], struct slu_err *err)
{
    /* Not to wait for a pipe's other end. */
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) {
        return 0;
    }
    struct stat st;
    char start[8];
    bool is_ours = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) &&
                   (st.st_size == 0 || (read(fd, start, sizeof start) == (ssize_t)sizeof start &&
                                        memcmp(start, magic, sizeof start) == 0));
    if (fd >= 0) {
        close(fd);
    }
    return is_ours
               ? 0
               : slu_err_set(err, SLU_EIO,
                             "%s: is in the way of what is written there; move or remove it", path);
}
