#include <assert.h>
#include <stdint.h>

#include "experts/stream_state.h"

/* No slot from n on is handed out any more, nor comes back to the free ones. */
static void close_slots_locked(struct slu_stream *stream, uint32_t n)
{
    uint32_t n_kept = 0;
    for (uint32_t i = 0; i < stream->n_free_slots; i++) {
        if (stream->free_slots[i] < n) {
            stream->free_slots[n_kept++] = stream->free_slots[i];
        }
    }
    stream->n_free_slots = n_kept;
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
    for (uint32_t slot = lo; slot < hi; slot++) {
        if (stream->slot_blocks[slot] != SLU_STREAM_NONE) {
            slu_stream_evict_locked(stream, slot);
        }
    }
}

static void open_slots_locked(struct slu_stream *stream, uint32_t n)
{
    for (uint32_t slot = stream->n_slots; slot < n; slot++) {
        stream->free_slots[stream->n_free_slots++] = slot;
    }
    stream->n_slots = n;
}

void slu_stream_borrow(struct slu_stream *stream, void *memory, size_t bytes)
{
    const struct stream_sizes *sizes = &stream->sizes;
    size_t unaligned = ((uintptr_t)memory + bytes) % SLU_IO_ALIGN;
    unsigned char *end = memory ? (unsigned char *)memory + bytes - unaligned : NULL;
    size_t n_fit = bytes > unaligned ? (bytes - unaligned) / sizes->slot_bytes : 0;
    size_t n_more = sizes->n_slots_max - sizes->n_slots;
    uint32_t n = sizes->n_slots + (uint32_t)(n_fit < n_more ? n_fit : n_more);

    pthread_mutex_lock(&stream->lock);
    assert(!stream->is_round);
    uint32_t n_before = stream->n_slots;
    if (n_before == sizes->n_slots) {
        stream->borrowed_end = end;
    }
    assert(n == sizes->n_slots || stream->borrowed_end == end);
    if (n < n_before) {
        close_slots_locked(stream, n);
        empty_slots_locked(stream, n, n_before);
    } else {
        open_slots_locked(stream, n);
    }
    if (n != n_before && stream->policy->resize) {
        stream->policy->resize(stream->policy, n);
    }
    stream->stats.n_slots = n;
    pthread_mutex_unlock(&stream->lock);
}
