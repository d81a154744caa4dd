#include <criterion/criterion.h>

#include "experts/locked.h"

#define N_LAYERS  3u
#define N_EXPERTS 6u
#define MOVES_MAX 8u

static void choose(struct slu_locked *locked, uint64_t token, uint32_t layer, uint32_t a,
                   uint32_t b, float weight_a)
{
    const uint32_t experts[] = {a, b};
    const float weights[] = {weight_a, 1 - weight_a};
    slu_locked_observe(
        locked,
        &(struct slu_policy_choice){
            .token = token, .layer = layer, .n = 2, .experts = experts, .weights = weights});
}

static uint32_t count_in(const struct slu_locked *locked)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < N_LAYERS * N_EXPERTS; i++) {
        n += slu_locked_has(locked, i / N_EXPERTS, i % N_EXPERTS);
    }
    return n;
}

static struct slu_locked *create(uint32_t n_resident, float reads_per_token)
{
    struct slu_locked *locked =
        slu_locked_create(&(struct slu_locked_params){.n_layers = N_LAYERS,
                                                      .n_experts = N_EXPERTS,
                                                      .n_resident = n_resident,
                                                      .reads_per_token = reads_per_token});
    cr_assert_not_null(locked);
    return locked;
}

/* The first set is what the prompt gave most weight to, over all layers together. */
Test(locked, begins_with_the_prompt)
{
    struct slu_locked *locked = create(4, 0);
    for (uint64_t token = 0; token < 10; token++) {
        choose(locked, token, 0, 1, 2, 0.5f);
        choose(locked, token, 1, 3, 4, 0.9f);
        choose(locked, token, 2, (uint32_t)token % N_EXPERTS, ((uint32_t)token + 1) % N_EXPERTS,
               0.5f);
    }
    cr_assert_eq(count_in(locked), 0);
    slu_locked_choose(locked);
    cr_assert_eq(count_in(locked), 4);
    cr_assert(slu_locked_has(locked, 0, 1) && slu_locked_has(locked, 0, 2));
    cr_assert(slu_locked_has(locked, 1, 3) && !slu_locked_has(locked, 1, 4));
    slu_locked_destroy(locked);
}

/* When the text turns to other experts, the set follows; it never changes its size, and each move
 * brings in what was out for what was in. */
Test(locked, follows_the_text)
{
    struct slu_locked *locked = create(6, 0);
    struct slu_locked_move moves[MOVES_MAX];
    uint64_t token = 0;
    for (; token < 10; token++) {
        for (uint32_t layer = 0; layer < N_LAYERS; layer++) {
            choose(locked, token, layer, 0, 1, 0.5f);
        }
    }
    slu_locked_choose(locked);
    cr_assert(slu_locked_has(locked, 2, 0) && !slu_locked_has(locked, 2, 4));
    uint32_t n_moves = 0;
    for (; token < 60; token++) {
        for (uint32_t layer = 0; layer < N_LAYERS; layer++) {
            choose(locked, token, layer, 4, 5, 0.5f);
            uint32_t n = slu_locked_move(locked, moves, MOVES_MAX);
            for (uint32_t i = 0; i < n; i++) {
                cr_assert(slu_locked_has(locked, moves[i].in / N_EXPERTS, moves[i].in % N_EXPERTS));
                cr_assert_neq(moves[i].in, moves[i].out);
            }
            n_moves += n;
            cr_assert_eq(count_in(locked), 6);
        }
    }
    for (uint32_t layer = 0; layer < N_LAYERS; layer++) {
        cr_assert(slu_locked_has(locked, layer, 4) && slu_locked_has(locked, layer, 5));
    }
    cr_assert_eq(n_moves, 6, "%u moves", n_moves);
    slu_locked_destroy(locked);
}

/* A text that turns to other experts every now and then, two of each layer at a time. */
struct text {
    uint32_t n_layers, n_experts;
    uint64_t random, token;
};

static uint32_t draw(struct text *text)
{
    text->random = text->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((text->random >> 33) % text->n_experts);
}

/* The next n tokens, that turn every n_alike. Returns how many reads; what moved goes into *mix,
 * unless that is NULL. */
static uint64_t decode(struct slu_locked *locked, struct text *text, uint64_t n, uint64_t n_alike,
                       uint64_t *mix)
{
    struct slu_locked_move moves[MOVES_MAX];
    uint32_t a[8] = {0};
    uint64_t n_reads = 0;
    for (uint64_t i = 0; i < n; i++, text->token++) {
        for (uint32_t layer = 0; layer < text->n_layers; layer++) {
            a[layer] = i % n_alike ? a[layer] : draw(text);
            choose(locked, text->token, layer, a[layer], (a[layer] + 1) % text->n_experts, 0.6f);
            uint32_t n_moves = slu_locked_move(locked, moves, MOVES_MAX);
            for (uint32_t k = 0; k < n_moves && mix; k++) {
                *mix = *mix * 31 + moves[k].in * 1000 + moves[k].out;
            }
            n_reads += n_moves;
        }
    }
    return n_reads;
}

/* Neither a restless text nor a router without any locality can make the set be read over and over:
 * the reads stay near the rate that was asked for, where they are worth it. */
Test(locked, keeps_to_its_rate)
{
    static const float rates[] = {0.05f, 0.2f, 1};
    static const uint64_t alike[] = {1, 12};
    for (unsigned i = 0; i < 6; i++) {
        float rate = rates[i / 2];
        struct slu_locked *locked = create(9, rate);
        struct text text = {N_LAYERS, N_EXPERTS, .random = 11};
        slu_locked_choose(locked);
        double n_reads = (double)decode(locked, &text, 4000, alike[i % 2], NULL);
        cr_assert_leq(n_reads / 4000, 1.1 * rate);
        cr_assert(rate == 1 || alike[i % 2] == 1 || n_reads / 4000 >= 0.3 * rate);
        slu_locked_destroy(locked);
    }
}

static struct slu_locked *create_wide(struct text *text, uint64_t seed)
{
    struct slu_locked_params params = {.n_layers = 8, .n_experts = 32, .n_resident = 64};
    struct slu_locked *locked = slu_locked_create(&params);
    cr_assert_not_null(locked);
    *text = (struct text){params.n_layers, params.n_experts, .random = seed};
    decode(locked, text, 16, 1, NULL);
    slu_locked_choose(locked);
    return locked;
}

/* Where a router chooses by chance, what was read is worth no more than what it replaced, and less
 * than a tenth of what might be read is; where that changes, the set follows again. */
Test(locked, reads_little_in_vain)
{
    uint64_t n_vain = 0, n_worth = 0;
    for (uint64_t seed = 1; seed <= 8; seed++) {
        struct text text;
        struct slu_locked *locked = create_wide(&text, seed);
        n_vain += decode(locked, &text, 5000, 1, NULL);
        decode(locked, &text, 100, 25, NULL);
        n_worth += decode(locked, &text, 500, 25, NULL);
        slu_locked_destroy(locked);
    }
    /* The rate allows 13 times that. */
    cr_assert_leq(n_vain, 8 * 5000 / 4, "%d reads", (int)n_vain);
    cr_assert_geq(n_worth, 8 * 500 / 3, "%d reads", (int)n_worth);
}

/* A prompt amid a text shows one layer all of its tokens before it comes to the next. What it uses
 * of an expert that had left in favour of another layer's would seem to be lost over and over. */
Test(locked, is_not_misled_by_a_prompt)
{
    struct slu_locked_params params = {.n_layers = 2, .n_experts = 6, .n_resident = 2};
    struct slu_locked *locked = slu_locked_create(&params);
    struct slu_locked_move moves[MOVES_MAX] = {{0}};
    uint64_t token = 0;
    for (; token < 10; token++) {
        choose(locked, token, 0, 0, 5, 1);
        choose(locked, token, 1, 0, 5, 1);
    }
    slu_locked_choose(locked);
    for (; token < 30; token++) { /* the first layer turns to many experts, the second to one */
        choose(locked, token, 0, 1 + (uint32_t)token % 4, 5, 1);
        choose(locked, token, 1, token < 20 ? 0 : 1, 5, 1);
    }
    uint32_t n_moves = slu_locked_move(locked, moves, 1);
    cr_assert_eq(n_moves, 1);
    cr_assert_eq(moves[0].in, 7);
    cr_assert_eq(moves[0].out, 0);
    for (uint32_t layer = 0; layer < 2; layer++) {
        static const float scores[2][6] = {{0}, {0, 1, 1}};
        for (uint64_t i = 0; i < 64; i++) {
            choose(locked, token + i, layer, layer ? 2 : 0, 5, 1);
        }
        slu_locked_fill(locked, layer, scores[layer], 2 * layer);
    }
    for (token += 64, n_moves = 0; token < 200 && n_moves == 0; token++) {
        choose(locked, token, 1, 3, 5, 1);
        n_moves = slu_locked_move(locked, moves, MOVES_MAX);
    }
    cr_assert_leq(token, 110, "the set follows at token %d", (int)token);
    slu_locked_destroy(locked);
}

/* A set that has been reset does what a new one does. */
Test(locked, forgets_everything)
{
    uint64_t mixes[2] = {0};
    for (unsigned i = 0; i < 2; i++) {
        struct text text;
        struct slu_locked *locked = create_wide(&text, 3);
        if (i == 1) {
            decode(locked, &text, 1003, 1, NULL);
            slu_locked_reset(locked);
            text = (struct text){8, 32, .random = 3};
            decode(locked, &text, 16, 1, NULL);
            slu_locked_choose(locked);
        }
        decode(locked, &text, 200, 10, &mixes[i]);
        slu_locked_destroy(locked);
    }
    cr_assert_neq(mixes[0], 0);
    cr_assert_eq(mixes[0], mixes[1]);
}

/* A long quiet text pays for no more than a short burst of reads when the text turns restless. */
Test(locked, saves_up_so_much_and_no_more)
{
    struct slu_locked *locked = create(9, 0.2f);
    struct text text = {N_LAYERS, N_EXPERTS, .random = 11};
    slu_locked_choose(locked);
    decode(locked, &text, 20000, UINT64_MAX, NULL);
    double n_reads = (double)decode(locked, &text, 2000, 12, NULL);
    cr_assert_leq(n_reads, 0.2 * (2000 + 200), "%g reads", n_reads);
    slu_locked_destroy(locked);
}

/* A set of one, of all, and of more than there are. */
Test(locked, takes_any_size)
{
    static const uint32_t sizes[] = {1, N_LAYERS * N_EXPERTS, 1000};
    for (unsigned s = 0; s < 3; s++) {
        struct slu_locked *locked = create(sizes[s], 0);
        struct slu_locked_move moves[MOVES_MAX];
        uint32_t n = sizes[s] < N_LAYERS * N_EXPERTS ? sizes[s] : N_LAYERS * N_EXPERTS;
        cr_assert_eq(slu_locked_move(locked, moves, MOVES_MAX), 0);
        slu_locked_choose(locked);
        for (uint64_t token = 0; token < 50; token++) {
            choose(locked, token, token % N_LAYERS, token % N_EXPERTS, (token + 2) % N_EXPERTS, 1);
            uint32_t n_moves = slu_locked_move(locked, moves, MOVES_MAX);
            cr_assert(n == 1 || n_moves == 0);
            cr_assert_eq(count_in(locked), n);
        }
        slu_locked_destroy(locked);
    }
}
