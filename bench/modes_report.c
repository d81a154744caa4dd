#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/chart.h"
#include "bench/modes.h"

/* A mode may lose so many points of right answers, or where there are none to compare with, so
 * much of its perplexity; beyond that it counts as broken. */
static const double points_max[] = {0, 1, 2};
#define PERPLEXITY_MAX 1.02

static const char *const mode_names[] = {"exact", "prefer", "locked"};
static const char *const ranker_names[BENCH_RANKERS] = {"-",       "hottest", "linear",
                                                        "network", "profile", "hindsight"};

static const char *task_name(const struct bench_task *task)
{
    const char *slash = task->adapter ? strrchr(task->adapter, '/') : NULL;
    return !task->adapter ? "base" : slash ? slash + 1 : task->adapter;
}

/* "bias 1", "least .9", or nothing; text[24]. */
static const char *option_name(const struct bench_row *row, char *text)
{
    text[0] = '\0';
    if (row->routing == SLU_ROUTING_PREFER) {
        snprintf(text, 24, "bias %g", row->bias);
    } else if (row->min_coverage > 0) {
        snprintf(text, 24, "least %g", row->min_coverage);
    }
    return text;
}

static double right_share(const struct bench_row *row, const struct bench_task *task, uint32_t i)
{
    return task->n_expected ? (double)row->n_right[i] / task->n_expected : NAN;
}

/* What it loses against exact with everything in memory. */
static void find_breaks(const struct bench_run *run, struct bench_row *row, bool has_expected)
{
    size_t at = 0;
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        const struct bench_task *task = &run->tasks[i];
        double lost = 100.0 * ((double)task->n_right - row->n_right[i]) /
                      (task->n_expected ? task->n_expected : 1);
        if (task->n_expected && lost > points_max[row->routing] + 1e-9 && at < sizeof row->breaks) {
            at += (size_t)snprintf(row->breaks + at, sizeof row->breaks - at, "%s%s -%.1f",
                                   at ? ", " : "", task_name(task), lost);
        }
    }
    if (!has_expected && run->exact_perplexity > 0 &&
        row->perplexity > PERPLEXITY_MAX * run->exact_perplexity) {
        snprintf(row->breaks, sizeof row->breaks, "perplexity +%.1f %%",
                 100 * (row->perplexity / run->exact_perplexity - 1));
    }
}

void bench_modes_finish_row(const struct bench_run *run, struct bench_row *row,
                            const struct bench_row *exact)
{
    const struct slu_phase_stats *decode = &row->stats.phases[SLU_PHASE_DECODE];
    const struct slu_phase_stats *prefill = &row->stats.phases[SLU_PHASE_PREFILL];
    double steps = row->n_decoded > run->n ? (double)(row->n_decoded - run->n) : 1;
    double weight = decode->router_weight + prefill->router_weight;
    double n_scored = row->n_scored ? (double)row->n_scored : 1;
    uint32_t n_right = 0, n_expected = 0;
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        n_right += row->n_right[i];
        n_expected += run->tasks[i].n_expected;
    }
    row->covered = weight > 0 ? (decode->covered_weight + prefill->covered_weight) / weight : 1;
    row->decode_covered =
        decode->router_weight > 0 ? decode->covered_weight / decode->router_weight : 1;
    row->flash_token =
        (double)decode->flash_bytes / (decode->n_tokens ? (double)decode->n_tokens : 1);
    row->flash_prompt = (double)prefill->flash_bytes / run->n;
    row->of_exact = exact->flash_token > 0 ? row->flash_token / exact->flash_token : NAN;
    row->first_ms = 1e3 * row->first_s / run->n;
    row->tok_s = row->decode_s > 0 ? steps / row->decode_s : 0;
    row->kl_token = row->kl / n_scored;
    row->perplexity = exp(row->nll / n_scored);
    row->accuracy = n_expected ? (double)n_right / n_expected : NAN;
    find_breaks(run, row, n_expected > 0);
}

void bench_modes_print_head(const struct bench_run *run)
{
    if (run->params->is_json) {
        printf("{\"messages\": %u, \"modes\": [", run->n);
        return;
    }
    printf("%u messages; what exact with everything in memory gets right:", run->n);
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        const struct bench_task *task = &run->tasks[i];
        printf("%s %s %u of %u", i ? "," : "", task_name(task), task->n_right, task->n_expected);
    }
    printf("\nmode    guess     option       set   MiB  covered  decoded  B a token  of exact "
           "first ms    tok/s       KL      ppl   same");
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        printf(" %9.9s", task_name(&run->tasks[i]));
    }
    printf("  breaks\n");
    fflush(stdout);
}

static void print_json_row(const struct bench_run *run, const struct bench_row *r)
{
    printf("%s{\"mode\": \"%s\", \"predictor\": \"%s\", \"set_share\": %g, \"bias\": %g, "
           "\"min_coverage\": %g, \"ram_bytes\": %" PRIu64 ", \"covered\": %.4f, "
           "\"decode_covered\": %.4f, \"flash_bytes_token\": %.0f, \"flash_bytes_prompt\": %.0f, "
           "\"first_token_ms\": %.2f, \"tok_s\": %.1f, \"kl\": %.5f, \"perplexity\": %.4f, "
           "\"same\": %.4f, \"right\": {",
           r == run->rows ? "" : ",\n ", mode_names[r->routing], ranker_names[r->ranker], r->share,
           r->bias, r->min_coverage, r->ram_bytes, r->covered, r->decode_covered, r->flash_token,
           r->flash_prompt, r->first_ms, r->tok_s, r->kl_token, r->perplexity,
           (double)r->n_same / run->n);
    bool is_first = true;
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        if (run->tasks[i].n_expected) {
            printf("%s\"%s\": %.4f", is_first ? "" : ", ", task_name(&run->tasks[i]),
                   right_share(r, &run->tasks[i], i));
            is_first = false;
        }
    }
    printf("}, \"breaks\": \"%s\"}", r->breaks);
    fflush(stdout);
}

void bench_modes_print_row(const struct bench_run *run, const struct bench_row *r)
{
    char option[24];
    if (run->params->is_json) {
        print_json_row(run, r);
        return;
    }
    printf(
        "%-7s %-9s %-10s %5.1f%% %5.1f %8.4f %8.4f %10.0f %8.0f%% %8.2f %8.1f %8.5f %8.4f %5.1f%%",
        mode_names[r->routing], ranker_names[r->ranker], option_name(r, option), 100 * r->share,
        (double)r->ram_bytes / (1 << 20), r->covered, r->decode_covered, r->flash_token,
        100 * r->of_exact, r->first_ms, r->tok_s, r->kl_token, r->perplexity,
        100.0 * (double)r->n_same / run->n);
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        printf(run->tasks[i].n_expected ? "    %5.1f%%" : "         -",
               100 * right_share(r, &run->tasks[i], i));
    }
    printf("  %s\n", r->breaks[0] ? r->breaks : "-");
    fflush(stdout);
}

/* The same way at another size. */
static bool is_same_way(const struct bench_row *a, const struct bench_row *b)
{
    return a->routing == b->routing && a->ranker == b->ranker && a->bias == b->bias &&
           a->min_coverage == b->min_coverage;
}

/* Whether it is its way's first row. */
static bool is_first(const struct bench_run *run, const struct bench_row *row)
{
    const struct bench_row *first = run->rows;
    while (!is_same_way(first, row)) {
        first++;
    }
    return first == row;
}

void bench_modes_print_end(const struct bench_run *run)
{
    char option[24];
    if (run->params->is_json) {
        printf("],\n \"exact_right\": {");
        for (uint32_t i = 0; i < run->n_tasks; i++) {
            printf("%s\"%s\": [%u, %u]", i ? ", " : "", task_name(&run->tasks[i]),
                   run->tasks[i].n_right, run->tasks[i].n_expected);
        }
        printf("}}\n");
        return;
    }
    printf("\nBroken: more points of right answers lost than %g (prefer) or %g (locked); without "
           "any to compare\nwith, perplexity more than %.0f %% above exact's. By that,\n",
           points_max[SLU_ROUTING_PREFER], points_max[SLU_ROUTING_LOCKED],
           100 * (PERPLEXITY_MAX - 1));
    for (uint32_t i = 0; i < run->n_rows; i++) {
        const struct bench_row *row = &run->rows[i];
        bool is_broken = false;
        if (row->routing == SLU_ROUTING_EXACT || !is_first(run, row)) {
            continue;
        }
        printf("  %-7s %-9s %-10s", mode_names[row->routing], ranker_names[row->ranker],
               option_name(row, option));
        for (uint32_t j = i; j < run->n_rows; j++) {
            if (is_same_way(&run->rows[j], row) && run->rows[j].breaks[0]) {
                printf("%s %.1f %%", is_broken ? "," : " breaks with a set of",
                       100 * run->rows[j].share);
                is_broken = true;
            }
        }
        printf("%s\n", is_broken ? "" : " holds with all of them");
    }
}

#define LINES_MAX (1 + BENCH_MODES_LIST_MAX + BENCH_RANKERS + BENCH_MODES_LIST_MAX)

static const char *colour_of(const struct bench_row *row, uint32_t at)
{
    static const char *const blues[] = {"#9ecae1", "#6baed6", "#3182bd", "#08519c"};
    static const char *const reds[] = {"#999999", "#d9a441", "#d9622b",
                                       "#c81e1e", "#8e44ad", "#2e8b57"};
    static const char *const greens[] = {"#c49a6c", "#a0522d", "#6b3a1a", "#3d2010"};
    if (row->routing == SLU_ROUTING_EXACT) {
        return "#000000";
    }
    if (row->routing == SLU_ROUTING_PREFER) {
        return blues[at % 4];
    }
    return row->min_coverage > 0 ? greens[at % 4] : reds[row->ranker];
}

/* The points of all ways: what[line][point]. */
struct figure {
    struct bench_chart_line lines[4][LINES_MAX];
    char names[LINES_MAX][48];
    double share[LINES_MAX][BENCH_MODES_LIST_MAX], bytes[LINES_MAX][BENCH_MODES_LIST_MAX],
        right[LINES_MAX][BENCH_MODES_LIST_MAX], covered[LINES_MAX][BENCH_MODES_LIST_MAX];
    uint32_t n;
    double bytes_max;
    bool has_right;
};

static void add_way(const struct bench_run *run, const struct bench_row *row, struct figure *f)
{
    uint32_t at = f->n++, n = 0;
    char option[24];
    for (const struct bench_row *r = row; r < run->rows + run->n_rows; r++) {
        if (is_same_way(r, row) && n < BENCH_MODES_LIST_MAX) {
            f->share[at][n] = r->share;
            f->bytes[at][n] = 1e-3 * r->flash_token;
            f->right[at][n] = f->has_right ? r->accuracy : (double)r->n_same / run->n;
            f->covered[at][n] = r->decode_covered;
            f->bytes_max = f->bytes[at][n] > f->bytes_max ? f->bytes[at][n] : f->bytes_max;
            n++;
        }
    }
    option_name(row, option);
    snprintf(f->names[at], sizeof f->names[at], "%s%s%s%s%s", mode_names[row->routing],
             row->ranker ? ", " : "", row->ranker ? ranker_names[row->ranker] : "",
             option[0] ? ", " : "", option);
    const double *const x[4] = {f->share[at], f->bytes[at], f->share[at], f->bytes[at]};
    const double *const y[4] = {f->right[at], f->right[at], f->covered[at], f->covered[at]};
    for (int i = 0; i < 4; i++) {
        f->lines[i][at] = (struct bench_chart_line){.name = f->names[at],
                                                    .colour = colour_of(row, at),
                                                    .is_dashed = row->min_coverage > 0,
                                                    .n = n,
                                                    .x = x[i],
                                                    .y = y[i]};
    }
}

int bench_modes_plot(const struct bench_run *run, struct slu_err *err)
{
    struct figure *f = calloc(1, sizeof *f);
    if (!f) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for a plot");
    }
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        f->has_right = f->has_right || run->tasks[i].n_expected > 0;
    }
    for (uint32_t i = 0; i < run->n_rows; i++) {
        if (is_first(run, &run->rows[i]) && f->n < LINES_MAX) {
            add_way(run, &run->rows[i], f);
        }
    }
    double bytes_max = f->bytes_max > 0 ? 1.05 * f->bytes_max : 1;
    const char *right = f->has_right ? "right answers" : "answers the same as exact's";
    const char *covered = "router weight covered while decoding";
    const char *by_share = "share of experts in the set", *by_bytes = "kB of flash a decoded token";
    const struct bench_chart charts[4] = {
        {right, by_share, 1, 0, 1, true, f->lines[0], f->n},
        {right, by_bytes, bytes_max, 0, 1, false, f->lines[1], f->n},
        {covered, by_share, 1, 0, 1, true, f->lines[2], f->n},
        {covered, by_bytes, bytes_max, 0, 1, false, f->lines[3], f->n},
    };
    int rc = bench_chart_write(run->params->svg, charts, 4, 2, err);
    free(f);
    return rc;
}
