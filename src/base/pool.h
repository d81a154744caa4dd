/*
 * The compute pool: a fixed gang of threads, the caller being thread 0, that runs one function at
 * a time on all of them. Workers spin briefly between runs, since the next matrix product is
 * usually microseconds away, and then sleep.
 *
 * A pool of as many threads as there are CPUs keeps each to a CPU of its own. Left alone, Linux
 * often puts two threads that wake each other on one CPU, and the other idles: decoding from flash
 * took 8 % longer on a 2-core VM. With fewer threads it is the scheduler who knows which CPUs are
 * the fast ones.
 *
 * Thread safety: one thread at a time may call slu_pool_run on a pool.
 */
#ifndef SLU_BASE_POOL_H
#define SLU_BASE_POOL_H

#include <stddef.h>

#include "base/err.h"

struct slu_pool;

/* Called once on every thread, thread in [0, n_threads). */
typedef void (*slu_pool_fn)(void *arg, unsigned thread, unsigned n_threads);

/* A product of many tokens takes some 1.2 MiB of its thread's stack. Workers have this
 * much, however little a system gives to threads. */
#define SLU_STACK_BYTES ((size_t)2 << 20)

/* n_threads 0 means one for each online CPU; at most SLU_POOL_THREADS_MAX. */
#define SLU_POOL_THREADS_MAX 64
int slu_pool_create(unsigned n_threads, struct slu_pool **ret_pool, struct slu_err *err);

/* Joins the threads. NULL is fine. */
void slu_pool_destroy(struct slu_pool *pool);

/* CPUs that this process may run on, or whose time its control groups give it in all, if that is
 * less; at least 1. */
unsigned slu_pool_cpus(void);

unsigned slu_pool_threads(const struct slu_pool *pool);

/* Between enter and leave the calling thread keeps to thread 0's CPU, if the pool's threads do;
 * leave gives it back the CPUs that it had. */
void slu_pool_enter(struct slu_pool *pool);
void slu_pool_leave(struct slu_pool *pool);

/* Returns when fn has returned on every thread; what they wrote is then visible to the caller. */
void slu_pool_run(struct slu_pool *pool, slu_pool_fn fn, void *arg);

/* The even share [*ret_lo, *ret_hi) of n items for a thread, in multiples of grain. */
void slu_pool_share(unsigned n, unsigned grain, unsigned thread, unsigned n_threads,
                    unsigned *ret_lo, unsigned *ret_hi);

#endif
