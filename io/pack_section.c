#include "io/pack_section.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/pack_check.h"

struct writing {
    const char *path;
    int fd;
    unsigned n_steps; /* left until the play ends */
    uint8_t page[SLU_PACK_ALIGN];
    struct slu_pack_header header;
    struct slu_pack_section old; /* zero where there is none that counts */
    uint64_t file_bytes;         /* as it is now */
};

/* What may be left out, as by a process that is no more, is the rest. */
static bool is_over(struct writing *w)
{
    if (w->n_steps == 0) {
        return true;
    }
    w->n_steps -= w->n_steps != UINT_MAX;
    return false;
}

static int failed(const struct writing *w, struct slu_err *err)
{
    return slu_err_set(err, SLU_EIO, "%s: its section cannot be written: %s", w->path,
                       strerror(errno));
}

static int write_at(struct writing *w, uint64_t offset, const void *data, size_t bytes,
                    struct slu_err *err)
{
    const uint8_t *at = data;
    if (is_over(w)) {
        return 0;
    }
    while (bytes > 0) {
        ssize_t n = pwrite(w->fd, at, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return failed(w, err);
        }
        at += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return 0;
}

static int sync_file(struct writing *w, struct slu_err *err)
{
    return is_over(w) || fsync(w->fd) == 0 ? 0 : failed(w, err);
}

static int set_size(struct writing *w, uint64_t bytes, struct slu_err *err)
{
    return is_over(w) || ftruncate(w->fd, (off_t)bytes) == 0 ? 0 : failed(w, err);
}

/* Whether the pack is sound, and has a section that is. */
static int look(const struct writing *w, bool *ret_has_section, struct slu_err *err)
{
    struct slu_pack *pack;
    int rc = slu_pack_open_file(w->path, &pack, err);
    if (rc == 0) {
        *ret_has_section = pack->section != NULL;
        slu_pack_close(pack);
    }
    return rc;
}

/* Opens for writing, alone, and takes the first page. */
static int begin(struct writing *w, struct slu_err *err)
{
    struct stat st;
    bool has_section = false;
    int rc = look(w, &has_section, err);
    if (rc < 0) {
        return rc;
    }
    w->fd = open(w->path, O_RDWR | O_CLOEXEC);
    if (w->fd < 0) {
        return failed(w, err);
    }
    if (flock(w->fd, LOCK_EX | LOCK_NB) != 0) {
        return slu_err_set(err, SLU_EIO, "%s: another program is writing its section", w->path);
    }
    rc = look(w, &has_section, err); /* once more, now that nobody changes it */
    if (rc < 0) {
        return rc;
    }
    if (fstat(w->fd, &st) != 0 || pread(w->fd, w->page, sizeof w->page, 0) != sizeof w->page) {
        return failed(w, err);
    }
    w->file_bytes = (uint64_t)st.st_size;
    memcpy(&w->header, w->page, sizeof w->header);
    if (has_section) {
        memcpy(&w->old, w->page + SLU_PACK_SECTION_AT, sizeof w->old);
    }
    return 0;
}

/* Header and record in one write, after everything else has reached the device, and synced. */
static int switch_header(struct writing *w, uint32_t version,
                         const struct slu_pack_section *section, struct slu_err *err)
{
    w->header.version = version;
    memset(w->page, 0, sizeof w->page);
    memcpy(w->page, &w->header, sizeof w->header);
    memcpy(w->page + SLU_PACK_SECTION_AT, section, sizeof *section);
    int rc = write_at(w, 0, w->page, sizeof w->page, err);
    return rc < 0 ? rc : sync_file(w, err);
}

static uint64_t pages(uint64_t bytes)
{
    return (bytes + SLU_PACK_ALIGN - 1) / SLU_PACK_ALIGN * SLU_PACK_ALIGN;
}

/* Behind the model if the old section leaves so much room there, otherwise behind that. */
static uint64_t choose_place(const struct writing *w, uint64_t bytes)
{
    uint64_t first = w->header.file_bytes;
    uint64_t old = w->old.extent.offset, old_end = old + pages(w->old.extent.stored_bytes);
    return old == 0 || first + bytes <= old ? first : old_end;
}

static int write_section(struct writing *w, enum slu_section_kind kind, const void *data,
                         size_t bytes, struct slu_err *err)
{
    uint64_t whole = pages(bytes), at = choose_place(w, whole);
    uint64_t end = at + whole, old_end = w->old.extent.offset + pages(w->old.extent.stored_bytes);
    struct slu_pack_section section = {
        .extent = {.offset = at,
                   .checksum = slu_checksum(data, bytes),
                   .stored_bytes = (uint32_t)bytes,
                   .raw_bytes = (uint32_t)bytes,
                   .codec = SLU_CODEC_RAW},
        .kind = kind,
        .fingerprint = w->header.checksum,
    };
    memcpy(section.magic, SLU_PACK_SECTION_MAGIC, sizeof section.magic);
    section.checksum = slu_checksum(&section, offsetof(struct slu_pack_section, checksum));
    /* A pack of version 1 may not be longer than its header says: it becomes one of version 2
     * without a section first. */
    int rc = w->header.version == SLU_PACK_VERSION
                 ? switch_header(w, SLU_PACK_VERSION_SECTION, &(struct slu_pack_section){0}, err)
                 : 0;
    if (rc < 0) {
        return rc;
    }
    rc = set_size(w, end > old_end ? end : old_end, err);
    rc = rc < 0 ? rc : write_at(w, at, data, bytes, err);
    rc = rc < 0 ? rc : sync_file(w, err);
    rc = rc < 0 ? rc : switch_header(w, w->header.version, &section, err);
    return rc < 0 ? rc : set_size(w, end, err);
}

int slu_pack_section_write_steps(const char *path, enum slu_section_kind kind, const void *data,
                                 size_t bytes, unsigned n_steps, struct slu_err *err)
{
    struct writing w = {.path = path, .fd = -1, .n_steps = n_steps};
    if (bytes == 0 || bytes > SLU_PACK_SECTION_BYTES_MAX) {
        return slu_err_set(err, SLU_EINVAL, "%s: a section of %zu bytes is none; up to %u will do",
                           path, bytes, SLU_PACK_SECTION_BYTES_MAX);
    }
    int rc = begin(&w, err);
    rc = rc < 0 ? rc : write_section(&w, kind, data, bytes, err);
    if (w.fd >= 0) {
        close(w.fd);
    }
    return rc;
}

int slu_pack_section_write(const char *path, enum slu_section_kind kind, const void *data,
                           size_t bytes, struct slu_err *err)
{
    return slu_pack_section_write_steps(path, kind, data, bytes, UINT_MAX, err);
}

int slu_pack_section_remove(const char *path, struct slu_err *err)
{
    struct writing w = {.path = path, .fd = -1, .n_steps = UINT_MAX};
    const struct slu_pack_section none = {0};
    int rc = begin(&w, err);
    if (rc == 0 && w.header.version != SLU_PACK_VERSION) {
        uint32_t bare = w.header.version == SLU_PACK_VERSION_SECTION ? SLU_PACK_VERSION
                                                                     : w.header.version;
        rc = switch_header(&w, w.header.version, &none, err);
        rc = rc < 0 ? rc : set_size(&w, w.header.file_bytes, err);
        rc = rc < 0 ? rc : sync_file(&w, err);
        rc = rc < 0 ? rc : switch_header(&w, bare, &none, err);
    }
    if (w.fd >= 0) {
        close(w.fd);
    }
    return rc;
}
