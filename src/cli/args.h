/*
 * Command lines. A command describes its options once, in tables; parsing, checks of ranges, error
 * sentences and --help all come from them.
 *
 * Long options take their value as `--name VALUE` or `--name=VALUE`, short ones as `-x VALUE` or
 * `-xVALUE`. `--` ends the options. The last of several equal options counts, but for lists.
 *
 * Thread safety: pure functions, but for what they print.
 */
#ifndef SLU_CLI_ARGS_H
#define SLU_CLI_ARGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/err.h"

enum slu_arg_type {
    SLU_ARG_FLAG,   /* bool: set true; takes no value */
    SLU_ARG_TEXT,   /* const char *: points into argv */
    SLU_ARG_TEXTS,  /* struct slu_arg_list: likewise, one for each time the option is given */
    SLU_ARG_U32,    /* uint32_t */
    SLU_ARG_U64,    /* uint64_t */
    SLU_ARG_SIZE,   /* uint64_t: bytes, plain or as 64K, 512M, 1.5G, 2T (powers of 1024) */
    SLU_ARG_FLOAT,  /* float */
    SLU_ARG_CHOICE, /* int: index into choices */
};

#define SLU_ARG_LIST_MAX 8u
struct slu_arg_list {
    const char *items[SLU_ARG_LIST_MAX];
    size_t n;
};

struct slu_arg {
    const char *name;  /* "--ram" */
    char letter;       /* 'n' for -n; 0: none */
    const char *value; /* what help calls the value: "SIZE"; NULL for flags */
    enum slu_arg_type type;
    void *target;               /* of the type above; untouched where the option isn't given */
    bool *ret_given;            /* set true where it is; may be NULL */
    double min, max;            /* of numbers, both included; max 0: whatever the type holds */
    const char *const *choices; /* NULL-terminated */
    const char *help;           /* may have line breaks */
};

struct slu_arg_table {
    const char *title; /* of the group in --help: "Sampling" */
    const struct slu_arg *args;
    size_t n;
};

#define SLU_ARG_TABLES_MAX 6

struct slu_command_args {
    const char *command;  /* "run" */
    const char *synopsis; /* what follows the command's name: "MODEL.slu -p TEXT [options]" */
    const char *about;    /* a paragraph or more */
    const char *after;    /* printed after the options, examples for instance; may be NULL */
    struct slu_arg_table tables[SLU_ARG_TABLES_MAX]; /* up to the first without args */
    const char *operand; /* what the one operand is: "MODEL.slu"; NULL: there is none */
};

enum { SLU_ARGS_OK, SLU_ARGS_HELP, SLU_ARGS_USAGE };

/* Parses what follows the command's name. *ret_operand receives the one operand. SLU_ARGS_HELP:
 * --help was given, and has been printed to stdout. SLU_ARGS_USAGE: the mistake has been told on
 * stderr. */
int slu_args_parse(const struct slu_command_args *args, int argc, char **argv,
                   const char **ret_operand);

/* Tells a mistake that only the command itself can see; returns SLU_ARGS_USAGE. */
int slu_args_mistake(const struct slu_command_args *args, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

void slu_args_help(const struct slu_command_args *args, FILE *out);

/* "4G", "1.5G", "512M", "64KiB", "4096". SLU_EINVAL; SLU_ERANGE past 2^64. */
int slu_args_size(const char *text, uint64_t *ret_bytes);

/* Token ids separated by commas or white space into an array for the caller to free; none is
 * fine. SLU_EINVAL, with the offending part named. */
int slu_args_ids(const char *text, size_t len, int32_t **ret_ids, size_t *ret_n,
                 struct slu_err *err);

#endif
