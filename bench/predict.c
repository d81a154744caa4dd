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
 * With --modes, what the ways to route do to answers, reads and speed, with the predictor that the
 * pack has and without; PROMPTS as for calibrate.
 *
 *     build/bench/predict MODEL.slu --modes PROMPTS.jsonl [--n 40] [--json]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine.h"
#include "predict_modes.h"
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
    const char *model, *train, *test, *svg, *modes;
    uint32_t n_prompts;
    bool is_json;
    uint64_t seed;
    struct slu_engine *engine;
    struct slu_predict_quality table[N_RANKERS][N_SHARES];
    struct slu_predictor *predictors[N_RANKERS];
    size_t bytes[N_RANKERS];
    double fit_s[N_RANKERS], run_ms[N_RANKERS];
};

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int embed(void *arg, const int32_t *ids, uint32_t n, float *x, struct slu_err *err)
{
    return slu_engine_embed(arg, ids, n, x, err);
}

static int open_trace(struct bench *b, const char *path, struct trace *trace, struct slu_err *err)
{
    int rc = slu_source_open_file(path, &trace->source, err);
    rc = rc < 0 ? rc : slu_trace_reader_create(trace->source, &trace->reader, err);
    if (rc == 0 &&
        slu_trace_reader_shape(trace->reader)->fingerprint != b->engine->pack->fingerprint) {
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
    double start = now_s();
    int rc = slu_predict_train(data, &params, &section, &b->bytes[which], err);
    if (rc == 0) {
        b->fit_s[which] = now_s() - start;
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
            double start = now_s();
            slu_predictor_run(b->predictors[which], x, n, score);
            best = now_s() - start < best ? now_s() - start : best;
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

/* Coverage of all tokens over the share of experts, a line for each ranking. */
static bool write_svg(const struct bench *b)
{
    static const char *const colours[N_RANKERS] = {"#999999", "#d98c26", "#2667b8", "#2e8b57"};
    FILE *f = fopen(b->svg, "w");
    if (!f) {
        return false;
    }
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"640\" height=\"420\" "
               "font-family=\"sans-serif\" font-size=\"12\">\n"
               "<rect width=\"640\" height=\"420\" fill=\"white\"/>\n"
               "<text x=\"60\" y=\"24\">router weight covered by the best experts of each "
               "ranking</text>\n");
    for (int i = 0; i <= 10; i += 2) {
        int y = 380 - 33 * i;
        fprintf(f,
                "<line x1=\"60\" x2=\"500\" y1=\"%d\" y2=\"%d\" stroke=\"#dddddd\"/>"
                "<text x=\"26\" y=\"%d\">%d %%</text>\n",
                y, y, y + 4, 10 * i);
    }
    for (size_t i = 0; i < N_SHARES; i++) {
        fprintf(f, "<text x=\"%d\" y=\"400\">%.1f %%</text>\n", (int)(40 + 550 * shares[i]),
                100 * shares[i]);
    }
    for (int which = 0; which < N_RANKERS; which++) {
        fprintf(f, "<polyline fill=\"none\" stroke-width=\"2\" stroke=\"%s\" points=\"",
                colours[which]);
        for (size_t i = 0; i < N_SHARES; i++) {
            fprintf(f, "%.1f,%.1f ", 60 + 550 * shares[i], 380 - 330 * b->table[which][i].all);
        }
        fprintf(f, "\"/><text x=\"520\" y=\"%d\" fill=\"%s\">%s</text>\n", 140 - 22 * which,
                colours[which], rankers[which]);
    }
    fprintf(f, "</svg>\n");
    return fclose(f) == 0;
}

static int fail_usage(void)
{
    fprintf(stderr, "usage: predict MODEL.slu TRAIN TEST [--seed S] [--json] [--svg OUT.svg]\n"
                    "       predict MODEL.slu --modes PROMPTS.jsonl [--n N] [--json]\n");
    return 2;
}

static bool parse(struct bench *b, int argc, char **argv)
{
    const char **operands[] = {&b->model, &b->train, &b->test};
    size_t n = 0;
    for (int i = 1; i < argc; i++) {
        bool has_value = i + 1 < argc;
        if (strcmp(argv[i], "--json") == 0) {
            b->is_json = true;
        } else if (strcmp(argv[i], "--svg") == 0 && has_value) {
            b->svg = argv[++i];
        } else if (strcmp(argv[i], "--modes") == 0 && has_value) {
            b->modes = argv[++i];
        } else if (strcmp(argv[i], "--n") == 0 && has_value) {
            b->n_prompts = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--seed") == 0 && has_value) {
            b->seed = strtoull(argv[++i], NULL, 10);
        } else if (argv[i][0] != '-' && n < 3) {
            *operands[n++] = argv[i];
        } else {
            return false;
        }
    }
    return n == (b->modes ? 1 : 3) && b->n_prompts > 0 && b->n_prompts <= 10000;
}

int main(int argc, char **argv)
{
    struct bench b = {.n_prompts = 40};
    struct trace train = {0}, test = {0};
    struct slu_err err = {0};
    if (!parse(&b, argc, argv)) {
        return fail_usage();
    }
    if (b.modes) {
        const struct bench_modes modes = {b.model, b.modes, b.n_prompts, b.is_json};
        if (bench_modes_run(&modes, &err) < 0) {
            fprintf(stderr, "predict: %s\n", err.text);
            return 1;
        }
        return 0;
    }
    int rc = slu_engine_open(b.model, &(struct slu_engine_params){.minimum_cache = true}, &b.engine,
                             &err);
    rc = rc < 0 ? rc : open_trace(&b, b.train, &train, &err);
    rc = rc < 0 ? rc : open_trace(&b, b.test, &test, &err);
    rc = rc < 0 ? rc : measure(&b, &train, &test, &err);
    if (rc == 0 && b.is_json) {
        print_json(&b);
    } else if (rc == 0) {
        print_table(&b, train.data.n_prompts, test.data.n_prompts);
    }
    if (rc == 0 && b.svg && !write_svg(&b)) {
        rc = slu_err_set(&err, SLU_EIO, "%s: cannot be written", b.svg);
    }
    slu_predictor_destroy(b.predictors[1]);
    slu_predictor_destroy(b.predictors[2]);
    close_trace(&train);
    close_trace(&test);
    slu_engine_close(b.engine);
    if (rc < 0) {
        fprintf(stderr, "predict: %s\n", err.text);
        return 1;
    }
    return 0;
}
