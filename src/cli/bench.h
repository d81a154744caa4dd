/*
 * A measurement of `sluice bench`: what was asked for, and what came out.
 *
 * Thread safety: the main thread only.
 */
#ifndef SLU_CLI_BENCH_H
#define SLU_CLI_BENCH_H

#include "cli/cli.h"
#include "cli/foresight.h"

struct slu_route_map;

struct slu_bench {
    /* The command line. */
    const char *model, *trace;
    uint32_t n_prompt, n_generate;
    float guess_share; /* of the recorded choices that look-ahead is told of */
    bool has_guess_share;
    bool is_json, is_warm;
    struct slu_foresight foresight;
    struct slu_cli_engine_args engine_args;
    /* What came out. */
    struct slu_probe probe;       /* the better of before and after, each for itself */
    struct slu_probe_turns turns; /* what was measured between decoded tokens */
    struct slu_engine_info info;
    struct slu_route_map *map; /* while the engine is open, and choices are recorded ones */
    struct slu_engine_stats stats;
    struct slu_plan plan;
    struct slu_result result;
    uint64_t major_faults; /* while it computed */
    int64_t readahead_kib; /* of the pack's block device; -1: unknown */
};

void slu_bench_print(const struct slu_bench *bench);
int slu_bench_print_json(const struct slu_bench *bench, struct slu_err *err);

#endif
