/*
 * A recorded routing trace through the cache policies, without a model: the share of expert uses
 * that a cache of a given size would have answered, between LRU and what hindsight could do.
 *
 *     build/bench/replay TRACE.csv --slots FRACTION [--policy NAME|best] [--json]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/replay.h"

static const char usage[] =
    "usage: replay TRACE.csv --slots FRACTION [--policy NAME|best] [--json]\n"
    "  --slots    the cache, as a share of all experts of all layers: 0.125, say\n"
    "  --policy   one of the names below; best is the default\n"
    "  --json     one object on one line\n";

struct options {
    const char *path, *policy;
    double slots;
    bool json;
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

static bool parse_fraction(const char *text, double *ret_fraction)
{
    char *end;
    double fraction = strtod(text, &end);
    if (end == text || *end != '\0' || !(fraction > 0 && fraction <= 1)) {
        return false;
    }
    *ret_fraction = fraction;
    return true;
}

static int parse_options(int argc, char **argv, struct options *ret)
{
    struct options o = {.policy = "best"};
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--json") == 0) {
            o.json = true;
        } else if (strcmp(argv[i], "--slots") == 0) {
            if (!value || !parse_fraction(value, &o.slots)) {
                return fail_usage("--slots takes a fraction over 0, up to 1", "");
            }
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
    if (!o.path || o.slots == 0) {
        return fail_usage("it takes a trace and --slots", "");
    }
    *ret = o;
    return 0;
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

int main(int argc, char **argv)
{
    struct options options = {0};
    int rc = parse_options(argc, argv, &options);
    if (rc != 0) {
        return rc;
    }
    struct slu_route_trace trace;
    struct slu_err err = {0};
    rc = slu_route_trace_open(options.path, &trace, &err);
    if (rc == 0) {
        rc = replay_slots(&trace, &options, &err);
        slu_route_trace_finish(&trace);
    }
    if (rc < 0) {
        fprintf(stderr, "replay: %s\n", err.text);
        return 1;
    }
    return 0;
}
