/*
 * What the device could deliver while it has nothing to do: between the last read that a round
 * needs and the beginning of the next round. Told from rounds that went before, by fading sums.
 * Guesses that keep within it delay nobody's read, even where they are wrong: so they may be right
 * or wrong on a slow device too, which has hardly such time.
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
    bool is_watched;                  /* the time until the next round counts */
    uint32_t n_arrived;               /* blocks since begin */
    double read_ns, n_read;           /* while rounds waited for blocks; blocks that came */
    double idle_ns, n_idle;           /* between rounds; how often */
};

void slu_pace_begin(struct slu_pace *pace, uint64_t now_ns);
/* A block was read, whoever wanted it; is_last: the round needs no other. */
void slu_pace_arrive(struct slu_pace *pace, uint64_t now_ns, bool is_last);
/* In a round: whether the stretch from it to the next is like those that will be asked about. */
void slu_pace_watch(struct slu_pace *pace, bool is_watched);
/* Whole blocks that may be expected to be read between two rounds. */
uint32_t slu_pace_blocks(const struct slu_pace *pace);

#endif
