#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/modes.h"

#define LINE_BYTES_MAX (1u << 20)

static int refuse(const struct bench_run *run, uint32_t line, const char *what, struct slu_err *err)
{
    return slu_err_set(err, SLU_EFORMAT, "%s: line %u: %s", run->params->prompts, line, what);
}

/* Index of the task, which is new if none has that adapter; -1 if there are too many. */
static int find_task(struct bench_run *run, const char *adapter)
{
    for (uint32_t i = 0; i < run->n_tasks; i++) {
        const char *other = run->tasks[i].adapter;
        if (adapter && other ? strcmp(adapter, other) == 0 : adapter == other) {
            return (int)i;
        }
    }
    if (run->n_tasks == BENCH_TASKS_MAX) {
        return -1;
    }
    run->tasks[run->n_tasks].adapter = adapter ? strdup(adapter) : NULL;
    return (int)run->n_tasks++;
}

static int add(struct bench_run *run, const json_t *line, uint32_t number, struct slu_err *err)
{
    struct bench_message *m = &run->messages[run->n];
    const json_t *prompt = json_is_object(line) ? json_object_get(line, "prompt") : line;
    const json_t *adapter = json_object_get(line, "adapter");
    const json_t *expected = json_object_get(line, "expected");
    if (!json_is_string(prompt) || (adapter && !json_is_string(adapter)) ||
        (expected && !json_is_string(expected))) {
        return refuse(run, number,
                      "neither a JSON string nor an object with the texts \"prompt\" and perhaps "
                      "\"adapter\" and \"expected\"",
                      err);
    }
    int task = find_task(run, json_string_value(adapter));
    if (task < 0) {
        return refuse(run, number, "more adapters than this program compares", err);
    }
    m->text = strdup(json_string_value(prompt));
    m->bytes = json_string_length(prompt);
    m->expected = expected ? strdup(json_string_value(expected)) : NULL;
    if (!m->text || (expected && !m->expected) || (adapter && !run->tasks[task].adapter)) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory");
    }
    m->task = (uint32_t)task;
    run->tasks[task].n++;
    run->tasks[task].n_expected += expected != NULL;
    run->n++;
    return 0;
}

int bench_modes_read(struct bench_run *run, struct slu_err *err)
{
    FILE *file = fopen(run->params->prompts, "re");
    char *line = malloc(LINE_BYTES_MAX);
    uint32_t number = 0;
    int rc = 0;
    if (!file || !line) {
        rc = slu_err_set(err, SLU_EIO, "%s: cannot be read: %s", run->params->prompts,
                         strerror(errno));
    }
    while (rc == 0 && run->n < run->params->n_prompts && fgets(line, LINE_BYTES_MAX, file)) {
        json_error_t why;
        number++;
        if (line[strspn(line, " \t\r\n")] == '\0') {
            continue;
        }
        json_t *object = json_loads(line, JSON_DECODE_ANY, &why);
        rc = object ? add(run, object, number, err) : refuse(run, number, why.text, err);
        json_decref(object);
    }
    if (rc == 0 && run->n == 0) {
        rc = slu_err_set(err, SLU_EINVAL, "%s: there are no messages", run->params->prompts);
    }
    if (file) {
        fclose(file);
    }
    free(line);
    return rc;
}
