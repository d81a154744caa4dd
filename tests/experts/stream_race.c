/*
 * A stream whose reads come back in any order, late, or not at all: rounds, hints and polls at
 * random, with few slots of one size or two, some of them borrowed for a while, with compressed
 * blocks and raw ones, with reads that the device refuses or fails, and with rounds that end before
 * their time. Between stream and device there is a ring that holds completions back. To be run
 * under the thread sanitizer too, for which the framework of the other tests is not fit; so it is a
 * program of its own.
 *
 *     stream_race [ROUNDS]
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/pool.h"
#include "experts/stream_state.h"

#define N_BLOCKS    24u
#define RAW_BYTES   9000u
#define SMALL_BYTES 7000u /* of every other block */
#define ROUND_MAX   16u
#define N_HELD      64u
#define LENT_MAX    6u

static void die(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void expect(bool is_so, const char *what)
{
    if (!is_so) {
        die(what);
    }
}

static uint32_t draw(uint64_t *random, uint32_t n)
{
    *random = *random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((*random >> 33) % n);
}

/* Gives completions out in an order of its own: at random, but first n_early of blocks below
 * `late`, and then n_late of the others. */
struct held_ring {
    struct slu_ring base;
    struct slu_ring *real;
    uint32_t n_early, n_late;
    uint64_t late;
    _Atomic uint32_t n_in_flight; /* submitted, not given out */
    _Atomic uint32_t n_refusals;  /* one in so many submissions is refused; 0: none */
    _Atomic uint64_t n_submitted;
    uint64_t random; /* of whoever waits */
    struct slu_read_done held[N_HELD];
    unsigned n_held;
};

static int held_submit(struct slu_ring *base, const struct slu_read *read, struct slu_err *err)
{
    struct held_ring *ring = (struct held_ring *)base;
    uint32_t n_refusals = ring->n_refusals;
    if (n_refusals && atomic_fetch_add(&ring->n_submitted, 1) % n_refusals == n_refusals - 1) {
        return slu_err_set(err, SLU_EIO, "refused");
    }
    atomic_fetch_add(&ring->n_in_flight, 1);
    int rc = ring->real->submit(ring->real, read, err);
    if (rc < 0) {
        atomic_fetch_sub(&ring->n_in_flight, 1);
    }
    return rc;
}

static bool is_due(struct held_ring *ring, const struct slu_read_done *done)
{
    bool is_late = done->tag >= ring->late;
    if (ring->n_early > 0) {
        ring->n_early -= !is_late;
        return !is_late;
    }
    if (ring->n_late > 0) {
        ring->n_late -= is_late;
        return is_late;
    }
    return draw(&ring->random, 2) == 0;
}

static int held_wait(struct slu_ring *base, struct slu_read_done *ret_done, unsigned n_max,
                     bool block)
{
    struct held_ring *ring = (struct held_ring *)base;
    unsigned n = 0;
    while (ring->n_in_flight > 0) {
        bool must_wait = block && ring->n_held == 0;
        ring->n_held += (unsigned)ring->real->wait(ring->real, ring->held + ring->n_held,
                                                   N_HELD - ring->n_held, must_wait);
        for (unsigned i = 0; i < ring->n_held && n < n_max;) {
            if (is_due(ring, &ring->held[i])) {
                ret_done[n++] = ring->held[i];
                ring->held[i] = ring->held[--ring->n_held];
                atomic_fetch_sub(&ring->n_in_flight, 1);
            } else {
                i++;
            }
        }
        if (n > 0 || !block) {
            break;
        }
    }
    return (int)n;
}

static void held_destroy(struct slu_ring *base)
{
    struct held_ring *ring = (struct held_ring *)base;
    slu_ring_destroy(ring->real);
}

struct hints {
    uint32_t blocks[ROUND_MAX], n;
    uint32_t n_in_flight;
    bool is_idle_only; /* of which `share` come true */
    float share;
    bool keep; /* the last one, or let go of it */
};

#define LENT_BYTES ((size_t)LENT_MAX * 3 * SLU_IO_ALIGN + 100)

struct bench {
    char path[64];
    struct slu_extent extents[N_BLOCKS];
    struct slu_ledger *ledger;
    struct slu_stream *stream;
    struct held_ring ring;
    struct slu_pool *pool;
    unsigned char *lent; /* LENT_BYTES, of which the stream has what lies past n_own_bytes */
    size_t n_own_bytes;
    unsigned char *borrowed; /* n_borrowed_bytes of the stream's */
    size_t n_borrowed_bytes;
    uint32_t list[ROUND_MAX];
    _Atomic uint32_t n_seen[ROUND_MAX];
    _Atomic uint32_t n_left;   /* items until workers leave before their time */
    const struct hints *hints; /* to be given while others take blocks; or NULL */
};

static unsigned char byte_of(uint32_t block, uint32_t i)
{
    return (unsigned char)(block * 37 + i / 64);
}

static uint32_t bytes_of(uint32_t block)
{
    return block % 2 ? SMALL_BYTES : RAW_BYTES;
}

/* Every third block raw, the others compressed. */
static void write_file(struct bench *b)
{
    static unsigned char raw[RAW_BYTES], stored[4 * RAW_BYTES];
    struct slu_encoder *encoder;
    snprintf(b->path, sizeof b->path, "/tmp/slu-stream-race-XXXXXX");
    int fd = mkstemp(b->path);
    expect(fd >= 0 && slu_encoder_create(&encoder, NULL) == 0, "no file");
    uint64_t offset = SLU_IO_ALIGN;
    for (uint32_t x = 0; x < N_BLOCKS; x++) {
        uint32_t n_raw = bytes_of(x);
        for (uint32_t i = 0; i < n_raw; i++) {
            raw[i] = byte_of(x, i);
        }
        bool is_raw = x % 3 == 0;
        int64_t n = is_raw ? n_raw : slu_encode(encoder, raw, n_raw, stored, sizeof stored, NULL);
        const unsigned char *bytes = is_raw ? raw : stored;
        expect(n > 0 && pwrite(fd, bytes, (size_t)n, (off_t)offset) == n, "no file");
        b->extents[x] = (struct slu_extent){
            .offset = offset,
            .checksum = slu_checksum(bytes, (size_t)n),
            .stored_bytes = (uint32_t)n,
            .raw_bytes = n_raw,
            .codec = is_raw ? SLU_CODEC_RAW : SLU_CODEC_ZSTD,
        };
        offset += ((uint64_t)n + SLU_IO_ALIGN - 1) / SLU_IO_ALIGN * SLU_IO_ALIGN;
    }
    expect(ftruncate(fd, (off_t)offset) == 0, "no file");
    close(fd);
    slu_encoder_destroy(encoder);
}

/* False where there is no such back end. */
static bool open_stream(struct bench *b, enum slu_io_backend backend, uint32_t n_slots,
                        unsigned n_workers, bool has_two_sizes)
{
    struct slu_err err;
    const struct slu_stream_params params = {.path = b->path,
                                             .extents = b->extents,
                                             .n_extents = N_BLOCKS,
                                             .n_slots = n_slots,
                                             .n_borrowed_max = LENT_MAX - 1,
                                             .n_blocks = N_BLOCKS,
                                             .slot_bytes = RAW_BYTES,
                                             .small_bytes = SMALL_BYTES,
                                             .n_small_blocks = has_two_sizes ? N_BLOCKS / 2 : 0,
                                             .round_blocks_max = ROUND_MAX,
                                             .n_workers = n_workers,
                                             .backend = backend,
                                             .ledger = b->ledger};
    int rc = slu_stream_create(&params, &b->stream, &err);
    if (rc == SLU_EUNSUP) {
        fprintf(stderr, "skipped on io_uring: %s\n", err.text);
        return false;
    }
    expect(rc == 0 && slu_pool_create(n_workers, &b->pool, &err) == 0, err.text);
    b->ring = (struct held_ring){.real = b->stream->ring, .random = n_slots + n_workers};
    b->ring.base = *b->stream->ring;
    b->ring.base.submit = held_submit;
    b->ring.base.wait = held_wait;
    b->ring.base.destroy = held_destroy;
    b->stream->ring = &b->ring.base;
    b->n_own_bytes = LENT_BYTES;
    b->n_borrowed_bytes = 0;
    return true;
}

static void close_stream(struct bench *b)
{
    slu_pool_destroy(b->pool);
    slu_stream_destroy(b->stream);
    expect(slu_ledger_used(b->ledger) == 0, "the stream has kept something");
}

static void give(struct bench *b, const struct hints *hints)
{
    if (hints->is_idle_only) {
        slu_stream_hint_idle(b->stream, hints->blocks, hints->n, hints->share);
    } else {
        slu_stream_hint(b->stream, hints->blocks, hints->n, hints->n_in_flight);
    }
    slu_stream_keep(b->stream, hints->blocks[ROUND_MAX - 1], hints->keep);
    for (uint32_t i = 0; i < ROUND_MAX; i++) {
        slu_stream_is_absent(b->stream, hints->blocks[i]);
    }
}

static void work(void *arg, unsigned thread, unsigned n_threads)
{
    struct bench *b = arg;
    struct slu_stream_item item;
    (void)n_threads;
    if (thread == 0 && b->hints) {
        give(b, b->hints);
    }
    while (b->n_left > 0 && slu_stream_next(b->stream, thread, &item) == 1) {
        const unsigned char *data = item.data;
        for (uint32_t i = 0; i < bytes_of(b->list[item.index]); i++) {
            expect(data[i] == byte_of(b->list[item.index], i), "wrong bytes");
        }
        atomic_fetch_add(&b->n_seen[item.index], 1);
        atomic_fetch_sub(&b->n_left, 1);
        slu_stream_done(b->stream, &item);
    }
}

/* What of its books can be told from outside, between rounds. */
static void check_books(const struct bench *b)
{
    const struct slu_stream *s = b->stream;
    uint32_t n_reading = 0, n_arrived = 0, n_slots = 0;
    for (uint32_t x = 0; x < N_BLOCKS; x++) {
        const struct stream_block *block = &s->blocks[x];
        n_reading += block->state == BLOCK_READING;
        n_arrived += block->state == BLOCK_ARRIVED;
        n_slots += block->state != BLOCK_ABSENT;
        expect(block->index == SLU_STREAM_NONE, "a block is of no round and of one");
        expect(block->state == BLOCK_ABSENT ||
                   slu_stream_is_small_slot(s, block->slot) == slu_stream_is_small(s, x),
               "a block lies in a slot of the other size");
    }
    expect(s->n_guesses == n_reading && s->n_in_flight == n_reading, "reads are miscounted");
    expect(s->guessed.n == n_arrived, "arrived guesses are miscounted");
    expect(s->free_slots[0].n + s->free_slots[1].n + n_slots == s->n_slots, "slots are miscounted");
    expect(s->n_taken == 0 && s->n_untaken == 0 && s->n_waiting == 0, "workers are miscounted");
}

static void run_round(struct bench *b, uint32_t n, uint32_t n_left, bool may_fail)
{
    struct slu_err err;
    for (uint32_t i = 0; i < n; i++) {
        b->n_seen[i] = 0;
    }
    b->n_left = n_left;
    expect(slu_stream_begin(b->stream, b->list, n, &err) == 0, "a round was refused");
    slu_pool_run(b->pool, work, b);
    int rc = slu_stream_end(b->stream, &err);
    expect(rc == 0 || (may_fail && rc == SLU_EIO), err.text);
    for (uint32_t i = 0; i < n; i++) {
        expect(b->n_seen[i] == 1 || (b->n_seen[i] == 0 && (rc < 0 || n_left < n)),
               "a block came twice or not at all");
    }
    check_books(b);
}

/* Hints whose reads come back late, and fail, when a block that is hinted at as well has been used
 * by the round and has made room for others: the round isn't given that block again. Of the three
 * slots the round has one until then. All hints are of raw blocks: for others there is too little
 * staging. */
static void fail_late(struct bench *b)
{
    static const uint32_t hints[] = {15, 18, 21, 3}, list[] = {3, 1, 2, 4};
    b->ring.n_early = 3;
    b->ring.n_late = 3;
    b->ring.late = 15;
    slu_stream_inject_fault(b->stream, 15, 1);
    slu_stream_inject_fault(b->stream, 18, 1);
    slu_stream_hint(b->stream, hints, 4, 2);
    memcpy(b->list, list, sizeof list);
    run_round(b, 4, UINT32_MAX, false);
    expect(b->ring.n_early == 0 && b->ring.n_late == 0, "reads came back in another order");
}

static bool is_unharmed(const struct bench *b)
{
    for (size_t i = 0; i < b->n_own_bytes; i++) {
        if (b->lent[i] != 0xee) {
            return false;
        }
    }
    return true;
}

/* Memory of the stream's own, for a while and with nothing borrowed. */
static void borrow(struct bench *b, size_t bytes)
{
    const struct stream_sizes *sizes = &b->stream->sizes;
    size_t most = slu_slots_bytes(&sizes->slots, slu_stream_slots_least(sizes), sizes->n_slots);
    if (b->n_borrowed_bytes == 0 && bytes == 0) { /* the stream may be who borrows */
        return;
    }
    for (size_t i = 0; i < b->n_borrowed_bytes; i++) {
        expect(b->borrowed[i] == 0xee, "memory that was lent was written to");
    }
    b->n_borrowed_bytes = bytes < most ? bytes : most;
    b->borrowed = slu_stream_lend(b->stream, b->n_borrowed_bytes);
    if (b->n_borrowed_bytes > 0) {
        memset(b->borrowed, 0xee, b->n_borrowed_bytes);
    }
    check_books(b);
}

/* What isn't lent, or no longer, nobody writes to. */
static void lend(struct bench *b, size_t n_own_bytes)
{
    expect(is_unharmed(b), "memory that isn't lent was written to");
    slu_stream_borrow(b->stream, b->lent + n_own_bytes, LENT_BYTES - n_own_bytes);
    b->n_own_bytes = n_own_bytes;
    memset(b->lent, 0xee, n_own_bytes);
    check_books(b);
}

static void soak(struct bench *b, unsigned rounds, uint64_t random)
{
    for (unsigned r = 0; r < rounds; r++) {
        uint32_t blocks[N_BLOCKS];
        struct hints hints = {.n = draw(&random, ROUND_MAX + 1)};
        bool may_fail = draw(&random, 3) == 0;
        for (uint32_t i = 0; i < N_BLOCKS; i++) {
            uint32_t j = draw(&random, i + 1);
            blocks[i] = blocks[j];
            blocks[j] = i;
        }
        memcpy(b->list, blocks, sizeof b->list);
        for (uint32_t i = 0; i < ROUND_MAX; i++) { /* of this round too, and some twice */
            hints.blocks[i] = draw(&random, N_BLOCKS);
        }
        b->ring.n_refusals = may_fail ? 1 + draw(&random, 9) : 0;
        for (uint32_t i = 0; may_fail && i < 3; i++) {
            slu_stream_inject_fault(b->stream, hints.blocks[i], 1 + draw(&random, 2));
        }
        hints.n_in_flight = draw(&random, 9);
        hints.is_idle_only = hints.n_in_flight == 8;
        hints.share = (float)draw(&random, 11) / 10;
        hints.keep = draw(&random, 2);
        b->hints = draw(&random, 2) ? &hints : NULL;
        if (!b->hints) {
            give(b, &hints);
        }
        if (draw(&random, 3) == 0) {
            borrow(b, 0);
            lend(b, draw(&random, LENT_BYTES + 1));
        }
        if (draw(&random, 4) == 0) {
            borrow(b, 0);
            lend(b, LENT_BYTES);
            borrow(b, draw(&random, LENT_BYTES + 1));
        }
        for (uint32_t i = draw(&random, 4); i > 0; i--) {
            slu_stream_poll(b->stream);
        }
        uint32_t n = draw(&random, ROUND_MAX + 1);
        run_round(b, n, draw(&random, 4) ? UINT32_MAX : draw(&random, n + 1), may_fail);
        for (uint32_t x = 0; x < N_BLOCKS; x++) {
            slu_stream_inject_fault(b->stream, x, 0);
        }
        b->ring.n_refusals = 0;
        b->hints = NULL;
    }
    borrow(b, 0);
    lend(b, LENT_BYTES);
}

int main(int argc, char **argv)
{
    static const enum slu_io_backend backends[] = {SLU_IO_PREAD, SLU_IO_URING};
    static const uint32_t slots[] = {1, 2, 3, 5, 11, N_BLOCKS};
    static const unsigned workers[] = {1, 2, 4};
    unsigned rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 60;
    struct bench b = {.ledger = slu_ledger_create(0)};
    write_file(&b);
    b.lent = malloc(LENT_BYTES);
    expect(b.lent, "out of memory");
    memset(b.lent, 0xee, LENT_BYTES);
    for (unsigned run = 0; run < 2 * 6 * 3 * 2; run++) {
        enum slu_io_backend backend = backends[run % 2];
        uint32_t n_slots = slots[run / 2 % 6];
        unsigned n_workers = workers[run / 12 % 3];
        bool has_two_sizes = run / 36;
        if (n_slots == 3 && !has_two_sizes && open_stream(&b, backend, n_slots, n_workers, false)) {
            fail_late(&b);
            close_stream(&b);
        }
        if (open_stream(&b, backend, n_slots, n_workers, has_two_sizes)) {
            struct stream_sizes *sizes = &b.stream->sizes;
            if (n_slots == N_BLOCKS) { /* apart, as they are with large blocks */
                sizes->depth = sizes->deep_depth / 4;
                sizes->packed_depth = sizes->deep_depth / 2;
            }
            soak(&b, rounds, run);
            close_stream(&b);
        }
    }
    unlink(b.path);
    free(b.lent);
    slu_ledger_destroy(b.ledger);
    return 0;
}
