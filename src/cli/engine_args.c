#include "cli/cli.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const io_names[] = {"auto", "uring", "pread", NULL};
static const char *const io_names_bench[] = {"auto", "uring", "pread", "mmap", NULL};
_Static_assert(SLU_USE_IO_MMAP == 3 && SLU_USE_IO_AUTO == 0 && SLU_USE_IO_URING == 1 &&
                   SLU_USE_IO_PREAD == 2,
               "io_names are in the order of enum slu_io");

static const char *const kv_names[] = {"f16", "q8", NULL};
_Static_assert(SLU_USE_KV_F16 == 0 && SLU_USE_KV_Q8 == 1,
               "kv_names are in the order of enum slu_use_kv");

const char *slu_cli_kv_name(enum slu_use_kv kv)
{
    return kv_names[kv];
}

struct slu_arg_table slu_cli_engine_args_init(struct slu_cli_engine_args *engine_args)
{
    memset(engine_args, 0, sizeof *engine_args);
    struct slu_engine_params *params = &engine_args->params;
    const struct slu_arg args[] = {
        {
            .name = "--ram",
            .value = "SIZE",
            .type = SLU_ARG_SIZE,
            .min = 1,
            .target = &params->ram_bytes,
            .help = "memory to stay within: 4G, 512M or plain bytes; K, M, G\n"
                    "are powers of 1024 (default: half of the machine's\n"
                    "memory, or of the control group's limit if that is less)",
        },
        {
            .name = "--ctx",
            .value = "N",
            .type = SLU_ARG_U32,
            .min = 1,
            .max = 1 << 28,
            .target = &params->ctx,
            .ret_given = &engine_args->ctx_given,
            .help = "tokens of context to have room for (default: 4096, or\n"
                    "what the model was trained for if that is less)",
        },
        {
            .name = "--threads",
            .value = "N",
            .type = SLU_ARG_U32,
            .min = 1,
            .max = 64,
            .target = &params->n_threads,
            .help = "threads that compute (default: one for each CPU that\n"
                    "the process and its control group may use)",
        },
        {
            .name = "--io",
            .value = "BACKEND",
            .type = SLU_ARG_CHOICE,
            .choices = io_names,
            .target = &engine_args->io,
            .help = "how to read flash: uring, pread, or auto, the default:\n"
                    "uring where the kernel has it; pread never asks about it",
        },
        {
            .name = "--kv",
            .value = "TYPE",
            .type = SLU_ARG_CHOICE,
            .choices = kv_names,
            .target = &engine_args->kv,
            .help = "how to keep keys and values of past tokens: f16, the\n"
                    "default, or q8, which takes half the memory and changes\n"
                    "results a little",
        },
        {
            .name = "--policy",
            .value = "NAME",
            .type = SLU_ARG_TEXT,
            .target = &params->policy,
            .help = "which experts the cache keeps: lru, lfu, slru, or kin, the\n"
                    "default, which goes by tokens routed alike",
        },
        {
            .name = "--min-cache",
            .type = SLU_ARG_FLAG,
            .target = &params->minimum_cache,
            .help = "cache only as many experts as the planner's minimum,\n"
                    "whatever --ram allows: for tests and measurements",
        },
        {
            .name = "--adapter",
            .value = "NAME[:SCALE]",
            .type = SLU_ARG_TEXTS,
            .target = &engine_args->adapters,
            .help = "run with this LoRA adapter: a .sla file, or its name in\n"
                    "--adapters-dir; several may be given, each with a scale",
        },
        {
            .name = "--adapter-ram",
            .value = "SIZE",
            .type = SLU_ARG_SIZE,
            .min = 1,
            .target = &engine_args->adapter_ram,
            .help = "how much of --ram is for adapters; experts' matrices that\n"
                    "don't fit are streamed (default: all that they take, but\n"
                    "for experts no more than an eighth of --ram)",
        },
        {
            .name = "--adapters-dir",
            .value = "DIR",
            .type = SLU_ARG_TEXT,
            .target = &params->adapters_dir,
            .help = "where adapters are found by name, as DIR/NAME.sla",
        },
    };
    _Static_assert(sizeof args == sizeof engine_args->args, "one for each");
    memcpy(engine_args->args, args, sizeof args);
    return (struct slu_arg_table){
        .title = "Engine",
        .args = engine_args->args,
        .n = sizeof args / sizeof *args,
    };
}

struct slu_arg_table slu_cli_engine_args_alone(struct slu_cli_engine_args *engine_args)
{
    struct slu_arg_table table = slu_cli_engine_args_init(engine_args);
    while (table.n > 0 && strncmp(table.args[table.n - 1].name, "--adapter", 9) == 0) {
        table.n--; /* they are the last */
    }
    return table;
}

void slu_cli_engine_args_bench(struct slu_cli_engine_args *engine_args)
{
    for (size_t i = 0; i < sizeof engine_args->args / sizeof *engine_args->args; i++) {
        struct slu_arg *arg = &engine_args->args[i];
        if (arg->target == &engine_args->io) {
            arg->choices = io_names_bench;
            arg->help = "how to read flash: uring, pread, or auto, the default:\n"
                        "uring where the kernel has it; or mmap, for comparison:\n"
                        "experts through a mapping, with no cache but the system's";
        }
    }
}

static bool ends_in_sla(const char *text, size_t len)
{
    return len >= 4 && memcmp(text + len - 4, ".sla", 4) == 0;
}

/* "NAME:SCALE" into its parts. A ':' that no number follows belongs to the name, except behind
 * ".sla", where a name ends. */
static int split_choice(const char *text, char **ret_name, float *ret_scale, struct slu_err *err)
{
    const char *colon = strrchr(text, ':');
    size_t len = strlen(text), name_len = colon ? (size_t)(colon - text) : len;
    float scale = 1.0f;
    if (colon) {
        char *end;
        float number = strtof(colon + 1, &end);
        if (colon[1] && !*end) {
            scale = number;
            len = name_len;
        } else if (ends_in_sla(text, name_len) && !strchr(colon, '/')) {
            return slu_err_set(err, SLU_EINVAL, "the scale '%s' of adapter %.*s is not a number",
                               colon + 1, (int)name_len, text);
        }
    }
    if (!isfinite(scale)) {
        return slu_err_set(err, SLU_EINVAL, "the scale of adapter %.*s is not a finite number",
                           (int)len, text);
    }
    *ret_scale = scale;
    *ret_name = strndup(text, len);
    return *ret_name ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory for an adapter's name");
}

void slu_cli_plan_doubts(const struct slu_plan *plan)
{
    if (plan->memory_bytes && plan->total_bytes > plan->memory_bytes) {
        slu_cli_error("it will take %s, and there is %s of memory for it here",
                      slu_cli_size(plan->total_bytes).text, slu_cli_size(plan->memory_bytes).text);
    }
    if (plan->ctx_trained && plan->ctx > plan->ctx_trained) {
        slu_cli_error("the model was trained for a context of %" PRIu32 " tokens; what it says "
                      "beyond that may make no sense",
                      plan->ctx_trained);
    }
}

bool slu_cli_is_adapter(const struct slu_cli_engine_args *engine_args, const char *output)
{
    const char *dir = engine_args->params.adapters_dir;
    bool is = false;
    for (size_t i = 0; i < engine_args->adapters.n && output && !is; i++) {
        char *name = NULL, *path = NULL;
        float scale;
        if (split_choice(engine_args->adapters.items[i], &name, &scale, NULL) == 0) {
            is = slu_cli_is_same_path(output, name);
        }
        if (name && dir && asprintf(&path, "%s/%s.sla", dir, name) > 0) {
            is |= slu_cli_is_same_path(output, path);
            free(path);
        }
        free(name);
    }
    return is;
}

/* Was the i-th adapter named before? It is in memory once then. */
static bool is_repeated(const struct slu_cli_engine_args *engine_args, size_t i)
{
    for (size_t j = 0; j < i; j++) {
        if (strcmp(engine_args->names[i], engine_args->names[j]) == 0) {
            return true;
        }
    }
    return false;
}

int slu_cli_engine_resolve(struct slu_cli_engine_args *engine_args, struct slu_err *err)
{
    struct slu_engine_params *params = &engine_args->params;
    params->io = (enum slu_io)engine_args->io;
    params->kv = (enum slu_use_kv)engine_args->kv;
    slu_cli_routing_resolve(engine_args);
    for (size_t i = 0; i < engine_args->adapters.n; i++) {
        struct slu_adapter_choice *choice = &engine_args->choices[i];
        uint64_t bytes = 0, expert_bytes = 0;
        int rc = split_choice(engine_args->adapters.items[i], &engine_args->names[i],
                              &choice->scale, err);
        choice->adapter = engine_args->names[i];
        rc = rc < 0 ? rc
                    : slu_adapter_memory(params->adapters_dir, choice->adapter, &bytes,
                                         &expert_bytes, err);
        if (rc < 0) {
            return rc;
        }
        if (!is_repeated(engine_args, i)) {
            params->adapter_bytes += bytes;
            params->adapter_expert_bytes += expert_bytes;
            params->adapters_at_once++;
        }
    }
    if (engine_args->adapter_ram) {
        params->adapter_bytes = engine_args->adapter_ram;
        params->adapter_expert_bytes = 0;
    }
    return 0;
}

void slu_cli_engine_args_finish(struct slu_cli_engine_args *engine_args)
{
    for (size_t i = 0; i < engine_args->adapters.n; i++) {
        free(engine_args->names[i]);
        engine_args->names[i] = NULL;
    }
}

int slu_cli_session_create(struct slu_engine *engine, const struct slu_cli_engine_args *engine_args,
                           struct slu_session **ret_session, struct slu_err *err)
{
    struct slu_session *session;
    int rc = slu_session_create(engine, &(struct slu_session_params){0}, &session, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_session_set_adapters(session, engine_args->choices, engine_args->adapters.n, err);
    if (rc < 0) {
        slu_session_destroy(session);
        return rc;
    }
    *ret_session = session;
    return 0;
}

/* Tokens a second, 0 where no time was measured. */
static double speed(double n_tokens, double seconds)
{
    return n_tokens > 0 && seconds > 0 ? n_tokens / seconds : 0;
}

/* The first token comes out of the prefill: decoding takes one step for each further one. */
static double decode_steps(const struct slu_result *result)
{
    return result->n_generated > 1 ? result->n_generated - 1 : 0;
}

static double hit_rate(const struct slu_engine_stats *stats)
{
    uint64_t n = stats->hits + stats->misses;
    return n ? (double)stats->hits / (double)n : 0;
}

/* Of the router's weight of all phases, the share that went to experts that were used. */
static double coverage(const struct slu_engine_stats *stats)
{
    double sum = 0, covered = 0;
    for (int i = 0; i < SLU_PHASES; i++) {
        sum += stats->phases[i].router_weight;
        covered += stats->phases[i].covered_weight;
    }
    return sum > 0 ? covered / sum : 1;
}

static double experts_read_per_token(const struct slu_engine_stats *stats)
{
    const struct slu_phase_stats *decode = &stats->phases[SLU_PHASE_DECODE];
    return decode->n_tokens ? decode->experts_read / (double)decode->n_tokens : 0;
}

void slu_cli_stats_print(const struct slu_engine *engine, const struct slu_result *result)
{
    struct slu_engine_stats stats;
    slu_engine_stats(engine, &stats);
    const struct slu_plan *plan = slu_engine_plan(engine);
    fprintf(stderr, "prompt     %" PRIu32 " tokens in %.2f s, %.2f tokens/s\n", result->n_prompt,
            result->prefill_s, speed(result->n_prompt, result->prefill_s));
    if (result->n_generated > 0) {
        fprintf(stderr, "generated  %" PRIu32 " tokens in %.2f s, %.2f tokens/s\n",
                result->n_generated, result->decode_s,
                speed(decode_steps(result), result->decode_s));
    }
    fprintf(stderr, "flash      %s read for experts, %.1f %% of blocks were in the cache\n",
            slu_cli_size(stats.flash_bytes).text, 100 * hit_rate(&stats));
    fprintf(stderr, "cache      %" PRIu32 " slots of %s%s for %" PRIu32 " blocks%s\n",
            stats.n_slots, plan->small_slot_bytes ? "up to " : "",
            slu_cli_size(plan->slot_bytes).text, plan->n_blocks,
            stats.n_slots < plan->token_blocks && stats.n_slots < plan->n_blocks
                ? ", fewer than one token uses: more --ram would help"
                : "");
    if (plan->routing != SLU_ROUTING_EXACT) {
        fprintf(stderr,
                "routing    %s, a set of %" PRIu32 " experts: %.1f %% of the router's weight "
                "covered\n           %.1f experts read a token while decoding\n",
                slu_cli_routing_name(plan->routing), plan->set_experts, 100 * coverage(&stats),
                experts_read_per_token(&stats));
    }
    if (stats.n_adapters > 0) {
        fprintf(stderr, "adapters   %" PRIu32 ", %" PRIu32 " with experts streamed; %s read\n",
                stats.n_adapters, stats.n_adapters_streamed,
                slu_cli_size(stats.adapter_flash_bytes).text);
    }
    fprintf(stderr, "memory     %s at the peak, of %s\n",
            slu_cli_size(stats.ledger_peak_bytes).text,
            slu_cli_size(stats.ledger_limit_bytes).text);
    fprintf(stderr, "using      %s kernels, %s\n", stats.kernels, stats.io_backend);
    if (!stats.io_direct) {
        fprintf(stderr, "reads are buffered: the file system refuses O_DIRECT\n");
    }
}

void slu_cli_stats_json(const struct slu_engine *engine, const struct slu_result *result,
                        json_t *object)
{
    struct slu_engine_stats stats;
    slu_engine_stats(engine, &stats);
    const struct slu_plan *plan = slu_engine_plan(engine);
    slu_json_whole(object, "n_prompt", result->n_prompt);
    slu_json_whole(object, "n_generated", result->n_generated);
    slu_json_real(object, "prefill_s", result->prefill_s);
    slu_json_real(object, "decode_s", result->decode_s);
    slu_json_real(object, "prefill_tok_s", speed(result->n_prompt, result->prefill_s));
    slu_json_real(object, "decode_tok_s", speed(decode_steps(result), result->decode_s));
    slu_json_real(object, "first_token_s", result->prefill_s);
    slu_json_text(object, "route", slu_cli_routing_name(plan->routing),
                  strlen(slu_cli_routing_name(plan->routing)));
    slu_json_real(object, "covered_router_weight", coverage(&stats));
    slu_json_real(object, "experts_read_per_token", experts_read_per_token(&stats));
    slu_json_whole(object, "set_experts", plan->set_experts);
    slu_json_whole(object, "flash_bytes", stats.flash_bytes);
    slu_json_whole(object, "adapters", stats.n_adapters);
    slu_json_whole(object, "adapters_streamed", stats.n_adapters_streamed);
    slu_json_whole(object, "adapter_flash_bytes", stats.adapter_flash_bytes);
    slu_json_real(object, "cache_hit_rate", hit_rate(&stats));
    slu_json_whole(object, "cache_hits", stats.hits);
    slu_json_whole(object, "cache_misses", stats.misses);
    slu_json_whole(object, "peak_ledger_bytes", stats.ledger_peak_bytes);
    slu_json_whole(object, "ram_bytes", stats.ledger_limit_bytes);
    slu_json_real(object, "wait_s", 1e-9 * (double)stats.wait_ns);
    slu_json_real(object, "unpack_s", 1e-9 * (double)stats.decode_ns);
    slu_json_whole(object, "n_slots", plan->n_slots);
    slu_json_whole(object, "n_slots_now", stats.n_slots);
    slu_json_whole(object, "n_blocks", plan->n_blocks);
    slu_json_whole(object, "ctx", plan->ctx);
    slu_json_whole(object, "n_threads", plan->n_threads);
    slu_json_text(object, "kv", slu_cli_kv_name(plan->kv), strlen(slu_cli_kv_name(plan->kv)));
    slu_json_text(object, "io", stats.io_backend, strlen(stats.io_backend));
    slu_json_bool(object, "io_direct", stats.io_direct);
    slu_json_text(object, "kernels", stats.kernels, strlen(stats.kernels));
}
