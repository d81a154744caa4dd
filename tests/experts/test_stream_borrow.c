/* Slots in memory that the stream has for a while. */
#include <criterion/criterion.h>

#include <stdlib.h>
#include <string.h>

#include "stream_fixture.h"

#define N_OWN      4u
#define N_BORROWED 20u
#define SLOT       ((size_t)(SLOT_BYTES + 4095) / 4096 * 4096)
#define LENT_BYTES (N_BORROWED * SLOT + 5000) /* neither whole slots nor whole pages */
#define MARK       0x5a

struct loan {
    struct stream_fixture f;
    struct slu_pool *pool;
    unsigned char *memory; /* [LENT_BYTES] */
    size_t n_own_bytes;    /* at its start, which the stream may not touch */
};

static bool loan_open(struct loan *l, enum slu_io_backend backend)
{
    stream_setup(&l->f);
    l->f.params.n_borrowed_max = N_BORROWED;
    cr_assert_eq(slu_pool_create(2, &l->pool, NULL), 0);
    l->memory = malloc(LENT_BYTES);
    l->n_own_bytes = LENT_BYTES;
    memset(l->memory, MARK, LENT_BYTES);
    return stream_open(&l->f, backend, N_OWN, 2);
}

static void loan_close(struct loan *l)
{
    free(l->memory);
    slu_pool_destroy(l->pool);
    stream_teardown(&l->f);
}

static void lend(struct loan *l, size_t bytes, uint32_t n_slots)
{
    l->n_own_bytes = LENT_BYTES - bytes;
    cr_assert_eq(slu_stream_borrow(l->f.stream, l->memory + l->n_own_bytes, bytes),
                 n_slots - N_OWN);
    memset(l->memory, MARK, l->n_own_bytes);
    struct slu_stream_stats stats;
    slu_stream_stats(l->f.stream, &stats);
    cr_assert_eq(stats.n_slots, n_slots);
}

/* Runs a round over blocks first .. first + n - 1, and says how many were in memory. */
static uint64_t hits_from(struct loan *l, uint32_t first, uint32_t n)
{
    struct slu_stream_stats before, after;
    struct slu_err err;
    uint32_t blocks[ROUND_MAX];
    for (uint32_t i = 0; i < n; i++) {
        blocks[i] = first + i;
    }
    slu_stream_stats(l->f.stream, &before);
    cr_assert_eq(stream_round_run(&l->f, l->pool, blocks, n, &err), 0, "%s", err.text);
    slu_stream_stats(l->f.stream, &after);
    for (size_t i = 0; i < l->n_own_bytes; i++) {
        cr_assert_eq(l->memory[i], MARK, "byte %zu of %zu", i, l->n_own_bytes);
    }
    return after.hits - before.hits;
}

static uint64_t hits_of(struct loan *l, uint32_t n)
{
    return hits_from(l, 0, n);
}

/* What is borrowed keeps blocks like any other slot; what is given back, in part or whole, is
 * touched no more. */
Test(stream_borrow, keeps_and_gives_back, .timeout = 60)
{
    for (size_t back = 0; back < 2; back++) {
        struct loan l;
        if (loan_open(&l, stream_backends[back])) {
            lend(&l, LENT_BYTES, N_OWN + N_BORROWED);
            cr_assert_eq(hits_of(&l, N_OWN + N_BORROWED), 0);
            cr_assert_eq(hits_of(&l, N_OWN + N_BORROWED), N_OWN + N_BORROWED);
            lend(&l, 7 * SLOT + 4096, N_OWN + 7);
            cr_assert_eq(hits_of(&l, N_OWN + N_BORROWED), N_OWN + 7);
            lend(&l, SLOT - 1, N_OWN);
            cr_assert_eq(hits_of(&l, N_OWN + N_BORROWED), N_OWN);
            lend(&l, 0, N_OWN);
            lend(&l, 12 * SLOT + 4096, N_OWN + 12);
            hits_of(&l, N_OWN + 12);
            cr_assert_eq(hits_of(&l, N_OWN + 12), N_OWN + 12);
            slu_stream_destroy(l.f.stream);
        }
        loan_close(&l);
    }
}

/* Memory elsewhere, once all of the other was given back; and never more slots than blocks. */
Test(stream_borrow, from_another_owner, .timeout = 60)
{
    struct loan l;
    cr_assert(loan_open(&l, SLU_IO_PREAD));
    lend(&l, 3 * SLOT + 4096, N_OWN + 3);
    hits_of(&l, N_OWN + 3);
    lend(&l, 0, N_OWN);
    unsigned char *other = malloc(6 * SLOT);
    slu_stream_borrow(l.f.stream, other, 6 * SLOT);
    hits_of(&l, N_OWN + 5);
    cr_assert_eq(hits_of(&l, N_OWN + 5), N_OWN + 5);
    slu_stream_borrow(l.f.stream, NULL, 0);
    free(other);
    hits_of(&l, N_OWN + 5);
    slu_stream_destroy(l.f.stream);

    l.f.params.n_borrowed_max = 2 * N_BLOCKS;
    cr_assert(stream_open(&l.f, SLU_IO_PREAD, N_BLOCKS - 2, 2));
    l.n_own_bytes = 0;
    cr_assert_eq(slu_stream_borrow(l.f.stream, l.memory, LENT_BYTES), 2);
    hits_of(&l, ROUND_MAX);
    slu_stream_destroy(l.f.stream);
    loan_close(&l);
}

/* Slots of its own whose memory others use for a while: of what was there, that stays which was
 * used last, and rounds touch none of it. */
Test(stream_borrow, lends_slots_of_its_own, .timeout = 60)
{
    enum { N_LENDER = 16, N_LEFT = 12, BYTES = 4 * SLOT - 100 };
    for (size_t back = 0; back < 2; back++) {
        struct loan l = {0};
        if (loan_open(&l, stream_backends[back])) {
            slu_stream_destroy(l.f.stream);
            cr_assert(stream_open(&l.f, stream_backends[back], N_LENDER, 2));
            cr_assert_eq(slu_stream_lendable_bytes(&l.f.params), 4 * SLOT);
            l.n_own_bytes = 0;
            for (int loan = 0; loan < 2; loan++) {
                hits_of(&l, N_LENDER);
                cr_assert_eq(hits_of(&l, N_LENDER), N_LENDER);
                hits_of(&l, N_LEFT); /* the last ones are used longest ago */
                unsigned char *memory = slu_stream_lend(l.f.stream, BYTES);
                cr_assert_eq((uintptr_t)memory % 4096, 0);
                memset(memory, MARK, BYTES);
                struct slu_stream_stats stats;
                slu_stream_stats(l.f.stream, &stats);
                cr_assert_eq(stats.n_slots, N_LEFT);
                cr_assert_eq(hits_of(&l, N_LEFT), N_LEFT);
                cr_assert_eq(slu_stream_lend(l.f.stream, BYTES), memory);
                cr_assert_eq(hits_of(&l, N_LENDER), N_LEFT);
                for (size_t i = 0; i < BYTES; i++) {
                    cr_assert_eq(memory[i], MARK, "byte %zu", i);
                }
                cr_assert_null(slu_stream_lend(l.f.stream, 0));
            }
            slu_stream_borrow(l.f.stream, l.memory, 3 * SLOT + 4096);
            hits_of(&l, N_LENDER + 3);
            cr_assert_eq(hits_of(&l, N_LENDER + 3), N_LENDER + 3);
            slu_stream_destroy(l.f.stream);
        }
        loan_close(&l);
    }
}

/* Free slots that stay are filled before those that leave; and where none is free, what leaves is
 * what is worth least (here: used longest ago), wherever it is, but for what is kept. */
Test(stream_borrow, keeps_the_best, .timeout = 60)
{
    struct loan l;
    cr_assert(loan_open(&l, SLU_IO_PREAD));
    lend(&l, LENT_BYTES, N_OWN + N_BORROWED);
    hits_of(&l, N_OWN + 6);
    lend(&l, 6 * SLOT + 4096, N_OWN + 6);
    cr_assert_eq(hits_of(&l, N_OWN + 6), N_OWN + 6);

    lend(&l, LENT_BYTES, N_OWN + N_BORROWED);
    for (uint32_t block = 0; block < N_OWN + N_BORROWED; block++) {
        hits_from(&l, block, 1);
    }
    slu_stream_keep(l.f.stream, 2, true);
    lend(&l, 5 * SLOT + 4096, N_OWN + 5);
    cr_assert_eq(hits_from(&l, 2, 1), 1);
    cr_assert_eq(hits_from(&l, N_BORROWED - 4, 8), 8);
    lend(&l, 0, N_OWN);
    cr_assert_eq(hits_from(&l, 2, 1), 1);
    slu_stream_destroy(l.f.stream);
    loan_close(&l);
}

/* Memory that may have to be provided first is taken into use bit by bit, but at least a slot. */
Test(stream_borrow, opens_a_few_at_a_time)
{
    enum { MIB = 1 << 20, N_MOST = 10 };
    static const struct {
        size_t slot_bytes;
        uint32_t n[3];
        bool touches;
    } cases[] = {
        {8 * MIB, {3, 6, 9}, false}, {40 * MIB, {1, 2, 3}, false}, {8 * MIB, {10, 10, 10}, true}};
    struct stream_fixture f;
    stream_setup(&f);
    f.params.n_borrowed_max = N_MOST;
    void *memory = aligned_alloc(4096, N_MOST * (size_t)(40 * MIB)); /* address space */
    cr_assert_not_null(memory);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        f.params.slot_bytes = cases[i].slot_bytes;
        f.params.touch_slots = cases[i].touches;
        cr_assert(stream_open(&f, SLU_IO_PREAD, 2, 1));
        for (int call = 0; call < 3; call++) {
            cr_expect_eq(slu_stream_borrow(f.stream, memory, N_MOST * cases[i].slot_bytes),
                         cases[i].n[call]);
        }
        cr_expect_eq(slu_stream_borrow(f.stream, NULL, 0), 0);
        slu_stream_destroy(f.stream);
    }
    free(memory);
    stream_teardown(&f);
}

/* Reads that a hint began are waited for before their memory is given back; what they brought is
 * read again where it is asked for. */
Test(stream_borrow, waits_for_what_is_in_flight, .timeout = 60)
{
    for (size_t back = 0; back < 2; back++) {
        struct loan l;
        if (loan_open(&l, stream_backends[back])) {
            for (uint32_t keep = 0; keep <= N_BORROWED; keep += 5) {
                uint32_t hints[N_OWN + N_BORROWED];
                lend(&l, LENT_BYTES, N_OWN + N_BORROWED);
                for (uint32_t i = 0; i < N_OWN + N_BORROWED; i++) {
                    hints[i] = (i + keep) % N_BLOCKS;
                }
                slu_stream_hint(l.f.stream, hints, N_OWN + N_BORROWED, SLU_HINTS_DEEP);
                lend(&l, keep * SLOT + 4096, N_OWN + keep);
                hits_of(&l, N_OWN + N_BORROWED);
                slu_stream_hint(l.f.stream, NULL, 0, 0);
            }
            slu_stream_destroy(l.f.stream);
        }
        loan_close(&l);
    }
}
