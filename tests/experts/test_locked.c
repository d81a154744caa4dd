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

static uint32_t draw(uint64_t *random)
{
    *random = *random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((*random >> 33) % N_EXPERTS);
}

/* Tokens of a text that turns to other experts every `n_alike` tokens. Returns how many reads. */
static uint64_t decode(struct slu_locked *locked, uint64_t *random, uint64_t *token, uint64_t n,
                       uint64_t n_alike)
{
    struct slu_locked_move moves[MOVES_MAX];
    uint32_t a[N_LAYERS] = {0};
    uint64_t n_reads = 0;
    for (uint64_t i = 0; i < n; i++, (*token)++) {
        for (uint32_t layer = 0; layer < N_LAYERS; layer++) {
            a[layer] = i % n_alike ? a[layer] : draw(random);
            choose(locked, *token, layer, a[layer], (a[layer] + 1) % N_EXPERTS, 0.6f);
            n_reads += slu_locked_move(locked, moves, MOVES_MAX);
        }
    }
    return n_reads;
}

/* A restless text can't make the set be read over and over: the reads stay near the rate that was
 * asked for. */
Test(locked, keeps_to_its_rate)
{
    static const float rates[] = {0.05f, 0.1f, 0.2f};
    for (unsigned r = 0; r < 3; r++) {
        struct slu_locked *locked = create(9, rates[r]);
        uint64_t random = 11, token = 0;
        slu_locked_choose(locked);
        uint64_t n_reads = decode(locked, &random, &token, 4000, 12);
        cr_assert_leq((double)n_reads / 4000, 1.1 * rates[r]);
        cr_assert_geq((double)n_reads / 4000, 0.3 * rates[r]);
        slu_locked_destroy(locked);
    }
}

/* Where a router chooses by chance, what was read is worth no more than what it replaced. */
Test(locked, reads_little_in_vain)
{
    struct slu_locked *locked = create(9, 1);
    uint64_t random = 5, token = 0;
    slu_locked_choose(locked);
    uint64_t n_vain = decode(locked, &random, &token, 1000, 1);
    cr_assert_leq(n_vain, 250, "%u reads", (unsigned)n_vain);
    /* But it notices when that changes. */
    decode(locked, &random, &token, 500, 25);
    uint64_t n_worth = decode(locked, &random, &token, 500, 25);
    cr_assert_geq(n_worth, 50, "%u reads", (unsigned)n_worth);
    slu_locked_destroy(locked);
}

/* A long quiet text pays for no more than a short burst of reads when the text turns restless. */
Test(locked, saves_up_so_much_and_no_more)
{
    struct slu_locked *locked = create(9, 0.2f);
    uint64_t random = 11, token = 0;
    slu_locked_choose(locked);
    decode(locked, &random, &token, 20000, UINT64_MAX);
    uint64_t n_reads = decode(locked, &random, &token, 2000, 12);
    cr_assert_leq((double)n_reads, 0.2 * (2000 + 200), "%u reads", (unsigned)n_reads);
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
