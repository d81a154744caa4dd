#include "experts/stream_state.h"

#include <assert.h>
#include <inttypes.h>
#include <string.h>

#include "base/clock.h"

/* Submitted and reaped at one go, between two takings of the lock. */
#define BATCH 8u

/* The last so many of a round's blocks wait until fewer than `depth` reads are in flight: what
 * arrives last is multiplied while nothing is read, so it had better be few. */
#define LAST_READS 2u

void slu_stream_push_locked(struct stream_queue *queue, uint32_t block)
{
    assert(queue->n < queue->n_max);
    queue->blocks[(queue->first + queue->n) % queue->n_max] = block;
    queue->n++;
}

uint32_t slu_stream_pop_locked(struct stream_queue *queue)
{
    assert(queue->n > 0);
    uint32_t block = queue->blocks[queue->first];
    queue->first = (queue->first + 1) % queue->n_max;
    queue->n--;
    return block;
}

unsigned char *slu_stream_slot(const struct slu_stream *stream, uint32_t slot)
{
    const struct stream_sizes *sizes = &stream->sizes;
    return slot < sizes->n_slots
               ? stream->slab + slu_slots_bytes(&sizes->slots, 0, slot)
               : stream->borrowed_end - slu_slots_bytes(&sizes->slots, sizes->n_slots, slot + 1);
}

bool slu_stream_is_small(const struct slu_stream *stream, uint32_t block)
{
    return slu_slots_is_small_block(&stream->sizes.slots, stream->extents[block].raw_bytes);
}

bool slu_stream_is_small_slot(const struct slu_stream *stream, uint32_t slot)
{
    return slu_slots_is_small(&stream->sizes.slots, slot);
}

unsigned char *slu_stream_arrival(const struct slu_stream *stream, const struct stream_block *b)
{
    return b->staging != SLU_STREAM_NONE
               ? stream->staging + (size_t)b->staging * stream->sizes.staging_bytes
               : slu_stream_slot(stream, b->slot);
}

void slu_stream_fail_locked(struct slu_stream *stream, const struct slu_err *err)
{
    if (stream->error == 0) {
        stream->error = err->code;
        stream->err = *err;
    }
    pthread_cond_broadcast(&stream->has_news);
}

void slu_stream_free_staging_locked(struct slu_stream *stream, struct stream_block *b)
{
    if (b->staging != SLU_STREAM_NONE) {
        assert(stream->n_free_stagings < stream->sizes.n_stagings);
        stream->free_stagings[stream->n_free_stagings++] = b->staging;
        b->staging = SLU_STREAM_NONE;
    }
}

void slu_stream_free_slot_locked(struct slu_stream *stream, uint32_t slot)
{
    struct stream_stack *free_slots = &stream->free_slots[slu_stream_is_small_slot(stream, slot)];
    assert(free_slots->n < stream->n_slots);
    free_slots->slots[free_slots->n++] = slot;
}

static void leave_slot_locked(struct slu_stream *stream, struct stream_block *b)
{
    stream->slot_blocks[b->slot] = SLU_STREAM_NONE;
    if (b->slot < stream->n_slots) { /* else it was given back */
        slu_stream_free_slot_locked(stream, b->slot);
    }
    b->slot = SLU_STREAM_NONE;
    b->state = BLOCK_ABSENT;
}

void slu_stream_evict_locked(struct slu_stream *stream, uint32_t slot)
{
    struct stream_block *b = &stream->blocks[stream->slot_blocks[slot]];
    assert(b->state == BLOCK_RESIDENT && b->slot == slot);
    stream->policy->remove(stream->policy, slot);
    leave_slot_locked(stream, b);
}

void slu_stream_drop_locked(struct slu_stream *stream, uint32_t block)
{
    struct stream_block *b = &stream->blocks[block];
    assert(b->state == BLOCK_READING || b->state == BLOCK_ARRIVED || b->state == BLOCK_DECODING);
    slu_stream_free_staging_locked(stream, b);
    leave_slot_locked(stream, b);
}

/*
 * Who may leave. Only residents are in the policy's list at all, and only a slot of the right size
 * is any use. Those that neither this round nor a hint wants nor the caller keeps go first, then
 * arrivals that nobody asked for, then what only a hint wants, then those that the round has
 * already used, and in the end what is kept. One that this round still wants never goes: some
 * worker can always take it at once, without any slot being free, after which its slot may be had.
 * So there is no deadlock, and nothing is read twice in a round.
 */
struct search {
    const struct slu_stream *stream;
    bool is_small;
    bool (*may_leave)(const struct stream_block *b);
};

static bool is_unwanted(const struct stream_block *b)
{
    return b->index == SLU_STREAM_NONE && !b->is_hinted && !b->is_kept;
}

static bool is_outside(const struct stream_block *b)
{
    return b->index == SLU_STREAM_NONE && !b->is_kept;
}

static bool is_used_up(const struct stream_block *b)
{
    return b->is_done && !b->is_kept;
}

static bool is_kept_outside(const struct stream_block *b)
{
    return b->index == SLU_STREAM_NONE;
}

static bool is_kept_used_up(const struct stream_block *b)
{
    return b->is_done;
}

static bool may_evict(void *arg, uint32_t slot)
{
    const struct search *search = arg;
    const struct slu_stream *stream = search->stream;
    return slu_stream_is_small_slot(stream, slot) == search->is_small &&
           search->may_leave(&stream->blocks[stream->slot_blocks[slot]]);
}

static bool evict_locked(struct slu_stream *stream, bool is_small,
                         bool (*may_leave)(const struct stream_block *b))
{
    struct search search = {stream, is_small, may_leave};
    int64_t slot = stream->policy->victim(stream->policy, may_evict, &search);
    if (slot < 0) {
        return false;
    }
    slu_stream_evict_locked(stream, (uint32_t)slot);
    return true;
}

bool slu_stream_evict_least_locked(struct slu_stream *stream, bool is_small)
{
    return evict_locked(stream, is_small, is_unwanted) ||
           evict_locked(stream, is_small, is_outside);
}

void slu_stream_move_locked(struct slu_stream *stream, uint32_t slot)
{
    struct stream_stack *free_slots = &stream->free_slots[slu_stream_is_small_slot(stream, slot)];
    assert(free_slots->n > 0);
    uint32_t block = stream->slot_blocks[slot], to = free_slots->slots[--free_slots->n];
    memcpy(slu_stream_slot(stream, to), slu_stream_slot(stream, slot),
           stream->extents[block].raw_bytes);
    slu_stream_evict_locked(stream, slot);
    struct stream_block *b = &stream->blocks[block];
    b->slot = to;
    b->state = BLOCK_RESIDENT;
    stream->slot_blocks[to] = block;
    stream->is_slot_fresh[to] = false;
    stream->policy->insert(stream->policy, to, block);
}

/* The first guess in a slot of that size that has arrived is given up. */
static bool drop_guess_locked(struct slu_stream *stream, bool is_small)
{
    bool is_dropped = false;
    for (uint32_t n = stream->guessed.n; n > 0; n--) {
        uint32_t block = slu_stream_pop_locked(&stream->guessed);
        if (is_dropped || slu_stream_is_small(stream, block) != is_small) {
            slu_stream_push_locked(&stream->guessed, block);
        } else {
            slu_stream_drop_locked(stream, block);
            is_dropped = true;
        }
    }
    return is_dropped;
}

/* Makes sure that there is a free slot for the block; false if there can't be one yet. */
static bool make_slot_locked(struct slu_stream *stream, uint32_t block)
{
    bool is_small = slu_stream_is_small(stream, block);
    if (stream->free_slots[is_small].n > 0 || evict_locked(stream, is_small, is_unwanted) ||
        drop_guess_locked(stream, is_small) || evict_locked(stream, is_small, is_outside) ||
        evict_locked(stream, is_small, is_used_up)) {
        return true;
    }
    /* A worker that has, or will take, such a block that isn't kept asks again when it is done with
     * it. */
    for (uint32_t i = 0; i < stream->n_list; i++) {
        const struct stream_block *b = &stream->blocks[stream->list[i]];
        if (!b->is_kept && b->state != BLOCK_ABSENT && b->state != BLOCK_MISSING &&
            slu_stream_is_small(stream, stream->list[i]) == is_small) {
            return false;
        }
    }
    return evict_locked(stream, is_small, is_kept_outside) ||
           evict_locked(stream, is_small, is_kept_used_up);
}

static bool is_compressed(const struct slu_extent *extent)
{
    return extent->codec != SLU_CODEC_RAW;
}

/* Reads in flight below which a missing block may be submitted. What arrives together is unpacked
 * while the device has less to do, so compressed blocks had better come in smaller groups. */
static uint32_t depth_for(const struct slu_stream *stream, const struct slu_extent *extent)
{
    const struct stream_sizes *sizes = &stream->sizes;
    if (stream->missing.n <= LAST_READS) {
        return sizes->depth;
    }
    return is_compressed(extent) ? sizes->packed_depth : sizes->deep_depth;
}

bool slu_stream_is_starved_locked(const struct slu_stream *stream)
{
    if (stream->missing.n == 0) {
        return false;
    }
    const struct slu_extent *extent =
        &stream->extents[stream->missing.blocks[stream->missing.first]];
    return stream->n_in_flight >= depth_for(stream, extent) ||
           (is_compressed(extent) && stream->n_free_stagings == 0);
}

/* Hints for idle time aren't read beside what the round asked for. */
static bool hints_wait_for_round(const struct slu_stream *stream)
{
    return stream->is_idle_only && stream->n_in_flight > stream->n_guesses;
}

bool slu_stream_is_hint_due_locked(const struct slu_stream *stream)
{
    return stream->missing.n == 0 && stream->next_hint < stream->n_hints &&
           (stream->n_guesses_left > 0 || hints_wait_for_round(stream));
}

/* A block for which there is a free slot is to be read. */
static struct slu_read start_read_locked(struct slu_stream *stream, uint32_t block)
{
    struct stream_block *b = &stream->blocks[block];
    const struct slu_extent *extent = &stream->extents[block];
    bool is_small = slu_stream_is_small(stream, block);
    struct stream_stack *free_slots = &stream->free_slots[is_small];
    assert(free_slots->n > 0);
    b->slot = free_slots->slots[--free_slots->n];
    assert(slu_stream_is_small_slot(stream, b->slot) == is_small);
    stream->slot_blocks[b->slot] = block;
    if (is_compressed(extent)) {
        b->staging = stream->free_stagings[--stream->n_free_stagings];
    }
    bool is_fresh = stream->is_slot_fresh[b->slot];
    stream->is_slot_fresh[b->slot] = false;
    b->state = BLOCK_READING;
    stream->n_in_flight++;
    return (struct slu_read){
        .buffer = slu_stream_arrival(stream, b),
        .offset = extent->offset,
        .bytes = (extent->stored_bytes + SLU_IO_ALIGN - 1) / SLU_IO_ALIGN * SLU_IO_ALIGN,
        .tag = block,
        .is_fresh = is_fresh && b->staging == SLU_STREAM_NONE,
    };
}

/* Gives the first missing block what it needs to be read. False if it must wait. */
static bool prepare_locked(struct slu_stream *stream, struct slu_read *ret_read)
{
    if (stream->error != 0 || stream->missing.n == 0 || slu_stream_is_starved_locked(stream) ||
        !make_slot_locked(stream, stream->missing.blocks[stream->missing.first])) {
        return false;
    }
    uint32_t block = slu_stream_pop_locked(&stream->missing);
    assert(stream->blocks[block].state == BLOCK_MISSING);
    *ret_read = start_read_locked(stream, block);
    return true;
}

/* Absent, and not of this round: a block that the round has used and that made room for another is
 * absent too, but whatever arrives of the round's blocks is taken for one that it still wants. */
static bool may_guess(const struct stream_block *b)
{
    return b->state == BLOCK_ABSENT && b->index == SLU_STREAM_NONE;
}

/* Staging that guesses leave to blocks that a round asks for: half of it, and enough to keep flash
 * busy. */
static uint32_t stagings_kept(const struct stream_sizes *sizes)
{
    uint32_t half = sizes->n_stagings / 2;
    uint32_t reads = sizes->depth < sizes->n_stagings ? sizes->depth : sizes->n_stagings - 1;
    return half > reads ? half : reads;
}

/* The same for the next hint. It takes nobody's slot that is wanted. */
static bool prepare_guess_locked(struct slu_stream *stream, struct slu_read *ret_read)
{
    while (stream->next_hint < stream->n_hints &&
           !may_guess(&stream->blocks[stream->hints[stream->next_hint]])) {
        stream->next_hint++;
    }
    if (stream->error != 0 || stream->missing.n > 0 || stream->next_hint == stream->n_hints ||
        stream->n_in_flight >= stream->n_guesses_max || stream->n_guesses_left == 0 ||
        hints_wait_for_round(stream) ||
        stream->n_guesses + stream->guessed.n >= stream->guessed.n_max) {
        return false;
    }
    uint32_t block = stream->hints[stream->next_hint];
    if (is_compressed(&stream->extents[block]) &&
        stream->n_free_stagings <= stagings_kept(&stream->sizes)) {
        return false;
    }
    bool is_small = slu_stream_is_small(stream, block);
    if (stream->free_slots[is_small].n == 0 && !evict_locked(stream, is_small, is_unwanted)) {
        return false;
    }
    stream->next_hint++;
    stream->n_guesses++;
    stream->n_guesses_left--;
    stream->stats.guesses++;
    *ret_read = start_read_locked(stream, block);
    return true;
}

/* `why` has a sentence about the read itself. Nobody has asked for a guess yet: who does so reads
 * it again. */
static void fail_read_locked(struct slu_stream *stream, uint32_t block, int code, const char *why)
{
    struct slu_err err;
    if (stream->blocks[block].index == SLU_STREAM_NONE) {
        stream->n_guesses--;
        slu_stream_drop_locked(stream, block);
        return;
    }
    slu_err_set(&err, code, "%s: block %" PRIu32 " at offset %" PRIu64 " can't be read: %s",
                stream->path, block, stream->extents[block].offset, why);
    slu_stream_drop_locked(stream, block);
    slu_stream_fail_locked(stream, &err);
}

void slu_stream_issue_locked(struct slu_stream *stream)
{
    struct slu_read reads[BATCH];
    for (;;) {
        unsigned n = 0;
        while (n < BATCH &&
               (prepare_locked(stream, &reads[n]) || prepare_guess_locked(stream, &reads[n]))) {
            n++;
        }
        if (n == 0) {
            return;
        }
        struct slu_err err;
        unsigned n_submitted = 0;
        int e = 0;
        pthread_mutex_unlock(&stream->lock);
        while (n_submitted < n && e == 0) {
            e = stream->ring->submit(stream->ring, &reads[n_submitted], &err);
            n_submitted += e == 0;
        }
        pthread_mutex_lock(&stream->lock);
        stream->n_reapable += n_submitted;
        for (unsigned i = 0; i < n_submitted; i++) {
            stream->stats.flash_bytes += reads[i].bytes;
        }
        for (unsigned i = n_submitted; i < n; i++) {
            stream->n_in_flight--;
            fail_read_locked(stream, (uint32_t)reads[i].tag, e, err.text);
        }
        if (stream->n_waiting > 0 && !stream->has_reaper) {
            pthread_cond_signal(&stream->has_news); /* somebody should reap */
        }
    }
}

static void arrive_locked(struct slu_stream *stream, const struct slu_read_done *done)
{
    uint32_t block = (uint32_t)done->tag;
    struct stream_block *b = &stream->blocks[block];
    assert(b->state == BLOCK_READING && stream->n_in_flight > 0);
    stream->n_in_flight--;
    stream->n_reapable--;
    int result = done->result;
    if (b->n_faults > 0) {
        b->n_faults--;
        result = SLU_EIO;
    }
    if (result < 0) {
        fail_read_locked(stream, block, result,
                         "the device failed or the file is shorter than its index says");
        return;
    }
    b->state = BLOCK_ARRIVED;
    bool is_guess = b->index == SLU_STREAM_NONE;
    if (is_guess) {
        stream->n_guesses--;
        slu_stream_push_locked(&stream->guessed, block);
    } else {
        slu_stream_push_locked(&stream->arrived, block);
    }
    bool is_last = !is_guess && stream->missing.n == 0 && stream->n_in_flight == stream->n_guesses;
    slu_pace_arrive(&stream->pace, slu_now_ns(), is_last);
}

void slu_stream_reap_locked(struct slu_stream *stream, bool block)
{
    struct slu_read_done dones[BATCH];
    assert(!stream->has_reaper);
    stream->has_reaper = true;
    pthread_mutex_unlock(&stream->lock);
    int n = stream->ring->wait(stream->ring, dones, BATCH, block);
    pthread_mutex_lock(&stream->lock);
    stream->has_reaper = false;
    for (int i = 0; i < n; i++) {
        arrive_locked(stream, &dones[i]);
    }
    if (stream->n_waiting > 0 && n > 0) {
        pthread_cond_broadcast(&stream->has_news);
    }
}
