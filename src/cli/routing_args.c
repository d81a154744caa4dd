/* The options of `--route`, which the commands with an engine share. */
#include <string.h>

#include "cli/cli.h"

static const char *const routings[] = {"exact", "prefer", "locked", NULL};
_Static_assert(SLU_ROUTING_EXACT == 0 && SLU_ROUTING_PREFER == 1 && SLU_ROUTING_LOCKED == 2,
               "routings are in the order of enum slu_routing");
static const char *const aheads[] = {"auto", "on", "off", "wrong", NULL};
_Static_assert(SLU_AHEAD_AUTO == 0 && SLU_AHEAD_ON == 1 && SLU_AHEAD_OFF == 2 &&
                   SLU_AHEAD_WRONG == 3,
               "aheads are in the order of enum slu_read_ahead");

struct slu_arg_table slu_cli_routing_args_init(struct slu_cli_engine_args *engine_args)
{
    struct slu_engine_params *params = &engine_args->params;
    const struct slu_arg args[] = {
        {
            .name = "--route",
            .value = "MODE",
            .type = SLU_ARG_CHOICE,
            .choices = routings,
            .target = &engine_args->routing,
            .help = "exact, the default: what the model's routers choose;\n"
                    "prefer: leaning to experts in memory, for fewer reads;\n"
                    "locked: among a set in memory that follows the text, for\n"
                    "next to no waiting. Both change the output a little",
        },
        {
            .name = "--route-bias",
            .value = "L",
            .type = SLU_ARG_FLOAT,
            .max = 100,
            .target = &params->route_bias,
            .ret_given = &engine_args->bias_given,
            .help = "prefer, and locked where it falls back to that: how much to\n"
                    "lean, in standard deviations of a token's scores\n"
                    "(default: 0.5; 0: not at all)",
        },
        {
            .name = "--set-share",
            .value = "S",
            .type = SLU_ARG_FLOAT,
            .min = 0.001,
            .max = 1,
            .target = &params->set_share,
            .help = "prefer, locked: count at most this share of all experts as\n"
                    "in memory (default: what --ram has room for)",
        },
        {
            .name = "--set-reads",
            .value = "N",
            .type = SLU_ARG_FLOAT,
            .min = 0.001,
            .max = 1e6,
            .target = &params->set_reads,
            .help = "locked: experts to read a token, on average, to follow the\n"
                    "text (default: 6 where it uses 72, 10 where it uses 288)",
        },
        {
            .name = "--min-coverage",
            .value = "C",
            .type = SLU_ARG_FLOAT,
            .max = 1,
            .target = &params->min_coverage,
            .help = "locked: choose as in prefer while the set covers less than\n"
                    "this share of the router's weight (default: 0, never)",
        },
        {
            .name = "--read-ahead",
            .value = "HOW",
            .type = SLU_ARG_CHOICE,
            .choices = aheads,
            .target = &engine_args->read_ahead,
            .help = "what to read before it is asked for while decoding: auto,\n"
                    "the default; on; off; or wrong, which is never wanted",
        },
    };
    _Static_assert(sizeof args == sizeof engine_args->routing_args, "one for each");
    memcpy(engine_args->routing_args, args, sizeof args);
    return (struct slu_arg_table){
        .title = "Routing",
        .args = engine_args->routing_args,
        .n = sizeof args / sizeof *args - 1, /* the last is for measurements */
    };
}

struct slu_arg_table slu_cli_routing_args_bench(struct slu_cli_engine_args *engine_args)
{
    struct slu_arg_table table = slu_cli_routing_args_init(engine_args);
    table.n++;
    return table;
}

void slu_cli_routing_resolve(struct slu_cli_engine_args *engine_args)
{
    struct slu_engine_params *params = &engine_args->params;
    params->routing = (enum slu_routing)engine_args->routing;
    params->read_ahead = (enum slu_read_ahead)engine_args->read_ahead;
    if (engine_args->bias_given && params->route_bias == 0) {
        params->route_bias = -1; /* 0 is the default's */
    }
}

const char *slu_cli_routing_name(enum slu_routing routing)
{
    return routings[routing];
}
