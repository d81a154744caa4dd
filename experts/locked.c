#include "experts/locked.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/*
 * The worth of an expert is its share of the router's weight, halved in 12 and in 34 visits of its
 * layer, a mean of both; in units in which a chosen expert counts 1 on average. A read pays if it
 * wins more than its price. Nearly constant prices do best, since some stretches of text are worth
 * more reads than others; so the price follows only, and slowly, what has been saved or overspent
 * against the rate; and whether reads win what they promise.
 */
#define SHORT_KEPT     0.944f
#define LONG_KEPT      0.980f
#define SHORT_PART     0.4f
#define PRICE          0.048f
#define BALANCE_TOKENS 50.0f /* saved or overspent by which the price changes by e */
#define BALANCE_MAX    3.0f
/* Experts read a token, of n that it chooses: READS * n^READS_POWER. */
#define READS       1.15f
#define READS_POWER 0.38f
#define CHOSEN_KEPT 0.9f

/* What is expected from outside counts as if it had been seen at so many visits of a layer. */
#define EXPECTED_SHORT 4.0f
#define EXPECTED_LONG  12.0f

/* Whether exchanges win what they promise is watched over so many visits, and what was found counts
 * with so much of its weight after each later finding. Before any, they are believed: as if so much
 * had been promised and won. On the traces recorded from real models they win more than they
 * promise, with a router that chooses by chance nothing. */
#define WATCHED    8u
#define FOUND_KEPT 0.99f
#define BELIEVED   10.0f
#define WON_ENOUGH 0.7f /* of what was promised; below, prices rise */
#define WON_MIN    0.03f

#define NONE SLU_LOCKED_NONE

struct locked_layer {
    float short_sum, long_sum;
    float n_chosen; /* lately */
    uint32_t n_in;
};

/* An exchange that would pay by itself, whether or not it is carried out. */
struct watch {
    uint32_t in, out;
    uint32_t n_left; /* visits to be watched; 0: nothing is */
    float promised;  /* a visit */
    float won;       /* by now */
};

struct slu_locked {
    struct slu_locked_params params;
    struct locked_layer *layers;   /* [n_layers] */
    float *short_uses, *long_uses; /* [n_layers][n_experts] */
    float *worths;                 /* [n_layers][n_experts] */
    uint32_t *places;              /* [n_layers][n_experts] in residents, or NONE */
    uint32_t *residents;           /* [n_resident] */
    uint32_t *order;               /* [n_layers * n_experts] for choosing */
    struct watch *watches;         /* [n_layers], each of one that brings in an expert of it */
    uint32_t n_in;
    uint32_t layer;       /* of the latest choice */
    uint64_t token;       /* of the latest choice */
    uint64_t token_moved; /* of the latest move */
    bool has_token;
    float price, credit;
    float promised, won; /* sums over all visits that were watched, fading */
};

size_t slu_locked_bytes(const struct slu_locked_params *params)
{
    size_t n = (size_t)params->n_layers * params->n_experts;
    return sizeof(struct slu_locked) +
           params->n_layers * (sizeof(struct locked_layer) + sizeof(struct watch)) +
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
    locked->watches = calloc(params->n_layers, sizeof *locked->watches);
    if (!locked->layers || !locked->short_uses || !locked->long_uses || !locked->worths ||
        !locked->places || !locked->order || !locked->residents || !locked->watches) {
        slu_locked_destroy(locked);
        return NULL;
    }
    if (locked->params.layer_min > locked->params.n_resident / params->n_layers) {
        locked->params.layer_min = locked->params.n_resident / params->n_layers;
    }
    slu_locked_reset(locked);
    return locked;
}

void slu_locked_reset(struct slu_locked *locked)
{
    size_t n = (size_t)locked->params.n_layers * locked->params.n_experts;
    memset(locked->layers, 0, locked->params.n_layers * sizeof *locked->layers);
    memset(locked->short_uses, 0, n * sizeof *locked->short_uses);
    memset(locked->long_uses, 0, n * sizeof *locked->long_uses);
    memset(locked->worths, 0, n * sizeof *locked->worths);
    for (size_t i = 0; i < n; i++) {
        locked->places[i] = NONE;
    }
    memset(locked->watches, 0, locked->params.n_layers * sizeof *locked->watches);
    locked->n_in = 0;
    locked->has_token = false;
    locked->credit = 0;
    locked->promised = BELIEVED;
    locked->won = BELIEVED;
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
    free(locked->watches);
    free(locked);
}

bool slu_locked_has(const struct slu_locked *locked, uint32_t layer, uint32_t expert)
{
    assert(layer < locked->params.n_layers && expert < locked->params.n_experts);
    return locked->places[(size_t)layer * locked->params.n_experts + expert] != NONE;
}

uint32_t slu_locked_count(const struct slu_locked *locked, uint32_t layer)
{
    assert(layer < locked->params.n_layers);
    return locked->layers[layer].n_in;
}

float slu_locked_worth(const struct slu_locked *locked, uint32_t layer, uint32_t expert)
{
    assert(layer < locked->params.n_layers && expert < locked->params.n_experts);
    return locked->worths[(size_t)layer * locked->params.n_experts + expert];
}

static void put_in(struct slu_locked *locked, uint32_t id)
{
    locked->places[id] = locked->n_in;
    locked->residents[locked->n_in++] = id;
    locked->layers[id / locked->params.n_experts].n_in++;
}

static void take_out(struct slu_locked *locked, uint32_t id)
{
    uint32_t place = locked->places[id], last = locked->residents[--locked->n_in];
    locked->residents[place] = last;
    locked->places[last] = place;
    locked->places[id] = NONE;
    locked->layers[id / locked->params.n_experts].n_in--;
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
    return READS * powf(n_chosen, READS_POWER);
}

/* Saved reads make the next ones cheaper, overspending makes them dearer. What is saved beyond what
 * the price heeds is forgotten, lest a long quiet stretch of text pay for as many needless reads.
 * Where exchanges don't win what they promise, all are dearer, and less is saved. */
static void start_token(struct slu_locked *locked)
{
    float truth = locked->won / (WON_ENOUGH * locked->promised);
    truth = truth < WON_MIN ? WON_MIN : truth < 1 ? truth : 1;
    float rate = reads_per_token(locked), most = BALANCE_MAX * BALANCE_TOKENS * rate * truth;
    locked->credit = locked->credit + rate < most ? locked->credit + rate : most;
    float x = rate > 0 ? locked->credit / rate / BALANCE_TOKENS : 0;
    x = x < -BALANCE_MAX ? -BALANCE_MAX : x;
    locked->price = PRICE * expf(-x) / truth;
}

static void appraise(struct slu_locked *locked, uint32_t layer)
{
    size_t at = (size_t)layer * locked->params.n_experts;
    float shorter = SHORT_PART / locked->layers[layer].short_sum;
    float longer = (1 - SHORT_PART) / locked->layers[layer].long_sum;
    for (size_t i = at; i < at + locked->params.n_experts; i++) {
        locked->worths[i] = shorter * locked->short_uses[i] + longer * locked->long_uses[i];
    }
}

void slu_locked_expect(struct slu_locked *locked, uint32_t layer, const float *scores,
                       float n_chosen)
{
    assert(layer < locked->params.n_layers);
    size_t at = (size_t)layer * locked->params.n_experts;
    double sum = 0;
    for (uint32_t e = 0; e < locked->params.n_experts; e++) {
        sum += scores[e];
    }
    if (!(sum > 0)) {
        return;
    }
    for (uint32_t e = 0; e < locked->params.n_experts; e++) {
        float weight = (float)(scores[e] / sum) * n_chosen;
        locked->short_uses[at + e] = weight * EXPECTED_SHORT;
        locked->long_uses[at + e] = weight * EXPECTED_LONG;
    }
    locked->layers[layer].short_sum = EXPECTED_SHORT;
    locked->layers[layer].long_sum = EXPECTED_LONG;
    locked->layers[layer].n_chosen = n_chosen;
    appraise(locked, layer);
}

/* What a chosen expert adds to or takes from the exchanges that are watched. */
static void watch_chosen(struct slu_locked *locked, uint32_t id, float weight)
{
    for (uint32_t i = 0; i < locked->params.n_layers; i++) {
        struct watch *watch = &locked->watches[i];
        if (watch->n_left > 0 && (watch->in == id || watch->out == id)) {
            watch->won += watch->in == id ? weight : -weight;
        }
    }
}

/* A layer has been visited: the exchange that brings in one of its experts may have been watched
 * for long enough. */
static void end_visit(struct slu_locked *locked, uint32_t layer)
{
    struct watch *watch = &locked->watches[layer];
    if (watch->n_left > 0 && --watch->n_left == 0) {
        locked->promised = FOUND_KEPT * locked->promised + WATCHED * watch->promised;
        locked->won = FOUND_KEPT * locked->won + watch->won;
    }
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
        watch_chosen(locked, (uint32_t)at + e, weight);
    }
    end_visit(locked, choice->layer);
    layer->short_sum = layer->short_sum * SHORT_KEPT + 1;
    layer->long_sum = layer->long_sum * LONG_KEPT + 1;
    layer->n_chosen +=
        (layer->n_chosen > 0 ? 1 - CHOSEN_KEPT : 1) * ((float)choice->n - layer->n_chosen);
    appraise(locked, choice->layer);
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

/* The layer's best of those that are out; NONE if all are in. */
static uint32_t find_best_out(const struct slu_locked *locked, uint32_t layer, const float *scores)
{
    uint32_t at = layer * locked->params.n_experts, best = NONE;
    for (uint32_t e = 0; e < locked->params.n_experts; e++) {
        if (locked->places[at + e] == NONE && (best == NONE || scores[e] > scores[best - at])) {
            best = at + e;
        }
    }
    return best;
}

void slu_locked_fill(struct slu_locked *locked, uint32_t layer, const float *scores, uint32_t n)
{
    assert(layer < locked->params.n_layers);
    /* They are for exchanges with sets that were, and a prompt shows one layer all its tokens
     * before it comes to the next. */
    memset(locked->watches, 0, locked->params.n_layers * sizeof *locked->watches);
    uint32_t at = layer * locked->params.n_experts;
    for (uint32_t e = 0; e < locked->params.n_experts; e++) {
        if (locked->places[at + e] != NONE) {
            take_out(locked, at + e);
        }
    }
    while (n-- > 0 && locked->n_in < locked->params.n_resident) {
        uint32_t best = find_best_out(locked, layer, scores);
        if (best == NONE) {
            break;
        }
        put_in(locked, best);
    }
}

void slu_locked_choose(struct slu_locked *locked)
{
    uint32_t n_experts = locked->params.n_experts, n = 0;
    for (uint32_t l = 0; l < locked->params.n_layers; l++) {
        slu_locked_fill(locked, l, &locked->worths[(size_t)l * n_experts], 0);
    }
    for (uint32_t l = 0; l < locked->params.n_layers; l++) {
        slu_locked_fill(locked, l, &locked->worths[(size_t)l * n_experts],
                        locked->params.layer_min);
    }
    for (uint32_t i = 0; i < locked->params.n_layers * n_experts; i++) {
        if (locked->places[i] == NONE) {
            locked->order[n++] = i;
        }
    }
    uint32_t n_more = locked->params.n_resident - locked->n_in;
    n_more = n_more < n ? n_more : n;
    /* A heap of the n_more best, the worst of them on top. */
    for (uint32_t i = n_more / 2 + 1; i-- > 0;) {
        if (i < n_more) {
            sift_down(locked->worths, locked->order, n_more, i);
        }
    }
    for (uint32_t i = n_more; n_more > 0 && i < n; i++) {
        if (locked->worths[locked->order[i]] > locked->worths[locked->order[0]]) {
            locked->order[0] = locked->order[i];
            sift_down(locked->worths, locked->order, n_more, 0);
        }
    }
    for (uint32_t i = 0; i < n_more; i++) {
        put_in(locked, locked->order[i]);
    }
}

/* Who is worth least of those in and may leave for one of the latest layer, of equals the one
 * listed first; NONE if nobody may. */
static uint32_t find_worst(const struct slu_locked *locked)
{
    uint32_t worst = NONE;
    float least = INFINITY;
    for (uint32_t i = 0; i < locked->n_in; i++) {
        uint32_t id = locked->residents[i], layer = id / locked->params.n_experts;
        if (locked->worths[id] < least &&
            (layer == locked->layer || locked->layers[layer].n_in > locked->params.layer_min)) {
            worst = id;
            least = locked->worths[id];
        }
    }
    return worst;
}

/* Begins to watch an exchange, if its layer watches none and no other does what leaves: one
 * expert's luck would count many times over, since it is the same one that is worth least for many
 * layers. */
static void watch_exchange(struct slu_locked *locked, uint32_t in, uint32_t out, float promised)
{
    if (locked->watches[locked->layer].n_left > 0) {
        return;
    }
    for (uint32_t i = 0; i < locked->params.n_layers; i++) {
        if (locked->watches[i].n_left > 0 && locked->watches[i].out == out) {
            return;
        }
    }
    locked->watches[locked->layer] = (struct watch){in, out, WATCHED, promised, 0};
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
    const float *worths = &locked->worths[(size_t)locked->layer * locked->params.n_experts];
    uint32_t n = 0;
    while (n < n_max) {
        bool is_full = locked->n_in == locked->params.n_resident;
        uint32_t best = find_best_out(locked, locked->layer, worths);
        uint32_t worst = is_full ? find_worst(locked) : NONE;
        float lost = worst != NONE ? locked->worths[worst] : 0;
        if (best == NONE || (is_full && worst == NONE)) {
            break;
        }
        float promised = locked->worths[best] - lost;
        if (n == 0 && worst != NONE && promised > PRICE) {
            watch_exchange(locked, best, worst, promised);
        }
        if (promised <= locked->price) {
            break;
        }
        locked->credit--;
        if (worst != NONE) {
            take_out(locked, worst);
        }
        put_in(locked, best);
        ret_moves[n++] = (struct slu_locked_move){.in = best, .out = worst};
    }
    return n;
}
