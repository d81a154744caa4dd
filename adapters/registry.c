/*
 * A list of entries, each an adapter by its file's real path. An entry is made before its adapter
 * is read, so that whoever comes second finds it and waits; it is read without the lock, and its
 * bytes are counted from before reading until after closing, so that the sum never passes the
 * share.
 *
 *     (absent) --acquire--> loading --read--> ready --evicted, refs 0--> (absent)
 *                              `----refused----> failed --last waiter--> (absent)
 */
#include "adapters/registry.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "adapters/expert_stream.h"

enum state { LOADING, READY, FAILED };

/* What tells one version of a file from another. */
struct identity {
    dev_t device;
    ino_t inode;
    off_t bytes;
    struct timespec mtime;
};

struct entry {
    struct entry *next;
    char *path;
    struct identity identity;
    enum state state;
    uint32_t n_refs; /* holders; while it is loading, whoever waits for it */
    uint64_t used_at;
    uint64_t bytes; /* counted in used_bytes */
    struct slu_adapter *adapter;
    struct slu_err err; /* why it failed */
};

struct slu_registry {
    struct slu_ledger *ledger;
    struct slu_base base;
    uint64_t bytes_max;
    uint32_t n_at_once, n_workers;
    enum slu_io_backend backend;
    char *dir;

    pthread_mutex_t lock; /* guards all below, and all of the entries */
    pthread_cond_t changed;
    struct entry *entries;
    bool is_loading; /* of some entry */
    uint64_t clock;  /* counts acquisitions */
    uint64_t used_bytes;
    uint64_t n_loads, n_hits, n_evictions;
    uint64_t flash_bytes; /* of loads, and of streams that have gone */
};

int slu_registry_create(const struct slu_registry_params *params,
                        struct slu_registry **ret_registry, struct slu_err *err)
{
    struct slu_registry *registry = calloc(1, sizeof *registry);
    if (!registry || (params->dir && !(registry->dir = strdup(params->dir)))) {
        free(registry);
        return slu_err_set(err, SLU_ENOMEM, "no memory for the registry of adapters");
    }
    registry->ledger = params->ledger;
    registry->base = *params->base;
    registry->bytes_max = params->bytes_max;
    registry->n_at_once = params->n_at_once ? params->n_at_once : 2;
    registry->n_workers = params->n_workers;
    registry->backend = params->backend;
    pthread_mutex_init(&registry->lock, NULL);
    pthread_cond_init(&registry->changed, NULL);
    *ret_registry = registry;
    return 0;
}

static void free_entry(struct entry *entry)
{
    slu_adapter_close(entry->adapter);
    free(entry->path);
    free(entry);
}

void slu_registry_destroy(struct slu_registry *registry)
{
    if (!registry) {
        return;
    }
    while (registry->entries) {
        struct entry *entry = registry->entries;
        assert(entry->state == READY && entry->n_refs == 0);
        registry->entries = entry->next;
        free_entry(entry);
    }
    pthread_cond_destroy(&registry->changed);
    pthread_mutex_destroy(&registry->lock);
    free(registry->dir);
    free(registry);
}

/* Takes an entry out of the list, and with it its bytes out of the sum. */
static void remove_locked(struct slu_registry *registry, struct entry *entry)
{
    struct entry **at = &registry->entries;
    while (*at != entry) {
        at = &(*at)->next;
    }
    *at = entry->next;
    registry->used_bytes -= entry->bytes;
    registry->flash_bytes += entry->adapter ? slu_expert_stream_flash_bytes(entry->adapter) : 0;
    free_entry(entry);
}

static struct entry *find_locked(struct slu_registry *registry, const char *path)
{
    struct entry *entry = registry->entries;
    while (entry && (entry->state == FAILED || strcmp(entry->path, path) != 0)) {
        entry = entry->next;
    }
    return entry;
}

/* Closes the adapter that nobody has asked for for the longest time; false if all are in use. */
static bool evict_locked(struct slu_registry *registry)
{
    struct entry *oldest = NULL;
    for (struct entry *entry = registry->entries; entry; entry = entry->next) {
        if (entry->state == READY && entry->n_refs == 0 &&
            (!oldest || entry->used_at < oldest->used_at)) {
            oldest = entry;
        }
    }
    if (oldest) {
        registry->n_evictions++;
        remove_locked(registry, oldest);
    }
    return oldest != NULL;
}

static bool is_same(const struct identity *a, const struct identity *b)
{
    return a->device == b->device && a->inode == b->inode && a->bytes == b->bytes &&
           a->mtime.tv_sec == b->mtime.tv_sec && a->mtime.tv_nsec == b->mtime.tv_nsec;
}

int slu_registry_path(const char *dir, const char *what, char **ret_path, struct slu_err *err)
{
    size_t len = strlen(what);
    bool is_path = strchr(what, '/') || (len >= 4 && strcmp(what + len - 4, ".sla") == 0);
    if (len == 0) {
        return slu_err_set(err, SLU_EINVAL, "an adapter's name is empty");
    }
    if (!is_path && !dir) {
        return slu_err_set(err, SLU_ENOENT,
                           "adapter '%s': is no path (those hold a '/' or end in .sla), and no "
                           "folder of adapters was given to look it up in",
                           what);
    }
    char *path = NULL;
    if ((is_path ? asprintf(&path, "%s", what) : asprintf(&path, "%s/%s.sla", dir, what)) < 0) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for the name of an adapter");
    }
    *ret_path = path;
    return 0;
}

/* The real path of what was asked for, to be freed, and which file that is now. */
static int resolve(const struct slu_registry *registry, const char *what, char **ret_path,
                   struct identity *ret_identity, struct slu_err *err)
{
    char *named = NULL;
    int named_rc = slu_registry_path(registry->dir, what, &named, err);
    if (named_rc < 0) {
        return named_rc;
    }
    struct stat st;
    char *path = realpath(named, NULL);
    if (!path || stat(path, &st) != 0) {
        int rc = errno == ENOENT || errno == ENOTDIR ? SLU_ENOENT : SLU_EIO;
        slu_err_set(err, rc, "%s: cannot be opened: %s", named, strerror(errno));
        free(path);
        free(named);
        return rc;
    }
    free(named);
    *ret_path = path;
    *ret_identity = (struct identity){st.st_dev, st.st_ino, st.st_size, st.st_mtim};
    return 0;
}

/* How an adapter is to be opened, and what of the share that takes. */
struct choice {
    bool is_streamed;
    struct slu_adapter_streaming streaming;
    uint64_t bytes;
    uint64_t kept_bytes; /* of them, those that stay taken once it is open */
};

/* Bytes of what cannot be evicted. */
static uint64_t held_bytes_locked(const struct slu_registry *registry)
{
    uint64_t bytes = registry->used_bytes;
    for (const struct entry *entry = registry->entries; entry; entry = entry->next) {
        bytes -= entry->state == READY && entry->n_refs == 0 ? entry->bytes : 0;
    }
    return bytes;
}

/* Counts the choice's bytes for the entry, evicting as many others as it takes, and none where that
 * wouldn't do. */
static int make_room_locked(struct slu_registry *registry, struct entry *entry,
                            const struct choice *choice, struct slu_err *err)
{
    uint64_t held_bytes = held_bytes_locked(registry), bytes = choice->bytes;
    if (bytes > registry->bytes_max - held_bytes) {
        return slu_err_set(err, SLU_EBUDGET,
                           "%s: needs %llu bytes of memory%s; the adapters' share is %llu, of "
                           "which those in use hold %llu",
                           entry->path, (unsigned long long)bytes,
                           choice->is_streamed ? " even with its experts streamed" : "",
                           (unsigned long long)registry->bytes_max, (unsigned long long)held_bytes);
    }
    while (bytes > registry->bytes_max - registry->used_bytes) {
        evict_locked(registry);
    }
    entry->bytes = bytes;
    registry->used_bytes += bytes;
    return 0;
}

/* All of it in memory if there is room for that, else as many blocks of experts as there is room
 * for, or, so that others have some too, as are its part. */
static int choose(struct slu_registry *registry, const char *path, uint64_t room_bytes,
                  struct slu_source *source, struct choice *ret_choice, struct slu_err *err)
{
    struct slu_adapter_info info;
    int rc = slu_adapter_inspect(source, &info, err);
    if (rc < 0) {
        return rc;
    }
    *ret_choice = (struct choice){
        .streaming = {.path = path, .n_workers = registry->n_workers, .backend = registry->backend},
        .bytes = info.memory_bytes + info.extra_bytes,
        .kept_bytes = info.memory_bytes,
    };
    uint64_t part = registry->bytes_max / registry->n_at_once;
    if (ret_choice->bytes <= room_bytes || info.n_blocks == 0 || registry->n_workers == 0) {
        return 0;
    }
    uint64_t bytes = 0;
    rc = slu_adapter_fit(source, &registry->base, part < room_bytes ? part : room_bytes,
                         &ret_choice->streaming, &bytes, err);
    if (rc < 0 && rc != SLU_EBUDGET) {
        return rc;
    }
    /* Where the least that it needs is more than there is, making room for that will be refused. A
     * small adapter is less than what a stream takes for itself. */
    ret_choice->is_streamed = bytes < ret_choice->bytes;
    if (ret_choice->is_streamed) {
        ret_choice->bytes = ret_choice->kept_bytes = bytes;
    }
    return 0;
}

/* What the path leads to is what it led to when it was asked for. */
static bool is_unchanged(const struct entry *entry)
{
    struct stat st;
    struct identity now;
    if (stat(entry->path, &st) != 0) {
        return false;
    }
    now = (struct identity){st.st_dev, st.st_ino, st.st_size, st.st_mtim};
    return is_same(&entry->identity, &now);
}

/* Opening reads the index anew, and a stream opens the path anew: neither may find another file
 * than the one whose bytes were counted and whose numbers were checked. */
static int open_as_chosen(struct slu_registry *registry, const struct entry *entry,
                          struct slu_source *source, const struct choice *choice,
                          struct slu_adapter **ret_adapter, struct slu_err *err)
{
    struct slu_adapter *adapter = NULL;
    int rc = choice->is_streamed
                 ? slu_adapter_open_streamed(source, &registry->base, &choice->streaming,
                                             registry->ledger, &adapter, err)
                 : slu_adapter_open(source, &registry->base, registry->ledger, &adapter, err);
    if (rc == 0 && (adapter->charged_bytes != choice->kept_bytes ||
                    (choice->is_streamed && !is_unchanged(entry)))) {
        slu_adapter_close(adapter);
        rc = slu_err_set(err, SLU_EIO, "%s: changed while it was loaded; try again", entry->path);
    }
    if (rc == 0) {
        *ret_adapter = adapter;
    }
    return rc;
}

/* The share has room for the choice but the ledger has not: closes what nobody uses, the oldest
 * first, until it might have; false, and nothing closed, where all of that wouldn't do. */
static bool make_way_locked(struct slu_registry *registry, const struct choice *choice)
{
    uint64_t limit_bytes = slu_ledger_limit(registry->ledger);
    uint64_t used_bytes = slu_ledger_used(registry->ledger);
    uint64_t idle_bytes = registry->used_bytes - held_bytes_locked(registry);
    /* A stream is made when what loading took has been given back. */
    uint64_t bytes = choice->bytes + (choice->is_streamed ? 0 : slu_adapter_staging_bytes());
    if (idle_bytes == 0 || bytes > limit_bytes || used_bytes > limit_bytes - bytes + idle_bytes) {
        return false;
    }
    /* One at least: what was refused may need more than can be told. */
    while (evict_locked(registry) && slu_ledger_used(registry->ledger) > limit_bytes - bytes) {
    }
    return true;
}

/* Reads the entry's file. Takes the lock only to make room. */
static int load(struct slu_registry *registry, struct entry *entry, uint64_t leave_bytes,
                struct slu_adapter **ret_adapter, struct slu_err *err)
{
    struct slu_source *source;
    struct choice choice;
    int rc = slu_source_open_file(entry->path, &source, err);
    if (rc < 0) {
        return rc;
    }
    pthread_mutex_lock(&registry->lock);
    uint64_t bytes = registry->bytes_max - held_bytes_locked(registry);
    pthread_mutex_unlock(&registry->lock);
    bytes = bytes > leave_bytes ? bytes - leave_bytes : 0;
    rc = choose(registry, entry->path, bytes, source, &choice, err);
    if (rc == 0) {
        pthread_mutex_lock(&registry->lock);
        rc = make_room_locked(registry, entry, &choice, err);
        pthread_mutex_unlock(&registry->lock);
    }
    while (rc == 0) {
        rc = open_as_chosen(registry, entry, source, &choice, ret_adapter, err);
        if (rc != SLU_EBUDGET) {
            break;
        }
        pthread_mutex_lock(&registry->lock);
        rc = make_way_locked(registry, &choice) ? 0 : SLU_EBUDGET;
        pthread_mutex_unlock(&registry->lock);
    }
    slu_source_destroy(source);
    return rc;
}

/* A new entry in the list, held by the caller, who is to load it. Takes over path. */
static struct entry *add_locked(struct slu_registry *registry, char *path,
                                const struct identity *identity)
{
    struct entry *entry = calloc(1, sizeof *entry);
    if (entry) {
        entry->path = path;
        entry->identity = *identity;
        entry->n_refs = 1;
        entry->next = registry->entries;
        registry->entries = entry;
    }
    return entry;
}

/* Waits for an entry that another thread loads. */
static int wait_locked(struct slu_registry *registry, struct entry *entry, struct slu_err *err)
{
    entry->n_refs++;
    while (entry->state == LOADING) {
        pthread_cond_wait(&registry->changed, &registry->lock);
    }
    if (entry->state == READY) {
        registry->n_hits++;
        return 0;
    }
    int rc = slu_err_set(err, entry->err.code, "%s", entry->err.text);
    if (--entry->n_refs == 0) {
        remove_locked(registry, entry);
    }
    return rc;
}

/* The lock is given up while reading. One at a time: the ledger has room for what one load takes
 * beyond the adapter, and two are no faster on one flash. */
static int load_locked(struct slu_registry *registry, struct entry *entry, uint64_t leave_bytes,
                       struct slu_err *err)
{
    struct slu_adapter *adapter = NULL;
    struct slu_err why = {0};
    while (registry->is_loading) {
        pthread_cond_wait(&registry->changed, &registry->lock);
    }
    registry->is_loading = true;
    pthread_mutex_unlock(&registry->lock);
    int rc = load(registry, entry, leave_bytes, &adapter, &why);
    pthread_mutex_lock(&registry->lock);
    registry->is_loading = false;
    pthread_cond_broadcast(&registry->changed);
    if (rc == 0) {
        /* What opening needed beyond the adapter itself is free again. */
        registry->used_bytes -= entry->bytes - adapter->charged_bytes;
        entry->bytes = adapter->charged_bytes;
        registry->n_loads++;
        registry->flash_bytes += adapter->info.file_bytes;
        entry->adapter = adapter;
        entry->state = READY;
        return 0;
    }
    slu_err_set(err, rc, "%s", why.text);
    registry->used_bytes -= entry->bytes;
    entry->bytes = 0;
    entry->state = FAILED;
    entry->err = why;
    entry->err.code = rc;
    if (--entry->n_refs == 0) {
        remove_locked(registry, entry);
    }
    return rc;
}

int slu_registry_acquire(struct slu_registry *registry, const char *what, uint64_t leave_bytes,
                         const struct slu_adapter **ret_adapter, struct slu_err *err)
{
    char *path = NULL;
    struct identity identity;
    int rc = resolve(registry, what, &path, &identity, err);
    if (rc < 0) {
        return rc;
    }
    pthread_mutex_lock(&registry->lock);
    struct entry *entry = find_locked(registry, path);
    if (entry && entry->state == READY && entry->n_refs == 0 &&
        !is_same(&entry->identity, &identity)) {
        remove_locked(registry, entry);
        entry = NULL;
    }
    if (entry && entry->state == READY) {
        entry->n_refs++;
        registry->n_hits++;
    } else if (entry) {
        rc = wait_locked(registry, entry, err);
    } else if ((entry = add_locked(registry, path, &identity))) {
        path = NULL;
        rc = load_locked(registry, entry, leave_bytes, err);
    } else {
        rc = slu_err_set(err, SLU_ENOMEM, "%s: no memory to load it", path);
    }
    if (rc == 0) {
        entry->used_at = ++registry->clock;
        *ret_adapter = entry->adapter;
    }
    pthread_mutex_unlock(&registry->lock);
    free(path);
    return rc;
}

int slu_registry_need(struct slu_registry *registry, const char *what, uint64_t *ret_bytes,
                      struct slu_err *err)
{
    char *path = NULL;
    struct identity identity;
    struct slu_source *source = NULL;
    struct choice choice = {0};
    int rc = resolve(registry, what, &path, &identity, err);
    if (rc < 0) {
        return rc;
    }
    pthread_mutex_lock(&registry->lock);
    const struct entry *entry = find_locked(registry, path);
    bool is_held = entry && entry->n_refs > 0;
    pthread_mutex_unlock(&registry->lock);
    if (!is_held) {
        rc = slu_source_open_file(path, &source, err);
        rc = rc < 0 ? rc : choose(registry, path, 0, source, &choice, err);
        slu_source_destroy(source);
    }
    free(path);
    *ret_bytes = choice.bytes;
    return rc;
}

void slu_registry_release(struct slu_registry *registry, const struct slu_adapter *adapter)
{
    if (!adapter) {
        return;
    }
    pthread_mutex_lock(&registry->lock);
    struct entry *entry = registry->entries;
    while (entry && entry->adapter != adapter) {
        entry = entry->next;
    }
    assert(entry && entry->n_refs > 0);
    entry->n_refs--;
    pthread_mutex_unlock(&registry->lock);
}

void slu_registry_stats(struct slu_registry *registry, struct slu_registry_stats *ret_stats)
{
    struct slu_registry_stats stats = {0};
    pthread_mutex_lock(&registry->lock);
    stats.loads = registry->n_loads;
    stats.hits = registry->n_hits;
    stats.evictions = registry->n_evictions;
    stats.used_bytes = registry->used_bytes;
    stats.flash_bytes = registry->flash_bytes;
    for (const struct entry *entry = registry->entries; entry; entry = entry->next) {
        if (entry->state == READY) {
            stats.n_streamed += entry->adapter->stream != NULL;
            stats.flash_bytes += slu_expert_stream_flash_bytes(entry->adapter);
        }
        stats.n_resident += entry->state == READY;
        stats.n_held += entry->state == READY && entry->n_refs > 0;
    }
    pthread_mutex_unlock(&registry->lock);
    *ret_stats = stats;
}
