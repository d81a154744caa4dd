/*
 * What the commands of `sluice` share: exit statuses, messages, interrupts, whole files, JSON, and
 * the options and statistics of an engine.
 *
 * Exit statuses: 0 done; 1 failed, with one line on stderr; 2 a mistake in the command line; 130
 * or 143 ended by Ctrl-C or SIGTERM; 141 the reader of stdout went away.
 *
 * Thread safety: the main thread only.
 */
#ifndef SLU_CLI_H
#define SLU_CLI_H

#include <jansson.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "cli/args.h"
#include "slu.h"

enum {
    SLU_EXIT_DONE = 0,
    SLU_EXIT_FAILED = 1,
    SLU_EXIT_USAGE = 2,
};

/* The commands. argv starts behind the command's name; each returns an exit status. */
int slu_cmd_pack(int argc, char **argv);
int slu_cmd_run(int argc, char **argv);
int slu_cmd_eval(int argc, char **argv);
int slu_cmd_tokenize(int argc, char **argv);
int slu_cmd_inspect(int argc, char **argv);
int slu_cmd_plan(int argc, char **argv);
int slu_cmd_adapter(int argc, char **argv);
int slu_cmd_synth(int argc, char **argv);
int slu_cmd_bench(int argc, char **argv);
int slu_cmd_calibrate(int argc, char **argv);

/* One line "sluice: ..." on stderr; control characters, which may come from a file, show as '?'. */
void slu_cli_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Tells err; returns the exit status: that of the interrupt if there was one. */
int slu_cli_fail(const struct slu_err *err);

/* The exit status for what slu_args_parse returned. */
int slu_cli_args_status(int parsed);

/* Copies text from a file for a terminal: controls, of direction too, become '?'. Always
 * terminated. */
void slu_cli_clean(char *out, size_t out_bytes, const char *text, size_t len);

/* For commands that have something to clean up: from now on Ctrl-C and SIGTERM set the flag that
 * slu_cli_interrupted returns, and a second one kills. SIGPIPE is ignored: writes fail with EPIPE.
 */
void slu_cli_catch_signals(void);
const atomic_bool *slu_cli_interrupted(void);
/* The interrupt also cancels this session; NULL: no longer. */
void slu_cli_cancel_session(struct slu_session *session);
/* 130 or 143 after an interrupt, else `status`. */
int slu_cli_exit_status(int status);

/* To be called when a write to stdout failed, with errno; returns the exit status. A reader that
 * went away needs no message. */
int slu_cli_output_failed(void);

/* Whether both paths lead to one file that is there. */
bool slu_cli_is_same_file(const char *a, const char *b);

/* The same, or the same name in the same folder, whether or not there is such a file. NULL is like
 * nothing. */
bool slu_cli_is_same_path(const char *a, const char *b);

/* The first output that would overwrite an input or another output; NULL: none would. Any of them
 * may be NULL. */
const char *slu_cli_find_clash(const char *const *outputs, size_t n_outputs,
                               const char *const *inputs, size_t n_inputs);

/* A whole file, or stdin for "-", to be freed. At most 1 GiB. */
int slu_cli_read_file(const char *path, char **ret_text, size_t *ret_len, struct slu_err *err);

/* Bytes for a person: "1.50 GiB". */
struct slu_cli_size {
    char text[24];
};
struct slu_cli_size slu_cli_size(uint64_t bytes);

/* JSON: values are taken over. Text that isn't UTF-8 gets U+FFFD, and numbers that JSON lacks are
 * null. */
void slu_json_text(json_t *object, const char *key, const char *text, size_t len);
void slu_json_real(json_t *object, const char *key, double value);
void slu_json_whole(json_t *object, const char *key, uint64_t value);
void slu_json_bool(json_t *object, const char *key, bool value);
/* Prints the object on one line of stdout and frees it. */
int slu_json_print(json_t *object, struct slu_err *err);

/* Options that commands with an engine share. */
struct slu_cli_engine_args {
    struct slu_arg args[10];
    struct slu_arg routing_args[6];
    struct slu_engine_params params;
    int io, kv, routing, read_ahead;
    bool bias_given;
    bool ctx_given;
    struct slu_arg_list adapters; /* NAME[:SCALE] */
    uint64_t adapter_ram;         /* 0: as much as they take */
    struct slu_adapter_choice choices[SLU_ARG_LIST_MAX];
    char *names[SLU_ARG_LIST_MAX]; /* NAME alone, owned */
};
/* Returns the table for slu_command_args, pointing into *engine_args. */
struct slu_arg_table slu_cli_engine_args_init(struct slu_cli_engine_args *engine_args);
/* The same for a command that runs the model without adapters. */
struct slu_arg_table slu_cli_engine_args_alone(struct slu_cli_engine_args *engine_args);
/* The same with what only measurements may ask for: --io mmap. */
void slu_cli_engine_args_bench(struct slu_cli_engine_args *engine_args);
/* "f16", "q8" */
const char *slu_cli_kv_name(enum slu_use_kv kv);
/* The table of --route and what belongs to it; after the one above. For bench, with --read-ahead.
 */
struct slu_arg_table slu_cli_routing_args_init(struct slu_cli_engine_args *engine_args);
struct slu_arg_table slu_cli_routing_args_bench(struct slu_cli_engine_args *engine_args);
void slu_cli_routing_resolve(struct slu_cli_engine_args *engine_args); /* part of what follows */
const char *slu_cli_routing_name(enum slu_routing routing);
/* After parsing: looks at the adapters' headers, so that the plan has room for them. Finish frees,
 * also after a failure. */
int slu_cli_engine_resolve(struct slu_cli_engine_args *engine_args, struct slu_err *err);
/* Says on stderr what speaks against a plan that fits. */
void slu_cli_plan_doubts(const struct slu_plan *plan);
/* Whether an output, if there is one, would overwrite one of the adapters, as a path, whose scale
 * is not part of it, or as a name in the folder of adapters. Needs no resolving. */
bool slu_cli_is_adapter(const struct slu_cli_engine_args *engine_args, const char *output);
void slu_cli_engine_args_finish(struct slu_cli_engine_args *engine_args);
/* A session with the adapters of the command line. */
int slu_cli_session_create(struct slu_engine *engine, const struct slu_cli_engine_args *engine_args,
                           struct slu_session **ret_session, struct slu_err *err);

/* What each phase's time went to and what bounds it, in lines for a person. probes may be NULL:
 * no bounds then. */
void slu_cli_phases_print(FILE *out, const struct slu_engine_stats *stats,
                          const struct slu_probe probes[SLU_PHASES]);
void slu_cli_probe_print(FILE *out, const struct slu_probe *probe);
/* Both for --stats, on stderr, after measuring; with the engine closed. */
void slu_cli_phases_probe(const char *model, const struct slu_engine_params *params,
                          const struct slu_engine_stats *stats);

/* Speed, reads and memory of a finished computation, for --stats on stderr or into JSON. */
void slu_cli_stats_print(const struct slu_engine *engine, const struct slu_result *result);
void slu_cli_stats_json(const struct slu_engine *engine, const struct slu_result *result,
                        json_t *object);

#endif
