#include "cli/outfile.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/place.h"

int slu_outfile_open(struct slu_outfile *out, const char *path, struct slu_err *err)
{
    *out = (struct slu_outfile){.path = path};
    struct stat existing;
    if (stat(path, &existing) == 0 && !S_ISREG(existing.st_mode)) {
        out->file = fopen(path, "wb");
        return out->file ? 0 : slu_err_set(err, SLU_EIO, "%s: %s", path, strerror(errno));
    }
    int fd = slu_place_open(path, &out->temporary, err);
    if (fd < 0) {
        return fd;
    }
    out->file = fdopen(fd, "wb");
    if (!out->file) {
        close(fd);
        slu_outfile_finish(out);
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
    }
    return 0;
}

int slu_outfile_commit(struct slu_outfile *out, struct slu_err *err)
{
    int failed = fflush(out->file) != 0 || ferror(out->file);
    failed |= fclose(out->file) != 0;
    out->file = NULL;
    if (!failed && out->temporary) {
        failed = rename(out->temporary, out->path) != 0;
    }
    if (failed) {
        int rc = slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", out->path, strerror(errno));
        slu_outfile_finish(out);
        return rc;
    }
    free(out->temporary);
    out->temporary = NULL;
    return 0;
}

void slu_outfile_finish(struct slu_outfile *out)
{
    if (out->file) {
        fclose(out->file);
        out->file = NULL;
    }
    if (out->temporary) {
        unlink(out->temporary);
        free(out->temporary);
        out->temporary = NULL;
    }
}
