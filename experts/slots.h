/*
 * How a cache's slots of one or two sizes lie in memory. Where a model's layers have blocks of two
 * sizes, as the K-quants' mixes do, slots for the larger ones alone would leave a part of each
 * smaller block's slot empty. Small slots and large ones are mixed evenly, in the proportion of the
 * blocks, so that any stretch of slots has about its share of both.
 *
 * Thread safety: pure.
 */
#ifndef SLU_EXPERTS_SLOTS_H
#define SLU_EXPERTS_SLOTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct slu_slots {
    size_t large, small;    /* bytes, whole pages */
    uint32_t n_small, n_of; /* small ones among so many slots; n_small 0: all are large */
};

/* What a block takes of a slot: whole pages. Saturates at PTRDIFF_MAX / 4, less a page. */
size_t slu_slots_round(size_t bytes);

/* Whether blocks of so many bytes, which fit a large slot, lie in small ones. */
static inline bool slu_slots_is_small_block(const struct slu_slots *slots, size_t bytes)
{
    return slots->n_small > 0 && bytes <= slots->small;
}

/* Small ones among the first n. */
static inline uint32_t slu_slots_small(const struct slu_slots *slots, uint32_t n)
{
    return slots->n_small ? (uint32_t)((uint64_t)n * slots->n_small / slots->n_of) : 0;
}

static inline bool slu_slots_is_small(const struct slu_slots *slots, uint32_t slot)
{
    return slu_slots_small(slots, slot + 1) > slu_slots_small(slots, slot);
}

/* What slots lo to hi - 1 take; saturates at PTRDIFF_MAX / 4. */
size_t slu_slots_bytes(const struct slu_slots *slots, uint32_t lo, uint32_t hi);

/* How many slots from lo on fit so many bytes, n_max at most. */
uint32_t slu_slots_fit(const struct slu_slots *slots, uint32_t lo, uint64_t bytes, uint32_t n_max);

#endif
