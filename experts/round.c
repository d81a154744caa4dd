#include "experts/stream_state.h"

#include <assert.h>
#include <inttypes.h>

#include "base/clock.h"

/*
 * Leaders and followers. There is no I/O thread: a worker that finds nothing ready becomes the
 * reaper and waits on the ring, one at a time; the others wait for its news. Whoever takes an
 * arrived block decodes it, outside the lock, and goes on to compute with it, while the data are
 * still in its CPU's cache; the reaper's place is then free for the next who has nothing to do.
 * Whoever takes a block while reads wait for room looks at the ring in passing, without waiting;
 * and, where blocks have to be unpacked, which takes long, while hints wait for a read to end.
 *
 * The wake-up rule: whoever changes something that a waiter could act on signals, namely that
 * blocks arrived, that there is nothing left to take, that an error ended the round, or that there
 * are reads to reap and nobody reaps. Missing blocks are no such thing, since whoever frees a slot
 * or a staging buffer submits them at once.
 */

/* Bytes from a file: extents are checked here, each time, rather than trusted since create. */
static int check_extent(const struct slu_stream *stream, uint32_t block, struct slu_err *err)
{
    if (block >= stream->n_extents) {
        return slu_err_set(err, SLU_EINVAL, "%s: there is no block %" PRIu32 " among %" PRIu32,
                           stream->path, block, stream->n_extents);
    }
    const struct slu_extent *extent = &stream->extents[block];
    const struct stream_sizes *sizes = &stream->sizes;
    bool is_raw = extent->codec == SLU_CODEC_RAW;
    size_t stored_max = is_raw ? sizes->slots.large : sizes->staging_bytes;
    if (extent->codec >= SLU_CODECS || extent->stored_bytes == 0 || extent->raw_bytes == 0 ||
        extent->stored_bytes > stored_max || extent->raw_bytes > sizes->slots.large ||
        (is_raw && extent->stored_bytes != extent->raw_bytes)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: block %" PRIu32 " of %" PRIu32 " bytes, %" PRIu32
                           " as stored with codec %" PRIu32 ", doesn't fit a slot of %zu",
                           stream->path, block, extent->raw_bytes, extent->stored_bytes,
                           extent->codec, sizes->slots.large);
    }
    return 0;
}

static int check_block(const struct slu_stream *stream, uint32_t block, struct slu_err *err)
{
    int e = check_extent(stream, block, err);
    if (e == 0 && stream->blocks[block].index != SLU_STREAM_NONE) {
        return slu_err_set(err, SLU_EINVAL, "block %" PRIu32 " is twice in the round's list",
                           block);
    }
    return e;
}

void slu_stream_observe(struct slu_stream *stream, const struct slu_policy_choice *choice)
{
    pthread_mutex_lock(&stream->lock);
    if (stream->policy->observe) {
        stream->policy->observe(stream->policy, choice);
    }
    pthread_mutex_unlock(&stream->lock);
}

bool slu_stream_foresee(struct slu_stream *stream, uint32_t layer, float *ret_chances)
{
    pthread_mutex_lock(&stream->lock);
    struct slu_policy *policy = stream->policy;
    bool can = policy->foresee && policy->foresee(policy, layer, ret_chances);
    pthread_mutex_unlock(&stream->lock);
    return can;
}

/* The round, whose list the block is on, finds it in whatever state it is. */
static void ask_locked(struct slu_stream *stream, uint32_t block)
{
    struct stream_block *b = &stream->blocks[block];
    if (b->state == BLOCK_RESIDENT) {
        stream->policy->touch(stream->policy, b->slot);
        slu_stream_push_locked(&stream->ready, block);
        stream->stats.hits++;
        return;
    }
    stream->stats.misses++;
    if (b->state == BLOCK_ABSENT) {
        b->state = BLOCK_MISSING;
        slu_stream_push_locked(&stream->missing, block);
        return;
    }
    assert(b->state == BLOCK_READING || b->state == BLOCK_ARRIVED);
    stream->n_guesses -= b->state == BLOCK_READING;
    stream->stats.foreseen++;
}

/* Guesses that the round asks for have arrived for it. */
static void claim_guessed_locked(struct slu_stream *stream)
{
    for (uint32_t n = stream->guessed.n; n > 0; n--) {
        uint32_t block = slu_stream_pop_locked(&stream->guessed);
        bool is_asked = stream->blocks[block].index != SLU_STREAM_NONE;
        slu_stream_push_locked(is_asked ? &stream->arrived : &stream->guessed, block);
    }
}

int slu_stream_begin(struct slu_stream *stream, const uint32_t *blocks, uint32_t n,
                     struct slu_err *err)
{
    if (n > stream->round_blocks_max) {
        return slu_err_set(err, SLU_EINVAL,
                           "%" PRIu32 " blocks are more than the %" PRIu32 " of the longest round",
                           n, stream->round_blocks_max);
    }
    int e = 0;
    pthread_mutex_lock(&stream->lock);
    assert(!stream->is_round);
    uint32_t n_listed = 0;
    while (n_listed < n && (e = check_block(stream, blocks[n_listed], err)) == 0) {
        stream->list[n_listed] = blocks[n_listed];
        stream->blocks[blocks[n_listed]].index = n_listed;
        n_listed++;
    }
    if (e < 0) {
        while (n_listed > 0) {
            stream->blocks[stream->list[--n_listed]].index = SLU_STREAM_NONE;
        }
        pthread_mutex_unlock(&stream->lock);
        return e;
    }
    slu_pace_begin(&stream->pace, slu_now_ns(), stream->n_in_flight);
    if (stream->is_idle_only) { /* guesses of this round's blocks: what is left of them was wrong */
        stream->n_guesses_left = 0;
    }
    stream->is_round = true;
    stream->n_list = n;
    stream->n_untaken = n;
    for (uint32_t i = 0; i < n; i++) {
        ask_locked(stream, blocks[i]);
    }
    claim_guessed_locked(stream);
    slu_stream_issue_locked(stream);
    pthread_mutex_unlock(&stream->lock);
    return 0;
}

/* An arrived block, popped by this worker, becomes resident, or fails the round. Drops the lock
 * while it decodes. */
static bool decode_locked(struct slu_stream *stream, unsigned worker, uint32_t block,
                          uint64_t *ret_unpack_ns)
{
    struct stream_block *b = &stream->blocks[block];
    const struct slu_extent *extent = &stream->extents[block];
    assert(b->state == BLOCK_ARRIVED);
    b->state = BLOCK_DECODING;
    const unsigned char *stored = slu_stream_arrival(stream, b);
    unsigned char *raw = slu_stream_slot(stream, b->slot);
    struct slu_err err;

    pthread_mutex_unlock(&stream->lock);
    uint64_t start_ns = slu_now_ns();
    /* Raw blocks lie in their slot already: the codec then copies nothing. */
    int e = slu_decode(stream->decoders[worker], (enum slu_codec_id)extent->codec, stored,
                       extent->stored_bytes, extent->checksum, raw, extent->raw_bytes, &err);
    uint64_t end_ns = slu_now_ns();
    pthread_mutex_lock(&stream->lock);

    *ret_unpack_ns += end_ns - start_ns;
    stream->stats.decode_ns += end_ns - start_ns;
    if (e < 0) {
        slu_err_prefix(&err, "%s: block %" PRIu32 " at offset %" PRIu64, stream->path, block,
                       extent->offset);
        slu_stream_drop_locked(stream, block);
        if (b->index != SLU_STREAM_NONE) { /* else whoever asks for it will learn of it */
            slu_stream_fail_locked(stream, &err);
        }
        return false;
    }
    if (extent->codec != SLU_CODEC_RAW) {
        stream->stats.unpacked_bytes += extent->raw_bytes;
    }
    slu_stream_free_staging_locked(stream, b);
    b->state = BLOCK_RESIDENT;
    stream->policy->insert(stream->policy, b->slot, block);
    return true;
}

/* Nothing is ready: reap, or wait for news from who does. */
static void wait_locked(struct slu_stream *stream)
{
    uint64_t start_ns = slu_now_ns();
    if (!stream->has_reaper && stream->n_reapable > 0) {
        slu_stream_reap_locked(stream, true);
    } else {
        stream->n_waiting++;
        pthread_cond_wait(&stream->has_news, &stream->lock);
        stream->n_waiting--;
    }
    stream->stats.wait_ns += slu_now_ns() - start_ns;
}

/* Before a worker leaves with a block: others may have something to do that it leaves undone. */
static void pass_on_locked(struct slu_stream *stream)
{
    if (stream->n_waiting == 0) {
        return;
    }
    if (stream->n_untaken == 0) {
        pthread_cond_broadcast(&stream->has_news);
    } else if (stream->arrived.n > 0 || (!stream->has_reaper && stream->n_reapable > 0)) {
        pthread_cond_signal(&stream->has_news);
    }
}

/* A block that is resident or can at once be made so; none if there is none, or on error. */
static uint32_t take_locked(struct slu_stream *stream, unsigned worker, uint64_t *ret_unpack_ns)
{
    bool is_starved = slu_stream_is_starved_locked(stream);
    bool unpacks = stream->sizes.n_stagings > 0;
    bool has_more = is_starved || (unpacks && slu_stream_is_hint_due_locked(stream));
    if (has_more && !stream->has_reaper && stream->n_reapable > 0) {
        slu_stream_reap_locked(stream, false);
        slu_stream_issue_locked(stream); /* first of all, lest the device idle */
    }
    /* Residents first, since the others may still be on their way; but not while reads wait for a
     * staging buffer, or for those before them: the device may be idle. */
    if (stream->arrived.n > 0 && (is_starved || stream->ready.n == 0)) {
        uint32_t block = slu_stream_pop_locked(&stream->arrived);
        stream->n_untaken--;
        bool is_sound = decode_locked(stream, worker, block, ret_unpack_ns);
        return is_sound ? block : SLU_STREAM_NONE;
    }
    if (stream->ready.n > 0 && stream->error == 0) {
        stream->n_untaken--;
        return slu_stream_pop_locked(&stream->ready);
    }
    return SLU_STREAM_NONE;
}

/* Unpacks a guess: something to do while waiting, and the way to get back the staging that guesses
 * hold. Whether anything changed that the caller could act on; false if there is no guess. */
static bool unpack_guess_locked(struct slu_stream *stream, unsigned worker, uint64_t *ret_unpack_ns)
{
    if (stream->guessed.n == 0) {
        return false;
    }
    if (!stream->has_reaper && stream->n_reapable > 0) {
        slu_stream_reap_locked(stream, false);
    }
    if (stream->arrived.n == 0 && stream->guessed.n > 0) { /* else there is better to do */
        decode_locked(stream, worker, slu_stream_pop_locked(&stream->guessed), ret_unpack_ns);
    }
    return true;
}

int slu_stream_next(struct slu_stream *stream, unsigned worker, struct slu_stream_item *ret_item)
{
    assert(worker < stream->n_workers);
    int got = 0;
    uint64_t unpack_ns = 0;
    pthread_mutex_lock(&stream->lock);
    assert(stream->is_round);
    while (got == 0) {
        slu_stream_issue_locked(stream);
        if (stream->error != 0) {
            got = stream->error;
            break;
        }
        uint32_t block = take_locked(stream, worker, &unpack_ns);
        if (block != SLU_STREAM_NONE) {
            const struct stream_block *b = &stream->blocks[block];
            stream->n_taken++;
            *ret_item = (struct slu_stream_item){
                .index = b->index,
                .slot = b->slot,
                .data = slu_stream_slot(stream, b->slot),
                .unpack_ns = unpack_ns,
            };
            got = 1;
        } else if (stream->error == 0 && stream->n_untaken == 0) {
            break;
        } else if (stream->error == 0 && stream->arrived.n == 0 && stream->ready.n == 0 &&
                   !unpack_guess_locked(stream, worker, &unpack_ns)) {
            wait_locked(stream);
        }
    }
    if (got == 1) {
        slu_stream_issue_locked(stream); /* decoding freed a staging buffer */
        pass_on_locked(stream);
    }
    pthread_mutex_unlock(&stream->lock);
    return got;
}

void slu_stream_done(struct slu_stream *stream, const struct slu_stream_item *item)
{
    pthread_mutex_lock(&stream->lock);
    assert(stream->is_round && item->index < stream->n_list && stream->n_taken > 0);
    struct stream_block *b = &stream->blocks[stream->list[item->index]];
    assert(b->state == BLOCK_RESIDENT && b->slot == item->slot && !b->is_done);
    b->is_done = true;
    stream->n_taken--;
    slu_stream_issue_locked(stream); /* its slot may be had now */
    pthread_mutex_unlock(&stream->lock);
}

int slu_stream_end(struct slu_stream *stream, struct slu_err *err)
{
    pthread_mutex_lock(&stream->lock);
    assert(stream->is_round && stream->n_taken == 0 && !stream->has_reaper);
    /* All was taken, and what is in flight are guesses; or the round ends before its time. */
    while (stream->n_in_flight > 0 && (stream->n_untaken > 0 || stream->error != 0)) {
        slu_stream_reap_locked(stream, true);
    }
    for (uint32_t i = 0; i < stream->n_list; i++) {
        struct stream_block *b = &stream->blocks[stream->list[i]];
        if (b->state == BLOCK_ARRIVED) {
            slu_stream_drop_locked(stream, stream->list[i]);
        } else if (b->state == BLOCK_MISSING) {
            b->state = BLOCK_ABSENT;
        }
        assert(b->state == BLOCK_ABSENT || b->state == BLOCK_RESIDENT);
        b->index = SLU_STREAM_NONE;
        b->is_done = false;
    }
    stream->ready.n = 0;
    stream->missing.n = 0;
    stream->arrived.n = 0;
    stream->n_list = 0;
    stream->n_untaken = 0;
    stream->is_round = false;
    int e = stream->error;
    if (e < 0) {
        slu_pace_watch(&stream->pace, false); /* who knows when the next round is */
        if (err) {
            *err = stream->err;
        }
    }
    stream->error = 0;
    pthread_mutex_unlock(&stream->lock);
    return e;
}

/* The blocks to hint at, in place of those before. */
static void take_hints(struct slu_stream *stream, const uint32_t *blocks, uint32_t n)
{
    assert(n <= stream->round_blocks_max);
    for (uint32_t i = 0; i < stream->n_hints; i++) {
        stream->blocks[stream->hints[i]].is_hinted = false;
    }
    stream->n_hints = 0;
    stream->next_hint = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (check_extent(stream, blocks[i], NULL) == 0) {
            stream->blocks[blocks[i]].is_hinted = true;
            stream->hints[stream->n_hints++] = blocks[i];
        }
    }
}

void slu_stream_hint(struct slu_stream *stream, const uint32_t *blocks, uint32_t n,
                     uint32_t n_in_flight_max)
{
    pthread_mutex_lock(&stream->lock);
    take_hints(stream, blocks, n);
    bool is_deep = n_in_flight_max == SLU_HINTS_DEEP;
    uint32_t depth = is_deep ? stream->sizes.deep_depth : stream->sizes.depth;
    stream->is_idle_only = false;
    slu_pace_watch(&stream->pace, false);
    stream->n_guesses_left = UINT32_MAX;
    stream->n_guesses_max = n_in_flight_max < depth ? n_in_flight_max : depth;
    slu_stream_issue_locked(stream);
    pthread_mutex_unlock(&stream->lock);
}

void slu_stream_hint_idle(struct slu_stream *stream, const uint32_t *blocks, uint32_t n,
                          float share)
{
    pthread_mutex_lock(&stream->lock);
    take_hints(stream, blocks, n);
    uint32_t n_fit = slu_pace_blocks(&stream->pace, share), n_late = stream->n_guesses;
    uint32_t depth = stream->sizes.depth;
    stream->is_idle_only = true;
    slu_pace_watch(&stream->pace, true);
    stream->n_guesses_left = n_fit > n_late ? n_fit - n_late : 0;
    stream->n_guesses_max = n_fit < depth ? n_fit : depth;
    slu_stream_issue_locked(stream);
    pthread_mutex_unlock(&stream->lock);
}

void slu_stream_keep(struct slu_stream *stream, uint32_t block, bool is_kept)
{
    pthread_mutex_lock(&stream->lock);
    if (block < stream->n_extents) { /* a round that asks for another tells so */
        stream->blocks[block].is_kept = is_kept;
    }
    pthread_mutex_unlock(&stream->lock);
}

bool slu_stream_is_absent(struct slu_stream *stream, uint32_t block)
{
    pthread_mutex_lock(&stream->lock);
    bool is_absent = block < stream->n_extents && stream->blocks[block].state == BLOCK_ABSENT;
    pthread_mutex_unlock(&stream->lock);
    return is_absent;
}

void slu_stream_poll(struct slu_stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    assert(!stream->is_round);
    if (stream->n_reapable > 0) {
        slu_stream_reap_locked(stream, false);
        slu_stream_issue_locked(stream);
    }
    pthread_mutex_unlock(&stream->lock);
}
