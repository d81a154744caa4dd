/*
 * What the device could deliver while it has nothing to do: between the last read that a round
 * needs and the beginning of the next round. Told from rounds that went before, by fading sums. As
 * long as guesses keep within it, a wrong one delays nobody's read; a slow device has hardly such
 * time, and gets none.
 *
 * Time is the caller's, in ns of any monotonic clock. Thread safety: none.
 */
#ifndef SLU_EXPERTS_PACE_H
#define SLU_EXPERTS_PACE_H

#include <stdbool.h>
#include <stdint.h>

/* Zeroed: nothing is known, and there is room for nothing. */
struct slu_pace {
    uint64_t begin_ns, idle_since_ns; /* of the round; of the device, as far as rounds need it */
    bool is_watched;                  /* this round, and the time until the next, count */
    uint32_t n_early;                 /* blocks yet to arrive that were on their way at begin */
    uint32_t n_arrived;               /* since begin, without those */
    uint32_t n_needed;                /* of them, until the round needed no other */
    double read_ns, n_read;           /* while rounds waited for blocks; blocks that came */
    double idle_ns, n_idle;           /* between rounds; how often */
};

/* n_in_flight: reads that are on their way already. */
void slu_pace_begin(struct slu_pace *pace, uint64_t now_ns, uint32_t n_in_flight);
/* A block was read, whoever wanted it; is_last: the round needs no other. */
void slu_pace_arrive(struct slu_pace *pace, uint64_t now_ns, bool is_last);
/* Between begin and the next: whether the round, and the stretch after it, are like those that will
 * be asked about. Not so until it is said, and not before the first round. */
void slu_pace_watch(struct slu_pace *pace, bool is_watched);
/* Blocks that had better be read between two rounds, where `share` of them, 0 to 1, come true:
 * those that fit; none where only a single one does, and not surely; and one more where so much of
 * it fits that it is worth the risk. */
uint32_t slu_pace_blocks(const struct slu_pace *pace, float share);

#endif
