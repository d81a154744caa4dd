#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "base/clock.h"
#include "cli/bench.h"
#include "tools/route_map.h"

static int parse(struct slu_bench *bench, int argc, char **argv)
{
    const struct slu_arg options[] = {
        {
            .name = "--pp",
            .value = "N",
            .type = SLU_ARG_U32,
            .min = 1,
            .max = 1 << 24,
            .target = &bench->n_prompt,
            .help = "tokens of the prompt (default: 64)",
        },
        {
            .name = "--tg",
            .value = "N",
            .type = SLU_ARG_U32,
            .min = 1,
            .max = 1 << 24,
            .target = &bench->n_generate,
            .help = "tokens to decode after it (default: 64)",
        },
        {
            .name = "--route-trace",
            .value = "FILE",
            .type = SLU_ARG_TEXT,
            .target = &bench->trace,
            .help = "experts as recorded from another model, in place of the\n"
                    "router's choices, which are random in a random model",
        },
        {
            .name = "--route-guess",
            .value = "SHARE",
            .type = SLU_ARG_FLOAT,
            .max = 1,
            .target = &bench->guess_share,
            .ret_given = &bench->has_guess_share,
            .help = "tell look-ahead so much of the recorded choices, as a real\n"
                    "model's routers would: of each layer before it runs, this\n"
                    "share (0 to 1) rightly and the rest wrongly (default: 0)",
        },
        {
            .name = "--warm",
            .type = SLU_ARG_FLAG,
            .target = &bench->is_warm,
            .help = "compute it all once before it counts, so that the cache holds\n"
                    "what it will",
        },
        {
            .name = "--json",
            .type = SLU_ARG_FLAG,
            .target = &bench->is_json,
            .help = "print one JSON object",
        },
    };
    const struct slu_command_args args = {
        .command = "bench",
        .synopsis = "MODEL.slu [options]",
        .about =
            "Measures prefill and decoding, and in the same run what the machine allows: reads of\n"
            "the pack from flash, reads of memory, int8 products, and decoding of blocks. The\n"
            "largest of the four times that a token takes by them is its bound.",
        .after = "Examples:\n"
                 "  sluice bench gpt-oss-20b.slu --ram 4G --ctx 4096\n"
                 "  sluice bench qwen3-30b.slu --ram 4G --route-trace qwen3-30b.route.csv --json",
        .operand = "MODEL.slu",
        .tables = {{.title = "Options", .args = options, .n = sizeof options / sizeof *options},
                   slu_foresight_args_bench(&bench->foresight),
                   slu_cli_engine_args_init(&bench->engine_args),
                   slu_cli_routing_args_bench(&bench->engine_args)},
    };
    slu_cli_engine_args_bench(&bench->engine_args);
    bench->n_prompt = 64;
    bench->n_generate = 64;
    return slu_args_parse(&args, argc, argv, &bench->model);
}

static void choose(void *arg, uint32_t layer, uint32_t position, uint32_t n_used, uint32_t *chosen,
                   float *weight)
{
    const struct slu_bench *bench = arg;
    (void)n_used; /* the map was made for it */
    slu_route_map_choose(bench->map, layer, position, chosen, weight);
}

static void guess(void *arg, uint32_t layer, uint32_t position, uint32_t n_used, uint32_t *guessed,
                  float *weight)
{
    const struct slu_bench *bench = arg;
    (void)n_used;
    slu_route_map_guess(bench->map, layer, position, bench->guess_share, guessed, weight);
}

static int64_t read_number(const char *path)
{
    FILE *file = fopen(path, "r");
    long long number = -1;
    if (file) {
        if (fscanf(file, "%lld", &number) != 1) {
            number = -1;
        }
        fclose(file);
    }
    return number;
}

/* A partition has no queue of its own, its disk does. */
static int64_t readahead_kib(const char *path)
{
    struct stat st;
    char name[128];
    if (stat(path, &st) != 0) {
        return -1;
    }
    unsigned maj = major(st.st_dev), min = minor(st.st_dev);
    snprintf(name, sizeof name, "/sys/dev/block/%u:%u/queue/read_ahead_kb", maj, min);
    int64_t kib = read_number(name);
    if (kib < 0) {
        snprintf(name, sizeof name, "/sys/dev/block/%u:%u/../queue/read_ahead_kb", maj, min);
        kib = read_number(name);
    }
    return kib;
}

static uint64_t major_faults(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (uint64_t)usage.ru_majflt : 0;
}

/* Ids from all over the vocabulary, the same each time. */
static int push_prompt(const struct slu_bench *bench, struct slu_session *session,
                       struct slu_err *err)
{
    int32_t *ids = malloc(bench->n_prompt * sizeof *ids);
    if (!ids) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for a prompt of %u tokens", bench->n_prompt);
    }
    for (uint32_t i = 0; i < bench->n_prompt; i++) {
        ids[i] = (int32_t)((i * 7919ull + 13) % bench->info.n_vocab);
    }
    int rc = slu_session_tokens(session, ids, bench->n_prompt, err);
    free(ids);
    return rc;
}

/* No turn sooner after the last one than this: tokens may take less than a turn. */
#define TURN_EVERY_NS 100000000u

struct turns {
    struct slu_bench *bench;
    struct slu_engine *engine;
    uint64_t last_ns; /* when the last one ended */
};

static int take_turn(void *arg, const char *text, size_t len, int32_t token)
{
    struct turns *turns = arg;
    (void)text, (void)len, (void)token;
    if (slu_now_ns() - turns->last_ns >= TURN_EVERY_NS) {
        slu_probe_turn(turns->engine, &turns->bench->turns);
        turns->last_ns = slu_now_ns();
    }
    return 0;
}

/* The prompt, and what follows it; stats as they are before its session goes. */
static int compute(struct slu_bench *bench, struct slu_engine *engine, struct slu_err *err)
{
    struct turns turns = {.bench = bench, .engine = engine};
    struct slu_session *session;
    bench->turns = (struct slu_probe_turns){0};
    int rc = slu_cli_session_create(engine, &bench->engine_args, &session, err);
    if (rc < 0) {
        return rc;
    }
    slu_cli_cancel_session(session);
    rc = push_prompt(bench, session, err);
    double start_s = slu_now_s(), foresight_s;
    rc = rc < 0 ? rc : slu_foresight_begin(&bench->foresight, engine, session, err);
    foresight_s = slu_now_s() - start_s;
    if (rc == 0) {
        /* The first token comes out of the prefill. */
        const struct slu_generate_params params = {
            .n_max = bench->n_generate + 1, .ignore_end = true, .text = take_turn, .arg = &turns};
        uint64_t before = major_faults();
        rc = slu_session_generate(session, &params, &bench->result, err);
        bench->major_faults = major_faults() - before;
        bench->result.prefill_s += foresight_s; /* the first token waits for it */
    }
    slu_foresight_finish(&bench->foresight);
    slu_cli_cancel_session(NULL);
    slu_engine_stats(engine, &bench->stats);
    slu_session_destroy(session);
    if (rc == 0 && bench->result.stop == SLU_STOP_CANCEL) {
        rc = slu_err_set(err, SLU_ECANCEL, "cancelled");
    }
    return rc;
}

/* What was spent since `before`. */
static void subtract(struct slu_phase_stats *phase, const struct slu_phase_stats *before)
{
    uint64_t *const fields[] = {
        &phase->n_tokens,    &phase->n_chunks,     &phase->wall_ns,        &phase->embed_ns,
        &phase->dense_ns,    &phase->attention_ns, &phase->experts_ns,     &phase->head_ns,
        &phase->other_ns,    &phase->flash_bytes,  &phase->unpacked_bytes, &phase->hits,
        &phase->misses,      &phase->dense_bytes,  &phase->expert_bytes,   &phase->dense_macs,
        &phase->expert_macs,
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        size_t offset = (size_t)((char *)fields[i] - (char *)phase);
        *fields[i] -= *(const uint64_t *)(const void *)((const char *)before + offset);
    }
    phase->router_weight -= before->router_weight;
    phase->covered_weight -= before->covered_weight;
    phase->experts_read -= before->experts_read;
    phase->guesses -= before->guesses;
    phase->foreseen -= before->foreseen;
    for (uint32_t i = 0; i < phase->n_threads; i++) {
        phase->threads[i].stall_ns -= before->threads[i].stall_ns;
        phase->threads[i].unpack_ns -= before->threads[i].unpack_ns;
        phase->threads[i].product_ns -= before->threads[i].product_ns;
    }
}

static int measure(struct slu_bench *bench, struct slu_engine *engine, struct slu_err *err)
{
    struct slu_engine_stats before = {0};
    if (bench->is_warm) {
        int rc = compute(bench, engine, err);
        if (rc < 0) {
            return rc;
        }
        before = bench->stats;
    }
    int rc = compute(bench, engine, err);
    for (int i = 0; i < SLU_PHASES; i++) {
        subtract(&bench->stats.phases[i], &before.phases[i]);
    }
    return rc;
}

static int run_engine(struct slu_bench *bench, const struct slu_engine_params *params,
                      struct slu_err *err)
{
    struct slu_engine *engine;
    int rc = slu_engine_open(bench->model, params, &engine, err);
    if (rc < 0) {
        return rc;
    }
    slu_engine_info(engine, &bench->info);
    if (bench->trace) {
        const struct slu_route_map_params shape = {.n_layers = bench->info.n_layers,
                                                   .n_experts = bench->info.n_experts,
                                                   .n_used = bench->info.n_used,
                                                   .n_prompt = bench->n_prompt};
        rc = slu_route_map_open(bench->trace, &shape, &bench->map, err);
        if (rc == 0) {
            slu_engine_set_route(engine, choose, bench);
            slu_engine_set_guess(engine, guess, bench);
        }
    }
    rc = rc < 0 ? rc : measure(bench, engine, err);
    bench->plan = *slu_engine_plan(engine);
    slu_engine_close(engine);
    slu_route_map_close(bench->map);
    bench->map = NULL;
    return rc;
}

static double larger(double a, double b)
{
    return a > b ? a : b;
}

/* What a machine gives may change within seconds, above all where others use it too: measured
 * before and after, the better of both is the bound. */
static int probe(struct slu_bench *bench, const struct slu_engine_params *params,
                 struct slu_err *err)
{
    struct slu_probe now;
    int rc = slu_probe_run(bench->model, params, &now, err);
    if (rc == 0) {
        const struct slu_probe *before = &bench->probe;
        now.flash_bytes_s = larger(now.flash_bytes_s, before->flash_bytes_s);
        now.ram_bytes_s = larger(now.ram_bytes_s, before->ram_bytes_s);
        now.macs_s = larger(now.macs_s, before->macs_s);
        now.unpack_bytes_s = larger(now.unpack_bytes_s, before->unpack_bytes_s);
        bench->probe = now;
    }
    return rc;
}

static int run(struct slu_bench *bench, struct slu_err *err)
{
    int rc = slu_cli_engine_resolve(&bench->engine_args, err);
    if (rc == 0 && bench->has_guess_share && !bench->trace) {
        rc = slu_err_set(err, SLU_EINVAL,
                         "--route-guess is about recorded choices; give --route-trace as well");
    }
    if (rc < 0) {
        return rc;
    }
    struct slu_engine_params params = bench->engine_args.params;
    params.touch_memory = true; /* else it is the system's zeroing of pages that prefill shows */
    uint64_t needed = (uint64_t)bench->n_prompt + bench->n_generate + 1;
    if (!bench->engine_args.ctx_given && needed > 4096) {
        params.ctx = (uint32_t)needed;
    }
    bench->readahead_kib = readahead_kib(bench->model);
    rc = slu_plan(bench->model, &params, &bench->plan, err);
    /* What will be refused needs no measuring first. */
    if (rc == 0 && bench->plan.fits && bench->plan.ctx + 1ull >= needed) {
        rc = probe(bench, &params, err);
    }
    rc = rc < 0 ? rc : run_engine(bench, &params, err);
    return rc < 0 ? rc : probe(bench, &params, err);
}

int slu_cmd_bench(int argc, char **argv)
{
    struct slu_bench bench = {0};
    struct slu_err err = {0};
    int parsed = parse(&bench, argc, argv);
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }
    slu_cli_catch_signals();
    int rc = run(&bench, &err);
    if (rc == 0 && bench.is_json) {
        rc = slu_bench_print_json(&bench, &err);
    } else if (rc == 0) {
        slu_bench_print(&bench);
    }
    slu_cli_engine_args_finish(&bench.engine_args);
    return rc < 0 ? slu_cli_fail(&err) : slu_cli_exit_status(SLU_EXIT_DONE);
}
