/* What is read when: rounds, and hints before a round asks for them. */
#include <criterion/criterion.h>

#include <unistd.h>

#include "experts/stream_state.h"
#include "stream_fixture.h"

/* Takes what is left of a round, on this thread. */
static void finish_round(struct stream_fixture *f)
{
    struct slu_stream_item item;
    struct slu_err err;
    while (slu_stream_next(f->stream, 0, &item) > 0) {
        slu_stream_done(f->stream, &item);
    }
    cr_assert_eq(slu_stream_end(f->stream, &err), 0, "%s", err.text);
}

/* Blocks that were hinted at are read between rounds, and the round that asks for them reads
 * nothing more; what was hinted at in vain costs its read and no more. */
Test(stream, reads_what_is_hinted, .timeout = 60)
{
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(2, &pool, NULL), 0);
    for (size_t back = 0; back < 2; back++) {
        if (!stream_open(&f, stream_backends[back], N_BLOCKS, 2)) {
            continue;
        }
        static const uint32_t hints[] = {1, 4, 9, 3}, blocks[] = {9, 4, 1};
        struct slu_stream_stats before, after;
        struct slu_err err;
        slu_stream_hint(f.stream, hints, 4, 8);
        do {
            slu_stream_poll(f.stream);
            slu_stream_stats(f.stream, &before);
        } while (before.guesses < 4);
        cr_assert_eq(stream_round_run(&f, pool, blocks, 3, &err), 0, "%s", err.text);
        slu_stream_stats(f.stream, &after);
        cr_assert_eq(after.foreseen, 3);
        cr_assert_eq(after.misses, 3);
        cr_assert_eq(after.flash_bytes, before.flash_bytes);
        slu_stream_hint(f.stream, NULL, 0, 0);
        cr_assert_eq(stream_round_run(&f, pool, hints, 4, &err), 0, "%s", err.text);
        slu_stream_stats(f.stream, &after);
        cr_assert_eq(after.hits, 3 + (after.foreseen == 3));
        cr_assert_eq(after.flash_bytes, before.flash_bytes);
        slu_stream_destroy(f.stream);
    }
    slu_pool_destroy(pool);
    stream_teardown(&f);
}

#define N_RAW ((N_BLOCKS + 2) / 3)

/* The raw blocks of the fixture. */
static void list_raw(uint32_t blocks[N_RAW])
{
    for (uint32_t i = 0; i < N_RAW; i++) {
        blocks[i] = 3 * i;
    }
}

/* Hints are read as many at a time as they allow, and no more than keep flash busy, unless they are
 * to go deep. */
Test(stream, reads_hints_as_deep_as_told, .timeout = 60)
{
    static const uint32_t allowed[] = {2, 100, SLU_HINTS_DEEP};
    static const uint32_t in_flight[] = {2, 4, 16};
    uint32_t hints[N_RAW];
    struct stream_fixture f;
    stream_setup(&f);
    f.params.slot_bytes = 1 << 20; /* four of them keep flash busy */
    list_raw(hints);
    for (size_t back = 0; back < 2; back++) {
        for (size_t i = 0; i < 3; i++) {
            if (!stream_open(&f, stream_backends[back], N_BLOCKS, 1)) {
                continue;
            }
            struct slu_stream_stats stats;
            slu_stream_hint(f.stream, hints, N_RAW, allowed[i]);
            slu_stream_stats(f.stream, &stats); /* before anybody takes completions */
            cr_assert_eq(stats.guesses, in_flight[i], "%zu: %d", i, (int)stats.guesses);
            slu_stream_destroy(f.stream);
        }
    }
    stream_teardown(&f);
}

/* A long round's blocks are read sixteen at a time, but the last two aren't queued beside others if
 * four are in flight; and with few slots, as many as there are. */
Test(stream, reads_the_last_of_a_round_apart, .timeout = 60)
{
    static const struct {
        uint32_t n, n_slots, in_flight;
    } cases[] = {{1, N_BLOCKS, 1}, {3, N_BLOCKS, 3},   {4, N_BLOCKS, 4},   {6, N_BLOCKS, 4},
                 {7, N_BLOCKS, 5}, {17, N_BLOCKS, 15}, {18, N_BLOCKS, 16}, {N_RAW, N_BLOCKS, 16},
                 {N_RAW, 6, 6},    {N_RAW, 3, 3}};
    uint32_t blocks[N_RAW];
    struct stream_fixture f;
    struct slu_err err;
    stream_setup(&f);
    f.params.slot_bytes = 1 << 20; /* four of them keep flash busy */
    list_raw(blocks);
    for (size_t i = 0; i < 2 * (sizeof cases / sizeof cases[0]); i++) {
        uint32_t n = cases[i / 2].n, in_flight = cases[i / 2].in_flight;
        if (!stream_open(&f, stream_backends[i % 2], cases[i / 2].n_slots, 1)) {
            continue;
        }
        cr_assert_eq(slu_stream_begin(f.stream, blocks, n, &err), 0, "%s", err.text);
        cr_expect_eq(f.stream->n_in_flight, in_flight, "%u of %u", f.stream->n_in_flight, n);
        finish_round(&f);
        slu_stream_destroy(f.stream);
    }
    stream_teardown(&f);
}

/* Compressed blocks are queued eight deep but for the last two, or as many as there is staging and
 * slots for: with few slots, what flash needs and one for each worker. */
Test(stream, reads_compressed_blocks_less_deep, .timeout = 60)
{
    static const struct {
        uint32_t n, n_slots, n_workers, in_flight;
    } cases[] = {{N_RAW - 1, N_BLOCKS, 12, 8}, {9, N_BLOCKS, 12, 7}, {6, N_BLOCKS, 12, 4},
                 {N_RAW - 1, N_BLOCKS, 2, 6},  {N_RAW - 1, 6, 1, 5}, {N_RAW - 1, 3, 1, 3}};
    uint32_t blocks[N_RAW - 1];
    struct stream_fixture f;
    struct slu_err err;
    stream_setup(&f);
    f.params.slot_bytes = 1 << 20; /* four of them keep flash busy */
    for (uint32_t i = 0; i < N_RAW - 1; i++) {
        blocks[i] = 3 * i + 1;
    }
    for (size_t i = 0; i < 2 * (sizeof cases / sizeof cases[0]); i++) {
        uint32_t in_flight = cases[i / 2].in_flight;
        if (!stream_open(&f, stream_backends[i % 2], cases[i / 2].n_slots,
                         cases[i / 2].n_workers)) {
            continue;
        }
        cr_assert_eq(slu_stream_begin(f.stream, blocks, cases[i / 2].n, &err), 0, "%s", err.text);
        cr_expect_eq(f.stream->n_in_flight, in_flight, "%u, not %u", f.stream->n_in_flight,
                     in_flight);
        finish_round(&f);
        slu_stream_destroy(f.stream);
    }
    stream_teardown(&f);
}

/* A worker that takes a block looks whether more have arrived, though there are blocks at hand: the
 * flash is not to rest because products take long. */
Test(stream, takes_completions_while_blocks_wait, .timeout = 60)
{
    uint32_t blocks[N_RAW];
    struct stream_fixture f;
    struct slu_err err;
    stream_setup(&f);
    f.params.slot_bytes = 1 << 20;
    list_raw(blocks);
    for (size_t back = 0; back < 2; back++) {
        if (!stream_open(&f, stream_backends[back], N_BLOCKS, 1)) {
            continue;
        }
        cr_assert_eq(slu_stream_begin(f.stream, blocks, N_RAW, &err), 0, "%s", err.text);
        cr_assert_eq(f.stream->n_in_flight, 16);
        usleep(500000); /* all of them have arrived, which shows once they are taken */
        for (int i = 0; i < 2; i++) {
            struct slu_stream_item item;
            cr_assert_eq(slu_stream_next(f.stream, 0, &item), 1);
            slu_stream_done(f.stream, &item);
        }
        /* Eight were taken twice, after which but two were left to be read, which wait. */
        cr_expect_leq(f.stream->n_in_flight, 4);
        finish_round(&f);
        slu_stream_destroy(f.stream);
    }
    stream_teardown(&f);
}

/* The same where only hints are left to be read and blocks are compressed: that the last of the
 * round's reads has come is noticed while the worker has blocks at hand, and hints follow it, or
 * if none fits it is at least known when that was. */
Test(stream, reads_hints_while_blocks_wait, .timeout = 60)
{
    static const uint32_t resident[] = {3, 6, 9}, round[] = {3, 6, 9, 1}, hints[] = {13, 16};
    struct stream_fixture f;
    struct slu_err err;
    struct slu_stream_stats stats;
    stream_setup(&f);
    for (size_t i = 0; i < 4; i++) {
        bool fits = i / 2;
        if (!stream_open(&f, stream_backends[i % 2], N_BLOCKS, 12)) { /* and staging for them */
            continue;
        }
        cr_assert_eq(slu_stream_begin(f.stream, resident, 3, &err), 0, "%s", err.text);
        finish_round(&f);
        cr_assert_eq(slu_stream_begin(f.stream, round, 4, &err), 0, "%s", err.text);
        f.stream->pace.read_ns = f.stream->pace.n_read = f.stream->pace.n_idle = 1;
        f.stream->pace.idle_ns = fits ? 1.5 : 0;
        slu_stream_hint_idle(f.stream, hints, 2, .75f);
        slu_stream_stats(f.stream, &stats);
        cr_assert_eq(stats.guesses, 0, "the round's block is on its way");
        usleep(500000); /* it has arrived */
        struct slu_stream_item item;
        cr_assert_eq(slu_stream_next(f.stream, 0, &item), 1);
        cr_expect_lt(item.index, 3, "what is resident comes first");
        slu_stream_done(f.stream, &item);
        slu_stream_stats(f.stream, &stats);
        cr_expect_eq(stats.guesses, fits);
        cr_expect_eq(f.stream->n_in_flight, fits);
        finish_round(&f);
        slu_stream_destroy(f.stream);
    }
    stream_teardown(&f);
}

/* Hints for idle time: none while nothing is known, none beside a read that a round waits for, no
 * more than fit, and none once the next round has begun. */
Test(stream, reads_hints_in_idle_time, .timeout = 60)
{
    static const uint32_t hints[] = {0, 3, 6, 9, 12, 15}, round = 18, other = 21; /* raw */
    struct stream_fixture f;
    struct slu_err err;
    struct slu_stream_stats stats;
    stream_setup(&f);
    for (size_t back = 0; back < 2; back++) {
        if (!stream_open(&f, stream_backends[back], N_BLOCKS, 1)) {
            continue;
        }
        slu_stream_hint_idle(f.stream, hints, 6, .75f);
        slu_stream_stats(f.stream, &stats);
        cr_assert_eq(stats.guesses, 0);
        cr_assert_eq(slu_stream_begin(f.stream, &round, 1, &err), 0, "%s", err.text);
        /* Three and a half blocks fit. */
        f.stream->pace.read_ns = f.stream->pace.n_read = f.stream->pace.n_idle = 1;
        f.stream->pace.idle_ns = 3.5;
        slu_stream_hint_idle(f.stream, hints, 6, .75f);
        slu_stream_stats(f.stream, &stats);
        cr_assert_eq(stats.guesses, 0, "its own block is on its way");
        finish_round(&f);
        for (int i = 0; i < 100; i++) {
            usleep(100);
            slu_stream_poll(f.stream);
        }
        slu_stream_stats(f.stream, &stats);
        cr_assert_eq(stats.guesses, 3);

        cr_assert_eq(slu_stream_begin(f.stream, &other, 1, &err), 0, "%s", err.text);
        f.stream->pace.idle_ns = 2.5 * f.stream->pace.n_idle;
        f.stream->pace.read_ns = f.stream->pace.n_read = 1;
        slu_stream_hint_idle(f.stream, hints + 3, 3, .75f);
        cr_assert_eq(f.stream->n_guesses_left, 2);
        cr_assert_eq(slu_stream_end(f.stream, &err), 0); /* without having taken it */
        cr_assert_eq(slu_stream_begin(f.stream, &round, 1, &err), 0, "%s", err.text);
        finish_round(&f);
        slu_stream_stats(f.stream, &stats);
        cr_assert_eq(stats.hits, 1);
        cr_assert_eq(stats.guesses, 3);
        slu_stream_destroy(f.stream);
    }
    stream_teardown(&f);
}

/* What the device delivers is told once a round, by the last block that it needs, without those
 * that were there before it; and a round that fails says nothing, nor the time after it. */
Test(stream, learns_what_the_device_delivers, .timeout = 60)
{
    static const uint32_t early[] = {0, 3, 6}, round[] = {0, 3, 6, 9, 12, 15, 18}; /* raw */
    struct stream_fixture f;
    struct slu_err err;
    struct slu_stream_stats stats;
    stream_setup(&f);
    for (size_t back = 0; back < 2; back++) {
        if (!stream_open(&f, stream_backends[back], N_BLOCKS, 1)) {
            continue;
        }
        const struct slu_pace *pace = &f.stream->pace;
        slu_stream_hint(f.stream, early, 3, 8);
        do {
            slu_stream_stats(f.stream, &stats);
        } while (stats.guesses < 3);
        usleep(20000); /* they have arrived, unnoticed */
        cr_assert_eq(slu_stream_begin(f.stream, round, 7, &err), 0, "%s", err.text);
        slu_stream_hint_idle(f.stream, NULL, 0, .75f);
        finish_round(&f);
        cr_assert_eq(pace->n_idle, 0);

        uint32_t bad = 21, good = 24;
        cr_assert_eq(slu_stream_begin(f.stream, &good, 1, &err), 0, "%s", err.text);
        cr_assert_eq(pace->n_read, 4, "%g", pace->n_read);
        cr_assert_eq(pace->n_idle, 1, "%g", pace->n_idle);
        finish_round(&f);
        slu_stream_inject_fault(f.stream, bad, 1);
        cr_assert_eq(slu_stream_begin(f.stream, &bad, 1, &err), 0, "%s", err.text);
        slu_stream_hint_idle(f.stream, NULL, 0, .75f);
        struct slu_stream_item item;
        cr_assert_lt(slu_stream_next(f.stream, 0, &item), 0);
        cr_assert_lt(slu_stream_end(f.stream, &err), 0);
        double n_idle = pace->n_idle, n_read = pace->n_read;
        cr_assert_eq(slu_stream_begin(f.stream, &bad, 1, &err), 0, "%s", err.text);
        finish_round(&f);
        cr_assert_eq(pace->n_idle, n_idle);
        cr_assert_eq(pace->n_read, n_read);
        slu_stream_destroy(f.stream);
    }
    stream_teardown(&f);
}

/* A guess that has arrived unnoticed when a round begins, and holds the only staging buffer, gives
 * it back to the block that the round asks for. */
Test(stream, guesses_give_back_staging, .timeout = 60)
{
    static const uint32_t hint = 1, block = 4; /* compressed */
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(1, &pool, NULL), 0);
    for (size_t back = 0; back < 2; back++) {
        if (!stream_open(&f, stream_backends[back], 1, 1)) {
            continue;
        }
        struct slu_err err;
        slu_stream_hint(f.stream, &hint, 1, 1);
        usleep(50000); /* the read is over, and nobody has looked */
        cr_assert_eq(stream_round_run(&f, pool, &block, 1, &err), 0, "%s", err.text);
        struct slu_stream_stats stats;
        slu_stream_stats(f.stream, &stats);
        cr_assert_eq(stats.guesses, 1);
        cr_assert_eq(stats.misses, 1);
        slu_stream_destroy(f.stream);
    }
    slu_pool_destroy(pool);
    stream_teardown(&f);
}

/* A resident block that is hinted at stays while others come and go. */
Test(stream, keeps_what_is_hinted)
{
    enum { N_SLOTS = 4 };
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(1, &pool, NULL), 0);
    if (!stream_open(&f, SLU_IO_PREAD, N_SLOTS, 1)) {
        cr_skip_test("no stream");
    }
    struct slu_err err;
    struct slu_stream_stats stats;
    for (uint32_t kept = 0; kept < 2; kept++) {
        uint64_t hits = kept;
        cr_assert_eq(stream_round_run(&f, pool, &kept, 1, &err), 0, "%s", err.text);
        if (kept) {
            slu_stream_hint_idle(f.stream, &kept, 1, .75f);
        } else {
            slu_stream_hint(f.stream, &kept, 1, 8);
        }
        for (uint32_t block = 2; block < N_BLOCKS; block++) {
            cr_assert_eq(stream_round_run(&f, pool, &block, 1, &err), 0, "%s", err.text);
        }
        cr_assert_eq(stream_round_run(&f, pool, &kept, 1, &err), 0, "%s", err.text);
        slu_stream_stats(f.stream, &stats);
        cr_assert_eq(stats.hits, hits + 1);
    }
    slu_stream_destroy(f.stream);
    slu_pool_destroy(pool);
    stream_teardown(&f);
}

/* A hint whose read fails, or that names no block, troubles nobody: the round that asks for the
 * block reads it again. */
Test(stream, forgives_failed_hints, .timeout = 60)
{
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(2, &pool, NULL), 0);
    for (size_t back = 0; back < 2; back++) {
        if (!stream_open(&f, stream_backends[back], N_BLOCKS, 2)) {
            continue;
        }
        static const uint32_t hints[] = {2, UINT32_MAX};
        static const uint32_t other = 5, wanted = 2;
        struct slu_err err;
        struct slu_stream_stats stats;
        slu_stream_inject_fault(f.stream, 2, 1);
        slu_stream_hint(f.stream, hints, 2, 8);
        do {
            slu_stream_poll(f.stream);
            slu_stream_stats(f.stream, &stats);
        } while (stats.guesses < 1);
        slu_stream_hint(f.stream, NULL, 0, 0);
        cr_assert_eq(stream_round_run(&f, pool, &other, 1, &err), 0, "%s", err.text);
        int e = stream_round_run(&f, pool, &wanted, 1, &err);
        cr_assert(e == 0 || e == SLU_EIO); /* it may still have been on its way when asked for */
        cr_assert_eq(stream_round_run(&f, pool, &wanted, 1, &err), 0, "%s", err.text);
        slu_stream_destroy(f.stream);
    }
    slu_pool_destroy(pool);
    stream_teardown(&f);
}
