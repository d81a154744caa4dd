#include "base/pool.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cgroup.h"
#include "base/clock.h"

/*
 * A run is a new generation. The caller writes fn and arg, then bumps `generation`; the workers,
 * who remember the last one that they served, see it change, run, and count `n_running` down; the
 * caller, having done its own share, waits for zero.
 *
 *   caller   fn, arg, n_running | generation+1 (release) | fn(0) | until n_running == 0 (acquire)
 *   worker        until generation changes (acquire) | fn(i) | n_running-1 (release)
 *
 * Whoever waits spins for a while and then sleeps in a futex on the very word that it waits for.
 * A waker needs the system call only if somebody sleeps. Each side first writes its own word and
 * then reads the other's (the sleeper: n_sleeping, then the futex compares the word; the waker:
 * the word, then n_sleeping), both sequentially consistent, so that at least one of them sees the
 * other and no wake-up is lost.
 */

/* Longer than one thread waits for another's last rows or block, some 60 us, and than the gap
 * between two matrix products of a layer; shorter than a scheduler's tick. To be woken takes 10 to
 * 40 us. */
#define SPIN_NS         150000
#define SPIN_NS_CROWDED 2000 /* threads outnumber CPUs: spinning keeps others from working */
#define SPINS_PER_CLOCK 64

struct worker {
    struct slu_pool *pool;
    unsigned thread;
    pthread_t id;
};

struct slu_pool {
    unsigned n_threads;
    int64_t spin_ns;
    bool has_cpus;          /* each thread keeps to one of `cpus` */
    cpu_set_t cpus, before; /* before: the caller's, between enter and leave */
    bool is_moved;

    /* Written by the caller before it bumps generation, read by workers after they saw it. */
    slu_pool_fn fn;
    void *arg;
    bool is_stopping;

    /* Each on its own cache line: the workers poll the first while they count down the second. */
    _Alignas(64) _Atomic uint32_t generation;
    _Atomic uint32_t n_workers_sleeping;
    _Alignas(64) _Atomic uint32_t n_running;
    _Atomic uint32_t n_callers_sleeping;

    struct worker workers[]; /* n_threads - 1: of threads 1 and up */
};

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Sleeps while *word is `value`; may wake for no reason. */
static void futex_sleep(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Until *word is `value` (is_equal) or is not. Acquire: what was written before the word was
 * changed is visible on return. */
static void wait_for(_Atomic uint32_t *word, uint32_t value, bool is_equal,
                     _Atomic uint32_t *n_sleeping, int64_t spin_ns)
{
    int64_t end_ns = (int64_t)slu_now_ns() + spin_ns;
    do {
        for (int i = 0; i < SPINS_PER_CLOCK; i++) {
            if ((atomic_load_explicit(word, memory_order_acquire) == value) == is_equal) {
                return;
            }
            relax();
        }
    } while ((int64_t)slu_now_ns() < end_ns);

    /* Sequentially consistent; partner: the load in publish. */
    atomic_fetch_add_explicit(n_sleeping, 1, memory_order_seq_cst);
    for (;;) {
        uint32_t seen = atomic_load_explicit(word, memory_order_seq_cst);
        if ((seen == value) == is_equal) {
            break;
        }
        futex_sleep(word, seen);
    }
    atomic_fetch_sub_explicit(n_sleeping, 1, memory_order_relaxed);
}

/* After *word was changed sequentially consistently: wakes who sleeps on it. Partner: the
 * increment in wait_for. */
static void publish(_Atomic uint32_t *word, _Atomic uint32_t *n_sleeping)
{
    if (atomic_load_explicit(n_sleeping, memory_order_seq_cst) > 0) {
        futex_wake_all(word);
    }
}

/* The calling thread keeps to the thread-th of the pool's CPUs. A refusal does no harm. */
static bool keep_to_cpu(const struct slu_pool *pool, unsigned thread)
{
    for (int cpu = 0; pool->has_cpus && cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &pool->cpus) && thread-- == 0) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            return sched_setaffinity(0, sizeof one, &one) == 0;
        }
    }
    return false;
}

static void *worker_main(void *arg)
{
    struct worker *worker = arg;
    struct slu_pool *pool = worker->pool;
    keep_to_cpu(pool, worker->thread);
    for (uint32_t served = 0;; served++) {
        wait_for(&pool->generation, served, false, &pool->n_workers_sleeping, pool->spin_ns);
        if (pool->is_stopping) {
            return NULL;
        }
        pool->fn(pool->arg, worker->thread, pool->n_threads);
        /* Releases what fn wrote; partner: the caller's wait_for in slu_pool_run. */
        if (atomic_fetch_sub_explicit(&pool->n_running, 1, memory_order_seq_cst) == 1) {
            publish(&pool->n_running, &pool->n_callers_sleeping);
        }
    }
}

/* Releases fn, arg and is_stopping to the workers; partner: the wait_for in worker_main. */
static void next_generation(struct slu_pool *pool)
{
    atomic_fetch_add_explicit(&pool->generation, 1, memory_order_seq_cst);
    publish(&pool->generation, &pool->n_workers_sleeping);
}

unsigned slu_pool_cpus(void)
{
    cpu_set_t set;
    long n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
    n = n > 0 ? n : sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t limit = slu_cgroup_cpus("");
    n = (uint64_t)n > limit ? (long)limit : n;
    return n > 0 ? (unsigned)n : 1;
}

static void join_workers(struct slu_pool *pool, unsigned n)
{
    pool->is_stopping = true;
    next_generation(pool);
    for (unsigned i = 0; i < n; i++) {
        pthread_join(pool->workers[i].id, NULL);
    }
}

/* Returns 0 or an errno; *ret_n workers were started in either case. */
static int start_workers(struct slu_pool *pool, unsigned *ret_n)
{
    *ret_n = 0;
    pthread_attr_t attr;
    size_t stack_bytes = 0;
    int e = pthread_attr_init(&attr);
    if (e != 0) {
        return e;
    }
    pthread_attr_getstacksize(&attr, &stack_bytes);
    if (stack_bytes < SLU_STACK_BYTES) {
        e = pthread_attr_setstacksize(&attr, SLU_STACK_BYTES);
    }
    /* Signals belong to the program's own threads: workers are born with all of them blocked. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (e == 0 && *ret_n < pool->n_threads - 1) {
        struct worker *worker = &pool->workers[*ret_n];
        worker->pool = pool;
        worker->thread = *ret_n + 1;
        e = pthread_create(&worker->id, &attr, worker_main, worker);
        *ret_n += e == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return e;
}

int slu_pool_create(unsigned n_threads, struct slu_pool **ret_pool, struct slu_err *err)
{
    unsigned n_cpus = slu_pool_cpus();
    if (n_threads > SLU_POOL_THREADS_MAX) {
        return slu_err_set(err, SLU_EINVAL, "%u threads are more than the %d allowed", n_threads,
                           SLU_POOL_THREADS_MAX);
    }
    if (n_threads == 0) {
        n_threads = n_cpus < SLU_POOL_THREADS_MAX ? n_cpus : SLU_POOL_THREADS_MAX;
    }
    size_t bytes = sizeof(struct slu_pool) + (n_threads - 1) * sizeof(struct worker);
    struct slu_pool *pool = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!pool) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for a pool of %u threads", n_threads);
    }
    memset(pool, 0, bytes);
    pool->n_threads = n_threads;
    pool->spin_ns = n_threads > n_cpus ? SPIN_NS_CROWDED : SPIN_NS;
    pool->has_cpus = n_threads > 1 && sched_getaffinity(0, sizeof pool->cpus, &pool->cpus) == 0 &&
                     n_threads == (unsigned)CPU_COUNT(&pool->cpus);

    unsigned n_started;
    int e = start_workers(pool, &n_started);
    if (e != 0) {
        join_workers(pool, n_started);
        free(pool);
        return slu_err_set(err, SLU_ENOMEM, "the system refuses thread %u of %u: %s", n_started + 1,
                           n_threads, strerror(e));
    }
    *ret_pool = pool;
    return 0;
}

void slu_pool_destroy(struct slu_pool *pool)
{
    if (!pool) {
        return;
    }
    join_workers(pool, pool->n_threads - 1);
    free(pool);
}

unsigned slu_pool_threads(const struct slu_pool *pool)
{
    return pool->n_threads;
}

void slu_pool_enter(struct slu_pool *pool)
{
    pool->is_moved = pool->has_cpus &&
                     sched_getaffinity(0, sizeof pool->before, &pool->before) == 0 &&
                     keep_to_cpu(pool, 0);
}

void slu_pool_leave(struct slu_pool *pool)
{
    if (pool->is_moved) {
        sched_setaffinity(0, sizeof pool->before, &pool->before);
    }
    pool->is_moved = false;
}

void slu_pool_run(struct slu_pool *pool, slu_pool_fn fn, void *arg)
{
    if (pool->n_threads == 1) {
        fn(arg, 0, 1);
        return;
    }
    pool->fn = fn;
    pool->arg = arg;
    /* Relaxed: published by the generation that follows. */
    atomic_store_explicit(&pool->n_running, pool->n_threads - 1, memory_order_relaxed);
    next_generation(pool);
    fn(arg, 0, pool->n_threads);
    wait_for(&pool->n_running, 0, true, &pool->n_callers_sleeping, pool->spin_ns);
}

void slu_pool_share(unsigned n, unsigned grain, unsigned thread, unsigned n_threads,
                    unsigned *ret_lo, unsigned *ret_hi)
{
    assert(grain > 0 && thread < n_threads);
    uint64_t n_grains = ((uint64_t)n + grain - 1) / grain;
    uint64_t lo = n_grains * thread / n_threads * grain;
    uint64_t hi = n_grains * (thread + 1) / n_threads * grain;
    *ret_lo = (unsigned)(lo < n ? lo : n);
    *ret_hi = (unsigned)(hi < n ? hi : n);
}
