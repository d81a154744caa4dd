#include "tools/route_trace.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/trace_file.h"

#define TRACE_BYTES_MAX ((uint64_t)1 << 30)
#define LINE_BYTES_MAX  4096u
#define COLUMNS_MAX     64u

enum column { COL_TURN, COL_PHASE, COL_STEP, COL_LAYER, COL_SLOT, COL_EXPERT, COL_WEIGHT, COLUMNS };

static const char *const column_names[COLUMNS] = {
    "turn", "phase", "step", "layer", "slot", "expert", "weight",
};

/* A line of the file, before it is put in its place. */
struct row {
    uint32_t turn, phase, step, layer, slot, expert;
    float weight;
};

struct parser {
    const char *name;
    const char *at, *end;
    uint64_t n_lines;
    int columns[COLUMNS]; /* where each stands; -1: nowhere */
    unsigned n_columns;   /* of the line that names them; 0 before it */
    uint32_t n_layers, n_experts;
    struct row *rows;
    size_t n_rows, n_rows_max;
    struct slu_err *err;
};

static int refuse(const struct parser *p, const char *what)
{
    return slu_err_set(p->err, SLU_EFORMAT, "%s: line %" PRIu64 ": %s", p->name, p->n_lines, what);
}

/* The next line as a string in `line`; 0 at the end. */
static int next_line(struct parser *p, char *line)
{
    if (p->at == p->end) {
        return 0;
    }
    size_t left = (size_t)(p->end - p->at);
    const char *newline = memchr(p->at, '\n', left);
    size_t len = newline ? (size_t)(newline - p->at) : left;
    p->n_lines++;
    if (len >= LINE_BYTES_MAX || memchr(p->at, '\0', len)) {
        return refuse(p, "this isn't text, so this isn't a routing trace");
    }
    memcpy(line, p->at, len);
    while (len > 0 && (line[len - 1] == '\r' || line[len - 1] == ' ')) {
        len--;
    }
    line[len] = '\0';
    p->at = newline ? newline + 1 : p->end;
    return 1;
}

/* A decimal number up to `most` that ends where the field does. */
static bool parse_number(const char *text, uint32_t most, uint32_t *ret_number)
{
    uint64_t number = 0;
    if (*text < '0' || *text > '9') {
        return false;
    }
    for (; *text >= '0' && *text <= '9'; text++) {
        number = number * 10 + (uint64_t)(*text - '0');
        if (number > most) {
            return false;
        }
    }
    *ret_number = (uint32_t)number;
    return *text == '\0' || *text == ' ';
}

/* "# model=... n_layer=36 n_expert=128 ...": names may hold anything, so the last one counts. */
static bool parse_header_number(const char *line, const char *key, uint32_t most, uint32_t *ret)
{
    const char *found = NULL;
    for (const char *at = line; (at = strstr(at, key)); at++) {
        found = at;
    }
    return found && parse_number(found + strlen(key), most, ret) && *ret > 0;
}

static int parse_comment(struct parser *p, const char *line)
{
    if (p->n_lines == 1) {
        return strcmp(line, "# route_trace v1") == 0
                   ? 0
                   : refuse(p, "a routing trace begins with \"# route_trace v1\"");
    }
    if (strncmp(line, "# model=", 8) != 0) {
        return 0;
    }
    if (p->n_layers > 0) {
        return refuse(p, "a second model in the same trace");
    }
    if (!parse_header_number(line, " n_layer=", SLU_ROUTE_LAYERS_MAX, &p->n_layers) ||
        !parse_header_number(line, " n_expert=", SLU_ROUTE_EXPERTS_MAX, &p->n_experts)) {
        return refuse(p, "the model's line needs n_layer= and n_expert=, each a sensible number");
    }
    return (uint64_t)p->n_layers * p->n_experts <= SLU_ROUTE_BANK_MAX
               ? 0
               : refuse(p, "no model has as many experts as that");
}

/* Cuts a line at its commas. 0 if there are too many fields. */
static unsigned split(char *line, char **fields)
{
    unsigned n = 0;
    for (char *at = line; at; n++) {
        if (n == COLUMNS_MAX) {
            return 0;
        }
        fields[n] = at;
        at = strchr(at, ',');
        if (at) {
            *at++ = '\0';
        }
    }
    return n;
}

static int parse_columns(struct parser *p, char **fields, unsigned n_fields)
{
    for (int c = 0; c < COLUMNS; c++) {
        p->columns[c] = -1;
        for (unsigned i = 0; i < n_fields; i++) {
            if (strcmp(fields[i], column_names[c]) == 0) {
                p->columns[c] = (int)i;
            }
        }
        bool is_optional = c == COL_TURN || c == COL_SLOT || c == COL_WEIGHT;
        if (p->columns[c] < 0 && !is_optional) {
            return refuse(p, "the line of column names lacks one of phase, step, layer, expert");
        }
    }
    p->n_columns = n_fields;
    return 0;
}

static bool parse_field(const struct parser *p, char **fields, enum column column, uint32_t most,
                        uint32_t *ret_number)
{
    int at = p->columns[column];
    *ret_number = 0;
    return at < 0 || parse_number(fields[at], most, ret_number);
}

static int parse_row(struct parser *p, char **fields, struct row *ret_row)
{
    struct row row = {.weight = 1};
    if (!parse_field(p, fields, COL_TURN, UINT32_MAX - 1, &row.turn) ||
        !parse_field(p, fields, COL_PHASE, 1, &row.phase) ||
        !parse_field(p, fields, COL_STEP, UINT32_MAX - 1, &row.step) ||
        !parse_field(p, fields, COL_SLOT, UINT32_MAX - 1, &row.slot)) {
        return refuse(p, "turn, step and slot must be numbers, and phase 0 or 1");
    }
    if (!parse_field(p, fields, COL_LAYER, p->n_layers - 1, &row.layer) ||
        !parse_field(p, fields, COL_EXPERT, p->n_experts - 1, &row.expert)) {
        return refuse(p, "the model has no such layer or expert");
    }
    if (p->columns[COL_WEIGHT] >= 0) {
        const char *text = fields[p->columns[COL_WEIGHT]];
        char *end;
        row.weight = strtof(text, &end);
        if (end == text || *end != '\0' || !isfinite(row.weight) || row.weight < 0) {
            return refuse(p, "the weight must be a number that isn't negative");
        }
    }
    *ret_row = row;
    return 0;
}

static int add_row(struct parser *p, const struct row *row)
{
    if (p->n_rows == p->n_rows_max) {
        size_t n = p->n_rows_max ? 2 * p->n_rows_max : 4096;
        struct row *rows = n > UINT32_MAX / 2 ? NULL : realloc(p->rows, n * sizeof *rows);
        if (!rows) {
            return slu_err_set(p->err, SLU_ENOMEM, "%s: no memory for %zu choices", p->name, n);
        }
        p->rows = rows;
        p->n_rows_max = n;
    }
    p->rows[p->n_rows++] = *row;
    return 0;
}

static int parse_data(struct parser *p, char *line)
{
    char *fields[COLUMNS_MAX];
    unsigned n_fields = split(line, fields);
    if (p->n_columns == 0) {
        return parse_columns(p, fields, n_fields);
    }
    if (n_fields != p->n_columns) {
        return refuse(p, "it has not as many fields as there are columns");
    }
    if (p->n_layers == 0) {
        return refuse(p, "there is no \"# model=\" line before the first choice");
    }
    struct row row;
    int rc = parse_row(p, fields, &row);
    return rc < 0 ? rc : add_row(p, &row);
}

static int parse(struct parser *p)
{
    char line[LINE_BYTES_MAX];
    int rc;
    while ((rc = next_line(p, line)) > 0) {
        bool is_comment = line[0] == '#';
        if (p->n_lines == 1 && !is_comment) {
            return refuse(p, "a routing trace begins with \"# route_trace v1\"");
        }
        if (line[0] != '\0') {
            rc = is_comment ? parse_comment(p, line) : parse_data(p, line);
        }
        if (rc < 0) {
            return rc;
        }
    }
    if (rc == 0 && p->n_rows == 0) {
        return slu_err_set(p->err, SLU_EFORMAT, "%s: there are no choices in this trace", p->name);
    }
    return rc;
}

static int compare_u32(uint32_t a, uint32_t b)
{
    return (a > b) - (a < b);
}

static int compare_tokens(const struct row *a, const struct row *b)
{
    int order = compare_u32(a->turn, b->turn);
    order = order ? order : compare_u32(a->phase, b->phase);
    return order ? order : compare_u32(a->step, b->step);
}

static int compare_visits(const struct row *a, const struct row *b)
{
    int order = compare_tokens(a, b);
    return order ? order : compare_u32(a->layer, b->layer);
}

static int compare_rows(const void *a, const void *b)
{
    const struct row *x = a, *y = b;
    int order = compare_visits(x, y);
    order = order ? order : compare_u32(x->slot, y->slot);
    return order ? order : compare_u32(x->expert, y->expert);
}

/* From sorted rows; the arrays are as long as there are rows. `seen` has a stamp for each layer,
 * then for each expert. */
static int fill(const struct parser *p, uint32_t *seen, struct slu_route_trace *trace)
{
    uint32_t *seen_layer = seen, *seen_expert = seen + p->n_layers;
    for (size_t i = 0; i < p->n_rows; i++) {
        const struct row *row = &p->rows[i], *before = i > 0 ? row - 1 : NULL;
        if (!before || compare_tokens(before, row) != 0) {
            trace->n_tokens++;
            trace->n_decoded_tokens += row->phase == 1;
        }
        if (!before || compare_visits(before, row) != 0) {
            trace->n_routed_layers += seen_layer[row->layer] == 0;
            seen_layer[row->layer] = 1;
            trace->visits[trace->n_visits++] = (struct slu_route_visit){
                .token = trace->n_tokens - 1,
                .layer = row->layer,
                .first = (uint32_t)i,
                .is_decoding = row->phase == 1,
            };
        }
        if (seen_expert[row->expert] == trace->n_visits) {
            return slu_err_set(p->err, SLU_EFORMAT,
                               "%s: step %" PRIu32 " chooses expert %" PRIu32 " of layer %" PRIu32
                               " twice",
                               p->name, row->step, row->expert, row->layer);
        }
        seen_expert[row->expert] = trace->n_visits;
        trace->visits[trace->n_visits - 1].n++;
        trace->experts[i] = row->expert;
        trace->weights[i] = row->weight;
    }
    trace->n_choices = (uint32_t)p->n_rows;
    return 0;
}

static int build(struct parser *p, struct slu_route_trace *ret_trace)
{
    qsort(p->rows, p->n_rows, sizeof *p->rows, compare_rows);
    struct slu_route_trace trace = {
        .n_layers = p->n_layers,
        .n_experts = p->n_experts,
        .visits = calloc(p->n_rows, sizeof *trace.visits),
        .experts = calloc(p->n_rows, sizeof *trace.experts),
        .weights = calloc(p->n_rows, sizeof *trace.weights),
    };
    uint32_t *seen = calloc((size_t)p->n_layers + p->n_experts, sizeof *seen);
    int rc;
    if (!trace.visits || !trace.experts || !trace.weights || !seen) {
        rc = slu_err_set(p->err, SLU_ENOMEM, "%s: no memory for %zu choices", p->name, p->n_rows);
    } else {
        rc = fill(p, seen, &trace);
    }
    free(seen);
    if (rc < 0) {
        slu_route_trace_finish(&trace);
        return rc;
    }
    *ret_trace = trace;
    return 0;
}

int slu_route_trace_read(struct slu_source *source, struct slu_route_trace *ret_trace,
                         struct slu_err *err)
{
    if (slu_trace_is(source)) {
        return slu_route_compact_read(source, ret_trace, err);
    }
    if (source->size_bytes == 0 || source->size_bytes > TRACE_BYTES_MAX) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: a file of %" PRIu64 " bytes isn't a routing trace", source->name,
                           source->size_bytes);
    }
    size_t bytes = (size_t)source->size_bytes;
    char *text = malloc(bytes);
    if (!text) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to read its %zu bytes", source->name,
                           bytes);
    }
    struct parser p = {.name = source->name, .at = text, .end = text + bytes, .err = err};
    int rc = source->read_at(source, 0, text, bytes, err);
    rc = rc < 0 ? rc : parse(&p);
    rc = rc < 0 ? rc : build(&p, ret_trace);
    free(p.rows);
    free(text);
    return rc;
}

int slu_route_trace_open(const char *path, struct slu_route_trace *ret_trace, struct slu_err *err)
{
    struct slu_source *source;
    int rc = slu_source_open_file(path, &source, err);
    if (rc == 0) {
        rc = slu_route_trace_read(source, ret_trace, err);
        slu_source_destroy(source);
    }
    return rc;
}

void slu_route_trace_finish(struct slu_route_trace *trace)
{
    free(trace->visits);
    free(trace->experts);
    free(trace->weights);
    *trace = (struct slu_route_trace){0};
}
