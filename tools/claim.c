#include "tools/claim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int refuse(const char *path, int cause, struct slu_err *err)
{
    return slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", path, strerror(cause));
}

int slu_claim_open(const char *path, struct slu_claim *ret_claim, struct slu_err *err)
{
    struct slu_claim claim = {0};
    struct stat st;
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) {
        return refuse(path, EISDIR, err);
    }
    if (asprintf(&claim.part, "%s.part", path) < 0) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
    }
    claim.is_new = stat(claim.part, &st) != 0;
    int fd = open(claim.part, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) {
        int rc = refuse(path, errno, err);
        free(claim.part);
        return rc;
    }
    close(fd);
    *ret_claim = claim;
    return 0;
}

void slu_claim_release(struct slu_claim *claim)
{
    struct stat st;
    if (claim->part && claim->is_new && stat(claim->part, &st) == 0 && st.st_size == 0) {
        unlink(claim->part);
    }
    free(claim->part);
    *claim = (struct slu_claim){0};
}
