#include <criterion/criterion.h>

#include "experts/pace.h"

#define US       1000u
#define DOUBTFUL .75f /* as many as come true */

/* n rounds of `reads` blocks each, that take read_us, the last of them the whole of it; each
 * followed by idle_us without any. */
static void rounds(struct slu_pace *pace, uint64_t *now, unsigned n, unsigned reads,
                   uint64_t read_us, uint64_t idle_us, bool is_watched)
{
    for (unsigned i = 0; i < n; i++) {
        slu_pace_begin(pace, *now, 0);
        slu_pace_watch(pace, is_watched);
        for (unsigned k = 0; k < reads; k++) {
            slu_pace_arrive(pace, *now + (k + 1) * read_us * US / reads, k + 1 == reads);
        }
        *now += (read_us + idle_us) * US;
    }
    slu_pace_begin(pace, *now, 0);
}

Test(pace, fits_what_the_device_delivers)
{
    static const struct {
        unsigned reads;
        uint64_t read_us, idle_us;
        uint32_t blocks;
    } cases[] = {
        {4, 4000, 500, 0},    /* a block a millisecond, and half of one */
        {4, 4000, 1400, 0},   /* one, often enough not */
        {4, 4000, 1600, 1},   /* one */
        {10, 4000, 2100, 5},  /* five and a quarter */
        {2, 20000, 9000, 0},  /* slow flash */
        {0, 3000, 2000, 0},   /* nothing was read: nobody knows how long that takes */
        {1, 100, 12345, 123}, /* nearly all in memory */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct slu_pace pace = {0};
        uint64_t now = 77;
        cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 0);
        rounds(&pace, &now, 20, cases[i].reads, cases[i].read_us, cases[i].idle_us, true);
        cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), cases[i].blocks, "case %zu: %u", i,
                     slu_pace_blocks(&pace, DOUBTFUL));
    }
}

/* The more of the guesses come true, the less of a block must fit. */
Test(pace, risks_what_mostly_comes_true)
{
    static const struct {
        uint64_t idle_us;
        float share;
        uint32_t blocks;
    } cases[] = {
        {1500, .93f, 2}, {1300, .93f, 1}, {450, .93f, 1}, {400, .93f, 0},
        {200, .97f, 1},  {150, .97f, 0},  {10, 1, 1},     {1400, .6f, 0},
        {1600, .6f, 1},  {3900, .6f, 3},  {3900, 0, 3},   {3900, 1, 4},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct slu_pace pace = {0};
        uint64_t now = 77;
        cr_expect_eq(slu_pace_blocks(&pace, 1), 0);
        rounds(&pace, &now, 20, 4, 4000, cases[i].idle_us, true);
        cr_expect_eq(slu_pace_blocks(&pace, cases[i].share), cases[i].blocks, "case %zu: %u", i,
                     slu_pace_blocks(&pace, cases[i].share));
    }
}

/* Stretches of another kind, as after a token's last layer, say nothing. */
Test(pace, goes_by_what_is_watched)
{
    struct slu_pace pace = {0};
    uint64_t now = 0;
    for (unsigned i = 0; i < 10; i++) {
        rounds(&pace, &now, 4, 2, 2000, 300, true);
        rounds(&pace, &now, 1, 2, 2000, 50000, false);
    }
    cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 0, "%u", slu_pace_blocks(&pace, DOUBTFUL));
}

/* Guesses that arrive while a round waits show what the device delivers; those that arrive between
 * rounds don't make it look faster. */
Test(pace, counts_guesses_while_a_round_waits)
{
    struct slu_pace pace = {0};
    uint64_t now = 0;
    for (unsigned i = 0; i < 10; i++, now += 5000 * US) {
        slu_pace_begin(&pace, now, 0);
        slu_pace_watch(&pace, true);
        slu_pace_arrive(&pace, now + 1000 * US, false);
        slu_pace_arrive(&pace, now + 2000 * US, true); /* one a millisecond, three idle */
        slu_pace_arrive(&pace, now + 2100 * US, false);
        slu_pace_arrive(&pace, now + 2200 * US, false);
    }
    slu_pace_begin(&pace, now, 0);
    cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 3, "%u", slu_pace_blocks(&pace, DOUBTFUL));
}

/* Whether a round counts may be said after all of its blocks have arrived. */
Test(pace, is_told_late_what_to_watch)
{
    struct slu_pace pace = {0};
    uint64_t now = 0;
    for (unsigned i = 0; i < 10; i++, now += 5000 * US) {
        slu_pace_begin(&pace, now, 0);
        slu_pace_arrive(&pace, now + 1000 * US, false);
        slu_pace_arrive(&pace, now + 2000 * US, true); /* one a millisecond, three idle */
        slu_pace_watch(&pace, true);
    }
    slu_pace_begin(&pace, now, 0);
    cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 3, "%u", slu_pace_blocks(&pace, DOUBTFUL));
}

/* Another device, another answer, within some tens of rounds. */
Test(pace, follows_the_device)
{
    struct slu_pace pace = {0};
    uint64_t now = 0;
    rounds(&pace, &now, 1000, 4, 2000, 2600, true);
    cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 5);
    rounds(&pace, &now, 100, 4, 20000, 2600, true);
    cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 0);
}

/* Rounds that find everything in memory have the whole time from their beginning to the next's. */
Test(pace, knows_rounds_that_read_nothing)
{
    struct slu_pace pace = {0};
    uint64_t now = 5;
    for (unsigned i = 0; i < 200; i++) {
        rounds(&pace, &now, 1, 4, 4000, 900, true);
        rounds(&pace, &now, 1, 0, 0, 4300, true);
    }
    cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 2, "%u",
                 slu_pace_blocks(&pace, DOUBTFUL)); /* of .9 and 4.3 ms */
}

/* Nothing is watched before the first round, and what is longer than any round isn't believed. */
Test(pace, is_not_misled_by_pauses)
{
    struct slu_pace pace = {0};
    uint64_t now = 1000000000000u;
    slu_pace_watch(&pace, true);
    rounds(&pace, &now, 20, 4, 4000, 500, true);
    cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 0, "%u", slu_pace_blocks(&pace, DOUBTFUL));
    rounds(&pace, &now, 1, 4, 4000, 60000000, true);
    cr_expect_lt(slu_pace_blocks(&pace, DOUBTFUL), 10, "%u", slu_pace_blocks(&pace, DOUBTFUL));
    rounds(&pace, &now, 300, 4, 4000, 500, true);
    cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 0, "%u", slu_pace_blocks(&pace, DOUBTFUL));
}

/* Blocks that were on their way when the round began are no measure of the device. */
Test(pace, leaves_out_what_was_on_its_way)
{
    struct slu_pace pace = {0};
    uint64_t now = 0;
    for (unsigned i = 0; i < 10; i++, now += 5000 * US) {
        slu_pace_begin(&pace, now + US, 3);
        slu_pace_watch(&pace, true);
        for (unsigned k = 1; k <= 3; k++) {
            slu_pace_arrive(&pace, now + 2 * US, false);
        }
        slu_pace_arrive(&pace, now + 1001 * US, true); /* one a millisecond, four idle */
    }
    slu_pace_begin(&pace, now + US, 0);
    cr_expect_eq(slu_pace_blocks(&pace, DOUBTFUL), 4, "%u", slu_pace_blocks(&pace, DOUBTFUL));
    slu_pace_watch(&pace, true);
    slu_pace_begin(&pace, now + 2 * US, 1); /* and if there is nothing else, it says nothing */
    slu_pace_watch(&pace, true);
    double n_read = pace.n_read;
    slu_pace_arrive(&pace, now + 3 * US, true);
    cr_expect_eq(pace.n_read, n_read);
}
