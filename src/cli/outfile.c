#include "cli/outfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int slu_outfile_open(struct slu_outfile *out, const char *path, struct slu_err *err)
{
    *out = (struct slu_outfile){.path = path};
    struct stat existing;
    if (stat(path, &existing) == 0 && !S_ISREG(existing.st_mode)) {
        out->file = fopen(path, "wb");
        return out->file ? 0 : slu_err_set(err, SLU_EIO, "%s: %s", path, strerror(errno));
    }
    if (asprintf(&out->temporary, "%s.XXXXXX.tmp", path) < 0) {
        out->temporary = NULL;
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to write it", path);
    }
    int fd = mkostemps(out->temporary, 4, O_CLOEXEC);
    if (fd < 0) {
        int rc = slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", path, strerror(errno));
        free(out->temporary);
        out->temporary = NULL;
        return rc;
    }
    /* mkstemp gives the file to its owner alone; others get what they get of any new file. */
    mode_t mask = umask(0);
    umask(mask);
    fchmod(fd, 0666 & ~mask);
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
