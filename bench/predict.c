/*
 * What a prompt predictor is worth: from a trace that it learns from and one that it has never
 * seen, how much of the router's weight the best experts by each ranking cover, and how many of the
 * truly most used ones are among them. The rankings are the hottest experts, which are the same for
 * every prompt; a linear layer on the prompt's mean embedding; the network; and what hindsight
 * says. All are fitted to the same prompts, with the same training.
 *
 *     sluice calibrate MODEL.slu --prompts train.jsonl --trace train.slt
 *     sluice calibrate MODEL.slu --prompts test.jsonl --trace test.slt --no-predictor
 *     build/bench/predict MODEL.slu train.slt test.slt [--seed S] [--json] [--svg OUT.svg]
 *
 * With --modes, what the ways to route do to answers, reads and speed, with each predictor and size
 * of cache. PROMPTS are JSON lines: {"prompt": ..., "adapter": NAME, "expected": ...}, of which the
 * last two may be left out (tools/demo-prompts writes them). bench/demo does all of it for the demo
 * model.
 *
 *     build/bench/predict MODEL.slu --modes PROMPTS.jsonl [--train train.slt] [--adapters-dir DIR]
 *         [--n 40] [--n-answer 160] [--shares .75,.5,.25] [--biases .5,1,2,4]
 *         [--coverages .8,.9,.95] [--json] [--svg OUT.svg]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "bench/chart.h"
#include "bench/predict_modes.h"
#include "engine.h"
#include "tools/predict_train.h"

static const double shares[] = {.125, .25, .375, .5, .625, .75};
#define N_SHARES  (sizeof shares / sizeof shares[0])
#define N_RANKERS 4
static const char *const rankers[N_RANKERS] = {"hottest", "linear", "network", "hindsight"};

struct trace {
    struct slu_source *source;
    struct slu_trace_reader *reader;
    struct slu_predict_data data;
};

struct bench {
    const char *train, *test, *svg;
    struct bench_modes modes;
    uint64_t seed;
    struct slu_engine *engine;
    struct slu_predict_quality table[N_RANKERS][N_SHARES];
    struct slu_predictor *predictors[N_RANKERS];
    size_t bytes[N_RANKERS];
    double fit_s[N_RANKERS], run_ms[N_RANKERS];
};

static int embed(void *arg, const int32_t *ids, uint32_t n, float *x, struct slu_err *err)
{
    return slu_engine_embed(arg, ids, n, x, err);
}

/* The fingerprint should do, but a trace may be damaged with care: what it says of the model's
 * sizes is what buffers are measured by. */
static bool is_of_model(const struct slu_trace_shape *shape, const struct slu_engine *engine)
{
    const struct slu_config *c = &engine->weights.config;
    return shape->fingerprint == engine->pack->fingerprint && shape->n_layers == c->n_layers &&
           shape->n_experts == c->n_experts && shape->n_vocab == c->n_vocab;
}

static int open_trace(struct bench *b, const char *path, struct trace *trace, struct slu_err *err)
{
    int rc = slu_source_open_file(path, &trace->source, err);
    rc = rc < 0 ? rc : slu_trace_reader_create(trace->source, &trace->reader, err);
    if (rc == 0 && !is_of_model(slu_trace_reader_shape(trace->reader), b->engine)) {
        rc = slu_err_set(err, SLU_EINVAL, "%s: was recorded with another model", path);
    }
    return rc < 0 ? rc
                  : slu_predict_data_init(&trace->data, trace->reader, embed, b->engine,
                                          b->engine->weights.config.n_embd, err);
}

static void close_trace(struct trace *trace)
{
    slu_predict_data_finish(&trace->data);
    slu_trace_reader_destroy(trace->reader);
    slu_source_destroy(trace->source);
}

static int fit(struct bench *b, const struct slu_predict_data *data, int which, struct slu_err *err)
{
    const struct slu_predict_train_params params = {.is_linear = which == 1, .seed = b->seed};
    void *section;
    double start = slu_now_s();
    int rc = slu_predict_train(data, &params, &section, &b->bytes[which], err);
    if (rc == 0) {
        b->fit_s[which] = slu_now_s() - start;
        rc = slu_predictor_create(section, b->bytes[which], &b->predictors[which], err);
        free(section);
    }
    return rc;
}

/* Milliseconds for the longest prompt, embeddings not counted. */
static void time_runs(struct bench *b, const struct slu_predict_data *data)
{
    uint32_t n = data->n_tokens_max, n_embd = data->n_embd;
    const struct slu_trace_shape *shape = slu_trace_reader_shape(data->reader);
    float *x = malloc((size_t)n * n_embd * sizeof *x);
    float *score = malloc((size_t)shape->n_layers * shape->n_experts * sizeof *score);
    for (size_t i = 0; x && i < (size_t)n * n_embd; i++) {
        x[i] = (float)(i * 7919 % 1000) - 500;
    }
    for (int which = 1; x && score && which <= 2; which++) {
        double best = 1e9;
        for (int run = 0; run < 20; run++) {
            double start = slu_now_s();
            slu_predictor_run(b->predictors[which], x, n, score);
            best = slu_now_s() - start < best ? slu_now_s() - start : best;
        }
        b->run_ms[which] = 1e3 * best;
    }
    free(x);
    free(score);
}

static int measure(struct bench *b, struct trace *train, struct trace *test, struct slu_err *err)
{
    const struct slu_trace_shape *shape = slu_trace_reader_shape(train->reader);
    float *hottest = calloc((size_t)shape->n_layers * shape->n_experts, sizeof *hottest);
    int rc = hottest ? slu_predict_hottest(&train->data, hottest, err)
                     : slu_err_set(err, SLU_ENOMEM, "out of memory");
    for (int which = 1; which <= 2 && rc == 0; which++) {
        rc = fit(b, &train->data, which, err);
    }
    for (int which = 0; which < N_RANKERS; which++) {
        for (size_t i = 0; i < N_SHARES && rc == 0; i++) {
            struct slu_predict_measure m = {.share = shares[i],
                                            .scores = hottest,
                                            .predictor = b->predictors[which],
                                            .kind = which == 0   ? SLU_PREDICT_HOTTEST
                                                    : which == 3 ? SLU_PREDICT_HINDSIGHT
                                                                 : SLU_PREDICT_BY_PROMPT};
            rc = slu_predict_measure(&test->data, &m, &b->table[which][i], err);
        }
    }
    if (rc == 0) {
        time_runs(b, &test->data);
    }
    free(hottest);
    return rc;
}

static void print_json(const struct bench *b)
{
    printf("{\"rows\": [");
    for (int which = 0; which < N_RANKERS; which++) {
        for (size_t i = 0; i < N_SHARES; i++) {
            const struct slu_predict_quality *q = &b->table[which][i];
            printf("%s{\"ranking\": \"%s\", \"share\": %.3f, \"covered\": %.4f, "
                   "\"prompt\": %.4f, \"answer\": %.4f, \"prompt_alone\": %.4f, "
                   "\"answer_alone\": %.4f, \"recall\": %.4f}",
                   which + i ? ", " : "", rankers[which], shares[i], q->all, q->prompt, q->answer,
                   q->prompt_alone, q->answer_alone, q->recall);
        }
    }
    printf("], \"network_bytes\": %zu, \"linear_bytes\": %zu, \"network_fit_s\": %.1f, "
           "\"network_run_ms\": %.3f}\n",
           b->bytes[2], b->bytes[1], b->fit_s[2], b->run_ms[2]);
}

static void print_table(const struct bench *b, uint32_t n_train, uint32_t n_test)
{
    printf("%u prompts to learn from, %u to be measured with; router weight covered\n"
           "%-10s %6s %8s %8s %8s %14s %14s %8s\n",
           n_train, n_test, "ranking", "share", "all", "prompt", "answer", "prompt (alone)",
           "answer (alone)", "recall");
    for (int which = 0; which < N_RANKERS; which++) {
        for (size_t i = 0; i < N_SHARES; i++) {
            const struct slu_predict_quality *q = &b->table[which][i];
            printf("%-10s %5.1f%% %8.4f %8.4f %8.4f %14.4f %14.4f %8.4f\n", rankers[which],
                   100 * shares[i], q->all, q->prompt, q->answer, q->prompt_alone, q->answer_alone,
                   q->recall);
        }
    }
    for (int which = 1; which <= 2; which++) {
        printf("%s: %zu bytes, fitted in %.1f s, %.2f ms for the longest prompt\n", rankers[which],
               b->bytes[which], b->fit_s[which], b->run_ms[which]);
    }
}

/* Coverage of all tokens, and recall, over the share of experts, a line for each ranking. */
static int write_svg(const struct bench *b, struct slu_err *err)
{
    static const char *const colours[N_RANKERS] = {"#999999", "#d98c26", "#2667b8", "#2e8b57"};
    struct bench_chart_line lines[2][N_RANKERS];
    double values[2][N_RANKERS][N_SHARES];
    for (int which = 0; which < N_RANKERS; which++) {
        for (size_t i = 0; i < N_SHARES; i++) {
            values[0][which][i] = b->table[which][i].all;
            values[1][which][i] = b->table[which][i].recall;
        }
        for (int what = 0; what < 2; what++) {
            lines[what][which] = (struct bench_chart_line){.name = rankers[which],
                                                           .colour = colours[which],
                                                           .n = N_SHARES,
                                                           .x = shares,
                                                           .y = values[what][which]};
        }
    }
    const char *by = "share of each layer's experts";
    const struct bench_chart charts[2] = {
        {"router weight covered by the best of each ranking", by, 1, 0, 1, true, lines[0],
         N_RANKERS},
        {"recall of the experts that were used most", by, 1, 0, 1, true, lines[1], N_RANKERS},
    };
    return bench_chart_write(b->svg, charts, 2, 2, err);
}

static int fail_usage(void)
{
    fprintf(stderr,
            "usage: predict MODEL.slu TRAIN TEST [--seed S] [--json] [--svg OUT.svg]\n"
            "       predict MODEL.slu --modes PROMPTS.jsonl [--train TRAIN] [--adapters-dir DIR]\n"
            "               [--n N] [--n-answer N] [--shares S,..] [--biases B,..]\n"
            "               [--coverages C,..] [--json] [--svg OUT.svg]\n");
    return 2;
}

/* Numbers between commas, more than 0 and max at most. */
static bool parse_list(const char *text, double max, struct bench_modes_list *ret_list)
{
    ret_list->n = 0;
    for (char *end; *text; text = *end ? end + 1 : end) {
        double number = strtod(text, &end);
        if (end == text || (*end && *end != ',') || ret_list->n == BENCH_MODES_LIST_MAX ||
            !(number > 0 && number <= max)) {
            return false;
        }
        ret_list->items[ret_list->n++] = number;
    }
    return true;
}

static bool parse_number(const char *text, uint32_t max, uint32_t *ret_number)
{
    char *end;
    unsigned long number = strtoul(text, &end, 10);
    *ret_number = (uint32_t)number;
    return *text >= '0' && *text <= '9' && *end == '\0' && number > 0 && number <= max;
}

/* An option of --modes and its value. */
static bool parse_modes(struct bench_modes *modes, const char *option, const char *value)
{
    if (strcmp(option, "--modes") == 0) {
        modes->prompts = value;
    } else if (strcmp(option, "--adapters-dir") == 0) {
        modes->adapters_dir = value;
    } else if (strcmp(option, "--n") == 0) {
        return parse_number(value, 10000, &modes->n_prompts);
    } else if (strcmp(option, "--n-answer") == 0) {
        return parse_number(value, 10000, &modes->n_answer);
    } else if (strcmp(option, "--shares") == 0) {
        return parse_list(value, 1, &modes->shares) && modes->shares.n > 0;
    } else if (strcmp(option, "--biases") == 0) {
        return parse_list(value, 100, &modes->biases);
    } else if (strcmp(option, "--coverages") == 0) {
        return parse_list(value, 1, &modes->coverages);
    } else {
        return false;
    }
    return true;
}

static bool parse(struct bench *b, int argc, char **argv)
{
    const char **operands[] = {&b->modes.model, &b->train, &b->test};
    size_t n = 0;
    for (int i = 1; i < argc; i++) {
        bool has_value = i + 1 < argc;
        if (strcmp(argv[i], "--json") == 0) {
            b->modes.is_json = true;
        } else if (strcmp(argv[i], "--svg") == 0 && has_value) {
            b->svg = argv[++i];
        } else if (strcmp(argv[i], "--train") == 0 && has_value) {
            b->train = argv[++i];
        } else if (strcmp(argv[i], "--seed") == 0 && has_value) {
            b->seed = strtoull(argv[++i], NULL, 10);
        } else if (argv[i][0] != '-' && n < 3) {
            *operands[n++] = argv[i];
        } else if (!has_value || !parse_modes(&b->modes, argv[i], argv[i + 1])) {
            return false;
        } else {
            i++;
        }
    }
    return n == (b->modes.prompts ? 1 : 3);
}

/* With a trace to learn from, the linear baseline is compared too. */
static int run_modes(struct bench *b, struct slu_err *err)
{
    struct trace train = {0};
    int rc = 0;
    if (b->train) {
        rc = slu_engine_open(b->modes.model, &(struct slu_engine_params){.minimum_cache = true},
                             &b->engine, err);
        rc = rc < 0 ? rc : open_trace(b, b->train, &train, err);
        rc = rc < 0 ? rc : fit(b, &train.data, 1, err);
        close_trace(&train);
        slu_engine_close(b->engine);
        b->engine = NULL;
    }
    b->modes.linear = b->predictors[1];
    b->modes.svg = b->svg;
    return rc < 0 ? rc : bench_modes_run(&b->modes, err);
}

static int run_rankings(struct bench *b, struct slu_err *err)
{
    struct trace train = {0}, test = {0};
    int rc = slu_engine_open(b->modes.model, &(struct slu_engine_params){.minimum_cache = true},
                             &b->engine, err);
    rc = rc < 0 ? rc : open_trace(b, b->train, &train, err);
    rc = rc < 0 ? rc : open_trace(b, b->test, &test, err);
    rc = rc < 0 ? rc : measure(b, &train, &test, err);
    if (rc == 0 && b->modes.is_json) {
        print_json(b);
    } else if (rc == 0) {
        print_table(b, train.data.n_prompts, test.data.n_prompts);
    }
    rc = rc < 0 || !b->svg ? rc : write_svg(b, err);
    close_trace(&train);
    close_trace(&test);
    slu_engine_close(b->engine);
    return rc;
}

int main(int argc, char **argv)
{
    struct bench b = {.modes = {.n_prompts = 40,
                                .n_answer = 160,
                                .shares = {{.75, .5, .25}, 3},
                                .biases = {{.5, 1, 2, 4}, 4},
                                .coverages = {{.8, .9, .95}, 3}}};
    struct slu_err err = {0};
    if (!parse(&b, argc, argv)) {
        return fail_usage();
    }
    int rc = b.modes.prompts ? run_modes(&b, &err) : run_rankings(&b, &err);
    slu_predictor_destroy(b.predictors[1]);
    slu_predictor_destroy(b.predictors[2]);
    if (rc < 0) {
        fprintf(stderr, "predict: %s\n", err.text);
        return 1;
    }
    return 0;
}
