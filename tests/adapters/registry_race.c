/*
 * Threads that take adapters from one registry and give them back, with room for fewer than there
 * are, while others ask for the statistics, replace a file, and ask for what can't be had. To be
 * run under the thread sanitizer, for which the framework of the other tests is not fit; so it is a
 * program of its own.
 *
 *     registry_race [ROUNDS]
 */
#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adapters/registry.h"
#include "adapters/sla.h"

#define N_ADAPTERS 8u
#define N_THREADS  4u
#define IN         64u
#define OUT        32u
#define RANK       4u

struct shared {
    struct slu_registry *registry;
    char dir[64];
    unsigned rounds;
    atomic_uint n_done, n_wrong, n_refused;
};

struct taker {
    struct shared *shared;
    unsigned seed;
};

static void shape_of(void *arg, enum slu_target target, uint32_t layer,
                     struct slu_target_shape *ret_shape)
{
    (void)arg, (void)layer;
    *ret_shape = (struct slu_target_shape){0};
    if (target == SLU_TARGET_Q) {
        *ret_shape = (struct slu_target_shape){IN, OUT, 1, 2};
    }
}

static void die(const struct slu_err *err)
{
    fprintf(stderr, "%s\n", err->text);
    exit(1);
}

/* Adapter i: all numbers are i. */
static void write_adapter(const char *dir, unsigned i)
{
    char path[128];
    struct slu_err err = {0};
    struct slu_sla_writer *writer;
    struct slu_mat_layout a, b;
    struct slu_sla_record record = {
        .target = SLU_TARGET_Q, .rank = RANK, .n = 1, .in = IN, .out = OUT, .scale = 1};
    float numbers[(IN + OUT) * RANK];
    for (unsigned k = 0; k < sizeof numbers / sizeof *numbers; k++) {
        numbers[k] = (float)i;
    }
    snprintf(path, sizeof path, "%s/%u.sla", dir, i);
    bool is_valid = slu_sla_layouts(&record, &a, &b);
    assert(is_valid && a.bytes + b.bytes == sizeof numbers);
    (void)is_valid;
    if (slu_sla_writer_create(path, &writer, &err) < 0 ||
        slu_sla_writer_pair(writer, &record, &err) < 0 ||
        slu_sla_writer_append(writer, numbers, sizeof numbers, &err) < 0 ||
        slu_sla_writer_finish(writer, &(struct slu_adapter_info){.is_hf_order = true}, &err) < 0) {
        die(&err);
    }
    slu_sla_writer_destroy(writer);
}

static void check(struct shared *shared, const struct slu_adapter *adapter, unsigned i)
{
    const struct slu_lora *pair = slu_adapter_find(adapter, 0, SLU_TARGET_Q);
    const float *a = (const float *)(const void *)pair->a.data;
    const float *b = (const float *)(const void *)pair->b.data;
    for (unsigned k = 0; k < IN * RANK; k++) {
        atomic_fetch_add(&shared->n_wrong, a[k] != (float)i);
    }
    for (unsigned k = 0; k < OUT * RANK; k++) {
        atomic_fetch_add(&shared->n_wrong, b[k] != (float)i);
    }
}

static void *take(void *arg)
{
    struct taker *taker = arg;
    struct shared *shared = taker->shared;
    const struct slu_adapter *held = NULL;
    unsigned held_i = 0;
    for (unsigned round = 0; round < shared->rounds; round++) {
        char name[24];
        unsigned i = (unsigned)rand_r(&taker->seed) % (N_ADAPTERS + 1);
        const struct slu_adapter *adapter;
        struct slu_err err = {0};
        snprintf(name, sizeof name, "%u", i); /* the last one is not there */
        int rc = slu_registry_acquire(shared->registry, name, 0, &adapter, &err);
        if (rc < 0) {
            /* Room for 4, and each thread holds up to 2 for a moment: that may be refused. */
            bool is_right = i == N_ADAPTERS ? rc == SLU_ENOENT : rc == SLU_EBUDGET;
            atomic_fetch_add(&shared->n_wrong, !is_right || err.text[0] == '\0');
            atomic_fetch_add(&shared->n_refused, 1);
            continue;
        }
        check(shared, adapter, i);
        if (held) {
            check(shared, held, held_i);
            slu_registry_release(shared->registry, held);
        }
        held = adapter;
        held_i = i;
    }
    slu_registry_release(shared->registry, held);
    atomic_fetch_add(&shared->n_done, 1);
    return NULL;
}

static void *disturb(void *arg)
{
    struct shared *shared = arg;
    struct slu_registry_stats stats;
    for (unsigned i = 0; atomic_load(&shared->n_done) < N_THREADS; i++) {
        slu_registry_stats(shared->registry, &stats);
        if (i % 4 == 0) {
            write_adapter(shared->dir, i / 4 % N_ADAPTERS); /* the same numbers, another file */
        }
        usleep(500);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    struct shared shared = {.rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 500};
    struct slu_err err = {0};
    const char *tmp = getenv("TMPDIR");
    snprintf(shared.dir, sizeof shared.dir, "%.40s/slu-race-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(shared.dir)) {
        perror(shared.dir);
        return 1;
    }
    for (unsigned i = 0; i < N_ADAPTERS; i++) {
        write_adapter(shared.dir, i);
    }
    struct slu_ledger *ledger = slu_ledger_create(0);
    const struct slu_base base = {.arch = "olmoe", .n_layers = 1, .shape = shape_of};
    char path[128];
    struct slu_source *source;
    struct slu_adapter_info info;
    snprintf(path, sizeof path, "%s/0.sla", shared.dir);
    if (slu_source_open_file(path, &source, &err) < 0 ||
        slu_adapter_inspect(source, &info, &err) < 0) {
        die(&err);
    }
    slu_source_destroy(source);
    struct slu_registry_params params = {
        .ledger = ledger, .base = &base, .bytes_max = 4 * info.memory_bytes, .dir = shared.dir};
    if (slu_registry_create(&params, &shared.registry, &err) < 0) {
        die(&err);
    }
    pthread_t threads[N_THREADS + 1];
    struct taker takers[N_THREADS];
    for (unsigned i = 0; i < N_THREADS; i++) {
        takers[i] = (struct taker){&shared, i + 1};
        pthread_create(&threads[i], NULL, take, &takers[i]);
    }
    pthread_create(&threads[N_THREADS], NULL, disturb, &shared);
    for (unsigned i = 0; i <= N_THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    struct slu_registry_stats stats;
    slu_registry_stats(shared.registry, &stats);
    slu_registry_destroy(shared.registry);
    bool is_right = shared.n_wrong == 0 && stats.n_held == 0 && slu_ledger_used(ledger) == 0 &&
                    stats.evictions > 0;
    printf("%llu loads, %llu hits, %llu evictions, %u refused, %u wrong\n",
           (unsigned long long)stats.loads, (unsigned long long)stats.hits,
           (unsigned long long)stats.evictions, shared.n_refused, shared.n_wrong);
    slu_ledger_destroy(ledger);
    for (unsigned i = 0; i < N_ADAPTERS; i++) {
        snprintf(path, sizeof path, "%s/%u.sla", shared.dir, i);
        unlink(path);
    }
    rmdir(shared.dir);
    return is_right ? 0 : 1;
}
