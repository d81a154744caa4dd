#include <criterion/criterion.h>

#include <inttypes.h>
#include <jemalloc/jemalloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "stream_fixture.h"

/* For each back end, number of workers, and number of slots from one up to all. */
static void on_each_stream(void (*body)(struct stream_fixture *f, struct slu_pool *pool))
{
    static const uint32_t slots[] = {1, 2, 7, N_BLOCKS, 1000};
    static const uint32_t workers[] = {1, 2, 4};
    struct stream_fixture f;
    stream_setup(&f);
    for (size_t b = 0; b < 2; b++) {
        for (size_t w = 0; w < sizeof workers / sizeof workers[0]; w++) {
            struct slu_pool *pool;
            cr_assert_eq(slu_pool_create(workers[w], &pool, NULL), 0);
            for (size_t s = 0; s < sizeof slots / sizeof slots[0]; s++) {
                if (stream_open(&f, stream_backends[b], slots[s], workers[w])) {
                    body(&f, pool);
                    slu_stream_destroy(f.stream);
                    cr_assert_eq(slu_ledger_used(f.ledger), 0);
                }
            }
            slu_pool_destroy(pool);
        }
    }
    stream_teardown(&f);
}

static void run_rounds(struct stream_fixture *f, struct slu_pool *pool)
{
    struct slu_err err;
    uint32_t blocks[ROUND_MAX];
    for (uint32_t i = 0; i < ROUND_MAX; i++) {
        blocks[i] = (i * 7 + 3) % N_BLOCKS;
    }
    cr_assert_eq(stream_round_run(f, pool, blocks, ROUND_MAX, &err), 0, "%s", err.text);
    cr_assert_eq(stream_round_run(f, pool, blocks, ROUND_MAX, &err), 0, "%s", err.text);
    cr_assert_eq(stream_round_run(f, pool, blocks, 1, &err), 0, "%s", err.text);
    cr_assert_eq(stream_round_run(f, pool, blocks, 0, &err), 0, "%s", err.text);
    struct slu_stream_stats stats;
    slu_stream_stats(f->stream, &stats);
    cr_assert_eq(stats.hits + stats.misses, 2 * ROUND_MAX + 1);
    cr_assert_eq(stats.n_slots, f->params.n_slots < N_BLOCKS ? f->params.n_slots : N_BLOCKS);
    if (f->params.n_slots >= N_BLOCKS) {
        cr_assert_eq(stats.misses, ROUND_MAX);
        uint64_t bytes = 0;
        for (uint32_t i = 0; i < ROUND_MAX; i++) {
            bytes += (f->extents[blocks[i]].stored_bytes + 4095) / 4096 * 4096;
        }
        cr_assert_eq(stats.flash_bytes, bytes);
    } else {
        /* A round's residents are kept for it: as many hit as there are slots. */
        cr_assert_geq(stats.misses, ROUND_MAX + ROUND_MAX - f->params.n_slots);
        cr_assert_leq(stats.misses, ROUND_MAX + ROUND_MAX - f->params.n_slots + 1);
    }
}

/* Whatever the back end, the workers and the slots, a round hands out each block once, whole and
 * right; what stays in a slot is not read again. */
Test(stream, hands_out_each_block_once)
{
    on_each_stream(run_rounds);
}

/* What create charges is what was foretold, account by account, and a byte less of budget is
 * refused with nothing left behind. */
Test(stream, charges_as_planned)
{
    struct stream_fixture f;
    stream_setup(&f);
    static const uint32_t slots[] = {1, 3, N_BLOCKS, 1000};
    for (size_t b = 0; b < 2; b++) {
        for (size_t s = 0; s < 4; s++) {
            f.params.backend = stream_backends[b];
            f.params.n_slots = slots[s];
            f.params.n_workers = 1 + (uint32_t)s;
            f.params.n_borrowed_max = 11 * (uint32_t)s;
            f.params.small_bytes = 9000;
            f.params.n_small_blocks = s % 2 ? N_BLOCKS / 3 : 0;
            uint64_t accounts[SLU_ACCOUNTS];
            uint64_t plan = slu_stream_charge_bytes(&f.params, accounts);
            if (!stream_open(&f, stream_backends[b], slots[s], 1 + (uint32_t)s)) {
                continue;
            }
            cr_assert_eq(slu_ledger_used(f.ledger), plan);
            for (int i = 0; i < SLU_ACCOUNTS; i++) {
                cr_assert_eq(slu_ledger_account_used(f.ledger, (enum slu_account)i), accounts[i]);
            }
            slu_stream_destroy(f.stream);
            for (uint64_t less = 1; less <= plan; less = less * 4 + 1) {
                struct slu_ledger *tight = slu_ledger_create(plan - less ? plan - less : 1);
                f.params.ledger = tight;
                struct slu_err err;
                cr_assert_eq(slu_stream_create(&f.params, &f.stream, &err), SLU_EBUDGET);
                slu_ledger_destroy(tight);
            }
            struct slu_ledger *exact = slu_ledger_create(plan);
            f.params.ledger = exact;
            struct slu_err err;
            cr_assert_eq(slu_stream_create(&f.params, &f.stream, &err), 0, "%s", err.text);
            cr_assert_eq(slu_ledger_peak(exact), plan);
            slu_stream_destroy(f.stream);
            slu_ledger_destroy(exact);
            f.params.ledger = f.ledger;
        }
    }
    stream_teardown(&f);
}

static void fail_and_recover(struct stream_fixture *f, struct slu_pool *pool)
{
    struct slu_err err;
    uint32_t blocks[ROUND_MAX];
    for (uint32_t i = 0; i < ROUND_MAX; i++) {
        blocks[i] = i;
    }
    for (uint32_t bad = 0; bad < ROUND_MAX; bad += 10) { /* raw, then compressed ones */
        slu_stream_inject_fault(f->stream, bad, 1);
        int e = stream_round_run(f, pool, blocks, ROUND_MAX, &err);
        if (e == 0) {
            slu_stream_inject_fault(f->stream, bad, 0); /* resident: it wasn't read */
            continue;
        }
        cr_assert_eq(e, SLU_EIO);
        char what[64];
        snprintf(what, sizeof what, "block %" PRIu32 " at offset %" PRIu64, bad,
                 f->extents[bad].offset);
        cr_assert_not_null(strstr(err.text, what), "%s", err.text);
        cr_assert_not_null(strstr(err.text, f->path), "%s", err.text);
        cr_assert_eq(stream_round_run(f, pool, blocks, ROUND_MAX, &err), 0, "%s", err.text);
    }
}

/* A read that fails ends its round with a sentence that names block, file and offset, and the next
 * round finds the stream as good as new. */
Test(stream, survives_failed_reads)
{
    on_each_stream(fail_and_recover);
}

static void flip_byte(const struct stream_fixture *f, uint32_t block)
{
    FILE *file = fopen(f->path, "r+b");
    cr_assert_not_null(file);
    long at = (long)(f->extents[block].offset + f->extents[block].stored_bytes / 2);
    fseek(file, at, SEEK_SET);
    int byte = fgetc(file);
    fseek(file, at, SEEK_SET);
    fputc(byte ^ 0x10, file);
    fflush(file);
    fsync(fileno(file));
    fclose(file);
}

static void read_damage(struct stream_fixture *f, struct slu_pool *pool)
{
    struct slu_err err;
    uint32_t blocks[] = {5, 6, 7, 8, 9, 10, 11, 12};
    for (uint32_t bad = 9; bad <= 10; bad++) { /* a raw one, a compressed one */
        flip_byte(f, bad);
        for (int again = 0; again < 2; again++) {
            cr_assert_eq(stream_round_run(f, pool, blocks, 8, &err), SLU_EFORMAT);
            char what[64];
            snprintf(what, sizeof what, "block %" PRIu32 " at offset %" PRIu64, bad,
                     f->extents[bad].offset);
            cr_assert_not_null(strstr(err.text, what), "%s", err.text);
            cr_assert_not_null(strstr(err.text, "checksum"), "%s", err.text);
        }
        flip_byte(f, bad);
        /* Nothing damaged has stayed in the cache. */
        cr_assert_eq(stream_round_run(f, pool, blocks, 8, &err), 0, "%s", err.text);
        static const uint32_t others[] = {20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32,
                                          33, 34, 35, 36, 37, 38, 39, 13, 14, 15, 16, 17};
        cr_assert_eq(stream_round_run(f, pool, others, 25, &err), 0, "%s", err.text);
        if (f->params.n_slots >= N_BLOCKS) {
            return; /* they are all resident by now, so that no more damage would be seen */
        }
    }
}

/* Damaged bytes are never handed out, whichever codec, and a failed block doesn't stay. */
Test(stream, detects_damage)
{
    on_each_stream(read_damage);
}

/* A file cut short is an error of the round, not a crash. */
Test(stream, detects_truncation)
{
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(2, &pool, NULL), 0);
    cr_assert_eq(truncate(f.path, (off_t)f.extents[20].offset + 100), 0);
    for (size_t b = 0; b < 2; b++) {
        if (!stream_open(&f, stream_backends[b], 5, 2)) {
            continue;
        }
        struct slu_err err;
        static const uint32_t blocks[] = {19, 20, 21, 22};
        cr_assert_eq(stream_round_run(&f, pool, blocks, 4, &err), SLU_EIO);
        cr_assert_eq(stream_round_run(&f, pool, blocks, 1, &err), 0, "%s", err.text);
        slu_stream_destroy(f.stream);
    }
    slu_pool_destroy(pool);
    stream_teardown(&f);
}

/* A list that makes no sense, or names extents that can't be blocks, is refused, and leaves the
 * stream ready for a good one. */
Test(stream, refuses_bad_lists)
{
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(1, &pool, NULL), 0);
    f.extents[1].codec = 9;
    f.extents[2].stored_bytes = 0;
    f.extents[3].raw_bytes++; /* raw, of two sizes */
    f.extents[4].stored_bytes = UINT32_MAX;
    f.extents[5].raw_bytes = 0;
    stream_open(&f, SLU_IO_PREAD, 5, 1);
    struct slu_err err;
    for (uint32_t b = 1; b <= 5; b++) {
        uint32_t bad[] = {10, b};
        cr_assert_eq(slu_stream_begin(f.stream, bad, 2, &err), SLU_EFORMAT);
    }
    uint32_t large[] = {10, N_BLOCKS}, past[] = {10, N_EXTENTS}, twice[] = {10, 11, 10};
    cr_assert_eq(slu_stream_begin(f.stream, large, 2, &err), SLU_EFORMAT);
    cr_assert_eq(slu_stream_begin(f.stream, past, 2, &err), SLU_EINVAL);
    cr_assert_eq(slu_stream_begin(f.stream, twice, 3, &err), SLU_EINVAL);
    cr_assert_eq(slu_stream_begin(f.stream, twice, ROUND_MAX + 1, &err), SLU_EINVAL);
    cr_assert_eq(stream_round_run(&f, pool, twice, 2, &err), 0, "%s", err.text);
    slu_stream_destroy(f.stream);
    slu_pool_destroy(pool);
    stream_teardown(&f);
}

/* A round may be ended before its blocks are taken: what was read is dropped, and nothing hangs. */
Test(stream, ends_early)
{
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(1, &pool, NULL), 0);
    for (size_t b = 0; b < 2; b++) {
        if (!stream_open(&f, stream_backends[b], 6, 1)) {
            continue;
        }
        struct slu_err err;
        uint32_t blocks[20];
        for (uint32_t i = 0; i < 20; i++) {
            blocks[i] = 2 * i;
        }
        cr_assert_eq(slu_stream_begin(f.stream, blocks, 20, &err), 0);
        cr_assert_eq(slu_stream_end(f.stream, &err), 0);
        cr_assert_eq(slu_stream_begin(f.stream, blocks, 20, &err), 0);
        struct slu_stream_item item;
        cr_assert_eq(slu_stream_next(f.stream, 0, &item), 1);
        slu_stream_done(f.stream, &item);
        cr_assert_eq(slu_stream_end(f.stream, &err), 0);
        cr_assert_eq(stream_round_run(&f, pool, blocks, 20, &err), 0, "%s", err.text);
        slu_stream_destroy(f.stream);
    }
    slu_pool_destroy(pool);
    stream_teardown(&f);
}

static void take_one_and_leave(void *arg, unsigned thread, unsigned n_threads)
{
    struct stream_round *round = arg;
    struct slu_stream_item item;
    if (thread > 0) {
        stream_round_work(arg, thread, n_threads);
    } else if (slu_stream_next(round->stream, 0, &item) == 1) {
        usleep(3000); /* the other is waiting for the slot by now */
        slu_stream_done(round->stream, &item);
        atomic_fetch_add(&round->n_seen[item.index], 1);
    }
}

/* A worker that leaves for good with its block done doesn't leave the others waiting. */
Test(stream, lets_a_worker_leave, .timeout = 60)
{
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(2, &pool, NULL), 0);
    for (size_t b = 0; b < 2; b++) {
        if (!stream_open(&f, stream_backends[b], 1, 2)) {
            continue;
        }
        static const uint32_t blocks[] = {4, 5, 6, 7};
        struct stream_round round = {.stream = f.stream, .extents = f.extents, .blocks = blocks};
        cr_assert_eq(slu_stream_begin(f.stream, blocks, 4, NULL), 0);
        slu_pool_run(pool, take_one_and_leave, &round);
        cr_assert_eq(slu_stream_end(f.stream, NULL), 0);
        for (uint32_t i = 0; i < 4; i++) {
            cr_assert_eq(round.n_seen[i], 1);
        }
        slu_stream_destroy(f.stream);
    }
    slu_pool_destroy(pool);
    stream_teardown(&f);
}

/* Parameters that make no sense, and a file that isn't there, are refused without a leak. */
Test(stream, refuses_bad_params)
{
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_err err;
    struct slu_stream *stream = NULL;
    struct slu_stream_params bad = f.params;
    bad.n_slots = 0;
    cr_assert_eq(slu_stream_create(&bad, &stream, &err), SLU_EINVAL);
    bad = f.params;
    bad.path = "/nonexistent/pack.slu";
    cr_assert_eq(slu_stream_create(&bad, &stream, &err), SLU_ENOENT);
    bad = f.params;
    bad.slot_bytes = SIZE_MAX / 2;
    cr_assert_lt(slu_stream_create(&bad, &stream, &err), 0);
    cr_assert_null(stream);
    slu_stream_destroy(NULL);
    stream_teardown(&f);
}

/* With one worker the cache is an LRU over rounds to the block: a model of it, fed with the same
 * random rounds, with faults among them, counts the same hits. */
Test(stream, agrees_with_a_model)
{
    enum { N_SLOTS = 20, LIST = 8 };
    struct stream_fixture f;
    stream_setup(&f);
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(1, &pool, NULL), 0);
    for (size_t back = 0; back < 2; back++) {
        if (!stream_open(&f, stream_backends[back], N_SLOTS, 1)) {
            continue;
        }
        uint32_t round_of[N_BLOCKS] = {0}; /* last one that used the block; 0: not resident */
        uint64_t n_hits = 0, n_misses = 0;
        uint64_t random = 99;
        for (uint32_t now = 1; now < 300; now++) {
            uint32_t blocks[LIST];
            for (uint32_t i = 0; i < LIST; i++) {
                bool is_new = false;
                while (!is_new) {
                    random = random * 6364136223846793005u + 1442695040888963407u;
                    uint32_t a = (uint32_t)(random >> 33) % N_BLOCKS;
                    uint32_t b = (uint32_t)(random >> 13) % N_BLOCKS;
                    blocks[i] = a < b ? a : b; /* some more often than others */
                    is_new = true;
                    for (uint32_t j = 0; j < i; j++) {
                        is_new = is_new && blocks[j] != blocks[i];
                    }
                }
            }
            /* In one round all uses are at one time: only how many rounds' blocks stay is the
             * same for every order, so the model asks which blocks must and which can't hit. */
            uint32_t n_newer[N_BLOCKS], n_same[N_BLOCKS];
            for (uint32_t b = 0; b < N_BLOCKS; b++) {
                n_newer[b] = n_same[b] = 0;
                for (uint32_t o = 0; o < N_BLOCKS; o++) {
                    n_newer[b] += round_of[o] > round_of[b];
                    n_same[b] += round_of[o] == round_of[b];
                }
            }
            for (uint32_t i = 0; i < LIST; i++) {
                uint32_t b = blocks[i];
                if (round_of[b] != 0 && n_newer[b] + n_same[b] <= N_SLOTS) {
                    n_hits++;
                } else if (round_of[b] == 0 || n_newer[b] >= N_SLOTS) {
                    n_misses++;
                }
            }
            struct slu_err err;
            cr_assert_eq(stream_round_run(&f, pool, blocks, LIST, &err), 0, "%s", err.text);
            for (uint32_t i = 0; i < LIST; i++) {
                round_of[blocks[i]] = now;
            }
            struct slu_stream_stats stats;
            slu_stream_stats(f.stream, &stats);
            cr_assert_geq(stats.hits, n_hits);
            cr_assert_geq(stats.misses, n_misses);
            cr_assert_eq(stats.hits + stats.misses, (uint64_t)now * LIST);
        }
        cr_assert_gt(n_hits, 300); /* the model did decide */
        cr_assert_gt(n_misses, 300);
        slu_stream_destroy(f.stream);
    }
    slu_pool_destroy(pool);
    stream_teardown(&f);
}

static void soak(struct stream_fixture *f, struct slu_pool *pool)
{
    uint64_t random = 5 + f->params.n_slots * 3 + f->params.n_workers;
    struct slu_err err;
    for (int step = 0; step < 60; step++) {
        uint32_t blocks[N_BLOCKS];
        for (uint32_t i = 0; i < N_BLOCKS; i++) { /* a shuffle, of which a part is the list */
            random = random * 6364136223846793005u + 1442695040888963407u;
            uint32_t j = (uint32_t)((random >> 33) % (i + 1));
            blocks[i] = blocks[j];
            blocks[j] = i;
        }
        uint32_t n = (uint32_t)(random >> 20) % (ROUND_MAX + 1);
        bool is_faulty = step % 5 == 4;
        if (is_faulty) {
            slu_stream_inject_fault(f->stream, blocks[0], 1);
            slu_stream_inject_fault(f->stream, blocks[1], 2);
        }
        if (step % 3) { /* right and wrong ones, on their way or not when the round begins */
            if (step % 5) {
                slu_stream_hint(f->stream, blocks + step % 7, ROUND_MAX - 7, (uint32_t)step % 6);
            } else {
                slu_stream_hint_idle(f->stream, blocks + step % 7, ROUND_MAX - 7,
                                     (float)(step % 11) / 10);
            }
            if (step % 4) {
                slu_stream_poll(f->stream);
            } else {
                usleep(500); /* for guesses to arrive that nobody has looked at */
            }
        }
        int e = stream_round_run(f, pool, blocks, n, &err);
        cr_assert(e == 0 || (is_faulty && e == SLU_EIO), "%s", err.text);
        slu_stream_inject_fault(f->stream, blocks[0], 0);
        slu_stream_inject_fault(f->stream, blocks[1], 0);
    }
}

/* Long random use, with faults, on every back end, number of workers and of slots. */
Test(stream, survives_random_use)
{
    on_each_stream(soak);
}

/* What this thread has allocated so far, in bytes. */
static uint64_t allocated_bytes(void)
{
    uint64_t bytes = 0;
    size_t len = sizeof bytes;
    cr_assert_eq(mallctl("thread.allocated", &bytes, &len, NULL, 0), 0);
    return bytes;
}

/* Rounds allocate nothing, whether their blocks hit, miss, or fail. */
Test(stream, allocates_nothing)
{
    uint64_t before = allocated_bytes();
    void *volatile probe = malloc(100);
    bool is_counted = allocated_bytes() > before;
    free(probe);
    if (!is_counted) {
        fprintf(stderr, "skipped: malloc isn't jemalloc's in this build\n");
        cr_skip_test("allocations can't be counted");
    }
    struct stream_fixture f;
    stream_setup(&f);
    uint32_t blocks[ROUND_MAX];
    for (uint32_t i = 0; i < ROUND_MAX; i++) {
        blocks[i] = i;
    }
    for (size_t b = 0; b < 2; b++) {
        if (!stream_open(&f, stream_backends[b], 10, 1)) {
            continue;
        }
        before = allocated_bytes();
        for (uint32_t step = 0; step < 20; step++) {
            struct slu_stream_item item;
            slu_stream_inject_fault(f.stream, 3, step % 5 == 4);
            slu_stream_begin(f.stream, blocks, ROUND_MAX, NULL);
            while (slu_stream_next(f.stream, 0, &item) == 1) {
                slu_stream_done(f.stream, &item);
            }
            slu_stream_end(f.stream, NULL);
        }
        uint64_t after = allocated_bytes();
        cr_assert_eq(after - before, 0);
        slu_stream_destroy(f.stream);
    }
    stream_teardown(&f);
}
