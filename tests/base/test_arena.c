#include <criterion/criterion.h>

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/arena.h"

#define MIB ((size_t)1 << 20)

static uint64_t xorshift(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* An arena and one slab, of whatever size, charge to the byte what a plan says they will. */
Test(arena, charges_as_planned)
{
    static const size_t slabs[] = {
        SLU_ARENA_EXACT_BYTES, 100 * 1000, MIB,          2 * MIB - 1,      2 * MIB,
        2 * MIB + 1,           13 * MIB,   33 * MIB + 5, 300 * MIB + 4096,
    };
    for (size_t i = 0; i < sizeof slabs / sizeof slabs[0]; i++) {
        uint64_t plan = slu_arena_overhead_bytes() + slu_map_charge_bytes(slabs[i]);
        struct slu_ledger *ledger = slu_ledger_create(plan);
        struct slu_arena *arena;
        struct slu_err err;
        cr_assert_eq(slu_arena_create(ledger, SLU_ACCOUNT_EXPERTS, &arena, &err), 0);
        char *slab = slu_arena_alloc(arena, slabs[i], 4096);
        cr_assert_not_null(slab, "%zu bytes", slabs[i]);
        cr_assert_eq((uintptr_t)slab % 4096, 0);
        slab[0] = 1;
        slab[slabs[i] - 1] = 1;
        cr_assert_eq(slu_ledger_used(ledger), plan);
        cr_assert_eq(slu_ledger_peak(ledger), plan);
        cr_assert_eq(slu_ledger_account_used(ledger, SLU_ACCOUNT_EXPERTS), plan);
        slu_arena_free(arena, slab);
        cr_assert_eq(slu_ledger_used(ledger), slu_arena_overhead_bytes());
        slu_arena_destroy(arena);
        slu_ledger_destroy(ledger);
    }
}

/* A byte less in the budget and the slab is refused, with nothing left charged. */
Test(arena, refuses_past_budget)
{
    uint64_t plan = slu_arena_overhead_bytes() + 5 * MIB;
    struct slu_ledger *ledger = slu_ledger_create(plan - 1);
    struct slu_arena *arena;
    cr_assert_eq(slu_arena_create(ledger, SLU_ACCOUNT_EXPERTS, &arena, NULL), 0);
    cr_assert_null(slu_arena_alloc(arena, 5 * MIB, 4096));
    cr_assert_eq(slu_ledger_used(ledger), slu_arena_overhead_bytes());
    void *less = slu_arena_alloc(arena, 4 * MIB, 4096);
    cr_assert_not_null(less);
    slu_arena_destroy(arena);
    slu_ledger_destroy(ledger);
}

/* An arena that itself doesn't fit is an error of the budget, and leaves nothing behind. */
Test(arena, refuses_itself)
{
    struct slu_ledger *ledger = slu_ledger_create(slu_arena_overhead_bytes() - 1);
    struct slu_arena *arena;
    struct slu_err err;
    cr_assert_eq(slu_arena_create(ledger, SLU_ACCOUNT_ADAPTERS, &arena, &err), SLU_EBUDGET);
    cr_assert_not_null(strstr(err.text, "adapters"), "%s", err.text);
    slu_ledger_destroy(ledger);
}

/* Sizes that no system has are refused, and zero too. */
Test(arena, refuses_absurd_sizes)
{
    struct slu_ledger *ledger = slu_ledger_create(0);
    struct slu_arena *arena;
    cr_assert_eq(slu_arena_create(ledger, SLU_ACCOUNT_EXPERTS, &arena, NULL), 0);
    cr_assert_null(slu_arena_alloc(arena, SIZE_MAX, 4096));
    cr_assert_null(slu_arena_alloc(arena, SIZE_MAX / 2, 4096));
    cr_assert_null(slu_arena_alloc(arena, 0, 4096));
    void *map = NULL;
    struct slu_err err;
    cr_assert_eq(slu_map_alloc(ledger, SLU_ACCOUNT_KV, SIZE_MAX - 5, &map, &err), SLU_EINVAL);
    cr_assert_eq(slu_map_alloc(ledger, SLU_ACCOUNT_KV, SIZE_MAX / 4, &map, &err), SLU_ENOMEM);
    cr_assert_eq(slu_ledger_account_used(ledger, SLU_ACCOUNT_KV), 0);
    slu_arena_destroy(arena);
    slu_ledger_destroy(ledger);
}

/* Through a long random life no two allocations overlap, the ledger never holds less than was
 * asked for, and all of it comes back. */
Test(arena, survives_random_use)
{
    enum { N = 64 };
    struct {
        unsigned char *start;
        size_t bytes;
    } live[N] = {0};
    struct slu_ledger *ledger = slu_ledger_create(64 * MIB);
    struct slu_arena *arena;
    cr_assert_eq(slu_arena_create(ledger, SLU_ACCOUNT_ADAPTERS, &arena, NULL), 0);
    uint64_t random = 88172645463325252u;
    size_t live_bytes = 0;
    unsigned n_refused = 0;
    for (int step = 0; step < 4000; step++) {
        unsigned i = (unsigned)(xorshift(&random) % N);
        if (live[i].start) {
            cr_assert_eq(live[i].start[0], i);
            cr_assert_eq(live[i].start[live[i].bytes - 1], i);
            slu_arena_free(arena, live[i].start);
            live_bytes -= live[i].bytes;
            live[i].start = NULL;
            continue;
        }
        size_t bytes = 1 + xorshift(&random) % (((size_t)1 << (xorshift(&random) % 24)));
        size_t align = (size_t)1 << (xorshift(&random) % 14);
        unsigned char *start = slu_arena_alloc(arena, bytes, align);
        if (!start) {
            n_refused++;
            continue;
        }
        cr_assert_eq((uintptr_t)start % align, 0);
        start[0] = (unsigned char)i;
        start[bytes - 1] = (unsigned char)i;
        live[i].start = start;
        live[i].bytes = bytes;
        live_bytes += bytes;
        cr_assert_geq(slu_ledger_used(ledger), live_bytes);
    }
    cr_assert_lt(n_refused, 1000);
    slu_arena_destroy(arena);
    slu_ledger_destroy(ledger);
}

/* A mapping is charged by the page, zeroed, and given back. */
Test(map, charges_pages)
{
    struct slu_ledger *ledger = slu_ledger_create(3 * MIB);
    void *memory;
    struct slu_err err;
    cr_assert_eq(slu_map_alloc(ledger, SLU_ACCOUNT_KV, 2 * MIB + 1, &memory, &err), 0);
    cr_assert_eq(slu_ledger_used(ledger), slu_map_charge_bytes(2 * MIB + 1));
    cr_assert_eq(((char *)memory)[2 * MIB], 0);
    void *other = &err;
    cr_assert_eq(slu_map_alloc(ledger, SLU_ACCOUNT_KV, MIB, &other, &err), SLU_EBUDGET);
    cr_assert_eq(other, &err);
    slu_map_free(ledger, SLU_ACCOUNT_KV, memory, 2 * MIB + 1);
    cr_assert_eq(slu_map_alloc(ledger, SLU_ACCOUNT_KV, 0, &other, &err), 0);
    cr_assert_null(other);
    slu_map_free(ledger, SLU_ACCOUNT_KV, other, 0);
    slu_ledger_destroy(ledger);
}

/* What is touched is there, all of it, and still zero. */
Test(map, touching_provides_memory)
{
    struct slu_ledger *ledger = slu_ledger_create(8 * MIB);
    void *memory;
    unsigned char pages[8 * MIB / 4096];
    size_t bytes = 5 * MIB + 12288, page = (size_t)sysconf(_SC_PAGESIZE);
    cr_assert_eq(slu_map_alloc(ledger, SLU_ACCOUNT_KV, bytes, &memory, NULL), 0);
    slu_map_touch(memory, bytes);
    cr_assert_eq(mincore(memory, bytes, pages), 0);
    for (size_t i = 0; i < bytes / page; i++) {
        cr_assert(pages[i] & 1, "page %zu", i);
    }
    for (size_t i = 0; i < bytes; i += 512) {
        cr_assert_eq(((char *)memory)[i], 0);
    }
    slu_map_touch(NULL, 0);
    slu_map_free(ledger, SLU_ACCOUNT_KV, memory, bytes);
    slu_ledger_destroy(ledger);
}

#if !defined(__SANITIZE_ADDRESS__) /* its own mappings would fail first */
/* Where the system has no address space left an arena is refused, and its measurement is a guess.
 */
Test(arena, refuses_without_address_space)
{
    struct slu_ledger *ledger = slu_ledger_create(0);
    struct slu_arena *arena = NULL;
    struct slu_err err;
    struct rlimit before;
    unsigned long pages = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    cr_assert(statm && fscanf(statm, "%lu", &pages) == 1);
    fclose(statm);
    getrlimit(RLIMIT_AS, &before);
    struct rlimit now = {.rlim_cur = pages * (unsigned long)sysconf(_SC_PAGESIZE) + (64 << 10),
                         .rlim_max = before.rlim_max};
    cr_assert_eq(setrlimit(RLIMIT_AS, &now), 0);
    int rc = slu_arena_create(ledger, SLU_ACCOUNT_EXPERTS, &arena, &err);
    size_t overhead_bytes = slu_arena_overhead_bytes();
    setrlimit(RLIMIT_AS, &before);
    cr_assert_eq(rc, SLU_ENOMEM);
    cr_assert_null(arena);
    cr_assert_gt(overhead_bytes, 0);
    cr_assert_eq(slu_ledger_used(ledger), 0);
    slu_ledger_destroy(ledger);
}
#endif
