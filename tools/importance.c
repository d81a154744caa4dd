#include "tools/importance.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/place.h"
#include "io/codec.h"
#include "io/source.h"

#define MAGIC          "SLUIMP\r\n"
#define VERSION        1u
#define COLS_MAX       ((uint32_t)1 << 24)
#define CHECKSUM_BYTES 8u
#define FILE_BYTES_MAX ((uint64_t)1 << 34) /* ten times what the largest models take */

struct head {
    char magic[8];
    uint32_t version;
    uint32_t n_entries;
    uint64_t file_bytes;
};

struct record {
    char name[SLU_IMPORTANCE_NAME_BYTES];
    uint32_t expert;
    uint32_t n_cols;
};

_Static_assert(sizeof(struct head) == 24 && sizeof(struct record) == 72, "as on disk");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read as they lie in memory");

struct slu_importance {
    void *owned; /* the file's bytes, or NULL where they are the caller's */
    const struct record **records;
    uint32_t n;
};

static int record_cmp(const struct record *a, const struct record *b)
{
    int by_name = memcmp(a->name, b->name, sizeof a->name);
    return by_name ? by_name : (a->expert > b->expert) - (a->expert < b->expert);
}

static int compare(const void *a, const void *b)
{
    return record_cmp(*(const struct record *const *)a, *(const struct record *const *)b);
}

static const float *moments_of(const struct record *record)
{
    return (const float *)(const void *)(record + 1);
}

static bool is_name(const char *name)
{
    size_t n = 0;
    while (n < SLU_IMPORTANCE_NAME_BYTES && name[n] > 0x20 && name[n] < 0x7f) {
        n++;
    }
    if (n == 0 || n == SLU_IMPORTANCE_NAME_BYTES) {
        return false;
    }
    return name[n] == 0;
}

/* Zeros to the end, so that names are equal where their bytes are. */
static bool is_zero_filled(const char name[SLU_IMPORTANCE_NAME_BYTES])
{
    size_t n = strnlen(name, SLU_IMPORTANCE_NAME_BYTES);
    while (n < SLU_IMPORTANCE_NAME_BYTES && name[n] == 0) {
        n++;
    }
    return n == SLU_IMPORTANCE_NAME_BYTES;
}

static bool are_moments(const float *moments, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (!(moments[i] >= 0) || isinf(moments[i])) {
            return false;
        }
    }
    return true;
}

/* ---- writing ------------------------------------------------------------------------------ */

static int check_entries(const char *path, const struct slu_importance_entry *entries, size_t n,
                         struct slu_err *err)
{
    for (size_t i = 0; i < n; i++) {
        const struct slu_importance_entry *e = &entries[i];
        if (strlen(e->name) >= SLU_IMPORTANCE_NAME_BYTES || !is_name(e->name) || !e->n_cols ||
            e->n_cols > COLS_MAX || !are_moments(e->moments, e->n_cols)) {
            return slu_err_set(err, SLU_EINVAL,
                               "%s: entry %zu has a name, a number of columns or a moment that the "
                               "format cannot hold",
                               path, i);
        }
    }
    return 0;
}

/* The file as one buffer. NULL when out of memory. */
static uint8_t *encode(const struct slu_importance_entry *entries, size_t n, size_t *ret_bytes)
{
    size_t bytes = sizeof(struct head) + CHECKSUM_BYTES;
    for (size_t i = 0; i < n; i++) {
        bytes += sizeof(struct record) + entries[i].n_cols * sizeof(float);
    }
    uint8_t *data = malloc(bytes), *at = data;
    if (!data) {
        return NULL;
    }
    struct head head = {.version = VERSION, .n_entries = (uint32_t)n, .file_bytes = bytes};
    memcpy(head.magic, MAGIC, sizeof head.magic);
    memcpy(at, &head, sizeof head);
    at += sizeof head;
    for (size_t i = 0; i < n; i++) {
        struct record record = {.expert = entries[i].expert, .n_cols = entries[i].n_cols};
        memcpy(record.name, entries[i].name, strlen(entries[i].name));
        memcpy(at, &record, sizeof record);
        at += sizeof record;
        memcpy(at, entries[i].moments, entries[i].n_cols * sizeof(float));
        at += entries[i].n_cols * sizeof(float);
    }
    uint64_t checksum = slu_checksum(data, bytes - CHECKSUM_BYTES);
    memcpy(at, &checksum, sizeof checksum);
    *ret_bytes = bytes;
    return data;
}

static int write_all(int fd, const uint8_t *data, size_t bytes)
{
    while (bytes > 0) {
        ssize_t done = write(fd, data, bytes);
        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done <= 0) {
            return -1;
        }
        data += done;
        bytes -= (size_t)done;
    }
    return fsync(fd);
}

static int store(const char *path, const uint8_t *data, size_t bytes, struct slu_err *err)
{
    char *temp;
    int fd = slu_place_open(path, &temp, err);
    if (fd < 0) {
        return fd;
    }
    return slu_place_commit(fd, temp, path, write_all(fd, data, bytes) == 0)
               ? 0
               : slu_err_set(err, SLU_EIO, "%s: writing failed: %s", path, strerror(errno));
}

int slu_importance_write(const char *path, const struct slu_importance_entry *entries,
                         size_t n_entries, struct slu_err *err)
{
    if (n_entries > UINT32_MAX) {
        return slu_err_set(err, SLU_EINVAL, "%s: %zu entries are too many", path, n_entries);
    }
    int code = check_entries(path, entries, n_entries, err);
    if (code < 0) {
        return code;
    }
    size_t bytes;
    uint8_t *data = encode(entries, n_entries, &bytes);
    if (!data) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory for %zu entries", path, n_entries);
    }
    /* What could not be read is not written: entries that come twice among it. */
    struct slu_importance *parsed;
    code = slu_importance_parse(path, data, bytes, &parsed, err);
    if (code < 0) {
        code = code == SLU_EFORMAT ? SLU_EINVAL : code;
        if (err) {
            err->code = code;
        }
    } else {
        slu_importance_destroy(parsed);
        code = store(path, data, bytes, err);
    }
    free(data);
    return code;
}

/* ---- reading ------------------------------------------------------------------------------ */

static int damaged(const char *name, struct slu_err *err)
{
    return slu_err_set(err, SLU_EFORMAT,
                       "%s: is cut short or damaged: its length or its checksum is not what it "
                       "says",
                       name);
}

/* What can be told from the first bytes; bytes: of the whole file, at least a head. */
static int check_head(const char *name, const void *data, uint64_t bytes, struct head *head,
                      struct slu_err *err)
{
    if (bytes < sizeof *head + CHECKSUM_BYTES || memcmp(data, MAGIC, sizeof head->magic) != 0) {
        return slu_err_set(err, SLU_EFORMAT, "%s: is not an importance file", name);
    }
    memcpy(head, data, sizeof *head);
    if (head->version != VERSION) {
        return slu_err_set(err, head->version > VERSION ? SLU_EUNSUP : SLU_EFORMAT,
                           "%s: is an importance file of version %u; this program knows %u", name,
                           head->version, VERSION);
    }
    if (bytes > FILE_BYTES_MAX) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: has %llu bytes, more than importance takes of any model", name,
                           (unsigned long long)bytes);
    }
    return head->file_bytes == bytes ? 0 : damaged(name, err);
}

/* Of the whole file. */
static int check_sum(const char *name, const void *data, size_t bytes, const struct head *head,
                     struct slu_err *err)
{
    uint64_t checksum;
    memcpy(&checksum, (const uint8_t *)data + bytes - CHECKSUM_BYTES, sizeof checksum);
    if (slu_checksum(data, bytes - CHECKSUM_BYTES) != checksum) {
        return damaged(name, err);
    }
    if (head->n_entries > bytes / sizeof(struct record)) {
        return slu_err_set(err, SLU_EFORMAT, "%s: claims %u entries, more than it has room for",
                           name, head->n_entries);
    }
    return 0;
}

/* Lists the records; each is whole and sound. */
static int list_records(const char *name, const uint8_t *data, size_t bytes,
                        struct slu_importance *imp, struct slu_err *err)
{
    size_t at = sizeof(struct head), end = bytes - CHECKSUM_BYTES;
    for (uint32_t i = 0; i < imp->n; i++) {
        const struct record *record = (const struct record *)(const void *)(data + at);
        size_t left = end - at;
        bool is_whole = left >= sizeof *record && record->n_cols && record->n_cols <= COLS_MAX &&
                        record->n_cols <= (left - sizeof *record) / sizeof(float);
        if (!is_whole || !is_name(record->name) || !is_zero_filled(record->name) ||
            !are_moments(moments_of(record), record->n_cols)) {
            return slu_err_set(err, SLU_EFORMAT, "%s: entry %u at offset %zu is broken", name, i,
                               at);
        }
        imp->records[i] = record;
        at += sizeof *record + record->n_cols * sizeof(float);
    }
    if (at != end) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %zu bytes follow its last entry", name, end - at);
    }
    qsort(imp->records, imp->n, sizeof *imp->records, compare);
    for (uint32_t i = 1; i < imp->n; i++) {
        if (record_cmp(imp->records[i - 1], imp->records[i]) == 0) {
            return slu_err_set(err, SLU_EFORMAT, "%s: has '%s' twice", name, imp->records[i]->name);
        }
    }
    return 0;
}

int slu_importance_parse(const char *name, const void *data, size_t bytes,
                         struct slu_importance **ret_importance, struct slu_err *err)
{
    struct head head;
    int code = check_head(name, data, bytes, &head, err);
    code = code < 0 ? code : check_sum(name, data, bytes, &head, err);
    if (code < 0) {
        return code;
    }
    struct slu_importance *imp = calloc(1, sizeof *imp);
    const struct record **records = calloc(head.n_entries + (size_t)1, sizeof *records);
    if (!imp || !records) {
        free(imp);
        free(records);
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory for its list", name);
    }
    imp->records = records;
    imp->n = head.n_entries;
    code = list_records(name, data, bytes, imp, err);
    if (code < 0) {
        slu_importance_destroy(imp);
        return code;
    }
    *ret_importance = imp;
    return 0;
}

int slu_importance_read(const char *path, struct slu_importance **ret_importance,
                        struct slu_err *err)
{
    struct slu_source *source;
    int code = slu_source_open_file(path, &source, err);
    if (code < 0) {
        return code;
    }
    /* Memory for the whole of it is taken when its beginning is that of such a file. */
    size_t bytes = (size_t)source->size_bytes;
    struct head raw = {0}, head;
    void *data = NULL;
    code = source->read_at(source, 0, &raw, bytes < sizeof raw ? bytes : sizeof raw, err);
    code = code < 0 ? code : check_head(path, &raw, source->size_bytes, &head, err);
    if (code == 0 && !(data = malloc(bytes))) {
        code = slu_err_set(err, SLU_ENOMEM, "%s: out of memory for its %zu bytes", path, bytes);
    }
    if (code == 0) {
        code = source->read_at(source, 0, data, bytes, err);
    }
    if (code == 0) {
        code = slu_importance_parse(path, data, bytes, ret_importance, err);
    }
    slu_source_destroy(source);
    if (code < 0) {
        free(data);
        return code;
    }
    (*ret_importance)->owned = data;
    return 0;
}

void slu_importance_destroy(struct slu_importance *importance)
{
    if (importance) {
        free(importance->owned);
        free(importance->records);
        free(importance);
    }
}

size_t slu_importance_entries(const struct slu_importance *importance)
{
    return importance->n;
}

const float *slu_importance_find(const struct slu_importance *importance, const char *name,
                                 uint32_t expert, uint32_t n_cols)
{
    struct record key = {.expert = expert};
    if (strlen(name) >= sizeof key.name) {
        return NULL;
    }
    memcpy(key.name, name, strlen(name));
    uint32_t lo = 0, hi = importance->n;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if (record_cmp(importance->records[mid], &key) < 0) {
            lo = mid + 1;
        } else {
            hi = mid;
        }
    }
    if (lo == importance->n || record_cmp(importance->records[lo], &key) != 0 ||
        importance->records[lo]->n_cols != n_cols) {
        return NULL;
    }
    return moments_of(importance->records[lo]);
}
