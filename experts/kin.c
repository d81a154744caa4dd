#include "experts/kin.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/*
 * What goes into a rank, for each expert of the layer:
 *
 *   near, far   its share among the tokens that followed those like the newest one, the vote of a
 *               follower halved with every 4 (16) tokens of distance
 *   next        its share among the direct followers alone
 *   used        its count, halved every 2 (64) tokens, as a share
 *   weight      the same of the router's weights, halved every 8 tokens
 *   last        tokens since its last use
 *
 * The rank is a sum of their logarithms, so a product of powers. The exponents were found by random
 * search for the best hit rates over two recorded traces and seven that were made from them (fewer
 * experts a token, every other layer, the text backwards), each at three cache sizes, and were
 * found to serve the traces of one model about as well when searched on the other's alone. They are
 * rounded, for the optimum is flat.
 */
#define NEAR_POWER    1.4f
#define FAR_POWER     -0.7f
#define NEXT_POWER    0.35f
#define NEXT_POWER_X  -0.2f
#define WEIGHT_POWER  0.9f
#define LONG_POWER    -0.35f
#define SHORT_POWER   -0.1f
#define SHORT_POWER_X -0.35f
#define LAST_POWER    -0.55f
#define LAST_POWER_X  -0.4f
#define NOW_BONUS     1.7f
#define NOW_BONUS_X   0.15f

#define LIKENESS_LOG2 11.5f   /* a token like the newest in all weighs 2 to this over one unlike */
#define LIKENESS_KEPT 0.966f  /* of the overlap in the layer before: halved in 20 layers */
#define NEAR_KEPT     0.8409f /* 2^(-1/4) */
#define FAR_KEPT      0.9576f /* 2^(-1/16) */
#define SHORT_KEPT    0.7071f
#define LONG_KEPT     0.9892f
#define WEIGHT_KEPT   0.9170f
#define PRIOR         0.1f /* of an even share, added to each share */
#define CHANCE_PRIOR  0.1f /* of the chance that follows from use alone, in votes of the likest */
#define LAST_MAX      60u

#define LN_2      0.693147f
#define SHARES    4
#define WORD_BITS 64u

/* Shares are sums over a layer's visits, each weighed down by age, divided by the same sum of
 * ones. */
struct kin_layer {
    float short_sum, long_sum, weight_sum;
    uint32_t n_visits;
    uint32_t n_chosen; /* of the last visit */
};

struct slu_kin {
    uint32_t n_layers, n_experts, n_words;
    uint64_t newest;
    uint32_t n_tokens; /* remembered, the newest among them, up to SLU_KIN_TOKENS */
    float likeness_sum;
    struct kin_layer *layers; /* [n_layers] */
    uint64_t *masks;          /* [n_layers][SLU_KIN_TOKENS][n_words]; all zero: not seen there */
    float *short_uses, *long_uses, *weight_uses; /* [n_layers][n_experts] */
    uint32_t *last_visits;   /* [n_layers][n_experts] number of the visit, from 1; 0: never */
    float *likeness;         /* [SLU_KIN_TOKENS] to the newest, a sum over its layers so far */
    float *votes;            /* [SLU_KIN_TOKENS] */
    float (*shares)[SHARES]; /* [n_experts] near, far, next, nothing: a vector's worth */
};

/* Both to about 1e-4, which is far less than what these numbers mean; the compiler makes vectors of
 * them, and results are the same everywhere. */
static inline float fast_log2(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    float exponent = (float)((int32_t)(bits >> 23) - 127);
    bits = (bits & 0x7fffffu) | 0x3f800000u;
    float m;
    memcpy(&m, &bits, sizeof m);
    return exponent +
           ((((-0.081615808f * m + 0.645142843f) * m - 2.120675145f) * m + 4.070090803f) * m -
            2.512854628f);
}

/* For x from -126 to 0. */
static inline float fast_exp2(float x)
{
    x = x < -126 ? -126 : x;
    int32_t whole = (int32_t)x - 1;
    float f = x - (float)whole;
    uint32_t bits = (uint32_t)(whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power * (((0.079204f * f + 0.224338f) * f + 0.696457f) * f + 1.0f);
}

static size_t add_table(size_t *bytes, size_t n, size_t item_bytes)
{
    size_t start = *bytes;
    *bytes += (n * item_bytes + 63) / 64 * 64;
    return start;
}

/* Lays out the tables behind the struct; with kin NULL only adds up their bytes. */
static size_t lay_out(struct slu_kin *kin, uint32_t n_layers, uint32_t n_experts)
{
    size_t n_words = (n_experts + WORD_BITS - 1) / WORD_BITS;
    size_t n = (size_t)n_layers * n_experts, bytes = 0;
    add_table(&bytes, 1, sizeof *kin);
    size_t layers = add_table(&bytes, n_layers, sizeof(struct kin_layer));
    size_t masks = add_table(&bytes, n_layers * SLU_KIN_TOKENS * n_words, sizeof(uint64_t));
    size_t uses[3];
    for (int i = 0; i < 3; i++) {
        uses[i] = add_table(&bytes, n, sizeof(float));
    }
    size_t shares = add_table(&bytes, n_experts, SHARES * sizeof(float));
    size_t last = add_table(&bytes, n, sizeof(uint32_t));
    size_t likeness = add_table(&bytes, SLU_KIN_TOKENS, sizeof(float));
    size_t votes = add_table(&bytes, SLU_KIN_TOKENS, sizeof(float));
    if (kin) {
        char *base = (char *)kin;
        kin->layers = (struct kin_layer *)(base + layers);
        kin->masks = (uint64_t *)(base + masks);
        kin->short_uses = (float *)(base + uses[0]);
        kin->long_uses = (float *)(base + uses[1]);
        kin->weight_uses = (float *)(base + uses[2]);
        kin->shares = (float(*)[SHARES])(base + shares);
        kin->last_visits = (uint32_t *)(base + last);
        kin->likeness = (float *)(base + likeness);
        kin->votes = (float *)(base + votes);
    }
    return bytes;
}

size_t slu_kin_bytes(uint32_t n_layers, uint32_t n_experts)
{
    return lay_out(NULL, n_layers, n_experts);
}

struct slu_kin *slu_kin_create(uint32_t n_layers, uint32_t n_experts)
{
    assert(n_layers > 0 && n_experts > 0);
    struct slu_kin *kin = calloc(1, slu_kin_bytes(n_layers, n_experts));
    if (kin) {
        lay_out(kin, n_layers, n_experts);
        kin->n_layers = n_layers;
        kin->n_experts = n_experts;
        kin->n_words = (n_experts + WORD_BITS - 1) / WORD_BITS;
    }
    return kin;
}

void slu_kin_destroy(struct slu_kin *kin)
{
    free(kin);
}

uint64_t slu_kin_newest(const struct slu_kin *kin)
{
    return kin->newest;
}

static uint64_t *masks_of(const struct slu_kin *kin, uint32_t layer, uint64_t token)
{
    size_t row = (size_t)layer * SLU_KIN_TOKENS + (size_t)(token % SLU_KIN_TOKENS);
    return &kin->masks[row * kin->n_words];
}

/* A new token, whose row and those of tokens that were left out are empty. */
static void advance(struct slu_kin *kin, uint64_t token)
{
    uint64_t n_new = kin->n_tokens > 0 ? token - kin->newest : 1;
    n_new = n_new < SLU_KIN_TOKENS ? n_new : SLU_KIN_TOKENS;
    for (uint64_t t = token - n_new + 1; t <= token; t++) {
        for (uint32_t layer = 0; layer < kin->n_layers; layer++) {
            memset(masks_of(kin, layer, t), 0, kin->n_words * sizeof(uint64_t));
        }
    }
    uint64_t n_tokens = kin->n_tokens + n_new;
    kin->n_tokens = (uint32_t)(n_tokens < SLU_KIN_TOKENS ? n_tokens : SLU_KIN_TOKENS);
    kin->newest = token;
    kin->likeness_sum = 0;
    memset(kin->likeness, 0, SLU_KIN_TOKENS * sizeof(float));
}

/* How much of the newest token's choice each token shares. */
static void compare(struct slu_kin *kin, const struct slu_policy_choice *choice)
{
    const uint64_t *mine = masks_of(kin, choice->layer, choice->token);
    const uint64_t *masks = masks_of(kin, choice->layer, 0);
    float share = 1 / (float)choice->n;
    for (uint32_t row = 0; row < SLU_KIN_TOKENS; row++) {
        unsigned n_shared = 0;
        for (uint32_t w = 0; w < kin->n_words; w++) {
            n_shared += (unsigned)__builtin_popcountll(masks[row * kin->n_words + w] & mine[w]);
        }
        kin->likeness[row] = kin->likeness[row] * LIKENESS_KEPT + share * (float)n_shared;
    }
    kin->likeness_sum = kin->likeness_sum * LIKENESS_KEPT + 1;
}

static void count(struct slu_kin *kin, const struct slu_policy_choice *choice)
{
    struct kin_layer *layer = &kin->layers[choice->layer];
    size_t at = (size_t)choice->layer * kin->n_experts;
    float *short_uses = &kin->short_uses[at], *long_uses = &kin->long_uses[at];
    float *weight_uses = &kin->weight_uses[at];
    for (uint32_t e = 0; e < kin->n_experts; e++) {
        short_uses[e] *= SHORT_KEPT;
        long_uses[e] *= LONG_KEPT;
        weight_uses[e] *= WEIGHT_KEPT;
    }
    float sum = 0;
    for (uint32_t i = 0; i < choice->n; i++) {
        sum += choice->weights ? choice->weights[i] : 1;
    }
    layer->n_visits++;
    layer->n_chosen = choice->n;
    for (uint32_t i = 0; i < choice->n; i++) {
        uint32_t e = choice->experts[i];
        float weight = choice->weights ? choice->weights[i] : 1;
        short_uses[e] += 1;
        long_uses[e] += 1;
        weight_uses[e] += sum > 0 ? weight / sum * (float)choice->n : 1;
        kin->last_visits[at + e] = layer->n_visits;
    }
    layer->short_sum = layer->short_sum * SHORT_KEPT + 1;
    layer->long_sum = layer->long_sum * LONG_KEPT + 1;
    layer->weight_sum = layer->weight_sum * WEIGHT_KEPT + 1;
}

void slu_kin_observe(struct slu_kin *kin, const struct slu_policy_choice *choice)
{
    assert(choice->layer < kin->n_layers);
    if (choice->n == 0) {
        return;
    }
    if (kin->n_tokens == 0 || choice->token > kin->newest) {
        advance(kin, choice->token);
    }
    if (kin->newest - choice->token < SLU_KIN_TOKENS) {
        uint64_t *mine = masks_of(kin, choice->layer, choice->token);
        for (uint32_t i = 0; i < choice->n; i++) {
            assert(choice->experts[i] < kin->n_experts);
            mine[choice->experts[i] / WORD_BITS] |= (uint64_t)1 << choice->experts[i] % WORD_BITS;
        }
    }
    if (choice->token == kin->newest) {
        compare(kin, choice);
    }
    count(kin, choice);
}

static void weigh_tokens(struct slu_kin *kin)
{
    float most = 0;
    for (uint32_t row = 0; row < SLU_KIN_TOKENS; row++) {
        kin->votes[row] = row == kin->newest % SLU_KIN_TOKENS ? 0 : kin->likeness[row];
        most = kin->votes[row] > most ? kin->votes[row] : most;
    }
    float scale = kin->likeness_sum > 0 ? LIKENESS_LOG2 / kin->likeness_sum : 0;
    for (uint32_t row = 0; row < SLU_KIN_TOKENS; row++) {
        kin->votes[row] = fast_exp2((kin->votes[row] - most) * scale);
    }
}

/* Adds to the shares; returns what each of them sums up to for an expert that all followers use. */
static void ask_followers(struct slu_kin *kin, uint32_t layer, float ret_sums[SHARES])
{
    float votes[SHARES] = {0}, sums[SHARES] = {0};
    uint64_t oldest = kin->newest + 1 - kin->n_tokens;
    for (uint64_t token = oldest; token < kin->newest; token++) {
        float vote = kin->votes[token % SLU_KIN_TOKENS];
        votes[0] = votes[0] * NEAR_KEPT + vote;
        votes[1] = votes[1] * FAR_KEPT + vote;
        votes[2] = vote;
        const uint64_t *follower = masks_of(kin, layer, token + 1);
        uint64_t seen = 0;
        for (uint32_t w = 0; w < kin->n_words; w++) {
            uint64_t bits = follower[w];
            seen |= bits;
            for (; bits; bits &= bits - 1) {
                float *share = kin->shares[w * WORD_BITS + (uint32_t)__builtin_ctzll(bits)];
                for (int i = 0; i < SHARES; i++) {
                    share[i] += votes[i];
                }
            }
        }
        for (int i = 0; seen && i < SHARES; i++) {
            sums[i] += votes[i];
        }
    }
    memcpy(ret_sums, sums, sizeof sums);
}

static float inverse(float sum)
{
    return sum > 0 ? 1 / sum : 0;
}

void slu_kin_rank(struct slu_kin *kin, uint32_t layer, float horizon_x, float *ret_scores)
{
    assert(layer < kin->n_layers);
    const struct kin_layer *l = &kin->layers[layer];
    size_t at = (size_t)layer * kin->n_experts;
    const float *short_uses = &kin->short_uses[at], *long_uses = &kin->long_uses[at];
    const float *weight_uses = &kin->weight_uses[at];
    const uint32_t *last_visits = &kin->last_visits[at];
    float sums[SHARES] = {0};
    memset(kin->shares, 0, kin->n_experts * sizeof kin->shares[0]);
    if (kin->n_tokens > 0) {
        weigh_tokens(kin);
        ask_followers(kin, layer, sums);
    }
    /* Shares are relative to an even one, so that they mean the same in every model. */
    float even = (float)kin->n_experts / (float)(l->n_chosen > 0 ? l->n_chosen : 1);
    float near = even * inverse(sums[0]), far = even * inverse(sums[1]);
    float next = even * inverse(sums[2]), shorter = even * inverse(l->short_sum);
    float longer = even * inverse(l->long_sum), weight = even * inverse(l->weight_sum);
    float next_power = NEXT_POWER + NEXT_POWER_X * horizon_x;
    next_power = next_power < 0 ? 0 : next_power;
    float short_power = SHORT_POWER + SHORT_POWER_X * horizon_x;
    float last_power = LAST_POWER + LAST_POWER_X * horizon_x;
    float now_bonus = NOW_BONUS + NOW_BONUS_X * horizon_x;
    for (uint32_t e = 0; e < kin->n_experts; e++) {
        const float *share = kin->shares[e];
        uint32_t age = l->n_visits - last_visits[e] + 1;
        age = last_visits[e] == 0 || age > LAST_MAX ? LAST_MAX : age;
        float log2_sum = NEAR_POWER * fast_log2(near * share[0] + PRIOR) +
                         FAR_POWER * fast_log2(far * share[1] + PRIOR) +
                         next_power * fast_log2(next * share[2] + PRIOR) +
                         WEIGHT_POWER * fast_log2(weight * weight_uses[e] + PRIOR) +
                         LONG_POWER * fast_log2(longer * long_uses[e] + PRIOR) +
                         short_power * fast_log2(shorter * short_uses[e] + PRIOR) +
                         last_power * fast_log2((float)age);
        ret_scores[e] = log2_sum * LN_2 + (age == 1 ? now_bonus : 0);
    }
}

void slu_kin_foresee(struct slu_kin *kin, uint32_t layer, float *ret_chances)
{
    assert(layer < kin->n_layers);
    const struct kin_layer *l = &kin->layers[layer];
    const float *uses = &kin->long_uses[(size_t)layer * kin->n_experts];
    float sum = CHANCE_PRIOR, use = CHANCE_PRIOR * inverse(l->long_sum);
    for (uint32_t e = 0; e < kin->n_experts; e++) {
        ret_chances[e] = use * uses[e];
    }
    if (kin->n_tokens == 0) {
        return;
    }
    weigh_tokens(kin);
    for (uint64_t token = kin->newest + 1 - kin->n_tokens; token < kin->newest; token++) {
        const uint64_t *mask = masks_of(kin, layer, token);
        float vote = kin->votes[token % SLU_KIN_TOKENS];
        uint64_t seen = 0;
        for (uint32_t w = 0; w < kin->n_words; w++) {
            seen |= mask[w];
            for (uint64_t bits = mask[w]; bits; bits &= bits - 1) {
                ret_chances[w * WORD_BITS + (uint32_t)__builtin_ctzll(bits)] += vote;
            }
        }
        sum += seen ? vote : 0;
    }
    for (uint32_t e = 0; e < kin->n_experts; e++) {
        ret_chances[e] /= sum;
    }
}
