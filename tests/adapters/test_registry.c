/* Which adapters are in memory: shared, counted, evicted, and never beyond their share. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "make.h"
#include "adapters/registry.h"

struct shelf {
    struct lab lab;
    struct slu_base base;
    struct slu_ledger *ledger;
    struct slu_registry *registry;
    uint64_t each; /* bytes of an adapter */
};

static void put(struct shelf *s, const char *name, uint32_t rank, uint64_t seed)
{
    lab_adapter(&s->lab, &(struct slu_adapter_synth_params){.rank = rank, .seed = seed},
                lab_path(&s->lab, name));
}

/* Adapters a, b, c and d of equal size, and a share for n of them. */
static void shelf_open(struct shelf *s, unsigned n)
{
    struct slu_err err;
    *s = (struct shelf){0};
    lab_open(&s->lab);
    lab_model(&s->lab, &(struct slu_synth_params){.arch = SLU_ARCH_OLMOE});
    s->base = slu_adapter_base_view(&s->lab.base);
    s->ledger = slu_ledger_create(0);
    put(s, "a.sla", 4, 1);
    put(s, "b.sla", 4, 2);
    put(s, "c.sla", 4, 3);
    put(s, "d.sla", 4, 4);
    struct slu_adapter *a = lab_load(lab_path(&s->lab, "a.sla"), &s->base, s->ledger);
    s->each = a->info.memory_bytes;
    slu_adapter_close(a);
    struct slu_registry_params params = {
        .ledger = s->ledger, .base = &s->base, .bytes_max = n * s->each, .dir = s->lab.dir};
    cr_assert_eq(slu_registry_create(&params, &s->registry, &err), 0);
}

static void shelf_close(struct shelf *s)
{
    slu_registry_destroy(s->registry);
    cr_assert_eq(slu_ledger_used(s->ledger), 0);
    slu_ledger_destroy(s->ledger);
    lab_close(&s->lab);
}

static const struct slu_adapter *get(struct shelf *s, const char *what)
{
    const struct slu_adapter *adapter = NULL;
    struct slu_err err = {0};
    cr_assert_eq(slu_registry_acquire(s->registry, what, 0, &adapter, &err), 0, "%s", err.text);
    return adapter;
}

static void drop(struct shelf *s, const struct slu_adapter *adapter)
{
    slu_registry_release(s->registry, adapter);
}

static struct slu_registry_stats stats_of(struct shelf *s)
{
    struct slu_registry_stats stats;
    slu_registry_stats(s->registry, &stats);
    cr_assert_eq(stats.used_bytes, slu_ledger_used(s->ledger));
    cr_assert_eq(stats.used_bytes, stats.n_resident * s->each);
    return stats;
}

/* By name, by path, a second time and after a release: one load, one copy. */
Test(registry, shares)
{
    struct shelf s;
    shelf_open(&s, 2);
    const struct slu_adapter *a = get(&s, "a");
    cr_assert_eq(get(&s, lab_path(&s.lab, "a.sla")), a);
    struct slu_registry_stats stats = stats_of(&s);
    cr_assert(stats.loads == 1 && stats.hits == 1 && stats.n_held == 1 && stats.n_resident == 1);
    drop(&s, a);
    cr_assert_eq(stats_of(&s).n_held, 1);
    drop(&s, a);
    stats = stats_of(&s);
    cr_assert(stats.n_held == 0 && stats.n_resident == 1);
    cr_assert_eq(get(&s, "a"), a);
    cr_assert_eq(stats_of(&s).loads, 1);
    drop(&s, a);
    shelf_close(&s);
}

/* The least recently used of those that nobody holds leaves, and comes back on demand; one that is
 * held never leaves. */
Test(registry, evicts)
{
    struct shelf s;
    shelf_open(&s, 3);
    const struct slu_adapter *a = get(&s, "a");
    drop(&s, get(&s, "b"));
    drop(&s, get(&s, "c"));
    drop(&s, get(&s, "b")); /* now c is the older */
    drop(&s, get(&s, "d"));
    struct slu_registry_stats stats = stats_of(&s);
    cr_assert(stats.loads == 4 && stats.evictions == 1 && stats.n_resident == 3);
    drop(&s, get(&s, "b"));
    cr_assert_eq(get(&s, "a"), a);
    cr_assert_eq(stats_of(&s).loads, 4);
    const struct slu_adapter *c = get(&s, "c");
    stats = stats_of(&s);
    cr_assert(stats.loads == 5 && stats.evictions == 2 && stats.n_held == 2);
    drop(&s, a);
    drop(&s, a);
    drop(&s, c);
    shelf_close(&s);
}

/* What passes the share is refused with its size, and changes nothing for anyone. */
Test(registry, refuses)
{
    struct shelf s;
    shelf_open(&s, 2);
    struct slu_err err = {0};
    const struct slu_adapter *a = get(&s, "a"), *b = get(&s, "b"), *other = NULL;
    char words[64];
    snprintf(words, sizeof words, "needs %llu bytes", (unsigned long long)s.each);
    int rc = slu_registry_acquire(s.registry, "c", 0, &other, &err);
    lab_expect_refusal(rc, &err, SLU_EBUDGET, words);
    drop(&s, b);
    put(&s, "big.sla", 200, 5);
    rc = slu_registry_acquire(s.registry, "big", 0, &other, &err);
    lab_expect_refusal(rc, &err, SLU_EBUDGET, "the adapters' share is");
    cr_assert_eq(stats_of(&s).n_resident, 2); /* what could never fit evicts nothing */
    put(&s, "bulky.sla", 8, 6);
    rc = slu_registry_acquire(s.registry, "bulky", 0, &other, &err);
    snprintf(words, sizeof words, "those in use hold %llu", (unsigned long long)s.each);
    lab_expect_refusal(rc, &err, SLU_EBUDGET, words);
    cr_assert_eq(stats_of(&s).n_resident, 2); /* nor does what doesn't fit beside those in use */
    lab_write(lab_path(&s.lab, "bad.sla"), "SLUICELA and then nothing", 25);
    rc = slu_registry_acquire(s.registry, "bad", 0, &other, &err);
    lab_expect_refusal(rc, &err, SLU_EFORMAT, "truncated");
    lab_expect_refusal(slu_registry_acquire(s.registry, "none", 0, &other, &err), &err, SLU_ENOENT,
                       "none.sla");
    lab_expect_refusal(slu_registry_acquire(s.registry, "", 0, &other, &err), &err, SLU_EINVAL,
                       "empty");
    cr_assert_null(other);
    cr_assert_eq(stats_of(&s).n_held, 1);
    drop(&s, a);
    shelf_close(&s);
}

/* Where the ledger has less room than the share, what nobody uses makes way. */
Test(registry, makes_way_in_the_ledger)
{
    struct shelf s;
    shelf_open(&s, 4);
    slu_registry_destroy(s.registry);
    struct slu_err err = {0};
    slu_ledger_destroy(s.ledger);
    s.ledger = slu_ledger_create(2 * s.each + slu_adapter_staging_bytes());
    struct slu_registry_params params = {
        .ledger = s.ledger, .base = &s.base, .bytes_max = 4 * s.each, .dir = s.lab.dir};
    cr_assert_eq(slu_registry_create(&params, &s.registry, &err), 0);
    const struct slu_adapter *a = get(&s, "a"), *other = NULL;
    drop(&s, get(&s, "b"));
    const struct slu_adapter *c = get(&s, "c");
    cr_assert(stats_of(&s).evictions == 1 && stats_of(&s).n_resident == 2);
    int rc = slu_registry_acquire(s.registry, "d", 0, &other, &err);
    lab_expect_refusal(rc, &err, SLU_EBUDGET, "d.sla");
    drop(&s, a);
    drop(&s, c);
    shelf_close(&s);
}

/* Where all that nobody uses would not make room enough in the ledger, none of it leaves. */
Test(registry, makes_no_way_in_vain)
{
    struct shelf s;
    shelf_open(&s, 4);
    slu_registry_destroy(s.registry);
    struct slu_err err = {0};
    slu_ledger_destroy(s.ledger);
    s.ledger = slu_ledger_create(3 * s.each + slu_adapter_staging_bytes() - 1);
    struct slu_registry_params params = {
        .ledger = s.ledger, .base = &s.base, .bytes_max = 64 * s.each, .dir = s.lab.dir};
    cr_assert_eq(slu_registry_create(&params, &s.registry, &err), 0);
    const struct slu_adapter *other = NULL;
    drop(&s, get(&s, "a"));
    drop(&s, get(&s, "b"));
    put(&s, "big.sla", 200, 5);
    int rc = slu_registry_acquire(s.registry, "big", 0, &other, &err);
    lab_expect_refusal(rc, &err, SLU_EBUDGET, "big.sla");
    struct slu_registry_stats stats = stats_of(&s);
    cr_assert(stats.evictions == 0 && stats.n_resident == 2);
    drop(&s, get(&s, "c")); /* one makes way for one, and no more do */
    stats = stats_of(&s);
    cr_assert(stats.evictions == 1 && stats.n_resident == 2);
    shelf_close(&s);
}

/* Overwrites a file when a registry that is opening it asks for the base's shapes. */
struct meddler {
    struct slu_base base;
    const char *path;
    const uint8_t *bytes;
    size_t n;
    unsigned n_asked;
};

static void meddle(void *arg, enum slu_target target, uint32_t layer,
                   struct slu_target_shape *ret_shape)
{
    struct meddler *meddler = arg;
    if (meddler->n_asked++ == 0) {
        lab_write(meddler->path, meddler->bytes, meddler->n);
    }
    meddler->base.shape(meddler->base.arg, target, layer, ret_shape);
}

/* A file that becomes another one, as long but larger in memory, between being measured and being
 * read, is refused: no more is taken of the share than was counted. */
Test(registry, changed_while_loading)
{
    struct shelf s;
    struct slu_err err = {0};
    size_t n, n_larger;
    shelf_open(&s, 1);
    slu_registry_destroy(s.registry);
    for (uint32_t rank = 1; rank <= 2; rank++) { /* a page for each expert's block, both times */
        lab_adapter(
            &s.lab,
            &(struct slu_adapter_synth_params){.rank = rank, .targets = SLU_ADAPTER_EXPERTS},
            lab_path(&s.lab, rank == 1 ? "small.sla" : "larger.sla"));
    }
    put(&s, "idle.sla", 1000, 1);
    char path[128];
    snprintf(path, sizeof path, "%s", lab_path(&s.lab, "small.sla"));
    uint8_t *small = lab_read(path, &n),
            *larger = lab_read(lab_path(&s.lab, "larger.sla"), &n_larger);
    cr_assert_eq(n, n_larger);
    struct meddler meddler = {.base = s.base, .path = path, .bytes = larger, .n = n, .n_asked = 1};
    struct slu_base base = s.base;
    base.shape = meddle;
    base.arg = &meddler;
    struct slu_adapter *idle = lab_load(lab_path(&s.lab, "idle.sla"), &s.base, s.ledger);
    uint64_t idle_bytes = idle->info.memory_bytes;
    slu_adapter_close(idle);
    /* Once the idle one has left there is room for what it has become. */
    cr_assert_gt(idle_bytes, slu_adapter_staging_bytes() + (256 << 10));
    slu_ledger_destroy(s.ledger);
    s.ledger = slu_ledger_create(idle_bytes + slu_adapter_staging_bytes() + 4096);
    struct slu_registry_params params = {
        .ledger = s.ledger, .base = &base, .bytes_max = 4 * idle_bytes, .dir = s.lab.dir};
    cr_assert_eq(slu_registry_create(&params, &s.registry, &err), 0);
    drop(&s, get(&s, "idle"));
    cr_assert_eq(slu_ledger_reserve(s.ledger, SLU_ACCOUNT_KV, slu_adapter_staging_bytes(), &err),
                 0);

    /* The first attempt finds no room in the ledger; by the second the file is the other one. */
    const struct slu_adapter *adapter = NULL;
    meddler.n_asked = 0;
    int rc = slu_registry_acquire(s.registry, "small", 0, &adapter, &err);
    cr_assert_gt(meddler.n_asked, 1);
    lab_expect_refusal(rc, &err, SLU_EIO, "changed while it was loaded");
    slu_ledger_release(s.ledger, SLU_ACCOUNT_KV, slu_adapter_staging_bytes());
    cr_assert_eq(slu_ledger_used(s.ledger), 0);
    adapter = get(&s, "small"); /* as it is now */
    struct slu_registry_stats stats;
    slu_registry_stats(s.registry, &stats);
    cr_assert_eq(stats.used_bytes, slu_ledger_used(s.ledger));
    drop(&s, adapter);
    free(small);
    free(larger);
    shelf_close(&s);
}

/* A file that was replaced is loaded anew, once nobody holds the old one. */
Test(registry, changed_file)
{
    struct shelf s;
    shelf_open(&s, 2);
    const struct slu_adapter *a = get(&s, "a");
    float before = ((const float *)(const void *)a->loras[0].a.data)[0];
    put(&s, "a.sla", 4, 9);
    cr_assert_eq(get(&s, "a"), a);
    drop(&s, a);
    cr_assert_eq(((const float *)(const void *)a->loras[0].a.data)[0], before);
    drop(&s, a);
    a = get(&s, "a");
    cr_assert_neq(((const float *)(const void *)a->loras[0].a.data)[0], before);
    cr_assert_eq(stats_of(&s).n_resident, 1);
    drop(&s, a);
    shelf_close(&s);
}

struct crowd {
    struct shelf *shelf;
    const char *what;
    pthread_barrier_t barrier;
    atomic_uint n_failed;
    const struct slu_adapter *_Atomic first;
};

static void *acquire_one(void *arg)
{
    struct crowd *crowd = arg;
    const struct slu_adapter *adapter = NULL;
    struct slu_err err = {0};
    pthread_barrier_wait(&crowd->barrier);
    int rc = slu_registry_acquire(crowd->shelf->registry, crowd->what, 0, &adapter, &err);
    if (rc < 0) {
        cr_assert(err.code == rc && err.text[0]);
        atomic_fetch_add(&crowd->n_failed, 1);
    } else {
        const struct slu_adapter *none = NULL;
        if (!atomic_compare_exchange_strong(&crowd->first, &none, adapter)) {
            cr_assert_eq(none, adapter);
        }
    }
    return NULL;
}

#define CROWD 8

static unsigned run_crowd(struct shelf *s, const char *what)
{
    struct crowd crowd = {.shelf = s, .what = what};
    pthread_t threads[CROWD];
    pthread_barrier_init(&crowd.barrier, NULL, CROWD);
    for (unsigned i = 0; i < CROWD; i++) {
        cr_assert_eq(pthread_create(&threads[i], NULL, acquire_one, &crowd), 0);
    }
    for (unsigned i = 0; i < CROWD; i++) {
        pthread_join(threads[i], NULL);
    }
    pthread_barrier_destroy(&crowd.barrier);
    for (unsigned i = 0; i < CROWD - crowd.n_failed; i++) {
        drop(s, crowd.first);
    }
    return crowd.n_failed;
}

/* Many who ask for one adapter at once get one load; or all of them the refusal. */
Test(registry, crowd)
{
    struct shelf s;
    shelf_open(&s, 1);
    cr_assert_eq(run_crowd(&s, "a"), 0);
    struct slu_registry_stats stats = stats_of(&s);
    cr_assert(stats.loads == 1 && stats.hits == CROWD - 1 && stats.n_held == 0);
    lab_write(lab_path(&s.lab, "bad.sla"), "x", 1);
    cr_assert_eq(run_crowd(&s, "bad"), CROWD);
    stats = stats_of(&s);
    cr_assert(stats.loads == 1 && stats.n_resident == 1);
    shelf_close(&s);
}

struct pair_of {
    struct shelf *shelf;
    pthread_barrier_t barrier;
    _Atomic unsigned n_failed;
};

static void acquire_and_drop(struct pair_of *pair, const char *what)
{
    const struct slu_adapter *adapter = NULL;
    pthread_barrier_wait(&pair->barrier);
    if (slu_registry_acquire(pair->shelf->registry, what, 0, &adapter, NULL) < 0) {
        pair->n_failed++;
    }
    pthread_barrier_wait(&pair->barrier);
    if (adapter) {
        drop(pair->shelf, adapter);
    }
}

static void *acquire_second(void *arg)
{
    acquire_and_drop(arg, "b");
    return NULL;
}

/* Two that are wanted at once fit where they would one after the other: the ledger has room for
 * what one load takes beside them. */
Test(registry, loads_in_turn)
{
    struct shelf s;
    shelf_open(&s, 2);
    put(&s, "a.sla", 64, 1); /* that take some time */
    put(&s, "b.sla", 64, 2);
    struct slu_adapter *a = lab_load(lab_path(&s.lab, "a.sla"), &s.base, s.ledger);
    uint64_t each = a->charged_bytes + a->info.extra_bytes;
    slu_adapter_close(a);
    slu_registry_destroy(s.registry);
    slu_ledger_destroy(s.ledger);
    for (int round = 0; round < 20; round++) {
        s.ledger = slu_ledger_create(2 * each + slu_adapter_staging_bytes());
        struct slu_registry_params params = {
            .ledger = s.ledger, .base = &s.base, .bytes_max = 2 * each, .dir = s.lab.dir};
        cr_assert_eq(slu_registry_create(&params, &s.registry, NULL), 0);
        struct pair_of pair = {.shelf = &s};
        pthread_t thread;
        pthread_barrier_init(&pair.barrier, NULL, 2);
        cr_assert_eq(pthread_create(&thread, NULL, acquire_second, &pair), 0);
        acquire_and_drop(&pair, "a");
        pthread_join(thread, NULL);
        pthread_barrier_destroy(&pair.barrier);
        cr_assert_eq(pair.n_failed, 0);
        slu_registry_destroy(s.registry);
        slu_ledger_destroy(s.ledger);
    }
    lab_close(&s.lab);
}
