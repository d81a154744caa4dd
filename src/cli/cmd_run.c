#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "cli/cli.h"
#include "cli/foresight.h"

struct run {
    /* The command line. */
    const char *model, *prompt, *prompt_file, *system;
    uint32_t n_max;
    bool is_raw, is_stats, is_json, seed_given;
    struct slu_sampling sampling;
    struct slu_foresight foresight;
    struct slu_cli_engine_args engine_args;
    /* What came out. */
    size_t n_before; /* ids in the context before the first that is generated */
    char *text;      /* with --json: all of it */
    size_t text_len, text_capacity;
    bool ends_line;
    struct slu_engine_stats stats; /* with --stats: of a run that succeeded */
    int out_errno;                 /* of a write to stdout that failed */
};

static int parse(struct run *run, int argc, char **argv)
{
    const struct slu_arg prompt[] = {
        {
            .name = "--prompt",
            .letter = 'p',
            .value = "TEXT",
            .type = SLU_ARG_TEXT,
            .target = &run->prompt,
            .help = "what to answer; - reads it from standard input",
        },
        {
            .name = "--file",
            .letter = 'f',
            .value = "FILE",
            .type = SLU_ARG_TEXT,
            .target = &run->prompt_file,
            .help = "read the prompt from a file",
        },
        {
            .name = "--n-max",
            .letter = 'n',
            .value = "N",
            .type = SLU_ARG_U32,
            .min = 1,
            .target = &run->n_max,
            .help = "tokens to generate at most (default: until the model ends\n"
                    "its turn, or the context is full)",
        },
        {
            .name = "--system",
            .value = "TEXT",
            .type = SLU_ARG_TEXT,
            .target = &run->system,
            .help = "what the model is told before the prompt, in its own way",
        },
        {
            .name = "--raw",
            .type = SLU_ARG_FLAG,
            .target = &run->is_raw,
            .help = "continue the prompt as it stands, without the model's\n"
                    "chat template",
        },
        {
            .name = "--stats",
            .type = SLU_ARG_FLAG,
            .target = &run->is_stats,
            .help = "print speed, reads and memory to standard error",
        },
        {
            .name = "--json",
            .type = SLU_ARG_FLAG,
            .target = &run->is_json,
            .help = "print one JSON object at the end instead of the text",
        },
    };
    const struct slu_arg sampling[] = {
        {
            .name = "--temp",
            .value = "T",
            .type = SLU_ARG_FLOAT,
            .max = 1000,
            .target = &run->sampling.temperature,
            .help = "temperature; 0, the default, always takes the likeliest",
        },
        {
            .name = "--top-k",
            .value = "K",
            .type = SLU_ARG_U32,
            .target = &run->sampling.top_k,
            .help = "draw from the K likeliest only (default: 0, all)",
        },
        {
            .name = "--top-p",
            .value = "P",
            .type = SLU_ARG_FLOAT,
            .max = 1,
            .target = &run->sampling.top_p,
            .help = "draw from the likeliest that together hold the share P of\n"
                    "the probability (default: 1, all)",
        },
        {
            .name = "--min-p",
            .value = "P",
            .type = SLU_ARG_FLOAT,
            .max = 1,
            .target = &run->sampling.min_p,
            .help = "leave out what is less than P times as likely as the\n"
                    "likeliest (default: 0, nothing)",
        },
        {
            .name = "--repeat-penalty",
            .value = "R",
            .type = SLU_ARG_FLOAT,
            .max = 1000,
            .target = &run->sampling.repeat_penalty,
            .help = "make the last 64 tokens less likely, from 1.1 or so\n"
                    "(default: 1, off)",
        },
        {
            .name = "--seed",
            .value = "S",
            .type = SLU_ARG_U64,
            .target = &run->sampling.seed,
            .ret_given = &run->seed_given,
            .help = "the same seed draws the same tokens (default: by chance)",
        },
    };
    const struct slu_command_args args = {
        .command = "run",
        .synopsis = "MODEL.slu -p TEXT|-f FILE [-n N] [options]",
        .about = "Answers a prompt. Text goes to standard output as it comes; Ctrl-C ends it.",
        .after =
            "Examples:\n"
            "  sluice run gpt-oss-20b.slu --ram 4G -p \"Why is the sky blue?\" --stats\n"
            "  sluice run mixtral.slu --raw -p \"Once upon a time\" -n 100 --temp 0.8 --seed 1",
        .operand = "MODEL.slu",
        .tables = {{.title = "Prompt and output",
                    .args = prompt,
                    .n = sizeof prompt / sizeof *prompt},
                   {.title = "Sampling", .args = sampling, .n = sizeof sampling / sizeof *sampling},
                   slu_foresight_args(&run->foresight),
                   slu_cli_engine_args_init(&run->engine_args),
                   slu_cli_routing_args_init(&run->engine_args)},
    };
    int parsed = slu_args_parse(&args, argc, argv, &run->model);
    if (parsed == SLU_ARGS_OK && run->is_raw && run->system) {
        parsed = slu_args_mistake(&args, "--system is for a chat, and --raw is none");
    }
    if (parsed == SLU_ARGS_OK && !run->prompt == !run->prompt_file) {
        parsed = slu_args_mistake(&args, run->prompt ? "there are two prompts, -p and --file"
                                                     : "-p TEXT is missing");
    }
    const char *outputs[] = {run->foresight.trace, run->foresight.save_profile};
    const char *inputs[] = {run->model, run->prompt_file};
    const char *clash = slu_cli_find_clash(outputs, 2, inputs, 2);
    if (parsed == SLU_ARGS_OK &&
        (clash || slu_cli_is_same_path(run->foresight.trace, run->foresight.profile))) {
        parsed = slu_args_mistake(
            &args, "%s would overwrite the model, the prompt, a profile or another output",
            clash ? clash : run->foresight.trace);
    }
    for (size_t i = 0; i < 2 && parsed == SLU_ARGS_OK; i++) {
        if (slu_cli_is_adapter(&run->engine_args, outputs[i])) {
            parsed = slu_args_mistake(&args, "%s would overwrite an adapter", outputs[i]);
        }
    }
    return parsed;
}

static void choose_seed(struct run *run)
{
    if (!run->seed_given &&
        getrandom(&run->sampling.seed, sizeof run->sampling.seed, GRND_NONBLOCK) < 0) {
        run->sampling.seed = (uint64_t)time(NULL) ^ (uint64_t)getpid() << 32;
    }
    /* So that the seed survives JSON readers whose numbers are doubles. */
    if (!run->seed_given) {
        run->sampling.seed &= UINT32_MAX;
    }
}

static int keep_text(struct run *run, const char *text, size_t len)
{
    if (run->text_len + len > run->text_capacity) {
        size_t capacity = 2 * run->text_capacity + len + 4096;
        char *more = realloc(run->text, capacity);
        if (!more) {
            return SLU_ENOMEM;
        }
        run->text = more;
        run->text_capacity = capacity;
    }
    memcpy(run->text + run->text_len, text, len);
    run->text_len += len;
    return 0;
}

static int on_text(void *arg, const char *text, size_t len, int32_t token)
{
    struct run *run = arg;
    (void)token;
    if (len == 0) {
        return 0;
    }
    if (run->is_json) {
        return keep_text(run, text, len);
    }
    run->ends_line = text[len - 1] == '\n';
    if (fwrite(text, 1, len, stdout) < len || fflush(stdout) != 0) {
        run->out_errno = errno;
        return SLU_EIO;
    }
    return 0;
}

static int load_prompt(struct run *run, struct slu_session *session, struct slu_err *err)
{
    char *owned = NULL;
    const char *text = run->prompt;
    size_t len = text ? strlen(text) : 0;
    if (!text || strcmp(text, "-") == 0) {
        int rc = slu_cli_read_file(text ? text : run->prompt_file, &owned, &len, err);
        if (rc < 0) {
            return rc;
        }
        text = owned;
    }
    int rc = 0;
    if (run->system) {
        rc = slu_session_system(session, run->system, strlen(run->system), err);
    }
    if (rc == 0) {
        rc = run->is_raw ? slu_session_text(session, text, len, err)
                         : slu_session_chat(session, text, len, err);
    }
    free(owned);
    return rc;
}

static int print_json(struct run *run, const struct slu_engine *engine,
                      const struct slu_session *session, const struct slu_result *result,
                      struct slu_err *err)
{
    static const char *const stops[] = {
        [SLU_STOP_END] = "end",
        [SLU_STOP_LENGTH] = "length",
        [SLU_STOP_CONTEXT] = "context",
        [SLU_STOP_CANCEL] = "cancel",
    };
    json_t *object = json_object();
    slu_json_text(object, "text", run->text ? run->text : "", run->text_len);
    json_t *tokens = json_array();
    size_t n;
    const int32_t *ids = slu_session_ids(session, &n);
    for (size_t i = run->n_before; i < n && i < run->n_before + result->n_generated; i++) {
        json_array_append_new(tokens, json_integer(ids[i]));
    }
    json_object_set_new(object, "tokens", tokens);
    slu_json_text(object, "stop", stops[result->stop], strlen(stops[result->stop]));
    slu_json_whole(object, "seed", run->sampling.seed);
    slu_cli_stats_json(engine, result, object);
    return slu_json_print(object, err);
}

static int generate(struct run *run, struct slu_engine *engine, struct slu_session *session,
                    struct slu_err *err)
{
    int rc = load_prompt(run, session, err);
    if (rc < 0) {
        return rc;
    }
    (void)slu_session_ids(session, &run->n_before);
    rc = slu_foresight_begin(&run->foresight, engine, session, err);
    if (rc < 0) {
        return rc;
    }
    struct slu_result result = {0};
    const struct slu_generate_params params = {
        .n_max = run->n_max,
        .sampling = run->sampling,
        .text = on_text,
        .arg = run,
    };
    rc = slu_session_generate(session, &params, &result, err);
    if (run->out_errno) {
        return 0; /* told by the caller */
    }
    if (!run->is_json && !run->ends_line && isatty(STDOUT_FILENO)) {
        putchar('\n');
        fflush(stdout);
    }
    if (rc == 0 && result.stop == SLU_STOP_CONTEXT && !run->is_json) {
        slu_cli_error("the answer ends here because the context is full; --ctx makes it longer");
    }
    rc = rc < 0 ? rc : slu_foresight_save(&run->foresight, session, err);
    if (rc < 0) {
        return rc;
    }
    if (run->is_stats) {
        slu_cli_stats_print(engine, &result);
        slu_engine_stats(engine, &run->stats);
    }
    return run->is_json ? print_json(run, engine, session, &result, err) : 0;
}

int slu_cmd_run(int argc, char **argv)
{
    struct run run = {.ends_line = true};
    struct slu_engine *engine = NULL;
    struct slu_session *session = NULL;
    struct slu_err err = {0};
    int parsed = parse(&run, argc, argv);
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }
    slu_cli_catch_signals();
    choose_seed(&run);
    int rc = slu_cli_engine_resolve(&run.engine_args, &err);
    if (rc == 0) {
        rc = slu_foresight_prepare(&run.foresight, &run.engine_args.params, &err);
    }
    if (rc == 0) {
        rc = slu_engine_open(run.model, &run.engine_args.params, &engine, &err);
    }
    if (rc == 0) {
        slu_cli_plan_doubts(slu_engine_plan(engine));
        rc = slu_cli_session_create(engine, &run.engine_args, &session, &err);
    }
    if (rc == 0) {
        slu_cli_cancel_session(session);
        rc = generate(&run, engine, session, &err);
        slu_cli_cancel_session(NULL);
    }
    slu_foresight_finish(&run.foresight);
    slu_session_destroy(session);
    slu_engine_close(engine);
    if (run.stats.kernels) {
        slu_cli_phases_probe(run.model, &run.engine_args.params, &run.stats);
    }
    slu_cli_engine_args_finish(&run.engine_args);
    free(run.text);
    if (run.out_errno) {
        errno = run.out_errno;
        return slu_cli_output_failed();
    }
    return rc < 0 ? slu_cli_fail(&err) : slu_cli_exit_status(SLU_EXIT_DONE);
}
