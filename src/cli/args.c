#include "cli/args.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"

#define HELP_COLUMN 26

/* Prints help text in a column of its own; its line breaks continue the column. */
static void print_column(FILE *out, int column, const char *text)
{
    for (const char *line = text; *line;) {
        size_t len = strcspn(line, "\n");
        fprintf(out, "%.*s\n", (int)len, line);
        line += len;
        if (*line == '\n') {
            line++;
            if (*line) {
                fprintf(out, "%*s", column, "");
            }
        }
    }
}

static void print_arg(FILE *out, const struct slu_arg *arg)
{
    char left[64];
    char letter[8] = "    ";
    if (arg->letter) {
        snprintf(letter, sizeof letter, "-%c%s", arg->letter, arg->name ? ", " : "");
    }
    snprintf(left, sizeof left, "  %s%s%s%s", letter, arg->name ? arg->name : "",
             arg->value ? " " : "", arg->value ? arg->value : "");
    if (strlen(left) >= HELP_COLUMN) {
        fprintf(out, "%s\n%*s", left, HELP_COLUMN, "");
    } else {
        fprintf(out, "%-*s", HELP_COLUMN, left);
    }
    print_column(out, HELP_COLUMN, arg->help);
}

void slu_args_help(const struct slu_command_args *args, FILE *out)
{
    fprintf(out, "Usage: sluice %s %s\n\n%s\n", args->command, args->synopsis, args->about);
    for (size_t t = 0; t < SLU_ARG_TABLES_MAX && args->tables[t].args; t++) {
        fprintf(out, "\n%s:\n", args->tables[t].title);
        for (size_t i = 0; i < args->tables[t].n; i++) {
            print_arg(out, &args->tables[t].args[i]);
        }
    }
    fprintf(out, "\n%-*sthis text\n", HELP_COLUMN, "  -h, --help");
    if (args->after) {
        fprintf(out, "\n%s\n", args->after);
    }
}

static int mistake_va(const struct slu_command_args *args, const char *format, va_list list)
{
    char text[512];
    vsnprintf(text, sizeof text, format, list);
    slu_cli_error("%s; see `sluice %s --help`", text, args->command);
    return SLU_ARGS_USAGE;
}

int slu_args_mistake(const struct slu_command_args *args, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    int status = mistake_va(args, format, list);
    va_end(list);
    return status;
}

/* Decimal digits into *ret; leaves *text behind them. */
static int parse_digits(const char **text, uint64_t *ret)
{
    if (**text < '0' || **text > '9') {
        return SLU_EINVAL;
    }
    uint64_t value = 0;
    for (; **text >= '0' && **text <= '9'; ++*text) {
        if (__builtin_mul_overflow(value, 10u, &value) ||
            __builtin_add_overflow(value, (uint64_t)(**text - '0'), &value)) {
            return SLU_ERANGE;
        }
    }
    *ret = value;
    return 0;
}

/* The power of two that a suffix stands for (K, KB, KiB, ... or B or none), or -1. */
static int suffix_shift(const char *suffix)
{
    static const char letters[] = "kmgt";
    int shift = 0;
    if (*suffix && *suffix != 'B' && *suffix != 'b') {
        const char *at = strchr(letters, *suffix | 0x20);
        if (!at) {
            return -1;
        }
        shift = 10 * (int)(at - letters + 1);
        suffix += suffix[1] == 'i' ? 2 : 1;
    }
    if (*suffix == 'B' || *suffix == 'b') {
        suffix++;
    }
    return *suffix ? -1 : shift;
}

int slu_args_size(const char *text, uint64_t *ret_bytes)
{
    uint64_t whole, part = 0, unit = 1;
    int rc = parse_digits(&text, &whole);
    if (rc < 0) {
        return rc;
    }
    if (*text == '.') {
        const char *digits = ++text;
        rc = parse_digits(&text, &part);
        if (rc < 0 || text - digits > 9) {
            return SLU_EINVAL;
        }
        for (; digits < text; digits++) {
            unit *= 10;
        }
    }
    int shift = suffix_shift(text);
    if (shift < 0 || (unit > 1 && shift == 0)) {
        return SLU_EINVAL;
    }
    if (whole > UINT64_MAX >> shift) {
        return SLU_ERANGE;
    }
    uint64_t bytes = whole << shift;
    if (__builtin_add_overflow(bytes, (uint64_t)(((__uint128_t)part << shift) / unit), &bytes)) {
        return SLU_ERANGE;
    }
    *ret_bytes = bytes;
    return 0;
}

/* A number as people write it: neither hexadecimal nor "inf". */
static int parse_float(const char *text, double *ret)
{
    char *end;
    if (!*text || text[strspn(text, "0123456789.eE+-")]) {
        return SLU_EINVAL;
    }
    errno = 0;
    double value = strtod(text, &end);
    if (*end || end == text) {
        return SLU_EINVAL;
    }
    if (errno == ERANGE && value != 0) {
        return SLU_ERANGE;
    }
    *ret = value;
    return 0;
}

static int wrong_value(const struct slu_command_args *args, const struct slu_arg *arg,
                       const char *shown, const char *value, const char *wanted)
{
    char range[96] = "";
    if (arg->max > 0) {
        snprintf(range, sizeof range, " from %.10g to %.10g", arg->min, arg->max);
    } else if (arg->min > 1) {
        snprintf(range, sizeof range, " of at least %.10g", arg->min);
    }
    return slu_args_mistake(args, "%s wants %s%s, not '%s'", shown, wanted, range, value);
}

static bool in_range(const struct slu_arg *arg, double value)
{
    return value >= arg->min && (arg->max == 0 || value <= arg->max);
}

static int set_whole(const struct slu_command_args *args, const struct slu_arg *arg,
                     const char *shown, const char *value)
{
    uint64_t number;
    const char *end = value;
    bool is_size = arg->type == SLU_ARG_SIZE;
    int rc = is_size ? slu_args_size(value, &number) : parse_digits(&end, &number);
    if (rc == 0 && !is_size && *end) {
        rc = SLU_EINVAL;
    }
    if (rc == 0 && arg->type == SLU_ARG_U32 && number > UINT32_MAX) {
        rc = SLU_ERANGE;
    }
    if (rc < 0 || !in_range(arg, (double)number)) {
        return wrong_value(args, arg, shown, value,
                           is_size ? "a size such as 4G, 512M or plain bytes" : "a whole number");
    }
    if (arg->type == SLU_ARG_U32) {
        *(uint32_t *)arg->target = (uint32_t)number;
    } else {
        *(uint64_t *)arg->target = number;
    }
    return SLU_ARGS_OK;
}

static int set_choice(const struct slu_command_args *args, const struct slu_arg *arg,
                      const char *shown, const char *value)
{
    char names[128] = "";
    for (int i = 0; arg->choices[i]; i++) {
        if (strcmp(arg->choices[i], value) == 0) {
            *(int *)arg->target = i;
            return SLU_ARGS_OK;
        }
        size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", arg->choices[i]);
    }
    return slu_args_mistake(args, "%s is one of %s, not '%s'", shown, names, value);
}

static int set_value(const struct slu_command_args *args, const struct slu_arg *arg,
                     const char *shown, const char *value)
{
    double number;
    if (arg->ret_given) {
        *arg->ret_given = true;
    }
    switch (arg->type) {
    case SLU_ARG_FLAG:
        *(bool *)arg->target = true;
        return SLU_ARGS_OK;
    case SLU_ARG_TEXT:
        *(const char **)arg->target = value;
        return SLU_ARGS_OK;
    case SLU_ARG_TEXTS: {
        struct slu_arg_list *list = arg->target;
        if (list->n == SLU_ARG_LIST_MAX) {
            return slu_args_mistake(args, "%s can be given %u times", shown, SLU_ARG_LIST_MAX);
        }
        list->items[list->n++] = value;
        return SLU_ARGS_OK;
    }
    case SLU_ARG_FLOAT:
        if (parse_float(value, &number) < 0 || !in_range(arg, number)) {
            return wrong_value(args, arg, shown, value, "a number");
        }
        *(float *)arg->target = (float)number;
        return SLU_ARGS_OK;
    case SLU_ARG_CHOICE:
        return set_choice(args, arg, shown, value);
    default:
        return set_whole(args, arg, shown, value);
    }
}

/* The option that `word` names; *ret_value points behind its `=` or letter, or is NULL. */
static const struct slu_arg *find_arg(const struct slu_command_args *args, const char *word,
                                      const char **ret_value)
{
    bool is_long = word[1] == '-';
    size_t len = strcspn(word, "=");
    for (size_t t = 0; t < SLU_ARG_TABLES_MAX && args->tables[t].args; t++) {
        for (size_t i = 0; i < args->tables[t].n; i++) {
            const struct slu_arg *arg = &args->tables[t].args[i];
            if (is_long && arg->name && strlen(arg->name) == len &&
                memcmp(arg->name, word, len) == 0) {
                *ret_value = word[len] ? word + len + 1 : NULL;
                return arg;
            }
            if (!is_long && arg->letter && arg->letter == word[1]) {
                *ret_value = word[2] ? word + 2 : NULL;
                return arg;
            }
        }
    }
    return NULL;
}

/* Takes the option at argv[*i], moving *i on where the value is the next word. */
static int take_option(const struct slu_command_args *args, int argc, char **argv, int *i)
{
    const char *word = argv[*i];
    const char *value;
    const struct slu_arg *arg = find_arg(args, word, &value);
    if (!arg) {
        return slu_args_mistake(args, "unknown option %s", word);
    }
    char shown[64];
    int len = word[1] == '-' ? (int)strcspn(word, "=") : 2;
    snprintf(shown, sizeof shown, "%.*s", len, word);
    if (arg->type == SLU_ARG_FLAG) {
        if (value) {
            return slu_args_mistake(args, "%s takes no value", shown);
        }
    } else if (!value) {
        if (*i + 1 >= argc) {
            return slu_args_mistake(args, "%s needs a value: %s %s", shown, shown, arg->value);
        }
        value = argv[++*i];
    }
    return set_value(args, arg, shown, value);
}

int slu_args_parse(const struct slu_command_args *args, int argc, char **argv,
                   const char **ret_operand)
{
    const char *operand = NULL;
    bool options_ended = false;
    for (int i = 0; i < argc; i++) {
        const char *word = argv[i];
        if (!options_ended && strcmp(word, "--") == 0) {
            options_ended = true;
        } else if (!options_ended && (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0)) {
            slu_args_help(args, stdout);
            return SLU_ARGS_HELP;
        } else if (!options_ended && word[0] == '-' && word[1]) {
            int status = take_option(args, argc, argv, &i);
            if (status != SLU_ARGS_OK) {
                return status;
            }
        } else if (!args->operand) {
            return slu_args_mistake(args, "'%s' is no option, and nothing else is taken", word);
        } else if (operand) {
            return slu_args_mistake(args, "there is one %s, and '%s' is a second", args->operand,
                                    word);
        } else {
            operand = word;
        }
    }
    if (!operand && args->operand) {
        return slu_args_mistake(args, "%s is missing", args->operand);
    }
    *ret_operand = operand;
    return SLU_ARGS_OK;
}

static bool is_separator(char c)
{
    return c == ',' || c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

int slu_args_ids(const char *text, size_t len, int32_t **ret_ids, size_t *ret_n,
                 struct slu_err *err)
{
    /* Every id but the last takes two bytes at least. */
    int32_t *ids = malloc((len / 2 + 1) * sizeof *ids);
    if (!ids) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for a list of ids of %zu bytes", len);
    }
    size_t n = 0;
    for (size_t i = 0; i < len;) {
        if (is_separator(text[i])) {
            i++;
            continue;
        }
        size_t start = i;
        int64_t id = 0;
        for (; i < len && text[i] >= '0' && text[i] <= '9' && id <= INT32_MAX; i++) {
            id = id * 10 + (text[i] - '0');
        }
        if (i == start || id > INT32_MAX || (i < len && !is_separator(text[i]))) {
            size_t end = i;
            while (end < len && end - start < 24 && !is_separator(text[end])) {
                end++;
            }
            free(ids);
            return slu_err_set(err, SLU_EINVAL, "'%.*s' is not a token id", (int)(end - start),
                               text + start);
        }
        ids[n++] = (int32_t)id;
    }
    *ret_ids = ids;
    *ret_n = n;
    return 0;
}
