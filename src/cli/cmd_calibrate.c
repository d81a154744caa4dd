#include <stdio.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/progress.h"
#include "tools/calibrate.h"

struct calibrate {
    struct slu_calibrate_params params;
    struct slu_cli_engine_args engine_args;
    struct slu_progress progress;
    bool is_json;
};

static void on_progress(void *arg, const char *what, uint64_t done, uint64_t total)
{
    struct calibrate *c = arg;
    if (!c->progress.what || strcmp(c->progress.what, what) != 0) {
        slu_progress_end(&c->progress);
        slu_progress_begin(&c->progress, what);
    }
    slu_progress_update(&c->progress, done, total);
}

static int parse(struct calibrate *c, int argc, char **argv)
{
    const struct slu_arg options[] = {
        {
            .name = "--prompts",
            .value = "FILE.jsonl",
            .type = SLU_ARG_TEXT,
            .target = &c->params.prompts,
            .help = "prompts of the kind that the model is to answer, one on a\n"
                    "line: a JSON string, or {\"prompt\": ..., \"answer\": ...};\n"
                    "without an answer the model gives its own",
        },
        {
            .name = "--text",
            .value = "FILE",
            .type = SLU_ARG_TEXT,
            .target = &c->params.text,
            .help = "plain text, read in pieces of 2 KiB or less, whose first\n"
                    "half counts as the prompt",
        },
        {
            .name = "--n-answer",
            .value = "N",
            .type = SLU_ARG_U32,
            .min = 1,
            .target = &c->params.n_answer,
            .help = "tokens that the model answers with, at most (default: 64)",
        },
        {
            .name = "--trace",
            .value = "OUT",
            .type = SLU_ARG_TEXT,
            .target = &c->params.trace,
            .help = "keep what was recorded (docs/trace-format.md)",
        },
        {
            .name = "--importance",
            .value = "OUT",
            .type = SLU_ARG_TEXT,
            .target = &c->params.importance,
            .help = "write how much each column of each matrix matters, for\n"
                    "pack --quant (docs/importance-format.md)",
        },
        {
            .name = "--save-profile",
            .value = "OUT",
            .type = SLU_ARG_TEXT,
            .target = &c->params.profile,
            .help = "save which experts these texts used most, for run --profile",
        },
        {
            .name = "--no-predictor",
            .type = SLU_ARG_FLAG,
            .target = &c->params.no_predictor,
            .help = "leave the pack as it is: only record",
        },
        {
            .name = "--seed",
            .value = "S",
            .type = SLU_ARG_U64,
            .target = &c->params.seed,
            .help = "of the training (default: 0)",
        },
        {
            .name = "--json",
            .type = SLU_ARG_FLAG,
            .target = &c->is_json,
            .help = "print one JSON object",
        },
    };
    const struct slu_command_args args = {
        .command = "calibrate",
        .synopsis = "MODEL.slu [--prompts FILE.jsonl] [--text FILE] [options]",
        .about =
            "Runs texts through the model, records which experts its routers choose, learns to\n"
            "foretell that from a prompt, and puts what it learned into the pack, whose model\n"
            "stays as it is. Interrupted, it goes on from where it was when called again.",
        .after = "Example:\n  sluice calibrate model.slu --prompts prompts.jsonl",
        .operand = "MODEL.slu",
        .tables = {{.title = "Options", .args = options, .n = sizeof options / sizeof *options},
                   slu_cli_engine_args_alone(&c->engine_args)},
    };
    int parsed = slu_args_parse(&args, argc, argv, &c->params.model);
    if (parsed == SLU_ARGS_OK && !c->params.prompts && !c->params.text) {
        parsed = slu_args_mistake(&args, "--prompts FILE.jsonl or --text FILE is missing");
    }
    const char *outputs[] = {c->params.trace, c->params.profile, c->params.importance};
    const char *inputs[] = {c->params.model, c->params.prompts, c->params.text};
    const char *clash = slu_cli_find_clash(outputs, 3, inputs, 3);
    if (parsed == SLU_ARGS_OK && clash) {
        parsed = slu_args_mistake(&args, "%s would overwrite the model, a text or another output",
                                  clash);
    }
    return parsed;
}

static json_t *quality_json(const struct slu_predict_quality *quality)
{
    json_t *object = json_object();
    slu_json_real(object, "covered", quality->all);
    slu_json_real(object, "prompt", quality->prompt);
    slu_json_real(object, "answer", quality->answer);
    slu_json_real(object, "prompt_alone", quality->prompt_alone);
    slu_json_real(object, "answer_alone", quality->answer_alone);
    slu_json_real(object, "recall", quality->recall);
    return object;
}

static int print_json(const struct slu_calibrate_report *report, struct slu_err *err)
{
    json_t *object = json_object();
    slu_json_whole(object, "prompts", report->n_prompts);
    slu_json_whole(object, "resumed", report->n_resumed);
    slu_json_whole(object, "skipped", report->n_skipped);
    slu_json_whole(object, "tokens", report->n_tokens);
    slu_json_whole(object, "section_bytes", report->section_bytes);
    if (report->has_quality) {
        json_object_set_new(object, "hottest", quality_json(&report->hottest));
        json_object_set_new(object, "predictor", quality_json(&report->predictor));
        json_object_set_new(object, "hindsight", quality_json(&report->hindsight));
    }
    return slu_json_print(object, err);
}

static void print_quality(const char *name, const struct slu_predict_quality *quality)
{
    printf("  %-22s %5.1f %% of all, %5.1f %% of the prompt's, %5.1f %% of the answer's\n", name,
           100 * quality->all, 100 * quality->prompt, 100 * quality->answer);
}

static void print_report(const struct calibrate *c, const struct slu_calibrate_report *report)
{
    printf("%u prompt%s", report->n_prompts, report->n_prompts == 1 ? "" : "s");
    if (report->n_resumed) {
        printf(", %u of them recorded before", report->n_resumed);
    }
    if (report->n_skipped) {
        printf("; %u were empty or longer than the context", report->n_skipped);
    }
    printf("\n");
    if (report->section_bytes) {
        printf("%s: has a predictor of %s now\n", c->params.model,
               slu_cli_size(report->section_bytes).text);
    }
    if (report->has_quality) {
        printf("router weight that half of the experts cover, on every tenth prompt, which it\n"
               "didn't see:\n");
        print_quality("the predictor's", &report->predictor);
        print_quality("the same for all", &report->hottest);
        print_quality("the best in hindsight", &report->hindsight);
    }
}

int slu_cmd_calibrate(int argc, char **argv)
{
    struct calibrate c = {0};
    int parsed = parse(&c, argc, argv);
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }
    slu_cli_catch_signals();
    c.params.engine = &c.engine_args.params;
    c.params.progress = on_progress;
    c.params.arg = &c;
    c.params.cancel = slu_cli_interrupted();
    struct slu_calibrate_report report = {0};
    struct slu_err err = {0};
    int rc = slu_cli_engine_resolve(&c.engine_args, &err);
    rc = rc < 0 ? rc : slu_calibrate_run(&c.params, &report, &err);
    slu_progress_end(&c.progress);
    slu_cli_engine_args_finish(&c.engine_args);
    if (rc == 0 && c.is_json) {
        rc = print_json(&report, &err);
    } else if (rc == 0) {
        print_report(&c, &report);
    }
    return rc < 0 ? slu_cli_fail(&err) : SLU_EXIT_DONE;
}
