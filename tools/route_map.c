#include "tools/route_map.h"

#include <stdlib.h>
#include <string.h>

#include "model/config.h"

#define NONE        UINT32_MAX
#define INDEX_MAX   ((size_t)1 << 28) /* entries */
#define CHOICES_MAX (1u << 25)        /* of a trace that is made: 800 MB at most, with its visits */

struct slu_route_map {
    struct slu_route_map_params params;
    struct slu_route_trace trace;
    uint32_t stride;     /* between the layers whose choices are put together */
    uint32_t *visit_at;  /* [n_tokens x n_layers] of the trace; NONE where there is no visit */
    uint32_t *tokens[2]; /* of the prompt and of decoding, in their order */
    uint32_t n_tokens[2];
};

/* splitmix64 (Steele, Lea, Flood). */
static uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

/* Where expert `id` goes under permutation number `which` of `n`: a Feistel network over the next
 * power of four, walked until it lands below n. Number 0 leaves all as they are. */
static uint32_t permute(uint32_t id, uint32_t which, uint32_t n)
{
    if (which == 0) {
        return id;
    }
    unsigned half = 1;
    while (((uint64_t)1 << (2 * half)) < n) {
        half++;
    }
    uint32_t mask = ((uint32_t)1 << half) - 1;
    do {
        uint32_t left = id >> half, right = id & mask;
        for (uint32_t round = 0; round < 4; round++) {
            uint32_t next =
                left ^
                ((uint32_t)mix((uint64_t)which << 40 ^ (uint64_t)round << 32 ^ right) & mask);
            left = right;
            right = next;
        }
        id = left << half | right;
    } while (id >= n);
    return id;
}

static bool is_among(const uint32_t *list, uint32_t n, uint32_t item)
{
    for (uint32_t i = 0; i < n; i++) {
        if (list[i] == item) {
            return true;
        }
    }
    return false;
}

/* The trace's token for a position. The prompt's last is the last of the trace's prompt, so that
 * what is decoded follows it as it did. */
static uint32_t token_at(const struct slu_route_map *map, uint32_t position)
{
    uint32_t n_prompt = map->params.n_prompt, n_recorded = map->n_tokens[0];
    bool is_decoding = n_recorded == 0 || (position >= n_prompt && map->n_tokens[1] > 0);
    if (is_decoding) {
        uint32_t step = position < n_prompt ? position : position - n_prompt;
        return map->tokens[1][step % map->n_tokens[1]];
    }
    uint64_t ahead = n_recorded - n_prompt % n_recorded;
    return map->tokens[0][(position + ahead) % n_recorded];
}

void slu_route_map_choose(const struct slu_route_map *map, uint32_t layer, uint32_t position,
                          uint32_t *ret_chosen, float *ret_weight)
{
    const struct slu_route_map_params *p = &map->params;
    const struct slu_route_trace *trace = &map->trace;
    uint32_t token = token_at(map, position);
    uint32_t wide = trace->n_experts > p->n_experts ? trace->n_experts : p->n_experts, n = 0;
    float sum = 0;
    for (uint32_t group = 0; n < p->n_used && group < trace->n_layers; group++) {
        uint32_t from =
            (layer + group * map->stride + group * map->stride / trace->n_layers) % trace->n_layers;
        uint32_t visit = map->visit_at[(size_t)token * trace->n_layers + from];
        for (uint32_t i = 0; visit != NONE && i < trace->visits[visit].n && n < p->n_used; i++) {
            uint32_t at = trace->visits[visit].first + i;
            uint32_t expert = permute(trace->experts[at], group, wide) % p->n_experts;
            if (!is_among(ret_chosen, n, expert)) {
                ret_weight[n] = trace->weights[at];
                sum += trace->weights[at];
                ret_chosen[n++] = expert;
            }
        }
    }
    for (uint32_t expert = 0; n < p->n_used; expert++) { /* a trace with too little in it */
        if (!is_among(ret_chosen, n, expert)) {
            ret_weight[n] = 0;
            ret_chosen[n++] = expert;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        ret_weight[i] = sum > 0 ? ret_weight[i] / sum : 1.0f / (float)n;
    }
}

void slu_route_map_guess(const struct slu_route_map *map, uint32_t layer, uint32_t position,
                         float share, uint32_t *ret_guessed, float *ret_weight)
{
    const struct slu_route_map_params *p = &map->params;
    uint32_t chosen[SLU_TOP_K_MAX], n_others = p->n_experts - p->n_used;
    uint64_t random = mix((uint64_t)position << 32 | layer);
    slu_route_map_choose(map, layer, position, chosen, ret_weight);
    memcpy(ret_guessed, chosen, p->n_used * sizeof *chosen);
    uint32_t other = (uint32_t)(random % p->n_experts);
    for (uint32_t i = 0; i < p->n_used && n_others > 0; i++) {
        random = mix(random);
        if ((float)(random >> 40) * 0x1p-24f < share) {
            continue;
        }
        do {
            other = (other + 1) % p->n_experts;
        } while (is_among(chosen, p->n_used, other));
        ret_guessed[i] = other;
        n_others--;
    }
}

int slu_route_map_trace(const struct slu_route_map *map, uint32_t n_decoded,
                        struct slu_route_trace *ret_trace, struct slu_err *err)
{
    const struct slu_route_map_params *p = &map->params;
    uint64_t n_tokens = (uint64_t)p->n_prompt + n_decoded, n_visits = n_tokens * p->n_layers;
    if (p->n_layers > SLU_ROUTE_LAYERS_MAX || p->n_experts > SLU_ROUTE_EXPERTS_MAX ||
        (uint64_t)p->n_layers * p->n_experts > SLU_ROUTE_BANK_MAX) {
        return slu_err_set(err, SLU_EINVAL, "%u layers of %u experts are more than a trace has",
                           p->n_layers, p->n_experts);
    }
    if (n_visits == 0 || n_visits * p->n_used > CHOICES_MAX) {
        return slu_err_set(err, SLU_EINVAL, "a trace has 1 to %u choices", CHOICES_MAX);
    }
    struct slu_route_trace trace = {
        .n_layers = p->n_layers,
        .n_experts = p->n_experts,
        .n_routed_layers = p->n_layers,
        .n_tokens = (uint32_t)n_tokens,
        .n_decoded_tokens = n_decoded,
        .n_visits = (uint32_t)n_visits,
        .n_choices = (uint32_t)n_visits * p->n_used,
    };
    trace.visits = malloc(trace.n_visits * sizeof *trace.visits);
    trace.experts = malloc(trace.n_choices * sizeof *trace.experts);
    trace.weights = malloc(trace.n_choices * sizeof *trace.weights);
    if (!trace.visits || !trace.experts || !trace.weights) {
        slu_route_trace_finish(&trace);
        return slu_err_set(err, SLU_ENOMEM, "no memory for a trace of %u tokens", trace.n_tokens);
    }
    for (uint32_t v = 0; v < trace.n_visits; v++) {
        uint32_t token = v / p->n_layers, layer = v % p->n_layers, first = v * p->n_used;
        trace.visits[v] = (struct slu_route_visit){.token = token,
                                                   .layer = layer,
                                                   .first = first,
                                                   .n = p->n_used,
                                                   .is_decoding = token >= p->n_prompt};
        slu_route_map_choose(map, layer, token, trace.experts + first, trace.weights + first);
    }
    *ret_trace = trace;
    return 0;
}

static int index_visits(struct slu_route_map *map, const char *path, struct slu_err *err)
{
    const struct slu_route_trace *trace = &map->trace;
    size_t n = (size_t)trace->n_tokens * trace->n_layers;
    if (n > INDEX_MAX) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %u tokens in %u layers are too many to index",
                           path, trace->n_tokens, trace->n_layers);
    }
    map->visit_at = malloc(n * sizeof *map->visit_at);
    map->tokens[0] = calloc(trace->n_tokens, sizeof(uint32_t));
    map->tokens[1] = calloc(trace->n_tokens, sizeof(uint32_t));
    if (!map->visit_at || !map->tokens[0] || !map->tokens[1]) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for an index of %u tokens", path,
                           trace->n_tokens);
    }
    for (size_t i = 0; i < n; i++) {
        map->visit_at[i] = NONE;
    }
    for (uint32_t v = 0; v < trace->n_visits; v++) {
        const struct slu_route_visit *visit = &trace->visits[v];
        map->visit_at[(size_t)visit->token * trace->n_layers + visit->layer] = v;
        if (v == 0 || visit->token != trace->visits[v - 1].token) {
            map->tokens[visit->is_decoding][map->n_tokens[visit->is_decoding]++] = visit->token;
        }
    }
    return 0;
}

int slu_route_map_open(const char *path, const struct slu_route_map_params *params,
                       struct slu_route_map **ret_map, struct slu_err *err)
{
    if (params->n_experts > 0 && params->n_used > params->n_experts) {
        return slu_err_set(err, SLU_EINVAL, "%u experts a token are more than the model's %u",
                           params->n_used, params->n_experts);
    }
    if (params->n_experts == 0 || params->n_used == 0) {
        return slu_err_set(err, SLU_EINVAL, "a model without experts has no routing to replace");
    }
    if (params->n_used > SLU_TOP_K_MAX) {
        return slu_err_set(err, SLU_EINVAL, "%u experts a token are more than %u", params->n_used,
                           SLU_TOP_K_MAX);
    }
    struct slu_route_map *map = calloc(1, sizeof *map);
    if (!map) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for a trace", path);
    }
    map->params = *params;
    int rc = slu_route_trace_open(path, &map->trace, err);
    rc = rc < 0 ? rc : index_visits(map, path, err);
    if (rc < 0) {
        slu_route_map_close(map);
        return rc;
    }
    /* As many layers are needed as the most choices of one go into what the model uses. */
    uint32_t most = 1;
    for (uint32_t v = 0; v < map->trace.n_visits; v++) {
        most = map->trace.visits[v].n > most ? map->trace.visits[v].n : most;
    }
    uint32_t n_groups = (params->n_used + most - 1) / most;
    map->stride = map->trace.n_layers / n_groups;
    map->stride = map->stride ? map->stride : 1;
    *ret_map = map;
    return 0;
}

void slu_route_map_close(struct slu_route_map *map)
{
    if (map) {
        slu_route_trace_finish(&map->trace);
        free(map->visit_at);
        free(map->tokens[0]);
        free(map->tokens[1]);
        free(map);
    }
}
