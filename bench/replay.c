/*
 * A recorded routing trace through the cache policies, without a model: the share of expert uses
 * that a cache of a given size would have answered, between LRU and what hindsight could do.
 *
 *     build/bench/replay TRACE --slots FRACTION [--policy NAME|best] [--json]
 *
 * With --as, the trace is laid over a model of other sizes first, as `sluice bench --route-trace`
 * lays it: what that would find in a cache of so many slots. LAYERS are those that have experts;
 * where a model begins with others, the bench takes later layers of the trace.
 *
 *     build/bench/replay TRACE --slots FRACTION --as LAYERS:EXPERTS:USED [--pp N] [--tg N]
 *
 * With --locked instead, the default locked set: how much of the router's weight a moving set of so
 * many experts covers, and how many are read a token to move it.
 *
 *     build/bench/replay TRACE --locked FRACTION [--reads N] [--curve] [--json]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/replay.h"
#include "tools/route_map.h"

static const char usage[] =
    "usage: replay TRACE --slots FRACTION [--policy NAME|best] [--json]\n"
    "              [--as LAYERS:EXPERTS:USED [--pp N] [--tg N]]\n"
    "       replay TRACE --locked FRACTION [--reads N] [--curve] [--json] [--as ...]\n"
    "  --slots    the cache, as a share of all experts of all layers: 0.125, say\n"
    "  --policy   one of the names below; best is the default\n"
    "  --as       lay it over a model of these sizes, as `sluice bench` does\n"
    "  --pp, --tg its prompt, and tokens decoded after it: 64 and 64 are the default\n"
    "  --locked   the set, as a share of all experts of all layers\n"
    "  --reads    how many experts may be read a token; otherwise that follows from the model\n"
    "  --curve    coverage over a range of rates of reading\n"
    "  --json     one object on one line\n";

struct options {
    const char *path, *policy;
    double slots, locked, reads;
    struct slu_route_map_params model; /* n_used 0: the trace's own */
    uint32_t n_decoded;
    bool json, curve;
};

static int fail_usage(const char *what, const char *value)
{
    fprintf(stderr, "replay: %s%s\n%s  policies:", what, value, usage);
    for (unsigned i = 0; slu_policy_at(i); i++) {
        fprintf(stderr, " %s", slu_policy_at(i)->name);
    }
    fprintf(stderr, "\n");
    return 2;
}

static bool parse_number(const char *text, double most, double *ret_number)
{
    char *end;
    double number = text ? strtod(text, &end) : 0;
    if (!text || end == text || *end != '\0' || !(number > 0 && number <= most)) {
        return false;
    }
    *ret_number = number;
    return true;
}

/* n numbers from 1 to a million with colons between them. */
static bool parse_counts(const char *text, uint32_t *ret_counts, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        char *end;
        unsigned long count = text && *text >= '0' && *text <= '9' ? strtoul(text, &end, 10) : 0;
        if (count < 1 || count > 1000000 || *end != (i + 1 < n ? ':' : '\0')) {
            return false;
        }
        ret_counts[i] = (uint32_t)count;
        text = end + 1;
    }
    return true;
}

static int parse_options(int argc, char **argv, struct options *ret)
{
    struct options o = {.policy = "best", .model.n_prompt = 64, .n_decoded = 64};
    bool has_tokens = false;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--json") == 0) {
            o.json = true;
        } else if (strcmp(argv[i], "--curve") == 0) {
            o.curve = true;
        } else if (strcmp(argv[i], "--slots") == 0 || strcmp(argv[i], "--locked") == 0) {
            if (!parse_number(value, 1, argv[i][2] == 's' ? &o.slots : &o.locked)) {
                return fail_usage(argv[i], " takes a fraction over 0, up to 1");
            }
            i++;
        } else if (strcmp(argv[i], "--reads") == 0) {
            if (!parse_number(value, 1e6, &o.reads)) {
                return fail_usage("--reads takes a number over 0", "");
            }
            i++;
        } else if (strcmp(argv[i], "--as") == 0) {
            uint32_t sizes[3];
            if (!parse_counts(value, sizes, 3)) {
                return fail_usage("--as takes sizes like 48:128:8", "");
            }
            o.model.n_layers = sizes[0];
            o.model.n_experts = sizes[1];
            o.model.n_used = sizes[2];
            i++;
        } else if (strcmp(argv[i], "--pp") == 0 || strcmp(argv[i], "--tg") == 0) {
            if (!parse_counts(value, argv[i][2] == 'p' ? &o.model.n_prompt : &o.n_decoded, 1)) {
                return fail_usage(argv[i], " takes a number from 1 to 1000000");
            }
            has_tokens = true;
            i++;
        } else if (strcmp(argv[i], "--policy") == 0) {
            if (!value || !slu_policy_find(value)) {
                return fail_usage("no such policy: ", value ? value : "(none)");
            }
            o.policy = value;
            i++;
        } else if (argv[i][0] == '-' || o.path) {
            return fail_usage("what is this: ", argv[i]);
        } else {
            o.path = argv[i];
        }
    }
    if (!o.path || (o.slots == 0) == (o.locked == 0)) {
        return fail_usage("it takes a trace and either --slots or --locked", "");
    }
    if (o.model.n_used == 0 && has_tokens) {
        return fail_usage("--pp and --tg go with --as", "");
    }
    *ret = o;
    return 0;
}

/* The trace, or what it comes to on the model that was given. */
static int open_trace(const struct options *o, struct slu_route_trace *ret_trace,
                      struct slu_err *err)
{
    if (o->model.n_used == 0) {
        return slu_route_trace_open(o->path, ret_trace, err);
    }
    struct slu_route_map *map;
    int rc = slu_route_map_open(o->path, &o->model, &map, err);
    if (rc == 0) {
        rc = slu_route_map_trace(map, o->n_decoded, ret_trace, err);
        slu_route_map_close(map);
    }
    return rc;
}

static int replay_slots(const struct slu_route_trace *trace, const struct options *o,
                        struct slu_err *err)
{
    struct slu_replay_result mine, lru, belady;
    const struct slu_policy_kind *kind = slu_policy_find(o->policy);
    uint32_t n_slots = slu_replay_slots(trace, o->slots);
    int rc = slu_replay_policy(trace, kind, n_slots, &mine, err);
    rc = rc < 0 ? rc : slu_replay_lru(trace, n_slots, &lru, err);
    rc = rc < 0 ? rc : slu_replay_belady(trace, n_slots, &belady, err);
    if (rc < 0) {
        return rc;
    }
    double gap = belady.hit_rate - lru.hit_rate;
    double closed = gap > 0 ? (mine.hit_rate - lru.hit_rate) / gap : 0;
    if (o->json) {
        printf("{\"policy\": \"%s\", \"slots\": %u, \"hit_rate\": %.6f, \"lru_hit_rate\": %.6f, "
               "\"belady_hit_rate\": %.6f, \"gap_closed\": %.6f}\n",
               kind->name, n_slots, mine.hit_rate, lru.hit_rate, belady.hit_rate, closed);
    } else {
        printf("%u slots (%.1f %% of %u layers x %u experts), %u tokens decoded after %u\n",
               n_slots, 100 * o->slots, trace->n_routed_layers, trace->n_experts,
               trace->n_decoded_tokens, trace->n_tokens - trace->n_decoded_tokens);
        printf("lru        %.4f\n%-10s %.4f  closes %.1f %% of the gap\nbelady     %.4f\n",
               lru.hit_rate, kind->name, mine.hit_rate, 100 * closed, belady.hit_rate);
    }
    return 0;
}

static int replay_locked(const struct slu_route_trace *trace, const struct options *o,
                         struct slu_err *err)
{
    static const float rates[] = {0.2f, 0.4f, 0.6f, 0.8f, 1, 1.25f, 1.5f, 2, 3};
    struct slu_replay_locked result;
    uint32_t n_resident = slu_replay_slots(trace, o->locked);
    int rc = slu_replay_locked(trace, n_resident, (float)o->reads, &result, err);
    if (rc < 0) {
        return rc;
    }
    if (o->json) {
        printf("{\"locked\": %u, \"covered_router_weight\": %.6f, "
               "\"experts_read_per_token\": %.4f",
               n_resident, result.covered_router_weight, result.experts_read_per_token);
    } else {
        printf("%u experts locked (%.1f %% of %u layers x %u), %u tokens decoded after %u\n"
               "covered %.4f of the router's weight at %.2f experts read a token\n",
               n_resident, 100 * o->locked, trace->n_routed_layers, trace->n_experts,
               trace->n_decoded_tokens, trace->n_tokens - trace->n_decoded_tokens,
               result.covered_router_weight, result.experts_read_per_token);
    }
    double middle = result.experts_read_per_token;
    for (unsigned i = 0; o->curve && middle > 0 && i < sizeof rates / sizeof rates[0]; i++) {
        rc = slu_replay_locked(trace, n_resident, (float)(middle * rates[i]), &result, err);
        if (rc < 0) {
            return rc;
        }
        printf(o->json ? "%s[%.6f, %.4f]" : "%s  %.4f at %.2f\n",
               !o->json ? ""
               : i == 0 ? ", \"curve\": ["
                        : ", ",
               result.covered_router_weight, result.experts_read_per_token);
    }
    if (o->json) {
        printf("%s}\n", o->curve && middle > 0 ? "]" : "");
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct options options = {0};
    int rc = parse_options(argc, argv, &options);
    if (rc != 0) {
        return rc;
    }
    struct slu_route_trace trace;
    struct slu_err err = {0};
    rc = open_trace(&options, &trace, &err);
    if (rc == 0) {
        rc = options.locked > 0 ? replay_locked(&trace, &options, &err)
                                : replay_slots(&trace, &options, &err);
        slu_route_trace_finish(&trace);
    }
    if (rc < 0) {
        fprintf(stderr, "replay: %s\n", err.text);
        return 1;
    }
    return 0;
}
