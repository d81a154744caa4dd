/*
 * The compute pool: a fixed gang of threads, the caller being thread 0, that runs one function at
 * a time on all of them. Workers spin briefly between runs, since the next matrix product is
 * usually microseconds away, and then sleep.
 *
 * Thread safety: one thread at a time may call slu_pool_run on a pool.
 */
#ifndef SLU_BASE_POOL_H
#define SLU_BASE_POOL_H

#include "base/err.h"

struct slu_pool;

/* Called once on every thread, thread in [0, n_threads). */
typedef void (*slu_pool_fn)(void *arg, unsigned thread, unsigned n_threads);

/* n_threads 0 means one for each online CPU; at most SLU_POOL_THREADS_MAX. */
#define SLU_POOL_THREADS_MAX 64
int slu_pool_create(unsigned n_threads, struct slu_pool **ret_pool, struct slu_err *err);

/* Joins the threads. NULL is fine. */
void slu_pool_destroy(struct slu_pool *pool);

/* CPUs that this process may run on, at least 1. */
unsigned slu_pool_cpus(void);

unsigned slu_pool_threads(const struct slu_pool *pool);

/* Returns when fn has returned on every thread; what they wrote is then visible to the caller. */
void slu_pool_run(struct slu_pool *pool, slu_pool_fn fn, void *arg);

/* The even share [*ret_lo, *ret_hi) of n items for a thread, in multiples of grain. */
void slu_pool_share(unsigned n, unsigned grain, unsigned thread, unsigned n_threads,
                    unsigned *ret_lo, unsigned *ret_hi);

#endif
