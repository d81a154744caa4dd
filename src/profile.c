/*
 * Profiles: a ranking of experts in a file. Its layout is in docs/pack-format.md.
 */
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/place.h"
#include "engine.h"

#define MAGIC   "SLUPROFI"
#define VERSION 1u

struct header {
    char magic[8];
    uint32_t version;
    uint32_t n_layers, n_experts;
    uint32_t reserved;    /* 0 */
    uint64_t fingerprint; /* of the pack */
    uint64_t checksum;    /* of everything before it, xor that of the scores */
};
_Static_assert(sizeof(struct header) == 40, "as stored");

static uint64_t checksum(const struct header *header, const float *scores, size_t bytes)
{
    return slu_checksum(header, offsetof(struct header, checksum)) ^ slu_checksum(scores, bytes);
}

static bool are_scores(const float *scores, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (!(scores[i] >= 0 && isfinite(scores[i]))) {
            return false;
        }
    }
    return true;
}

static bool write_all(int fd, const void *data, size_t bytes)
{
    for (const uint8_t *at = data; bytes > 0;) {
        ssize_t n = write(fd, at, bytes);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return false;
        }
        at += n;
        bytes -= (size_t)n;
    }
    return true;
}

static int write_file(const char *path, const struct header *header, const float *scores,
                      size_t bytes, struct slu_err *err)
{
    char *temp;
    int fd = slu_place_open(path, &temp, err);
    if (fd < 0) {
        return fd;
    }
    bool is_written = write_all(fd, header, sizeof *header) && write_all(fd, scores, bytes) &&
                      (fsync(fd) == 0 || errno == EINVAL);
    return slu_place_commit(fd, temp, path, is_written)
               ? 0
               : slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", path, strerror(errno));
}

int slu_profile_save(const char *path, const struct slu_engine *engine, const float *scores,
                     struct slu_err *err)
{
    const struct slu_config *c = &engine->weights.config;
    size_t n = (size_t)c->n_layers * c->n_experts;
    struct header header = {.version = VERSION,
                            .n_layers = c->n_layers,
                            .n_experts = c->n_experts,
                            .fingerprint = engine->pack->fingerprint};
    if (n == 0 || !are_scores(scores, n)) {
        return slu_err_set(err, SLU_EINVAL, "%s: there are no scores of experts to save", path);
    }
    memcpy(header.magic, MAGIC, sizeof header.magic);
    header.checksum = checksum(&header, scores, n * sizeof *scores);
    return write_file(path, &header, scores, n * sizeof *scores, err);
}

static int check(const struct slu_engine *engine, const struct slu_source *source,
                 const struct header *header, struct slu_err *err)
{
    const struct slu_config *c = &engine->weights.config;
    if (source->size_bytes < sizeof *header ||
        memcmp(header->magic, MAGIC, sizeof header->magic) != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: is not a profile; sluice run --save-profile "
                           "makes one",
                           source->name);
    }
    if (header->version > VERSION) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: is a profile of version %u, newer than this program knows (%u)",
                           source->name, header->version, VERSION);
    }
    if (header->fingerprint != engine->pack->fingerprint || header->n_layers != c->n_layers ||
        header->n_experts != c->n_experts) {
        return slu_err_set(err, SLU_EFORMAT, "%s: is a profile for another model than %s",
                           source->name, engine->pack->source->name);
    }
    if (header->version == 0 || header->reserved != 0 ||
        source->size_bytes !=
            sizeof *header + (uint64_t)c->n_layers * c->n_experts * sizeof(float)) {
        return slu_err_set(err, SLU_EFORMAT, "%s: is damaged: its size or header is wrong",
                           source->name);
    }
    return 0;
}

static int load(const struct slu_engine *engine, struct slu_source *source, float *ret_scores,
                struct slu_err *err)
{
    struct header header = {0};
    size_t head = source->size_bytes < sizeof header ? (size_t)source->size_bytes : sizeof header;
    int rc = source->read_at(source, 0, &header, head, err);
    rc = rc < 0 ? rc : check(engine, source, &header, err);
    if (rc < 0) {
        return rc;
    }
    size_t bytes = (size_t)(source->size_bytes - sizeof header);
    float *scores = malloc(bytes);
    if (!scores) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to read it", source->name);
    }
    rc = source->read_at(source, sizeof header, scores, bytes, err);
    if (rc == 0 && (header.checksum != checksum(&header, scores, bytes) ||
                    !are_scores(scores, bytes / sizeof *scores))) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: is damaged: its checksum doesn't match",
                         source->name);
    }
    if (rc == 0) {
        memcpy(ret_scores, scores, bytes);
    }
    free(scores);
    return rc;
}

int slu_profile_load(const char *path, const struct slu_engine *engine, float *ret_scores,
                     struct slu_err *err)
{
    struct slu_source *source;
    int rc = slu_source_open_file(path, &source, err);
    if (rc == 0) {
        rc = load(engine, source, ret_scores, err);
        slu_source_destroy(source);
    }
    return rc;
}
