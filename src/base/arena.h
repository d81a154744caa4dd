/*
 * Memory that is charged to the ledger. Two forms:
 *
 *  - a jemalloc arena of its own, whose extent hooks reserve every mapping in the ledger and ask
 *    for transparent huge pages: for expert slots and adapters, which come and go;
 *  - a plain mapping, for what lives as long as its owner: dense weights, KV, scratch.
 *
 * First touch of anonymous memory is slow on some machines: allocate once and keep.
 *
 * Thread safety: arenas may be used from any thread; create and destroy from one.
 */
#ifndef SLU_BASE_ARENA_H
#define SLU_BASE_ARENA_H

#include <stddef.h>

#include "base/ledger.h"

struct slu_arena;

/* The ledger must outlive the arena. SLU_ENOMEM, SLU_EBUDGET (jemalloc's own metadata for the
 * arena, about 2 MiB of address space, is charged too). */
int slu_arena_create(struct slu_ledger *ledger, enum slu_account account,
                     struct slu_arena **ret_arena, struct slu_err *err);

/* Frees whatever is still allocated from it. NULL is fine. */
void slu_arena_destroy(struct slu_arena *arena);

/* Zeroed on first use only. align_bytes is a power of two. NULL when the ledger or the system
 * refuses. From SLU_ARENA_EXACT_BYTES up an allocation charges its bytes, rounded up to the page,
 * and is given back to the system when it is freed; smaller ones share mappings of 2 MiB. */
#define SLU_ARENA_EXACT_BYTES ((size_t)64 << 10)
void *slu_arena_alloc(struct slu_arena *arena, size_t bytes, size_t align_bytes);
void slu_arena_free(struct slu_arena *arena, void *memory);

/* Bytes an arena charges beyond what is asked of it, for plans made before it exists. */
size_t slu_arena_overhead_bytes(void);

/* A zeroed, page-aligned mapping, charged; huge pages are asked for from 2 MiB up. No bytes, no
 * mapping: *ret_memory is NULL then. */
int slu_map_alloc(struct slu_ledger *ledger, enum slu_account account, size_t bytes,
                  void **ret_memory, struct slu_err *err);

/* Has the system provide the memory at once and not as each page is first used. For what
 * was just allocated: it is all zeros afterwards. */
void slu_map_touch(void *memory, size_t bytes);

/* What slu_map_alloc charges for `bytes`: rounded up to the page. */
size_t slu_map_charge_bytes(size_t bytes);

/* `bytes` as at allocation; memory NULL is fine. */
void slu_map_free(struct slu_ledger *ledger, enum slu_account account, void *memory, size_t bytes);

#endif
