#include "experts/pace.h"

/* So much of its weight what a round adds keeps with each round after it. */
#define KEPT 0.98
/* A longer stretch counts as this: it was the user's, or the process was stopped. */
#define IDLE_MOST_NS 100000000u
/* Where fewer blocks fit on average, it depends on how many come true whether one is read.
 * Stretches differ: many of them have no room for one. A wrong guess then delays a round by more
 * than the right ones can win; and under a rate limit that saves up idle time it costs its whole
 * time. Measured: docs/benchmarks/routing.md. */
#define BLOCKS_LEAST 1.5
/* What a wrong guess of a block of which only a part fits is reckoned to cost, in what a right one
 * of a block that fits entirely wins. */
#define WRONG_COST 6

void slu_pace_begin(struct slu_pace *pace, uint64_t now_ns, uint32_t n_in_flight)
{
    if (pace->is_watched) {
        uint64_t idle_ns = now_ns - pace->idle_since_ns;
        idle_ns = idle_ns < IDLE_MOST_NS ? idle_ns : IDLE_MOST_NS;
        pace->idle_ns = KEPT * pace->idle_ns + (double)idle_ns;
        pace->n_idle = KEPT * pace->n_idle + 1;
        if (pace->n_needed > 0) {
            pace->read_ns = KEPT * pace->read_ns + (double)(pace->idle_since_ns - pace->begin_ns);
            pace->n_read = KEPT * pace->n_read + pace->n_needed;
        }
    }
    pace->is_watched = false;
    pace->begin_ns = now_ns;
    pace->idle_since_ns = now_ns; /* unless there is something to read */
    pace->n_early = n_in_flight;
    pace->n_arrived = 0;
    pace->n_needed = 0;
}

void slu_pace_arrive(struct slu_pace *pace, uint64_t now_ns, bool is_last)
{
    if (pace->n_early > 0) {
        pace->n_early--;
    } else {
        pace->n_arrived++;
    }
    if (is_last) {
        pace->idle_since_ns = now_ns;
        pace->n_needed = pace->n_arrived;
    }
}

void slu_pace_watch(struct slu_pace *pace, bool is_watched)
{
    pace->is_watched = is_watched && pace->begin_ns > 0;
}

uint32_t slu_pace_blocks(const struct slu_pace *pace, float share)
{
    if (pace->n_idle == 0 || pace->read_ns == 0) {
        return 0;
    }
    double n = pace->idle_ns / pace->n_idle * (pace->n_read / pace->read_ns);
    double with_part = n + 1 - WRONG_COST * (1 - (double)share);
    n = n < BLOCKS_LEAST ? 0 : n;
    n = n < with_part ? with_part : n;
    return n < UINT32_MAX ? (uint32_t)n : UINT32_MAX;
}
