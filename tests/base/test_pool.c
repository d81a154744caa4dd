#include <criterion/criterion.h>

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/pool.h"

struct seen {
    unsigned char calls[SLU_POOL_THREADS_MAX];
    unsigned n_threads;
};

static void see(void *arg, unsigned thread, unsigned n_threads)
{
    struct seen *seen = arg;
    seen->calls[thread]++;
    if (thread == 0) {
        seen->n_threads = n_threads;
    }
}

struct where {
    cpu_set_t cpus[SLU_POOL_THREADS_MAX];
};

static void look_where(void *arg, unsigned thread, unsigned n_threads)
{
    struct where *where = arg;
    (void)n_threads;
    sched_getaffinity(0, sizeof where->cpus[thread], &where->cpus[thread]);
}

/* More of the stack than products take, less than a pool promises. */
static void use_stack(void *arg, unsigned thread, unsigned n_threads)
{
    volatile char stack[SLU_STACK_BYTES / 4 * 3];
    for (size_t i = 0; i < sizeof stack; i += 1024) {
        stack[sizeof stack - 1 - i] = 1;
    }
    see(arg, thread, n_threads);
}

/* Workers may use what SLU_STACK_BYTES says, also where a system gives its threads less. */
Test(pool, has_room_on_its_stacks)
{
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    cr_assert_eq(pthread_attr_setstacksize(&attr, 256 << 10), 0);
    cr_assert_eq(pthread_setattr_default_np(&attr), 0);
    struct slu_pool *pool;
    struct slu_err err = {0};
    cr_assert_eq(slu_pool_create(2, &pool, &err), 0, "%s", err.text);
    struct seen seen = {0};
    slu_pool_run(pool, use_stack, &seen);
    cr_assert_eq(seen.calls[1], 1);
    slu_pool_destroy(pool);
}

/* With a thread for each CPU, none shares one with another between enter and leave, after which the
 * caller may run where it could before. */
Test(pool, keeps_threads_apart)
{
    cpu_set_t before, after;
    struct slu_pool *pool;
    struct where where;
    cr_assert_eq(sched_getaffinity(0, sizeof before, &before), 0);
    cr_assert_eq(slu_pool_create(0, &pool, NULL), 0);
    unsigned n = slu_pool_threads(pool);
    slu_pool_enter(pool);
    slu_pool_run(pool, look_where, &where);
    slu_pool_leave(pool);
    for (unsigned t = 0; t < n && n > 1 && n == (unsigned)CPU_COUNT(&before); t++) {
        cr_assert_eq(CPU_COUNT(&where.cpus[t]), 1);
        for (unsigned other = 0; other < t; other++) {
            cr_assert_not(CPU_EQUAL(&where.cpus[t], &where.cpus[other]));
        }
    }
    cr_assert_eq(sched_getaffinity(0, sizeof after, &after), 0);
    cr_assert(CPU_EQUAL(&before, &after));
    slu_pool_destroy(pool);
}

/* Each thread runs the function exactly once a run, and what it wrote is visible afterwards, at
 * any number of threads. */
Test(pool, runs_once_on_each)
{
    static const unsigned sizes[] = {1, 2, 3, 7, SLU_POOL_THREADS_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        struct slu_pool *pool;
        struct slu_err err;
        cr_assert_eq(slu_pool_create(sizes[i], &pool, &err), 0);
        cr_assert_eq(slu_pool_threads(pool), sizes[i]);
        for (int run = 0; run < 50; run++) {
            struct seen seen = {0};
            slu_pool_run(pool, see, &seen);
            cr_assert_eq(seen.n_threads, sizes[i]);
            for (unsigned t = 0; t < SLU_POOL_THREADS_MAX; t++) {
                cr_assert_eq(seen.calls[t], t < sizes[i]);
            }
        }
        slu_pool_destroy(pool);
    }
}

static void nap_by_turns(void *arg, unsigned thread, unsigned n_threads)
{
    unsigned run = *(unsigned *)arg;
    if (run % n_threads == thread) {
        nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
    }
}

/* No wake-up is lost when caller and workers fall asleep in turn. */
Test(pool, wakes_sleepers)
{
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(3, &pool, NULL), 0);
    for (unsigned run = 0; run < 200; run++) {
        slu_pool_run(pool, nap_by_turns, &run);
        if (run % 4 == 0) {
            nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
        }
    }
    struct seen seen = {0};
    slu_pool_run(pool, see, &seen);
    cr_assert_eq(seen.calls[2], 1);
    slu_pool_destroy(pool);
}

/* Zero threads means some, and too many are refused. */
Test(pool, checks_its_size)
{
    struct slu_pool *pool;
    struct slu_err err;
    cr_assert_eq(slu_pool_create(SLU_POOL_THREADS_MAX + 1, &pool, &err), SLU_EINVAL);
    cr_assert_not_null(strstr(err.text, "65"), "%s", err.text);
    cr_assert_eq(slu_pool_create(0, &pool, &err), 0);
    cr_assert_geq(slu_pool_threads(pool), 1);
    slu_pool_destroy(pool);
    slu_pool_destroy(NULL);
}

/* Shares follow each other without a gap from 0 to n, start at multiples of the grain, and differ
 * by a grain at most. */
Test(pool, shares_evenly)
{
    static const unsigned ns[] = {0, 1, 5, 63, 64, 65, 1000, 4000000000u};
    static const unsigned grains[] = {1, 4, 64};
    for (size_t i = 0; i < sizeof ns / sizeof ns[0]; i++) {
        for (size_t g = 0; g < sizeof grains / sizeof grains[0]; g++) {
            for (unsigned n_threads = 1; n_threads <= 9; n_threads++) {
                unsigned at = 0, least = ~0u, most = 0;
                for (unsigned t = 0; t < n_threads; t++) {
                    unsigned lo, hi;
                    slu_pool_share(ns[i], grains[g], t, n_threads, &lo, &hi);
                    cr_assert_eq(lo, at);
                    cr_assert(lo % grains[g] == 0 || lo == ns[i]);
                    cr_assert_geq(hi, lo);
                    at = hi;
                    unsigned n_grains = (unsigned)(((uint64_t)hi - lo + grains[g] - 1) / grains[g]);
                    least = n_grains < least ? n_grains : least;
                    most = n_grains > most ? n_grains : most;
                }
                cr_assert_eq(at, ns[i]);
                cr_assert_leq(most - least, 1);
            }
        }
    }
}
