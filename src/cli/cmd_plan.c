#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cli/cli.h"

static int print_json(const struct slu_plan *plan, struct slu_err *err)
{
    json_t *object = json_object();
    json_t *lines = json_array();
    for (uint32_t i = 0; i < plan->n_lines; i++) {
        json_array_append_new(lines, json_pack("{s:s, s:I}", "name", plan->lines[i].name, "bytes",
                                               (json_int_t)plan->lines[i].bytes));
    }
    slu_json_bool(object, "fits", plan->fits);
    slu_json_whole(object, "ram_bytes", plan->ram_bytes);
    slu_json_whole(object, "total_bytes", plan->total_bytes);
    slu_json_whole(object, "least_ram_bytes", plan->least_ram_bytes);
    slu_json_whole(object, "resident_ram_bytes", plan->resident_ram_bytes);
    json_object_set_new(object, "lines", lines);
    slu_json_whole(object, "n_slots", plan->n_slots);
    slu_json_whole(object, "n_slots_lent", plan->n_slots_lent);
    slu_json_whole(object, "n_slots_min", plan->n_slots_min);
    slu_json_whole(object, "n_blocks", plan->n_blocks);
    slu_json_whole(object, "slot_bytes", plan->slot_bytes);
    slu_json_whole(object, "small_slot_bytes", plan->small_slot_bytes);
    slu_json_whole(object, "token_blocks", plan->token_blocks);
    slu_json_text(object, "route", slu_cli_routing_name(plan->routing),
                  strlen(slu_cli_routing_name(plan->routing)));
    slu_json_whole(object, "set_experts", plan->set_experts);
    slu_json_bool(object, "below_token", plan->below_token);
    slu_json_whole(object, "chunk_tokens", plan->chunk_tokens);
    slu_json_whole(object, "long_chunk_tokens", plan->long_chunk_tokens);
    slu_json_whole(object, "ctx", plan->ctx);
    slu_json_whole(object, "ctx_trained", plan->ctx_trained);
    slu_json_whole(object, "memory_bytes", plan->memory_bytes);
    slu_json_whole(object, "n_threads", plan->n_threads);
    slu_json_text(object, "kv", slu_cli_kv_name(plan->kv), strlen(slu_cli_kv_name(plan->kv)));
    return slu_json_print(object, err);
}

static void print_line(const char *name, uint64_t bytes)
{
    printf("  %-16s %16" PRIu64 " bytes  %10s\n", name, bytes, slu_cli_size(bytes).text);
}

static void print_text(const struct slu_plan *plan)
{
    printf("For %" PRIu32 " tokens of context on %" PRIu32 " thread%s:\n", plan->ctx,
           plan->n_threads, plan->n_threads == 1 ? "" : "s");
    for (uint32_t i = 0; i < plan->n_lines; i++) {
        print_line(plan->lines[i].name, plan->lines[i].bytes);
    }
    print_line("in all", plan->total_bytes);
    print_line("of --ram", plan->ram_bytes);
    printf("\n");
    print_line("least --ram", plan->least_ram_bytes);
    print_line("all resident at", plan->resident_ram_bytes);
    printf("\n%" PRIu32 " slots of %s%s hold %.1f %% of the %" PRIu32
           " expert blocks; a token uses %" PRIu32 ", the least is %" PRIu32 " slots.\n",
           plan->n_slots, plan->small_slot_bytes ? "up to " : "",
           slu_cli_size(plan->slot_bytes).text,
           plan->n_blocks ? 100.0 * plan->n_slots / plan->n_blocks : 100.0, plan->n_blocks,
           plan->token_blocks, plan->n_slots_min);
    if (plan->n_slots_lent > 0) {
        printf("As long as the context is short, its KV cache has room for %" PRIu32 " more.\n",
               plan->n_slots_lent);
    }
    if (plan->long_chunk_tokens > plan->chunk_tokens) {
        printf("Of a long prompt up to %" PRIu32
               " tokens are computed at once, in memory of slots.\n",
               plan->long_chunk_tokens);
    }
    if (plan->routing != SLU_ROUTING_EXACT) {
        printf("With --route %s, %" PRIu32 " experts count as in memory.\n",
               slu_cli_routing_name(plan->routing), plan->set_experts);
    }
    if (plan->fits && plan->below_token && plan->routing != SLU_ROUTING_LOCKED) {
        printf("The slots hold less than one token uses, so nearly every block is read anew for\n"
               "each token: more --ram makes it much faster.\n");
    }
}

int slu_cmd_plan(int argc, char **argv)
{
    bool is_json = false;
    const char *path;
    struct slu_cli_engine_args engine_args;
    const struct slu_arg options[] = {
        {
            .name = "--json",
            .type = SLU_ARG_FLAG,
            .target = &is_json,
            .help = "print one JSON object",
        },
    };
    const struct slu_command_args args = {
        .command = "plan",
        .synopsis = "MODEL.slu [--ram SIZE] [--ctx N] [options]",
        .about =
            "Prints what running the model would take, line by line, and the least --ram that\n"
            "would do, from the pack's header alone. Exit status 1 if it doesn't fit.",
        .after = "Example:\n  sluice plan gpt-oss-20b.slu --ram 4G --ctx 8192",
        .operand = "MODEL.slu",
        .tables = {slu_cli_engine_args_init(&engine_args),
                   slu_cli_routing_args_init(&engine_args),
                   {.title = "Output", .args = options, .n = sizeof options / sizeof *options}},
    };
    int parsed = slu_args_parse(&args, argc, argv, &path);
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }
    struct slu_plan plan;
    struct slu_err err = {0};
    int rc = slu_cli_engine_resolve(&engine_args, &err);
    rc = rc < 0 ? rc : slu_plan(path, &engine_args.params, &plan, &err);
    slu_cli_engine_args_finish(&engine_args);
    if (rc < 0) {
        return slu_cli_fail(&err);
    }
    if (!is_json) {
        print_text(&plan);
    } else if (print_json(&plan, &err) < 0) {
        return slu_cli_fail(&err);
    }
    if (!plan.fits) {
        slu_cli_error("%s doesn't fit into %" PRIu64 " bytes: --ram %" PRIu64 " (%s) would do",
                      path, plan.ram_bytes, plan.least_ram_bytes,
                      slu_cli_size(plan.least_ram_bytes).text);
        return SLU_EXIT_FAILED;
    }
    slu_cli_plan_doubts(&plan);
    return SLU_EXIT_DONE;
}
