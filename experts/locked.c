#include "experts/locked.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

/*
 * The worth of an expert is its share of the router's weight, halved in 8 and in 32 visits of its
 * layer, the mean of both; in units in which a chosen expert counts 1 on average. A read pays if it
 * wins more than its price. Nearly constant prices do best, since some stretches of text are worth
 * more reads than others; so the price follows only what has been saved or overspent against the
 * rate, slowly.
 */
#define SHORT_KEPT     0.9170f /* 2^(-1/8) */
#define LONG_KEPT      0.9786f /* 2^(-1/32) */
#define PRICE          0.073f
#define BALANCE_TOKENS 64.0f /* saved or overspent by which the price changes by e */
#define BALANCE_MAX    3.0f
#define READS_PER_ROOT 0.6f /* experts read a token, over the root of those chosen */
#define CHOSEN_KEPT    0.9f

#define NONE UINT32_MAX

struct locked_layer {
    float short_sum, long_sum;
    float n_chosen; /* lately */
};

struct slu_locked {
    struct slu_locked_params params;
    struct locked_layer *layers;   /* [n_layers] */
    float *short_uses, *long_uses; /* [n_layers][n_experts] */
    float *worths;                 /* [n_layers][n_experts] */
    uint32_t *places;              /* [n_layers][n_experts] in residents, or NONE */
    uint32_t *residents;           /* [n_resident] */
    uint32_t *order;               /* [n_layers * n_experts] for choosing */
    uint32_t n_in;
    uint32_t layer;       /* of the latest choice */
    uint64_t token;       /* of the latest choice */
    uint64_t token_moved; /* of the latest move */
    bool has_token;
    float price, credit;
};

size_t slu_locked_bytes(const struct slu_locked_params *params)
{
    size_t n = (size_t)params->n_layers * params->n_experts;
    return sizeof(struct slu_locked) + params->n_layers * sizeof(struct locked_layer) +
           n * (3 * sizeof(float) + 2 * sizeof(uint32_t)) + params->n_resident * sizeof(uint32_t);
}

struct slu_locked *slu_locked_create(const struct slu_locked_params *params)
{
    assert(params->n_layers > 0 && params->n_experts > 0 && params->n_resident > 0);
    size_t n = (size_t)params->n_layers * params->n_experts;
    struct slu_locked *locked = calloc(1, sizeof *locked);
    if (!locked) {
        return NULL;
    }
    locked->params = *params;
    if (locked->params.n_resident > n) {
        locked->params.n_resident = (uint32_t)n;
    }
    locked->layers = calloc(params->n_layers, sizeof *locked->layers);
    locked->short_uses = calloc(n, sizeof *locked->short_uses);
    locked->long_uses = calloc(n, sizeof *locked->long_uses);
    locked->worths = calloc(n, sizeof *locked->worths);
    locked->places = malloc(n * sizeof *locked->places);
    locked->order = malloc(n * sizeof *locked->order);
    locked->residents = malloc(locked->params.n_resident * sizeof *locked->residents);
    if (!locked->layers || !locked->short_uses || !locked->long_uses || !locked->worths ||
        !locked->places || !locked->order || !locked->residents) {
        slu_locked_destroy(locked);
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        locked->places[i] = NONE;
    }
    return locked;
}

void slu_locked_destroy(struct slu_locked *locked)
{
    if (!locked) {
        return;
    }
    free(locked->layers);
    free(locked->short_uses);
    free(locked->long_uses);
    free(locked->worths);
    free(locked->places);
    free(locked->order);
    free(locked->residents);
    free(locked);
}

bool slu_locked_has(const struct slu_locked *locked, uint32_t layer, uint32_t expert)
{
    assert(layer < locked->params.n_layers && expert < locked->params.n_experts);
    return locked->places[(size_t)layer * locked->params.n_experts + expert] != NONE;
}

static float reads_per_token(const struct slu_locked *locked)
{
    if (locked->params.reads_per_token > 0) {
        return locked->params.reads_per_token;
    }
    float n_chosen = 0;
    for (uint32_t i = 0; i < locked->params.n_layers; i++) {
        n_chosen += locked->layers[i].n_chosen;
    }
    return READS_PER_ROOT * sqrtf(n_chosen);
}

/* Saved reads make the next ones cheaper, overspending makes them dearer. */
static void start_token(struct slu_locked *locked)
{
    float rate = reads_per_token(locked);
    locked->credit += rate;
    float x = rate > 0 ? locked->credit / rate / BALANCE_TOKENS : 0;
    x = x < -BALANCE_MAX ? -BALANCE_MAX : x > BALANCE_MAX ? BALANCE_MAX : x;
    locked->price = PRICE * expf(-x);
}

void slu_locked_observe(struct slu_locked *locked, const struct slu_policy_choice *choice)
{
    assert(choice->layer < locked->params.n_layers);
    if (choice->n == 0) {
        return;
    }
    struct locked_layer *layer = &locked->layers[choice->layer];
    size_t at = (size_t)choice->layer * locked->params.n_experts;
    float *short_uses = &locked->short_uses[at], *long_uses = &locked->long_uses[at];
    for (uint32_t e = 0; e < locked->params.n_experts; e++) {
        short_uses[e] *= SHORT_KEPT;
        long_uses[e] *= LONG_KEPT;
    }
    float sum = 0;
    for (uint32_t i = 0; i < choice->n; i++) {
        sum += choice->weights ? choice->weights[i] : 1;
    }
    for (uint32_t i = 0; i < choice->n; i++) {
        uint32_t e = choice->experts[i];
        assert(e < locked->params.n_experts);
        float weight = choice->weights ? choice->weights[i] : 1;
        weight = sum > 0 ? weight / sum * (float)choice->n : 1;
        short_uses[e] += weight;
        long_uses[e] += weight;
    }
    layer->short_sum = layer->short_sum * SHORT_KEPT + 1;
    layer->long_sum = layer->long_sum * LONG_KEPT + 1;
    layer->n_chosen +=
        (layer->n_chosen > 0 ? 1 - CHOSEN_KEPT : 1) * ((float)choice->n - layer->n_chosen);
    float shorter = 0.5f / layer->short_sum, longer = 0.5f / layer->long_sum;
    for (uint32_t e = 0; e < locked->params.n_experts; e++) {
        locked->worths[at + e] = shorter * short_uses[e] + longer * long_uses[e];
    }
    locked->layer = choice->layer;
    locked->token = choice->token;
}

static void sift_down(const float *worths, uint32_t *heap, uint32_t n, uint32_t i)
{
    uint32_t expert = heap[i];
    for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && (worths[heap[child + 1]] < worths[heap[child]])) {
            child++;
        }
        if (!(worths[heap[child]] < worths[expert])) {
            break;
        }
        heap[i] = heap[child];
    }
    heap[i] = expert;
}

void slu_locked_choose(struct slu_locked *locked)
{
    uint32_t n = locked->params.n_layers * locked->params.n_experts;
    uint32_t n_resident = locked->params.n_resident;
    /* A heap of the n_resident best, the worst of them on top. */
    for (uint32_t i = 0; i < n; i++) {
        locked->places[i] = NONE;
        locked->order[i] = i;
    }
    for (uint32_t i = n_resident / 2 + 1; i-- > 0;) {
        if (i < n_resident) {
            sift_down(locked->worths, locked->order, n_resident, i);
        }
    }
    for (uint32_t i = n_resident; i < n; i++) {
        if (locked->worths[i] > locked->worths[locked->order[0]]) {
            locked->order[0] = i;
            sift_down(locked->worths, locked->order, n_resident, 0);
        }
    }
    for (uint32_t i = 0; i < n_resident; i++) {
        locked->residents[i] = locked->order[i];
        locked->places[locked->order[i]] = i;
    }
    locked->n_in = n_resident;
}

/* Who is worth least of those in, of equals the one listed first. */
static uint32_t find_worst(const struct slu_locked *locked)
{
    uint32_t worst = 0;
    for (uint32_t i = 1; i < locked->n_in; i++) {
        if (locked->worths[locked->residents[i]] < locked->worths[locked->residents[worst]]) {
            worst = i;
        }
    }
    return worst;
}

/* Who is worth most of those of the latest layer that are out; NONE if all are in. */
static uint32_t find_best(const struct slu_locked *locked)
{
    uint32_t at = locked->layer * locked->params.n_experts, best = NONE;
    for (uint32_t i = at; i < at + locked->params.n_experts; i++) {
        if (locked->places[i] == NONE &&
            (best == NONE || locked->worths[i] > locked->worths[best])) {
            best = i;
        }
    }
    return best;
}

uint32_t slu_locked_move(struct slu_locked *locked, struct slu_locked_move *ret_moves,
                         uint32_t n_max)
{
    if (locked->n_in == 0) {
        return 0;
    }
    if (!locked->has_token || locked->token_moved != locked->token) {
        start_token(locked);
        locked->has_token = true;
        locked->token_moved = locked->token;
    }
    uint32_t n = 0;
    while (n < n_max) {
        uint32_t best = find_best(locked), worst = find_worst(locked);
        if (best == NONE ||
            locked->worths[best] - locked->worths[locked->residents[worst]] <= locked->price) {
            break;
        }
        locked->credit--;
        uint32_t out = locked->residents[worst];
        locked->places[out] = NONE;
        locked->places[best] = worst;
        locked->residents[worst] = best;
        ret_moves[n++] = (struct slu_locked_move){.in = best, .out = out};
    }
    return n;
}
