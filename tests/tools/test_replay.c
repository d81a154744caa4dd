#include <criterion/criterion.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/replay.h"

#define HEAD  "# route_trace v1\n# model=m n_layer=1 n_expert=4 n_expert_used=1\n"
#define NAMES "turn,phase,step,layer,slot,expert,weight\n"

static int read_text(const char *text, size_t bytes, struct slu_route_trace *ret_trace,
                     struct slu_err *err)
{
    struct slu_source *source;
    cr_assert_eq(slu_source_open_memory(text, bytes, "trace", &source), 0);
    int rc = slu_route_trace_read(source, ret_trace, err);
    slu_source_destroy(source);
    return rc;
}

/* A prompt of expert 0; then 1 0 2 0 1 2, out of order, and with columns that nobody asked for. */
static const char small[] =
    "# route_trace v1\n# model=a n_layer=9 name arch=x n_layer=1 n_expert=4 n_expert_used=1\n"
    "# layer=0 expert_bytes=7\r\n"
    "phase,turn,step,layer,slot,expert,weight,residency\r\n"
    "1,0,6,0,0,2,0.5,1\n1,0,1,0,0,1,0.25,0\n1,0,2,0,0,0,0.5,1\n0,0,0,0,0,0,1,0\n"
    "\n1,0,3,0,0,2,0.125,1\n1,0,4,0,0,0,0.5,1\n1,0,5,0,0,1,1e-1,1";

static void open_small(struct slu_route_trace *trace)
{
    struct slu_err err;
    cr_assert_eq(read_text(small, sizeof small - 1, trace, &err), 0, "%s", err.text);
}

/* Lines and columns find their places. */
Test(route_trace, is_sorted_by_token)
{
    static const uint32_t experts[] = {0, 1, 0, 2, 0, 1, 2};
    struct slu_route_trace trace;
    open_small(&trace);
    cr_assert(trace.n_layers == 1 && trace.n_experts == 4 && trace.n_routed_layers == 1);
    cr_assert(trace.n_tokens == 7 && trace.n_decoded_tokens == 6 && trace.n_visits == 7);
    for (uint32_t i = 0; i < 7; i++) {
        cr_assert_eq(trace.visits[i].token, i);
        cr_assert_eq(trace.visits[i].is_decoding, i > 0);
        cr_assert_eq(trace.experts[trace.visits[i].first], experts[i]);
    }
    cr_assert_float_eq(trace.weights[1], 0.25f, 1e-9);
    slu_route_trace_finish(&trace);
}

/* What isn't a trace is refused with a sentence that names the line. */
Test(route_trace, refuses_what_it_cannot_use)
{
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"", "bytes"},
        {"turn,phase\n", "line 1"},
        {"# route_trace v2\n", "line 1"},
        {HEAD, "no choices"},
        {HEAD NAMES, "no choices"},
        {"# route_trace v1\n# model=m n_layer=1\n", "line 2"},
        {"# route_trace v1\n# model=m n_layer=0 n_expert=4\n", "line 2"},
        {"# route_trace v1\n# model=m n_layer=99999999999999999999 n_expert=4\n", "line 2"},
        {"# route_trace v1\n# model=m n_layer=4096 n_expert=65536\n", "line 2"},
        {"# route_trace v1\n" NAMES "0,0,0,0,0,0,1\n", "line 3"},
        {HEAD "# model=m n_layer=2 n_expert=2\n", "line 3"},
        {HEAD "phase,step,layer\n", "line 3"},
        {HEAD NAMES "0,0,0,0,0,0\n", "line 4"},
        {HEAD NAMES "0,0,0,0,0,0,1,1\n", "line 4"},
        {HEAD NAMES "0,2,0,0,0,0,1\n", "phase"},
        {HEAD NAMES "0,-1,0,0,0,0,1\n", "phase"},
        {HEAD NAMES "0,0,x,0,0,0,1\n", "line 4"},
        {HEAD NAMES "0,0,99999999999,0,0,0,1\n", "line 4"},
        {HEAD NAMES "0,0,0,1,0,0,1\n", "no such layer"},
        {HEAD NAMES "0,0,0,0,0,4,1\n", "no such layer or expert"},
        {HEAD NAMES "0,0,0,0,0,0,nan\n", "weight"},
        {HEAD NAMES "0,0,0,0,0,0,-1\n", "weight"},
        {HEAD NAMES "0,0,0,0,0,0,\n", "weight"},
        {HEAD NAMES "0,0,0,0,0,3,1\n0,0,0,0,1,3,1\n", "twice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct slu_route_trace trace;
        struct slu_err err = {0};
        int rc = read_text(cases[i].text, strlen(cases[i].text), &trace, &err);
        cr_assert_eq(rc, SLU_EFORMAT, "case %zu gave %d", i, rc);
        cr_assert_not_null(strstr(err.text, cases[i].says), "case %zu says: %s", i, err.text);
    }
    struct slu_route_trace trace;
    cr_assert_eq(slu_route_trace_open("/nonexistent/trace.csv", &trace, NULL), SLU_ENOENT);
}

/* Any damage to a byte is either harmless or refused; a NUL and an endless line are. */
Test(route_trace, survives_damage)
{
    uint64_t random = 1;
    for (int round = 0; round < 3000; round++) {
        char text[sizeof small];
        size_t len = sizeof small - 1;
        memcpy(text, small, sizeof small);
        for (int i = 0; i < 1 + round % 4; i++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            text[(random >> 33) % len] = (char)(random >> 24);
        }
        len = round % 5 == 0 ? (random >> 40) % len : len;
        struct slu_route_trace trace;
        struct slu_err err = {0};
        struct slu_replay_result result;
        int rc = read_text(text, len, &trace, &err);
        cr_assert(rc == 0 || (rc == SLU_EFORMAT && err.text[0]), "%d: %s", rc, err.text);
        if (rc == 0) {
            const struct slu_policy_kind *best = slu_policy_find("best");
            cr_assert_eq(slu_replay_policy(&trace, best, 1, &result, &err), 0);
        }
        if (rc == 0) {
            slu_route_trace_finish(&trace);
        }
    }
    char *line = malloc(100000);
    memset(line, '#', 100000);
    struct slu_route_trace trace;
    cr_assert_eq(read_text(line, 100000, &trace, NULL), SLU_EFORMAT);
    free(line);
}

/* With two slots LRU finds 0 twice in six uses, and hindsight keeps 2 for the end as well. */
Test(replay, agrees_with_a_count_by_hand)
{
    struct slu_route_trace trace;
    struct slu_replay_result result;
    struct slu_err err;
    open_small(&trace);
    cr_assert_eq(slu_replay_slots(&trace, 0.5), 2);
    cr_assert_eq(slu_replay_slots(&trace, 0.01), 1);
    cr_assert_eq(slu_replay_slots(&trace, 1), 4);
    cr_assert_eq(slu_replay_lru(&trace, 2, &result, &err), 0);
    cr_assert(result.hits == 2 && result.misses == 4);
    cr_assert_float_eq(result.hit_rate, 2.0 / 6, 1e-12);
    cr_assert_eq(slu_replay_belady(&trace, 2, &result, &err), 0);
    cr_assert(result.hits == 3 && result.misses == 3);
    for (unsigned k = 0; slu_policy_at(k); k++) {
        cr_assert_eq(slu_replay_policy(&trace, slu_policy_at(k), 4, &result, &err), 0);
        cr_assert(result.hits == 4 && result.misses == 2, "%s", slu_policy_at(k)->name);
        cr_assert_eq(slu_replay_policy(&trace, slu_policy_at(k), 1, &result, &err), 0);
        cr_assert_eq(result.hits, 0);
    }
    slu_route_trace_finish(&trace);
}

/* A locked set of one expert, chosen from the prompt: it is 0, whose weight is 1 of 1.975; a rate
 * close to none leaves it there. */
Test(replay, locked_agrees_with_a_count_by_hand)
{
    struct slu_route_trace trace;
    struct slu_replay_locked result;
    struct slu_err err;
    open_small(&trace);
    cr_assert_eq(slu_replay_locked(&trace, 4, 0, &result, &err), 0);
    cr_assert_float_eq(result.covered_router_weight, 1, 1e-9);
    cr_assert_float_eq(result.experts_read_per_token, 0, 1e-9);
    cr_assert_eq(slu_replay_locked(&trace, 1, 0, &result, &err), 0);
    cr_assert_geq(result.covered_router_weight, 0);
    cr_assert_lt(result.covered_router_weight, 1);
    slu_route_trace_finish(&trace);
}

/* Skips where there are no recorded traces. */
static void open_recorded(const char *name, struct slu_route_trace *trace)
{
    const char *data = getenv("SLUICE_DATA");
    char path[512];
    if (data) {
        snprintf(path, sizeof path, "%s/traces/%s.route.csv", data, name);
    } else {
        bool is_absolute = SLU_TEST_DATA[0] == '/';
        snprintf(path, sizeof path, "%s%s%s/traces/%s.route.csv",
                 is_absolute ? "" : SLU_TEST_SOURCE_ROOT, is_absolute ? "" : "/", SLU_TEST_DATA,
                 name);
    }
    if (access(path, R_OK) != 0) {
        fprintf(stderr, "skipped: no %s\n", path);
        cr_skip_test("no recorded traces");
    }
    struct slu_err err;
    cr_assert_eq(slu_route_trace_open(path, trace, &err), 0, "%s", err.text);
}

static void check_recorded(const char *name, double lru_rate, double belady_rate, double closed_min,
                           double covered_min, double reads_max)
{
    struct slu_route_trace trace;
    open_recorded(name, &trace);
    struct slu_replay_result lru, best, belady;
    struct slu_replay_locked locked;
    struct slu_err err;
    uint32_t n_slots = slu_replay_slots(&trace, 0.125);
    cr_assert_eq(slu_replay_lru(&trace, n_slots, &lru, &err), 0);
    cr_assert_eq(slu_replay_belady(&trace, n_slots, &belady, &err), 0);
    cr_assert_eq(slu_replay_policy(&trace, slu_policy_find("best"), n_slots, &best, &err), 0);
    cr_assert_float_eq(lru.hit_rate, lru_rate, 5e-4);
    cr_assert_float_eq(belady.hit_rate, belady_rate, 5e-4);
    double closed = (best.hit_rate - lru.hit_rate) / (belady.hit_rate - lru.hit_rate);
    cr_assert_geq(closed, closed_min, "closes only %.3f of the gap", closed);
    n_slots = slu_replay_slots(&trace, 0.25);
    cr_assert_eq(slu_replay_locked(&trace, n_slots, 0, &locked, &err), 0);
    cr_assert_geq(locked.covered_router_weight, covered_min);
    cr_assert_leq(locked.experts_read_per_token, reads_max);
    slu_route_trace_finish(&trace);
}

/* On a trace of Qwen3-30B-A3B the best policy closes at least a quarter of the gap between LRU and
 * Belady, and the locked set covers .82 of the weight at 11 reads. */
Test(replay, serves_a_recorded_qwen)
{
    check_recorded("qwen3-30b-a3b", 0.582, 0.800, 0.25, 0.82, 11);
}

/* On a trace of gpt-oss-120b: 18 % of the gap, and .74 at 6.5 reads. */
Test(replay, serves_a_recorded_gpt_oss)
{
    check_recorded("gpt-oss-120b", 0.645, 0.829, 0.18, 0.74, 6.5);
}
