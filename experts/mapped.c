#include "experts/mapped.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/arena.h"
#include "io/codec.h"

struct mapped_worker {
    struct slu_decoder *decoder;
    uint8_t *buffer;
    struct slu_err err; /* code 0: none */
};

struct slu_mapped {
    struct slu_mapped_params params;
    uint8_t *file;
    size_t file_bytes;
    uint8_t *buffers; /* n_workers, where blocks are compressed */
    size_t buffers_bytes;
    uint64_t heap_bytes; /* charged */
    struct mapped_worker workers[];
};

static bool has_compressed(const struct slu_mapped_params *params)
{
    for (uint32_t i = 0; params->extents && i < params->n_extents; i++) {
        const struct slu_extent *extent = &params->extents[i];
        if (extent->codec != SLU_CODEC_RAW && extent->raw_bytes <= params->slot_bytes) {
            return true;
        }
    }
    return !params->extents;
}

static size_t buffer_bytes(const struct slu_mapped_params *params)
{
    size_t pages = (params->slot_bytes + SLU_PACK_ALIGN - 1) / SLU_PACK_ALIGN * SLU_PACK_ALIGN;
    return has_compressed(params) ? pages : 0;
}

static uint64_t heap_bytes(const struct slu_mapped_params *params)
{
    return sizeof(struct slu_mapped) +
           params->n_workers * (sizeof(struct mapped_worker) + slu_decoder_bytes());
}

uint64_t slu_mapped_charge_bytes(const struct slu_mapped_params *params)
{
    return heap_bytes(params) + slu_map_charge_bytes(params->n_workers * buffer_bytes(params));
}

static int map_file(struct slu_mapped *mapped, struct slu_err *err)
{
    const char *path = mapped->params.path;
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0 || st.st_size <= 0) {
        int code = errno == ENOENT ? SLU_ENOENT : SLU_EIO;
        slu_err_set(err, code, "%s: can't be opened: %s", path, strerror(errno));
        if (fd >= 0) {
            close(fd);
        }
        return code;
    }
    mapped->file_bytes = (size_t)st.st_size;
    mapped->file = mmap(NULL, mapped->file_bytes, PROT_READ, MAP_SHARED, fd, 0);
    int cause = errno;
    close(fd);
    if (mapped->file == MAP_FAILED) {
        mapped->file = NULL;
        return slu_err_set(err, SLU_ENOMEM, "%s: can't be mapped: %s", path, strerror(cause));
    }
    return 0;
}

static int create_workers(struct slu_mapped *mapped, struct slu_err *err)
{
    const struct slu_mapped_params *p = &mapped->params;
    size_t each = buffer_bytes(p);
    void *buffers;
    int rc = slu_map_alloc(p->ledger, SLU_ACCOUNT_IO, p->n_workers * each, &buffers, err);
    if (rc < 0) {
        return rc;
    }
    mapped->buffers = buffers;
    mapped->buffers_bytes = p->n_workers * each;
    for (uint32_t i = 0; i < p->n_workers && rc == 0; i++) {
        mapped->workers[i].buffer = mapped->buffers + i * each;
        rc = slu_decoder_create(&mapped->workers[i].decoder, err);
    }
    return rc;
}

int slu_mapped_open(const struct slu_mapped_params *params, struct slu_mapped **ret_mapped,
                    struct slu_err *err)
{
    uint64_t heap = heap_bytes(params);
    int rc = slu_ledger_reserve(params->ledger, SLU_ACCOUNT_IO, heap, err);
    if (rc < 0) {
        return rc;
    }
    struct slu_mapped *mapped =
        calloc(1, sizeof *mapped + params->n_workers * sizeof mapped->workers[0]);
    if (!mapped) {
        slu_ledger_release(params->ledger, SLU_ACCOUNT_IO, heap);
        return slu_err_set(err, SLU_ENOMEM, "no memory for a mapping");
    }
    mapped->params = *params;
    mapped->heap_bytes = heap;
    rc = map_file(mapped, err);
    rc = rc < 0 ? rc : create_workers(mapped, err);
    if (rc < 0) {
        slu_mapped_close(mapped);
        return rc;
    }
    *ret_mapped = mapped;
    return 0;
}

void slu_mapped_close(struct slu_mapped *mapped)
{
    if (!mapped) {
        return;
    }
    for (uint32_t i = 0; i < mapped->params.n_workers; i++) {
        slu_decoder_destroy(mapped->workers[i].decoder);
    }
    slu_map_free(mapped->params.ledger, SLU_ACCOUNT_IO, mapped->buffers, mapped->buffers_bytes);
    if (mapped->file) {
        munmap(mapped->file, mapped->file_bytes);
    }
    slu_ledger_release(mapped->params.ledger, SLU_ACCOUNT_IO, mapped->heap_bytes);
    free(mapped);
}

const void *slu_mapped_block(struct slu_mapped *mapped, unsigned worker, uint32_t block)
{
    struct mapped_worker *w = &mapped->workers[worker];
    const struct slu_extent *extent = &mapped->params.extents[block];
    struct slu_err err;
    assert(worker < mapped->params.n_workers && block < mapped->params.n_extents);
    if (extent->offset > mapped->file_bytes ||
        extent->stored_bytes > mapped->file_bytes - extent->offset ||
        extent->raw_bytes > mapped->params.slot_bytes) {
        slu_err_set(&err, SLU_EFORMAT, "it lies past the end of the file");
    } else if (extent->codec == SLU_CODEC_RAW) {
        return mapped->file + extent->offset;
    } else if (slu_decode(w->decoder, (enum slu_codec_id)extent->codec,
                          mapped->file + extent->offset, extent->stored_bytes, extent->checksum,
                          w->buffer, extent->raw_bytes, &err) == 0) {
        return w->buffer;
    }
    slu_err_prefix(&err, "%s: block %" PRIu32 " at offset %" PRIu64, mapped->params.path, block,
                   extent->offset);
    w->err = w->err.code ? w->err : err;
    return NULL;
}

int slu_mapped_error(struct slu_mapped *mapped, struct slu_err *err)
{
    int code = 0;
    for (uint32_t i = 0; i < mapped->params.n_workers; i++) {
        struct slu_err *own = &mapped->workers[i].err;
        if (own->code && !code) {
            code = own->code;
            if (err) {
                *err = *own;
            }
        }
        own->code = 0;
    }
    return code;
}

uint64_t slu_mapped_device_bytes(void)
{
    char line[128];
    unsigned long long bytes = 0;
    FILE *file = fopen("/proc/self/io", "r");
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "read_bytes: %llu", &bytes) == 1) {
            break;
        }
    }
    if (file) {
        fclose(file);
    }
    return bytes;
}
