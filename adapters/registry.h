/*
 * The registry: which adapters are in memory. Sessions acquire adapters by path or by name and
 * release them; an adapter nobody holds stays for the next who asks, until another needs its room:
 * then the least recently used one leaves. Loading goes on off to the side, without the lock, and
 * is published when it is complete; whoever asks for the same adapter meanwhile waits for it.
 *
 * An adapter for which those in use leave no room, but which has pairs of routed experts, is opened
 * with these streamed, in what room there is, and stays so until it leaves. Where a stream would
 * take more than the whole adapter does, it is not.
 *
 * Thread safety: all functions from any thread; create and destroy from one. One lock, never held
 * while reading.
 */
#ifndef SLU_ADAPTERS_REGISTRY_H
#define SLU_ADAPTERS_REGISTRY_H

#include "adapters/adapter.h"

struct slu_registry;

struct slu_registry_params {
    struct slu_ledger *ledger;   /* outlives the registry */
    const struct slu_base *base; /* copied; its arg outlives the registry */
    uint64_t bytes_max;          /* the adapters' share */
    uint32_t n_at_once;          /* adapters that are to be in use at once: one that is streamed
                                    takes no more than such a part of the share if it needn't; 0: 2,
                                    one and the one that takes its place */
    uint32_t n_workers; /* threads that take blocks of streamed ones; 0: none is streamed */
    enum slu_io_backend backend;
    const char *dir; /* where names are looked up as dir/NAME.sla; may be NULL; copied */
};

int slu_registry_create(const struct slu_registry_params *params,
                        struct slu_registry **ret_registry, struct slu_err *err);
/* Asserts that every adapter was released. NULL is fine. */
void slu_registry_destroy(struct slu_registry *registry);

/* Where the adapter `what` lies, to be freed: `what` itself if it holds a '/' or ends in ".sla",
 * else dir/what.sla. SLU_ENOENT for a name without a folder, SLU_EINVAL for an empty one. */
int slu_registry_path(const char *dir, const char *what, char **ret_path, struct slu_err *err);

/* A reference to the adapter `what`, found by slu_registry_path. Resident: takes no time and no
 * copy. SLU_ENOENT; SLU_EBUDGET when what it needs passes what adapters in use leave of the share;
 * SLU_EIO where the file became another one meanwhile; else as slu_adapter_open. A file that has
 * changed since it was loaded (size, mtime, inode) is loaded anew once nobody holds the old one.
 * leave_bytes of the share are left alone, for others that are to be acquired next. */
int slu_registry_acquire(struct slu_registry *registry, const char *what, uint64_t leave_bytes,
                         const struct slu_adapter **ret_adapter, struct slu_err *err);

/* The least of the share that acquiring it takes: 0 where somebody holds it already. Errors as
 * slu_registry_acquire's for the name and the file's header. */
int slu_registry_need(struct slu_registry *registry, const char *what, uint64_t *ret_bytes,
                      struct slu_err *err);
void slu_registry_release(struct slu_registry *registry, const struct slu_adapter *adapter);

struct slu_registry_stats {
    uint64_t loads, hits, evictions;
    uint64_t used_bytes;
    uint64_t flash_bytes; /* read, for loads and for streamed experts */
    uint32_t n_resident, n_held;
    uint32_t n_streamed; /* of the resident ones, those of which only a part is */
};
void slu_registry_stats(struct slu_registry *registry, struct slu_registry_stats *ret_stats);

#endif
