/*
 * Time for intervals. Thread safety: pure.
 */
#ifndef SLU_BASE_CLOCK_H
#define SLU_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

/* ns of CLOCK_MONOTONIC. */
static inline uint64_t slu_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The same in seconds. */
static inline double slu_now_s(void)
{
    return 1e-9 * (double)slu_now_ns();
}

#endif
