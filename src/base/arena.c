#include "base/arena.h"

#include <jemalloc/jemalloc.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/*
 * How an exact charge comes about.
 *
 * jemalloc rounds a large request up to its size class, up to a quarter more, and asks the alloc
 * hook for that, plus a page of padding, or for more still when it grows by its own series. A slab
 * of gigabytes must not be charged so: the planner counts on every page. So a request from
 * SLU_ARENA_EXACT_BYTES up is announced to the hook beforehand (`want_*`), under the arena's lock.
 * The hook refuses the growth series, whereupon jemalloc falls back to asking for the size class;
 * that is given in address space, and charged with the pages that the caller asked for, since
 * nobody touches the rest. Such an extent is kept in a list, is never split or merged, and goes
 * back to the system as soon as it is freed, since the arena's oversize threshold is the same.
 *
 * Everything else, small objects and jemalloc's metadata, is charged as mapped.
 */
#define HUGE_BYTES ((size_t)2 << 20)

struct exact_extent {
    void *start;
    size_t charged_bytes;
    struct exact_extent *next;
};

struct slu_arena {
    extent_hooks_t hooks; /* first: the hooks find the arena by it */
    struct slu_ledger *ledger;
    enum slu_account account;
    unsigned index;

    pthread_mutex_t lock; /* held around every call into jemalloc, hence in every hook */
    struct exact_extent *exacts;
    struct exact_extent *spent; /* no longer mapped; freed once jemalloc has returned */
    struct exact_extent *want;  /* announced; NULL once taken */
    size_t want_class_bytes;    /* the size class that want will be asked for as */
    size_t want_charge_bytes;
    size_t refused_bytes; /* that the ledger last refused */
};

static size_t page_bytes(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

/* 0 when the sum passes SIZE_MAX. */
static size_t round_up(size_t bytes, size_t multiple)
{
    return bytes > SIZE_MAX - (multiple - 1) ? 0 : (bytes + multiple - 1) / multiple * multiple;
}

/* An anonymous mapping at a multiple of align_bytes: more is mapped, and what sticks out unmapped.
 */
static void *map_aligned(size_t bytes, size_t align_bytes)
{
    size_t slack = align_bytes > page_bytes() ? align_bytes - page_bytes() : 0;
    if (bytes > SIZE_MAX - slack) {
        return NULL;
    }
    char *start = mmap(NULL, bytes + slack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        return NULL;
    }
    size_t head = (align_bytes - (uintptr_t)start % align_bytes) % align_bytes;
    if (head > 0) {
        munmap(start, head);
    }
    if (slack > head) {
        munmap(start + head + bytes, slack - head);
    }
    return start + head;
}

/* Whole huge pages only: a last one that reached past `bytes` would hold more than was charged.
 * Advice: a refusal costs speed and nothing else. */
static void advise_huge(void *memory, size_t bytes)
{
    size_t whole = bytes / HUGE_BYTES * HUGE_BYTES;
    if (whole > 0) {
        madvise(memory, whole, MADV_HUGEPAGE);
    }
}

/* The exact extent that holds `address`. */
static struct exact_extent *exact_find_locked(const struct slu_arena *arena, const void *address)
{
    for (struct exact_extent *at = arena->exacts; at; at = at->next) {
        if (at->start == address) {
            return at;
        }
    }
    return NULL;
}

static void *hook_alloc(extent_hooks_t *hooks, void *new_addr, size_t size, size_t alignment,
                        bool *zero, bool *commit, unsigned index)
{
    struct slu_arena *arena = (struct slu_arena *)hooks;
    (void)index;
    if (new_addr) {
        return NULL; /* no promise can be made about where a mapping lands */
    }
    struct exact_extent *want = arena->want;
    size_t charge = size;
    if (want) {
        if (size < arena->want_class_bytes || size > arena->want_class_bytes + page_bytes()) {
            return NULL; /* growth; see above */
        }
        charge = arena->want_charge_bytes;
    }
    if (slu_ledger_reserve(arena->ledger, arena->account, charge, NULL) < 0) {
        arena->refused_bytes = charge;
        return NULL;
    }
    void *start = map_aligned(size, alignment);
    if (!start) {
        slu_ledger_release(arena->ledger, arena->account, charge);
        return NULL;
    }
    if (want) {
        advise_huge(start, charge);
        want->start = start;
        want->charged_bytes = charge;
        want->next = arena->exacts;
        arena->exacts = want;
        arena->want = NULL;
    }
    *zero = true;
    *commit = true;
    return start;
}

static void give_back_locked(struct slu_arena *arena, void *start, size_t size)
{
    munmap(start, size);
    size_t charged = size;
    for (struct exact_extent **at = &arena->exacts; *at; at = &(*at)->next) {
        if ((*at)->start == start) {
            struct exact_extent *gone = *at;
            charged = gone->charged_bytes;
            *at = gone->next;
            gone->next = arena->spent;
            arena->spent = gone;
            break;
        }
    }
    slu_ledger_release(arena->ledger, arena->account, charged);
}

static bool hook_dalloc(extent_hooks_t *hooks, void *start, size_t size, bool committed,
                        unsigned index)
{
    (void)committed;
    (void)index;
    give_back_locked((struct slu_arena *)hooks, start, size);
    return false;
}

static void hook_destroy(extent_hooks_t *hooks, void *start, size_t size, bool committed,
                         unsigned index)
{
    (void)committed;
    (void)index;
    give_back_locked((struct slu_arena *)hooks, start, size);
}

/* True refuses. */
static bool hook_split(extent_hooks_t *hooks, void *start, size_t size, size_t size_a,
                       size_t size_b, bool committed, unsigned index)
{
    (void)size;
    (void)size_a;
    (void)size_b;
    (void)committed;
    (void)index;
    return exact_find_locked((struct slu_arena *)hooks, start) != NULL;
}

static bool hook_merge(extent_hooks_t *hooks, void *start_a, size_t size_a, void *start_b,
                       size_t size_b, bool committed, unsigned index)
{
    (void)size_a;
    (void)size_b;
    (void)committed;
    (void)index;
    const struct slu_arena *arena = (struct slu_arena *)hooks;
    return exact_find_locked(arena, start_a) || exact_find_locked(arena, start_b);
}

static void free_spent_locked(struct slu_arena *arena)
{
    while (arena->spent) {
        struct exact_extent *next = arena->spent->next;
        free(arena->spent);
        arena->spent = next;
    }
}

/* Writes one of the arena's settings. The process's jemalloc may lack it; then memory that was
 * freed stays charged for longer, which is no error. */
static void arena_setting(const struct slu_arena *arena, const char *name, void *value,
                          size_t bytes)
{
    char path[64];
    snprintf(path, sizeof path, "arena.%u.%s", arena->index, name);
    mallctl(path, NULL, NULL, value, bytes);
}

int slu_arena_create(struct slu_ledger *ledger, enum slu_account account,
                     struct slu_arena **ret_arena, struct slu_err *err)
{
    struct slu_arena *arena = calloc(1, sizeof *arena);
    if (!arena) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for an arena for %s",
                           slu_account_name(account));
    }
    arena->hooks = (extent_hooks_t){
        .alloc = hook_alloc,
        .dalloc = hook_dalloc,
        .destroy = hook_destroy,
        .split = hook_split,
        .merge = hook_merge,
    };
    arena->ledger = ledger;
    arena->account = account;
    pthread_mutex_init(&arena->lock, NULL);

    extent_hooks_t *hooks = &arena->hooks;
    size_t index_bytes = sizeof arena->index;
    int e = mallctl("arenas.create", &arena->index, &index_bytes, &hooks, sizeof hooks);
    if (e != 0) {
        size_t refused_bytes = arena->refused_bytes;
        pthread_mutex_destroy(&arena->lock);
        free(arena);
        if (refused_bytes > 0) {
            uint64_t left = slu_ledger_limit(ledger) - slu_ledger_used(ledger);
            return slu_err_set(err, SLU_EBUDGET,
                               "an arena for %s takes %zu bytes and the budget has %" PRIu64
                               " left",
                               slu_account_name(account), refused_bytes, left);
        }
        return slu_err_set(err, SLU_ENOMEM, "jemalloc can't create an arena for %s: %s",
                           slu_account_name(account), strerror(e));
    }
    /* Ten years. Purging must be off, since it costs far more than keeping the pages; but -1, which
     * says so, also stops freed oversize extents from going back to the system. */
    ssize_t never = (ssize_t)1000 * 60 * 60 * 24 * 3650;
    size_t threshold = SLU_ARENA_EXACT_BYTES;
    size_t grow_limit = HUGE_BYTES;
    arena_setting(arena, "dirty_decay_ms", &never, sizeof never);
    arena_setting(arena, "muzzy_decay_ms", &never, sizeof never);
    arena_setting(arena, "oversize_threshold", &threshold, sizeof threshold);
    arena_setting(arena, "retain_grow_limit", &grow_limit, sizeof grow_limit);
    *ret_arena = arena;
    return 0;
}

void slu_arena_destroy(struct slu_arena *arena)
{
    if (!arena) {
        return;
    }
    char path[64];
    snprintf(path, sizeof path, "arena.%u.destroy", arena->index);
    pthread_mutex_lock(&arena->lock);
    int e = mallctl(path, NULL, NULL, NULL, 0);
    free_spent_locked(arena);
    pthread_mutex_unlock(&arena->lock);
    assert(e == 0 && !arena->exacts);
    (void)e;
    pthread_mutex_destroy(&arena->lock);
    free(arena);
}

void *slu_arena_alloc(struct slu_arena *arena, size_t bytes, size_t align_bytes)
{
    assert(align_bytes > 0 && (align_bytes & (align_bytes - 1)) == 0);
    size_t charge = round_up(bytes, page_bytes());
    if (bytes == 0 || charge == 0 || charge > PTRDIFF_MAX / 2) {
        return NULL;
    }
    struct exact_extent *want = NULL;
    if (bytes >= SLU_ARENA_EXACT_BYTES) {
        want = calloc(1, sizeof *want);
        if (!want) {
            return NULL;
        }
        /* At least a page: below that jemalloc shifts the start to spread cache sets. */
        size_t least = bytes >= HUGE_BYTES ? HUGE_BYTES : page_bytes();
        align_bytes = align_bytes > least ? align_bytes : least;
    }
    int flags = MALLOCX_ARENA(arena->index) | MALLOCX_TCACHE_NONE | MALLOCX_ALIGN(align_bytes);

    pthread_mutex_lock(&arena->lock);
    if (want) {
        arena->want = want;
        arena->want_class_bytes = nallocx(bytes, flags);
        arena->want_charge_bytes = charge;
    }
    void *memory = mallocx(bytes, flags);
    want = arena->want; /* not taken: refused, or served from what was there */
    arena->want = NULL;
    pthread_mutex_unlock(&arena->lock);
    free(want);
    return memory;
}

void slu_arena_free(struct slu_arena *arena, void *memory)
{
    if (!memory) {
        return;
    }
    pthread_mutex_lock(&arena->lock);
    dallocx(memory, MALLOCX_ARENA(arena->index) | MALLOCX_TCACHE_NONE);
    free_spent_locked(arena);
    pthread_mutex_unlock(&arena->lock);
}

/* Measured on an arena made for the purpose, since it depends on how jemalloc was built: one huge
 * page, which its base allocator carves metadata from. */
size_t slu_arena_overhead_bytes(void)
{
    size_t bytes = HUGE_BYTES;
    struct slu_ledger *ledger = slu_ledger_create(0);
    struct slu_arena *arena;
    if (ledger && slu_arena_create(ledger, SLU_ACCOUNT_EXPERTS, &arena, NULL) == 0) {
        bytes = slu_ledger_used(ledger);
        slu_arena_destroy(arena);
    }
    slu_ledger_destroy(ledger);
    return bytes;
}

size_t slu_map_charge_bytes(size_t bytes)
{
    return round_up(bytes, page_bytes());
}

int slu_map_alloc(struct slu_ledger *ledger, enum slu_account account, size_t bytes,
                  void **ret_memory, struct slu_err *err)
{
    size_t charge = slu_map_charge_bytes(bytes);
    if (bytes == 0) {
        *ret_memory = NULL;
        return 0;
    }
    if (charge == 0) {
        return slu_err_set(err, SLU_EINVAL, "%zu bytes for %s can't be mapped", bytes,
                           slu_account_name(account));
    }
    int e = slu_ledger_reserve(ledger, account, charge, err);
    if (e < 0) {
        return e;
    }
    void *memory = map_aligned(charge, charge >= HUGE_BYTES ? HUGE_BYTES : page_bytes());
    if (!memory) {
        slu_ledger_release(ledger, account, charge);
        return slu_err_set(err, SLU_ENOMEM, "the system has no %zu bytes for %s", charge,
                           slu_account_name(account));
    }
    advise_huge(memory, charge);
    *ret_memory = memory;
    return 0;
}

void slu_map_touch(void *memory, size_t bytes)
{
    volatile unsigned char *at = memory;
    for (size_t i = 0; i < bytes; i += page_bytes()) {
        at[i] = 0; /* huge pages, where there are any, are had by the first byte */
    }
}

void slu_map_free(struct slu_ledger *ledger, enum slu_account account, void *memory, size_t bytes)
{
    if (!memory) {
        return;
    }
    size_t charge = slu_map_charge_bytes(bytes);
    munmap(memory, charge);
    slu_ledger_release(ledger, account, charge);
}
