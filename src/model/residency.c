#include "model/residency.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "experts/locked.h"
#include "model/ops.h"

/* Slots beyond the set's for what is read but not kept: an expert's, and some in flight. */
#define SPARE_BLOCKS    4u
#define READ_USES       2.0f /* for so many of a chunk's uses more than who goes, an expert is read */
#define COVERAGE_TOKENS 16.0f /* that coverage is averaged over, later ones weighing more */
#define MOVES_MAX       16u
/* Of a guess for a chunk's next layer, the better half of its share is read, as long as so much of
 * that comes true; that share moves by so much of the difference at each layer. What was to be read
 * on a guess has an advantage of so many uses, since it is there already, or so it is reckoned. */
#define GUESS_WORTH_READING 0.4f
#define GUESS_USES          4.0f
#define GUESS_RATE          0.25f

#define NONE UINT32_MAX

struct slu_residency {
    struct slu_residency_params params;
    uint32_t n_layers, first_layer; /* with experts; the layers before are dense */
    uint32_t n_experts, n_used;
    bool *members; /* [n_layers][n_experts] */
    struct slu_residency_stats stats;

    struct slu_locked *locked;
    uint32_t *pending; /* [n_set] members to be read yet perhaps, in the order of their use */
    uint32_t n_pending;
    float *gains;   /* [n_experts] weight that a chunk gives, where a chosen one has 1 on average */
    float *scores;  /* [n_experts] */
    bool *wider;    /* [n_experts] members, and what a chunk takes beyond them */
    float coverage; /* lately */
    bool is_fresh;  /* nothing observed yet */
    bool *guessed;  /* [n_experts] for guessed_layer, which is none without a guess */
    uint32_t guessed_layer;
    float guess_share; /* of guesses that came true, lately */

    struct slu_policy *policy;
    uint32_t *slots;   /* [n_layers][n_experts] of the policy's cache, or none */
    uint32_t *experts; /* [n_set] in them */
    uint64_t *uses;    /* [n_layers][n_experts] the last token that used it, from 1 */
    uint32_t n_filled;
    uint64_t n_tokens;
};

static uint32_t first_routed(const struct slu_weights *w)
{
    uint32_t l = 0;
    while (l < w->config.n_layers && !w->layers[l].routed.n_experts) {
        l++;
    }
    return l;
}

static uint32_t n_routed(const struct slu_weights *w)
{
    return w->config.n_layers - first_routed(w);
}

/* Of an expert, in the layer where they have most. */
static uint32_t expert_blocks(const struct slu_weights *w)
{
    uint32_t most = 1;
    for (uint32_t l = first_routed(w); l < w->config.n_layers; l++) {
        most = w->layers[l].routed.n_blocks > most ? w->layers[l].routed.n_blocks : most;
    }
    return most;
}

uint32_t slu_residency_experts(const struct slu_weights *w, uint32_t n_slots, float share)
{
    uint32_t n_all = n_routed(w) * w->config.n_experts, n = n_all;
    uint32_t blocks = expert_blocks(w), spare = blocks + SPARE_BLOCKS;
    if (n_slots < w->n_blocks) {
        uint32_t n_fit = n_slots > spare ? (n_slots - spare) / blocks : 0;
        n = n_fit < n ? n_fit : n;
    }
    if (share > 0 && share < 1 && n > share * (float)n_all) {
        n = (uint32_t)(share * (float)n_all);
        n = n < n_routed(w) ? n_routed(w) : n;
    }
    return n;
}

uint32_t slu_residency_slots(const struct slu_weights *w, uint32_t n_set)
{
    uint64_t n = (n_set + 1ull) * expert_blocks(w) + SPARE_BLOCKS;
    return n < w->n_blocks ? (uint32_t)n : w->n_blocks;
}

static struct slu_locked_params locked_params(const struct slu_residency_params *p)
{
    return (struct slu_locked_params){.n_layers = n_routed(p->weights),
                                      .n_experts = p->weights->config.n_experts,
                                      .n_resident = p->n_set,
                                      .reads_per_token = p->reads_per_token,
                                      .layer_min = p->weights->config.n_used};
}

static struct slu_policy_shape policy_shape(const struct slu_residency_params *p)
{
    struct slu_policy_shape shape = {p->n_set, n_routed(p->weights), p->weights->config.n_experts};
    shape.n_blocks = shape.n_layers * shape.n_experts;
    return shape;
}

uint64_t slu_residency_bytes(const struct slu_residency_params *p)
{
    uint64_t n_experts = p->weights->config.n_experts, n = n_routed(p->weights) * n_experts;
    uint64_t bytes = sizeof(struct slu_residency) + n * sizeof(bool);
    struct slu_locked_params locked = locked_params(p);
    struct slu_policy_shape shape = policy_shape(p);
    if (p->is_locked) {
        return bytes + slu_locked_bytes(&locked) + p->n_set * sizeof(uint32_t) +
               n_experts * (2 * sizeof(float) + 2 * sizeof(bool));
    }
    return bytes + p->policy->bytes(&shape) + n * (sizeof(uint32_t) + sizeof(uint64_t)) +
           p->n_set * sizeof(uint32_t);
}

static bool create_locked(struct slu_residency *r)
{
    struct slu_locked_params params = locked_params(&r->params);
    r->locked = slu_locked_create(&params);
    r->pending = malloc(r->params.n_set * sizeof *r->pending);
    r->gains = malloc(r->n_experts * sizeof *r->gains);
    r->scores = malloc(r->n_experts * sizeof *r->scores);
    r->wider = malloc(r->n_experts * sizeof *r->wider);
    r->guessed = malloc(r->n_experts * sizeof *r->guessed);
    r->guessed_layer = NONE;
    r->guess_share = 1;
    return r->locked && r->pending && r->gains && r->scores && r->wider && r->guessed;
}

static bool create_prefer(struct slu_residency *r)
{
    struct slu_policy_shape shape = policy_shape(&r->params);
    r->policy = r->params.policy->create(&shape);
    r->slots = malloc(shape.n_blocks * sizeof *r->slots);
    r->experts = malloc(r->params.n_set * sizeof *r->experts);
    r->uses = calloc(shape.n_blocks, sizeof *r->uses);
    for (uint32_t i = 0; r->slots && i < shape.n_blocks; i++) {
        r->slots[i] = NONE;
    }
    return r->policy && r->slots && r->experts && r->uses;
}

struct slu_residency *slu_residency_create(const struct slu_residency_params *params)
{
    struct slu_residency *r = calloc(1, sizeof *r);
    if (!r) {
        return NULL;
    }
    r->params = *params;
    r->first_layer = first_routed(params->weights);
    r->n_layers = n_routed(params->weights);
    r->n_experts = params->weights->config.n_experts;
    r->n_used = params->weights->config.n_used;
    r->coverage = 1;
    r->is_fresh = true;
    r->members = calloc((size_t)r->n_layers * r->n_experts, sizeof *r->members);
    if (!r->members || !(params->is_locked ? create_locked(r) : create_prefer(r))) {
        slu_residency_destroy(r);
        return NULL;
    }
    return r;
}

void slu_residency_destroy(struct slu_residency *r)
{
    if (!r) {
        return;
    }
    slu_locked_destroy(r->locked);
    if (r->policy) {
        r->policy->destroy(r->policy);
    }
    free(r->pending);
    free(r->gains);
    free(r->scores);
    free(r->wider);
    free(r->guessed);
    free(r->slots);
    free(r->experts);
    free(r->uses);
    free(r->members);
    free(r);
}

struct slu_residency_stats slu_residency_stats(const struct slu_residency *r)
{
    return r->stats;
}

/* id: layer, counted from the first with experts, * n_experts + expert. */
static void set_member(struct slu_residency *r, struct slu_stream *stream, uint32_t id, bool is_in)
{
    if (r->members[id] == is_in) {
        return;
    }
    r->members[id] = is_in;
    const struct slu_bank *bank =
        &r->params.weights->layers[r->first_layer + id / r->n_experts].routed;
    uint32_t first = bank->first_extent + id % r->n_experts * bank->n_blocks;
    for (uint32_t b = 0; b < bank->n_blocks; b++) {
        slu_stream_keep(stream, first + b, is_in);
    }
}

/* The first of an expert's blocks that nobody has begun to read; NONE if there is none. */
static uint32_t absent_block(const struct slu_residency *r, struct slu_stream *stream, uint32_t id,
                             uint32_t from)
{
    const struct slu_bank *bank =
        &r->params.weights->layers[r->first_layer + id / r->n_experts].routed;
    uint32_t first = bank->first_extent + id % r->n_experts * bank->n_blocks;
    for (uint32_t b = from > first ? from - first : 0; b < bank->n_blocks; b++) {
        if (slu_stream_is_absent(stream, first + b)) {
            return first + b;
        }
    }
    return NONE;
}

/* What was wanted, and how much of it is among what will be used. */
static float account(struct slu_residency *r, const uint32_t *wish, const float *wish_weight,
                     const uint32_t *chosen)
{
    float sum = 0, covered = 0;
    for (uint32_t k = 0; k < r->n_used; k++) {
        bool is_used = false;
        for (uint32_t i = 0; i < r->n_used; i++) {
            is_used |= chosen[i] == wish[k];
        }
        sum += wish_weight[k];
        covered += is_used ? wish_weight[k] : 0;
    }
    float share = sum > 0 ? covered / sum : 1;
    r->stats.router_weight += 1;
    r->stats.covered_weight += share;
    return share;
}

static bool is_idle(void *arg, uint32_t slot)
{
    const struct slu_residency *r = arg;
    return r->uses[r->experts[slot]] != r->n_tokens;
}

/* An expert is used, as by a cache of experts. */
static void use(struct slu_residency *r, struct slu_stream *stream, uint32_t id)
{
    struct slu_policy *policy = r->policy;
    if (r->slots[id] != NONE) {
        policy->touch(policy, r->slots[id]);
        return;
    }
    int64_t slot = r->n_filled;
    if (r->n_filled < r->params.n_set) {
        r->n_filled++;
    } else {
        slot = policy->victim(policy, is_idle, r);
        if (slot < 0) {
            return; /* fewer than a token uses of the layer */
        }
        policy->remove(policy, (uint32_t)slot);
        r->slots[r->experts[slot]] = NONE;
        set_member(r, stream, r->experts[slot], false);
    }
    policy->insert(policy, (uint32_t)slot, id);
    r->slots[id] = (uint32_t)slot;
    r->experts[slot] = id;
    set_member(r, stream, id, true);
}

static void route_prefer(struct slu_residency *r, struct slu_stream *stream,
                         const struct slu_residency_chunk *c, uint32_t layer)
{
    const struct slu_weights *w = r->params.weights;
    uint32_t wish[SLU_TOP_K_MAX];
    float wish_weight[SLU_TOP_K_MAX];
    for (uint32_t t = 0; t < c->n; t++) {
        uint32_t *chosen = c->chosen + (size_t)t * r->n_used;
        float *weight = c->weight + (size_t)t * r->n_used;
        memcpy(wish, chosen, r->n_used * sizeof *wish);
        memcpy(wish_weight, weight, r->n_used * sizeof *wish_weight);
        slu_route_prefer(&w->config, &w->layers[c->layer], c->logits + (size_t)t * r->n_experts,
                         &r->members[layer * r->n_experts], r->params.bias, chosen, weight);
        account(r, wish, wish_weight, chosen);
        if (r->policy->observe) {
            r->policy->observe(r->policy, &(struct slu_policy_choice){.token = c->token + t,
                                                                      .layer = layer,
                                                                      .n = r->n_used,
                                                                      .experts = wish,
                                                                      .weights = wish_weight});
        }
        r->n_tokens++;
        for (uint32_t k = 0; k < r->n_used; k++) {
            r->uses[layer * r->n_experts + chosen[k]] = r->n_tokens;
        }
        for (uint32_t k = 0; k < r->n_used; k++) {
            use(r, stream, layer * r->n_experts + chosen[k]);
        }
    }
}

/* What an expert of a layer is worth to a chunk of n tokens that give it gains, and afterwards. */
static void score_layer(const struct slu_residency *r, uint32_t layer, const float *gains,
                        uint32_t n, float *ret_scores)
{
    for (uint32_t e = 0; e < r->n_experts; e++) {
        bool is_in = r->members[layer * r->n_experts + e];
        ret_scores[e] =
            (gains[e] + (is_in ? READ_USES : 0)) / (float)n + slu_locked_worth(r->locked, layer, e);
    }
}

/* The layer's share of the set: what it has, or as much as any. */
static uint32_t layer_share(const struct slu_residency *r, uint32_t layer)
{
    uint32_t n = slu_locked_count(r->locked, layer);
    uint64_t n_set = r->params.n_set;
    return n ? n : (uint32_t)(n_set * (layer + 1) / r->n_layers - n_set * layer / r->n_layers);
}

static void observe(struct slu_residency *r, const struct slu_residency_chunk *c, uint32_t layer)
{
    memset(r->gains, 0, r->n_experts * sizeof *r->gains);
    for (uint32_t t = 0; t < c->n; t++) {
        const uint32_t *chosen = c->chosen + (size_t)t * r->n_used;
        const float *weight = c->weight + (size_t)t * r->n_used;
        float sum = 0;
        for (uint32_t k = 0; k < r->n_used; k++) {
            sum += weight[k];
        }
        for (uint32_t k = 0; k < r->n_used; k++) {
            r->gains[chosen[k]] += sum > 0 ? weight[k] / sum * (float)r->n_used : 1;
        }
        slu_locked_observe(r->locked, &(struct slu_policy_choice){.token = c->token + t,
                                                                  .layer = layer,
                                                                  .n = r->n_used,
                                                                  .experts = chosen,
                                                                  .weights = weight});
    }
    r->is_fresh = false;
}

/* How good was the guess for this layer? Returns whether it was acted upon. */
static bool note_guess(struct slu_residency *r, uint32_t layer)
{
    uint32_t n = 0, n_true = 0;
    bool is_acted_on = layer == r->guessed_layer && r->guess_share >= GUESS_WORTH_READING;
    for (uint32_t e = 0; layer == r->guessed_layer && e < r->n_experts; e++) {
        n += r->guessed[e];
        n_true += r->guessed[e] && slu_locked_has(r->locked, layer, e);
    }
    if (n > 0) {
        r->guess_share += GUESS_RATE * ((float)n_true / (float)n - r->guess_share);
    }
    r->guessed_layer = NONE;
    return is_acted_on;
}

/* The set of a layer, for a chunk of a prompt. What isn't used of it is read in idle time. */
static void fill(struct slu_residency *r, struct slu_stream *stream, uint32_t layer, uint32_t n)
{
    score_layer(r, layer, r->gains, n, r->scores);
    uint32_t share = layer_share(r, layer);
    slu_locked_fill(r->locked, layer, r->scores, share);
    if (note_guess(r, layer)) {
        for (uint32_t e = 0; e < r->n_experts; e++) {
            r->scores[e] += r->guessed[e] ? GUESS_USES / (float)n : 0;
        }
        slu_locked_fill(r->locked, layer, r->scores, share);
    }
    for (uint32_t e = 0; e < r->n_experts; e++) {
        uint32_t id = layer * r->n_experts + e;
        bool is_in = slu_locked_has(r->locked, layer, e);
        if (is_in && !r->members[id] && r->n_pending < r->params.n_set) {
            r->pending[r->n_pending++] = id;
        }
        set_member(r, stream, id, is_in);
    }
}

/* Where the members cover too little of a chunk's weight, others join them for this chunk. */
static void widen(struct slu_residency *r, uint32_t layer)
{
    float sum = 0, covered = 0;
    memcpy(r->wider, &r->members[layer * r->n_experts], r->n_experts * sizeof *r->wider);
    for (uint32_t e = 0; e < r->n_experts; e++) {
        sum += r->gains[e];
        covered += r->wider[e] ? r->gains[e] : 0;
    }
    while (covered < r->params.min_coverage * sum) {
        uint32_t best = NONE;
        for (uint32_t e = 0; e < r->n_experts; e++) {
            if (!r->wider[e] && (best == NONE || r->gains[e] > r->gains[best])) {
                best = e;
            }
        }
        if (best == NONE) {
            break;
        }
        r->wider[best] = true;
        covered += r->gains[best];
    }
}

/* Which share of the router's weight the set itself would have covered, lately. */
static void note_coverage(struct slu_residency *r, uint32_t layer, const uint32_t *wish,
                          const float *weight)
{
    float sum = 0, covered = 0;
    for (uint32_t k = 0; k < r->n_used; k++) {
        sum += weight[k];
        covered += r->members[layer * r->n_experts + wish[k]] ? weight[k] : 0;
    }
    if (sum > 0) {
        r->coverage += (covered / sum - r->coverage) / (COVERAGE_TOKENS * (float)r->n_layers);
    }
}

static void choose_among(struct slu_residency *r, const struct slu_residency_chunk *c,
                         uint32_t layer, const bool *members, bool only_members)
{
    const struct slu_weights *w = r->params.weights;
    uint32_t wish[SLU_TOP_K_MAX];
    float wish_weight[SLU_TOP_K_MAX];
    for (uint32_t t = 0; t < c->n; t++) {
        uint32_t *chosen = c->chosen + (size_t)t * r->n_used;
        float *weight = c->weight + (size_t)t * r->n_used;
        const float *logits = c->logits + (size_t)t * r->n_experts;
        memcpy(wish, chosen, r->n_used * sizeof *wish);
        memcpy(wish_weight, weight, r->n_used * sizeof *wish_weight);
        note_coverage(r, layer, wish, wish_weight);
        if (only_members) {
            slu_route_within(&w->config, &w->layers[c->layer], logits, members, chosen, weight);
        } else {
            slu_route_prefer(&w->config, &w->layers[c->layer], logits, members, r->params.bias,
                             chosen, weight);
        }
        account(r, wish, wish_weight, chosen);
    }
}

/* After the token's choice: what it exchanges is there from the next token on. */
static void move(struct slu_residency *r, struct slu_stream *stream)
{
    struct slu_locked_move moves[MOVES_MAX];
    uint32_t n = slu_locked_move(r->locked, moves, MOVES_MAX);
    r->stats.n_moves += n;
    for (uint32_t i = 0; i < n; i++) {
        if (moves[i].out != SLU_LOCKED_NONE) {
            set_member(r, stream, moves[i].out, false);
        }
        set_member(r, stream, moves[i].in, true);
        if (r->n_pending < r->params.n_set) {
            r->pending[r->n_pending++] = moves[i].in;
        }
    }
}

bool slu_residency_reads_beyond(const struct slu_residency *r)
{
    return !r->locked || !(r->coverage >= r->params.min_coverage);
}

static void route_locked(struct slu_residency *r, struct slu_stream *stream,
                         const struct slu_residency_chunk *c, uint32_t layer)
{
    const bool *members = &r->members[layer * r->n_experts];
    if (c->position == 0 && layer == 0 && !r->is_fresh) {
        slu_residency_rank(r, stream, NULL);
    }
    if (c->n > 1 || slu_locked_count(r->locked, layer) == 0) {
        observe(r, c, layer);
        fill(r, stream, layer, c->n);
        widen(r, layer);
        choose_among(r, c, layer, r->wider, true);
        return;
    }
    observe(r, c, layer);
    choose_among(r, c, layer, members, !slu_residency_reads_beyond(r));
    move(r, stream);
}

void slu_residency_route(struct slu_residency *r, struct slu_stream *stream,
                         const struct slu_residency_chunk *c)
{
    uint32_t layer = c->layer - r->first_layer;
    if (r->params.is_locked) {
        route_locked(r, stream, c, layer);
    } else {
        route_prefer(r, stream, c, layer);
    }
}

/* Members whose blocks are all there, or that are members no more, have nothing to wait for. */
static void prune_pending(struct slu_residency *r, struct slu_stream *stream)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < r->n_pending; i++) {
        uint32_t id = r->pending[i];
        if (r->members[id] && absent_block(r, stream, id, 0) != NONE) {
            r->pending[n++] = id;
        }
    }
    r->n_pending = n;
}

static uint32_t put_absent(const struct slu_residency *r, struct slu_stream *stream, uint32_t id,
                           uint32_t *blocks, uint32_t n, uint32_t n_max)
{
    uint32_t block = 0;
    while (n < n_max && (block = absent_block(r, stream, id, block)) != NONE) {
        blocks[n++] = block++;
    }
    return n;
}

/* The experts that fill would take of a layer if the guess were true, the best first. */
static uint32_t put_guessed(struct slu_residency *r, struct slu_stream *stream, uint32_t layer,
                            const float *gains, uint32_t n_guessed, uint32_t *blocks,
                            uint32_t n_max)
{
    uint32_t n = 0, n_experts = (layer_share(r, layer) + 1) / 2;
    bool is_worth = r->guess_share >= GUESS_WORTH_READING;
    score_layer(r, layer, gains, n_guessed, r->scores);
    memset(r->guessed, 0, r->n_experts * sizeof *r->guessed);
    r->guessed_layer = layer;
    for (uint32_t i = 0; i < n_experts && i < r->n_experts; i++) {
        uint32_t best = 0;
        for (uint32_t e = 1; e < r->n_experts; e++) {
            best = r->scores[e] > r->scores[best] ? e : best;
        }
        r->guessed[best] = gains[best] > 0;
        if (r->guessed[best] && is_worth) {
            n = put_absent(r, stream, layer * r->n_experts + best, blocks, n, n_max);
        }
        r->scores[best] = -INFINITY;
    }
    return n;
}

uint32_t slu_residency_hints(struct slu_residency *r, struct slu_stream *stream, uint32_t next,
                             const float *gains, uint32_t n_guessed, uint32_t *ret_blocks,
                             uint32_t n_max)
{
    uint32_t n = 0;
    if (!r->locked) {
        return 0;
    }
    if (gains) {
        n = put_guessed(r, stream, next - r->first_layer, gains, n_guessed, ret_blocks, n_max);
    }
    prune_pending(r, stream);
    for (uint32_t i = 0; i < r->n_pending; i++) {
        n = put_absent(r, stream, r->pending[i], ret_blocks, n, n_max);
    }
    return n;
}

void slu_residency_rank(struct slu_residency *r, struct slu_stream *stream,
                        const struct slu_ranking *ranking)
{
    if (!r->locked) {
        return;
    }
    slu_locked_reset(r->locked);
    for (uint32_t id = 0; id < r->n_layers * r->n_experts; id++) {
        set_member(r, stream, id, false);
    }
    r->n_pending = 0;
    r->guessed_layer = NONE;
    r->guess_share = 1;
    r->coverage = 1;
    r->is_fresh = true;
    if (!ranking) {
        return;
    }
    for (uint32_t l = 0; l < r->n_layers; l++) {
        slu_locked_expect(r->locked, l,
                          ranking->score + (size_t)(r->first_layer + l) * r->n_experts,
                          (float)r->n_used);
    }
    slu_locked_choose(r->locked);
    for (uint32_t id = 0; id < r->n_layers * r->n_experts; id++) {
        if (slu_locked_has(r->locked, id / r->n_experts, id % r->n_experts)) {
            set_member(r, stream, id, true);
            r->pending[r->n_pending++] = id;
        }
    }
}
