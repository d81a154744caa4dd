/* Slots of two sizes: how they lie, and what a stream keeps in them. */
#include <criterion/criterion.h>

#include <string.h>

#include "experts/slots.h"
#include "stream_fixture.h"

#define PAGE 4096u

/* Any stretch takes what its slots take, and has its share of small ones. */
Test(slots, lie_mixed)
{
    static const struct slu_slots cases[] = {
        {3 * PAGE, 2 * PAGE, 1, 2},  {5 * PAGE, PAGE, 27, 64}, {3 * PAGE, 2 * PAGE, 63, 64},
        {3 * PAGE, 2 * PAGE, 1, 50}, {3 * PAGE, 0, 0, 64},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const struct slu_slots *s = &cases[c];
        for (uint32_t lo = 0; lo < 70; lo++) {
            size_t bytes = 0;
            uint32_t n_small = 0;
            for (uint32_t hi = lo; hi < 200; hi++) {
                double share = (double)(hi - lo) * s->n_small / s->n_of;
                cr_assert(n_small > share - 1 && n_small < share + 1);
                cr_assert_eq(slu_slots_bytes(s, lo, hi), bytes);
                cr_assert_eq(slu_slots_fit(s, lo, bytes, 300), hi - lo);
                bytes += slu_slots_is_small(s, hi) ? s->small : s->large;
                n_small += slu_slots_is_small(s, hi);
                cr_assert_eq(slu_slots_fit(s, lo, bytes - 1, 300), hi - lo);
            }
            cr_assert_eq(slu_slots_fit(s, lo, UINT64_MAX, 300), 300);
        }
        cr_expect_eq(slu_slots_small(s, 2 * s->n_of), 2 * s->n_small);
        cr_expect_eq(slu_slots_is_small_block(s, s->small), s->n_small > 0);
        cr_expect_not(slu_slots_is_small_block(s, s->small + 1));
    }
    cr_expect(slu_slots_round(1) == PAGE && slu_slots_round(PAGE) == PAGE);
    cr_expect_eq(slu_slots_round(SIZE_MAX), (size_t)PTRDIFF_MAX / 4 / PAGE * PAGE);
    const struct slu_slots huge = {SIZE_MAX / 8 / PAGE * PAGE, PAGE, 1, 3};
    cr_expect_eq(slu_slots_bytes(&huge, 0, UINT32_MAX), (size_t)PTRDIFF_MAX / 4);
}

enum { SMALL_BYTES = 12000, SMALL_SLOT = 3 * PAGE, N_SLOTS = 20, N_SMALL_SLOTS = 8 };

/* The blocks that fit the pages of SMALL_BYTES are the file's last ones; some are larger. */
static uint32_t count_small(const struct stream_fixture *f)
{
    uint32_t n = 0;
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        n += f->extents[b].raw_bytes <= SMALL_SLOT;
    }
    return n;
}

static void open_two_sizes(struct stream_fixture *f, struct slu_pool **ret_pool, uint32_t n_slots)
{
    stream_setup(f);
    f->params.small_bytes = SMALL_BYTES;
    f->params.n_small_blocks = count_small(f);
    f->params.n_borrowed_max = N_BLOCKS;
    cr_assert_eq(slu_pool_create(2, ret_pool, NULL), 0);
    cr_assert(stream_open(f, SLU_IO_PREAD, n_slots, 2));
}

static void close_two_sizes(struct stream_fixture *f, struct slu_pool *pool)
{
    slu_stream_destroy(f->stream);
    slu_pool_destroy(pool);
    stream_teardown(f);
}

/* Of n_large large blocks and n_small small ones, how many are found the second time. */
static uint64_t found(struct stream_fixture *f, struct slu_pool *pool, uint32_t n_large,
                      uint32_t n_small)
{
    struct slu_stream_stats before, after;
    struct slu_err err;
    uint32_t blocks[ROUND_MAX], n = n_large + n_small;
    for (uint32_t i = 0; i < n; i++) {
        blocks[i] = i < n_large ? i : N_BLOCKS - n + i;
    }
    for (int round = 0; round < 2; round++) {
        slu_stream_stats(f->stream, &before);
        cr_assert_eq(stream_round_run(f, pool, blocks, n, &err), 0, "%s", err.text);
    }
    slu_stream_stats(f->stream, &after);
    return after.hits - before.hits;
}

/* Each size has its own slots, and as many as its blocks' share. */
Test(slots, keep_blocks_of_their_size)
{
    struct stream_fixture f;
    struct slu_pool *pool;
    open_two_sizes(&f, &pool, N_SLOTS);
    cr_assert_eq(N_SLOTS * count_small(&f) / N_BLOCKS, N_SMALL_SLOTS);
    uint32_t n_large = N_SLOTS - N_SMALL_SLOTS;
    cr_expect_eq(found(&f, pool, n_large, N_SMALL_SLOTS), N_SLOTS);
    cr_expect_eq(found(&f, pool, n_large - 2, N_SMALL_SLOTS + 2), n_large - 2 + N_SMALL_SLOTS);
    cr_expect_eq(found(&f, pool, n_large + 2, N_SMALL_SLOTS - 2), n_large + N_SMALL_SLOTS - 2);
    close_two_sizes(&f, pool);
}

/* What is borrowed has both sizes too, and what goes back makes room in both. */
Test(slots, are_borrowed_in_both_sizes)
{
    enum { LENT_BYTES = 100000 };
    struct stream_fixture f;
    struct slu_pool *pool;
    open_two_sizes(&f, &pool, N_SLOTS);
    uint32_t n_lent = slu_stream_borrowed_slots(&f.params, LENT_BYTES);
    cr_expect(n_lent > LENT_BYTES / (5 * PAGE) && n_lent < LENT_BYTES / (3 * PAGE));
    unsigned char *memory = aligned_alloc(PAGE, LENT_BYTES / PAGE * PAGE + PAGE);
    cr_assert_eq(slu_stream_borrow(f.stream, memory, LENT_BYTES / PAGE * PAGE), n_lent);
    uint32_t n_all = N_SLOTS + n_lent, n_small = n_all * count_small(&f) / N_BLOCKS;
    cr_assert_leq(n_all, ROUND_MAX);
    cr_expect_eq(found(&f, pool, n_all - n_small, n_small), n_all);
    for (uint32_t n = n_lent; n-- > 0;) {
        size_t bytes = LENT_BYTES / PAGE * PAGE * n / n_lent;
        uint32_t n_left =
            slu_stream_borrow(f.stream, memory + LENT_BYTES / PAGE * PAGE - bytes, bytes);
        cr_expect(n_left <= n && n_left + 1 >= n);
        uint32_t n_now = N_SLOTS + n_left;
        n_small = n_now * count_small(&f) / N_BLOCKS;
        cr_expect_eq(found(&f, pool, n_now - n_small, n_small), n_now);
    }
    slu_stream_borrow(f.stream, NULL, 0);
    free(memory);
    close_two_sizes(&f, pool);
}

/* What is lent takes both, a quarter of them at most. */
Test(slots, are_lent_in_both_sizes)
{
    struct stream_fixture f;
    struct slu_pool *pool;
    open_two_sizes(&f, &pool, N_SLOTS);
    size_t most = slu_stream_lendable_bytes(&f.params);
    cr_expect(most > 3 * SMALL_SLOT && most <= 5 * slu_slots_round(SLOT_BYTES));
    for (size_t bytes = most; bytes > 0; bytes = bytes > 3 * PAGE ? bytes - 3 * PAGE : 0) {
        memset(slu_stream_lend(f.stream, bytes), 0x5a, bytes);
        struct slu_stream_stats stats;
        slu_stream_stats(f.stream, &stats);
        uint32_t n = stats.n_slots, n_small = n * count_small(&f) / N_BLOCKS;
        cr_expect(n >= N_SLOTS - N_SLOTS / 4 && n < N_SLOTS);
        cr_expect_eq(found(&f, pool, n - n_small, n_small), n);
    }
    slu_stream_lend(f.stream, 0);
    cr_expect_eq(found(&f, pool, N_SLOTS - N_SMALL_SLOTS, N_SMALL_SLOTS), N_SLOTS);
    close_two_sizes(&f, pool);
}

/* Where one of the sizes would have no slot, there is only the larger one. */
Test(slots, are_of_one_size_where_few)
{
    static const uint32_t n_slots[] = {1, 2, 3, N_BLOCKS};
    for (size_t i = 0; i < sizeof n_slots / sizeof *n_slots; i++) {
        struct stream_fixture f;
        struct slu_pool *pool;
        open_two_sizes(&f, &pool, n_slots[i]);
        struct slu_stream_params one_size = f.params;
        one_size.n_small_blocks = 0;
        bool is_alike =
            slu_stream_charge_bytes(&one_size, NULL) == slu_stream_charge_bytes(&f.params, NULL);
        uint32_t n = n_slots[i] < ROUND_MAX ? n_slots[i] : ROUND_MAX;
        cr_expect_eq(found(&f, pool, 0, n_slots[i] > 2 ? 1 : n), n_slots[i] > 2 ? 1 : n);
        cr_expect(n_slots[i] > 2 || is_alike);
        close_two_sizes(&f, pool);
    }
}
