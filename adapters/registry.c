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
    char *dir;

    pthread_mutex_t lock; /* guards all below, and all of the entries */
    pthread_cond_t changed;
    struct entry *entries;
    uint64_t clock; /* counts acquisitions */
    uint64_t used_bytes;
    uint64_t n_loads, n_hits, n_evictions;
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

/* Bytes of what cannot be evicted. */
static uint64_t held_bytes_locked(const struct slu_registry *registry)
{
    uint64_t bytes = registry->used_bytes;
    for (const struct entry *entry = registry->entries; entry; entry = entry->next) {
        bytes -= entry->state == READY && entry->n_refs == 0 ? entry->bytes : 0;
    }
    return bytes;
}

/* Counts `bytes` for the entry, evicting as many others as it takes, and none where that wouldn't
 * do. */
static int make_room_locked(struct slu_registry *registry, struct entry *entry, uint64_t bytes,
                            struct slu_err *err)
{
    uint64_t held_bytes = held_bytes_locked(registry);
    if (bytes > registry->bytes_max - held_bytes) {
        return slu_err_set(err, SLU_EBUDGET,
                           "%s: needs %llu bytes of memory; the adapters' share is %llu, of "
                           "which those in use hold %llu",
                           entry->path, (unsigned long long)bytes,
                           (unsigned long long)registry->bytes_max, (unsigned long long)held_bytes);
    }
    while (bytes > registry->bytes_max - registry->used_bytes) {
        evict_locked(registry);
    }
    entry->bytes = bytes;
    registry->used_bytes += bytes;
    return 0;
}

/* Reads the entry's file. Takes the lock only to make room. */
static int load(struct slu_registry *registry, struct entry *entry,
                struct slu_adapter **ret_adapter, struct slu_err *err)
{
    struct slu_source *source;
    struct slu_adapter_info info;
    int rc = slu_source_open_file(entry->path, &source, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_adapter_inspect(source, &info, err);
    if (rc == 0) {
        pthread_mutex_lock(&registry->lock);
        rc = make_room_locked(registry, entry, info.memory_bytes, err);
        pthread_mutex_unlock(&registry->lock);
    }
    while (rc == 0) {
        rc = slu_adapter_open(source, &registry->base, registry->ledger, ret_adapter, err);
        if (rc != SLU_EBUDGET) {
            break;
        }
        /* The share has room but the ledger has not: what nobody uses may go. */
        pthread_mutex_lock(&registry->lock);
        rc = evict_locked(registry) ? 0 : SLU_EBUDGET;
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

/* The lock is given up while reading. */
static int load_locked(struct slu_registry *registry, struct entry *entry, struct slu_err *err)
{
    struct slu_adapter *adapter = NULL;
    struct slu_err why = {0};
    pthread_mutex_unlock(&registry->lock);
    int rc = load(registry, entry, &adapter, &why);
    pthread_mutex_lock(&registry->lock);
    pthread_cond_broadcast(&registry->changed);
    if (rc == 0) {
        registry->n_loads++;
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

int slu_registry_acquire(struct slu_registry *registry, const char *what,
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
        rc = load_locked(registry, entry, err);
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
    for (const struct entry *entry = registry->entries; entry; entry = entry->next) {
        stats.n_resident += entry->state == READY;
        stats.n_held += entry->state == READY && entry->n_refs > 0;
    }
    pthread_mutex_unlock(&registry->lock);
    *ret_stats = stats;
}
