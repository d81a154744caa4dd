/*
 * Slots that come and go: in memory that somebody lends, who wants it back piece by piece from its
 * start. Slots are counted from its end, so that the last ones are the first to leave.
 *
 *     slab      | 0 | 1 | 2 | ... | n_own - 1 |
 *     borrowed  owner's ... | n_slots - 1 | ... | n_own + 1 | n_own |  borrowed_end
 *
 * With nothing borrowed, the last slots of the slab may go as well, for whom their memory is lent.
 *
 * Blocks are put into a borrowed slot when there is no other, and into the one that stays longest.
 * What has to leave takes the place of the blocks that are worth least.
 *
 * Memory that was never used has to be provided by the system, which on a virtual machine may take
 * seconds a GiB. It is worth that in the long run, but no single token should wait for all of it:
 * so slots are opened a few at a time.
 */
#include <assert.h>
#include <stdint.h>
#include <string.h>

#include "experts/stream_state.h"

#define OPENED_BYTES ((size_t)16 << 20) /* at a call; one slot at least */

/* No slot from n on is handed out any more, nor comes back to the free ones. */
static void close_slots_locked(struct slu_stream *stream, uint32_t n)
{
    for (int is_small = 0; is_small < 2; is_small++) {
        struct stream_stack *free_slots = &stream->free_slots[is_small];
        uint32_t n_left = 0;
        for (uint32_t i = 0; i < free_slots->n; i++) {
            if (free_slots->slots[i] < n) {
                free_slots->slots[n_left++] = free_slots->slots[i];
            }
        }
        free_slots->n = n_left;
    }
    stream->n_slots = n;
}

static bool is_read_into_locked(const struct slu_stream *stream, uint32_t lo, uint32_t hi)
{
    for (uint32_t slot = lo; slot < hi; slot++) {
        uint32_t block = stream->slot_blocks[slot];
        if (block != SLU_STREAM_NONE && stream->blocks[block].state == BLOCK_READING) {
            return true;
        }
    }
    return false;
}

static bool has_block_locked(const struct slu_stream *stream, uint32_t slot, bool is_small)
{
    return stream->slot_blocks[slot] != SLU_STREAM_NONE &&
           slu_stream_is_small_slot(stream, slot) == is_small;
}

/* Makes as many free slots of a size as there are residents in closed ones, lo to hi - 1, by
 * evicting from both. */
static void make_room_locked(struct slu_stream *stream, uint32_t lo, uint32_t hi, bool is_small)
{
    uint32_t n = 0;
    for (uint32_t slot = lo; slot < hi; slot++) {
        n += has_block_locked(stream, slot, is_small);
    }
    /* Each that goes is one less to be moved, or leaves a slot to move one to. */
    for (uint32_t i = stream->free_slots[is_small].n; i < n; i++) {
        if (!slu_stream_evict_least_locked(stream, is_small)) {
            while (!has_block_locked(stream, lo, is_small)) {
                lo++;
            }
            slu_stream_evict_locked(stream, lo);
        }
    }
}

/* Between rounds a block in a slot is resident, or a guess that is being read or has arrived. */
static void empty_slots_locked(struct slu_stream *stream, uint32_t lo, uint32_t hi)
{
    while (is_read_into_locked(stream, lo, hi)) {
        slu_stream_reap_locked(stream, true);
    }
    for (uint32_t n = stream->guessed.n; n > 0; n--) {
        uint32_t block = slu_stream_pop_locked(&stream->guessed);
        if (stream->blocks[block].slot >= lo) {
            slu_stream_drop_locked(stream, block);
        } else {
            slu_stream_push_locked(&stream->guessed, block);
        }
    }
    make_room_locked(stream, lo, hi, false);
    make_room_locked(stream, lo, hi, true);
    for (uint32_t slot = lo; slot < hi; slot++) {
        if (stream->slot_blocks[slot] != SLU_STREAM_NONE) {
            slu_stream_move_locked(stream, slot);
        }
    }
}

/* Under all that are free, the last one lowest. */
static void open_slots_locked(struct slu_stream *stream, uint32_t n)
{
    const struct slu_slots *slots = &stream->sizes.slots;
    uint32_t n_before = stream->n_slots;
    uint32_t n_small = slu_slots_small(slots, n) - slu_slots_small(slots, n_before);
    uint32_t n_more[2] = {n - n_before - n_small, n_small};
    for (int is_small = 0; is_small < 2; is_small++) {
        struct stream_stack *free_slots = &stream->free_slots[is_small];
        memmove(free_slots->slots + n_more[is_small], free_slots->slots,
                free_slots->n * sizeof *free_slots->slots);
        free_slots->n += n_more[is_small];
    }
    stream->n_slots = n;
    for (uint32_t slot = n_before; slot < n; slot++) {
        bool is_small = slu_stream_is_small_slot(stream, slot);
        stream->free_slots[is_small].slots[--n_more[is_small]] = slot;
    }
}

/* With none left: what is borrowed next may lie elsewhere. */
static void forget_memory_locked(struct slu_stream *stream)
{
    for (uint32_t slot = stream->sizes.n_slots; slot < stream->sizes.n_slots_max; slot++) {
        stream->is_slot_fresh[slot] = !stream->touches_slots;
    }
}

static void resize_locked(struct slu_stream *stream, uint32_t n)
{
    uint32_t n_before = stream->n_slots;
    if (n < n_before) {
        close_slots_locked(stream, n);
        empty_slots_locked(stream, n, n_before);
    } else {
        open_slots_locked(stream, n);
    }
    if (n == stream->sizes.n_slots) {
        forget_memory_locked(stream);
    }
    if (stream->policy->resize) {
        stream->policy->resize(stream->policy, n);
    }
}

uint32_t slu_stream_borrow(struct slu_stream *stream, void *memory, size_t bytes)
{
    const struct stream_sizes *sizes = &stream->sizes;
    size_t unaligned = ((uintptr_t)memory + bytes) % SLU_IO_ALIGN;
    size_t usable = bytes > unaligned ? bytes - unaligned : 0;
    uint32_t n_most = sizes->n_slots_max - sizes->n_slots;
    uint32_t n_fit = slu_slots_fit(&sizes->slots, sizes->n_slots, usable, n_most);
    uint32_t n_opened = (uint32_t)(OPENED_BYTES / sizes->slots.large) + 1;

    pthread_mutex_lock(&stream->lock);
    assert(!stream->is_round && stream->n_slots >= sizes->n_slots);
    uint32_t n_before = stream->n_slots - sizes->n_slots;
    if (!stream->touches_slots && n_fit > n_before + n_opened) {
        n_fit = n_before + n_opened;
    }
    if (n_fit > 0) {
        unsigned char *end = (unsigned char *)memory + bytes - unaligned;
        assert(n_before == 0 || stream->borrowed_end == end);
        stream->borrowed_end = end;
    }
    if (n_fit != n_before) { /* most tokens change nothing */
        resize_locked(stream, sizes->n_slots + n_fit);
    }
    pthread_mutex_unlock(&stream->lock);
    return n_fit;
}

void *slu_stream_lend(struct slu_stream *stream, size_t bytes)
{
    const struct stream_sizes *sizes = &stream->sizes;
    size_t slots_bytes = slu_slots_bytes(&sizes->slots, 0, sizes->n_slots);
    assert(bytes <= slots_bytes);
    uint32_t n = slu_slots_fit(&sizes->slots, 0, slots_bytes - bytes, sizes->n_slots);
    assert(n >= slu_stream_slots_least(sizes));

    pthread_mutex_lock(&stream->lock);
    assert(!stream->is_round && stream->n_slots <= sizes->n_slots);
    if (n != stream->n_slots) {
        resize_locked(stream, n);
    }
    pthread_mutex_unlock(&stream->lock);
    return bytes > 0 ? stream->slab + slu_slots_bytes(&sizes->slots, 0, n) : NULL;
}
