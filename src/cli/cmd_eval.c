#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "cli/cli.h"
#include "cli/outfile.h"
#include "tools/divergence.h"

/* What happens to the logits of one run over the pending tokens. */
struct eval {
    /* The command line. */
    const char *model, *token_list, *text_path, *logits_path;
    uint32_t n_greedy;
    bool is_json, is_stats;
    struct slu_cli_engine_args engine_args;
    /* The computation. */
    struct slu_engine *engine;
    uint32_t n_vocab;
    int32_t *ids;
    size_t n_ids;
    struct slu_outfile out; /* --logits */
    int32_t best;           /* the likeliest after the last position */
    int32_t *greedy;        /* --greedy: n_greedy ids */
    uint32_t n_greedy_done;
    const int32_t *window; /* --text: what this session computes */
    size_t n_window;
    double nll; /* sum of -ln p over n_scored tokens */
    uint64_t n_scored;
    uint32_t n_windows;
    int rc;                   /* why a callback stopped */
    struct slu_result result; /* times and counts, summed */
};

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "floats are written as they are");

static int parse(struct eval *eval, int argc, char **argv)
{
    const struct slu_arg options[] = {
        {
            .name = "--tokens",
            .value = "IDS",
            .type = SLU_ARG_TEXT,
            .target = &eval->token_list,
            .help = "token ids to start from: 1,2,3 (no BOS is added)",
        },
        {
            .name = "--logits",
            .value = "OUT.f32",
            .type = SLU_ARG_TEXT,
            .target = &eval->logits_path,
            .help = "write the logits after each of --tokens: rows of\n"
                    "n_vocab little-endian float32",
        },
        {
            .name = "--greedy",
            .value = "N",
            .type = SLU_ARG_U32,
            .min = 1,
            .max = 1 << 24,
            .target = &eval->n_greedy,
            .help = "continue --tokens by the N likeliest ids, past any end\n"
                    "token, and print them on the last line",
        },
        {
            .name = "--text",
            .value = "FILE",
            .type = SLU_ARG_TEXT,
            .target = &eval->text_path,
            .help = "print the perplexity of a text; - reads standard input.\n"
                    "A text longer than the context is cut into windows of\n"
                    "--ctx tokens, each scored on its own",
        },
        {
            .name = "--stats",
            .type = SLU_ARG_FLAG,
            .target = &eval->is_stats,
            .help = "print speed, reads and memory to standard error",
        },
        {
            .name = "--json",
            .type = SLU_ARG_FLAG,
            .target = &eval->is_json,
            .help = "print one JSON object",
        },
    };
    const struct slu_command_args args = {
        .command = "eval",
        .synopsis = "MODEL.slu --tokens IDS [--logits OUT.f32] [--greedy N] [options]\n"
                    "       sluice eval MODEL.slu --text FILE [options]",
        .about = "Computes logits, greedy continuations, or the perplexity of a text.",
        .after = "Example:\n"
                 "  sluice eval model.slu --tokens 1,15043,3186 --logits out.f32 --greedy 16",
        .operand = "MODEL.slu",
        .tables = {{.title = "What to compute",
                    .args = options,
                    .n = sizeof options / sizeof *options},
                   slu_cli_engine_args_init(&eval->engine_args),
                   slu_cli_routing_args_init(&eval->engine_args)},
    };
    int parsed = slu_args_parse(&args, argc, argv, &eval->model);
    if (parsed != SLU_ARGS_OK) {
        return parsed;
    }
    if (!eval->token_list == !eval->text_path) {
        return slu_args_mistake(&args, eval->text_path ? "--tokens and --text exclude each other"
                                                       : "--tokens IDS or --text FILE is missing");
    }
    if (eval->text_path && (eval->logits_path || eval->n_greedy)) {
        return slu_args_mistake(&args, "--logits and --greedy go with --tokens, not with --text");
    }
    if (eval->logits_path && slu_cli_is_same_file(eval->model, eval->logits_path)) {
        return slu_args_mistake(&args, "--logits would overwrite the model, %s", eval->model);
    }
    if (slu_cli_is_adapter(&eval->engine_args, eval->logits_path)) {
        return slu_args_mistake(&args, "--logits would overwrite an adapter");
    }
    if (eval->token_list) {
        struct slu_err err;
        if (slu_args_ids(eval->token_list, strlen(eval->token_list), &eval->ids, &eval->n_ids,
                         &err) < 0) {
            return slu_args_mistake(&args, "--tokens: %s", err.text);
        }
        if (eval->n_ids == 0) {
            return slu_args_mistake(&args, "--tokens: the list of token ids is empty");
        }
        if (!eval->logits_path && !eval->n_greedy) {
            return slu_args_mistake(&args, "--tokens needs --logits OUT.f32, --greedy N, or both");
        }
    }
    return SLU_ARGS_OK;
}

/* The lower id of equals, as the sampler has it. */
static int32_t likeliest(const float *logits, uint32_t n_vocab)
{
    int32_t best = -1;
    for (uint32_t i = 0; i < n_vocab; i++) {
        if (best < 0 ? !isnan(logits[i]) : logits[i] > logits[best]) {
            best = (int32_t)i;
        }
    }
    return best;
}

static int on_logits(void *arg, uint32_t position, const float *logits)
{
    struct eval *eval = arg;
    if (eval->out.file &&
        fwrite(logits, sizeof *logits, eval->n_vocab, eval->out.file) < eval->n_vocab) {
        eval->rc = SLU_EIO;
        return eval->rc;
    }
    if (position + 1 == eval->n_ids) {
        eval->best = likeliest(logits, eval->n_vocab);
    }
    return 0;
}

/* -ln of the probability of the token that follows. */
static int on_text_logits(void *arg, uint32_t position, const float *logits)
{
    struct eval *eval = arg;
    if ((size_t)position + 1 >= eval->n_window) {
        return 0;
    }
    int32_t next = eval->window[position + 1];
    eval->nll += slu_log_sum_exp(logits, eval->n_vocab) - logits[next];
    eval->n_scored++;
    return 0;
}

/* Computes n ids in a session of their own, or in the one given. */
static int compute(struct eval *eval, struct slu_session *session, const int32_t *ids, size_t n,
                   slu_logits_fn logits, struct slu_err *err)
{
    int rc = slu_session_tokens(session, ids, n, err);
    if (rc < 0) {
        return rc;
    }
    slu_cli_cancel_session(session);
    double start = slu_now_s();
    rc = slu_session_eval(session, logits, eval, err);
    slu_cli_cancel_session(NULL);
    eval->result.prefill_s += slu_now_s() - start;
    eval->result.n_prompt += (uint32_t)n;
    if (eval->rc < 0) {
        return slu_err_set(err, eval->rc, "%s: cannot be written: %s", eval->logits_path,
                           strerror(errno));
    }
    return rc;
}

static int on_greedy(void *arg, const char *text, size_t len, int32_t token)
{
    (void)arg, (void)text, (void)len, (void)token;
    return 0;
}

/* The first id comes from the logits that are there; the others from generating on from it. */
static int continue_greedily(struct eval *eval, struct slu_session *session, struct slu_err *err)
{
    eval->greedy = malloc(eval->n_greedy * sizeof *eval->greedy);
    if (!eval->greedy) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for %" PRIu32 " ids", eval->n_greedy);
    }
    if (eval->best < 0) {
        return slu_err_set(err, SLU_EFORMAT, "%s: its logits are not numbers", eval->model);
    }
    eval->greedy[eval->n_greedy_done++] = eval->best;
    if (eval->n_greedy == 1) {
        return 0;
    }
    int rc = slu_session_tokens(session, &eval->best, 1, err);
    if (rc < 0) {
        return rc;
    }
    const struct slu_generate_params params = {
        .n_max = eval->n_greedy - 1,
        .ignore_end = true,
        .text = on_greedy,
        .arg = eval,
    };
    struct slu_result result = {0};
    slu_cli_cancel_session(session);
    rc = slu_session_generate(session, &params, &result, err);
    slu_cli_cancel_session(NULL);
    if (rc < 0) {
        return rc;
    }
    if (result.stop == SLU_STOP_CANCEL) {
        return slu_err_set(err, SLU_ECANCEL, "interrupted");
    }
    size_t n;
    const int32_t *ids = slu_session_ids(session, &n);
    if (result.n_generated < params.n_max || n < params.n_max) {
        return slu_err_set(err, SLU_ERANGE,
                           "the context is full after %" PRIu32 " of %" PRIu32
                           " ids: --ctx %zu would do",
                           result.n_generated + 1, eval->n_greedy, eval->n_ids + eval->n_greedy);
    }
    memcpy(eval->greedy + 1, ids + n - params.n_max, params.n_max * sizeof *ids);
    eval->n_greedy_done = eval->n_greedy;
    eval->result.n_generated = eval->n_greedy;
    eval->result.decode_s = result.prefill_s + result.decode_s;
    return 0;
}

static int eval_tokens(struct eval *eval, struct slu_err *err)
{
    struct slu_session *session = NULL;
    int rc = 0;
    if (eval->logits_path) {
        rc = slu_outfile_open(&eval->out, eval->logits_path, err);
    }
    if (rc == 0) {
        rc = slu_cli_session_create(eval->engine, &eval->engine_args, &session, err);
    }
    if (rc == 0) {
        rc = compute(eval, session, eval->ids, eval->n_ids, on_logits, err);
    }
    if (rc == 0 && eval->n_greedy) {
        rc = continue_greedily(eval, session, err);
    }
    if (rc == 0 && eval->logits_path) {
        rc = slu_outfile_commit(&eval->out, err);
    }
    slu_outfile_finish(&eval->out);
    slu_session_destroy(session);
    return rc;
}

/* BOS where the model wants it, as a session puts it before text: at most one id. */
static int begin_of_text(struct eval *eval, int32_t *ret_bos, size_t *ret_n, struct slu_err *err)
{
    struct slu_session *session;
    int rc = slu_cli_session_create(eval->engine, &eval->engine_args, &session, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_session_text(session, "", 0, err);
    if (rc == 0) {
        size_t n;
        const int32_t *ids = slu_session_ids(session, &n);
        *ret_n = n > 0;
        *ret_bos = n > 0 ? ids[0] : -1;
    }
    slu_session_destroy(session);
    return rc;
}

/* The text as ids, with room for one more before them. */
static int encode_text(struct eval *eval, struct slu_err *err)
{
    char *text;
    size_t len;
    int rc = slu_cli_read_file(eval->text_path, &text, &len, err);
    if (rc < 0) {
        return rc;
    }
    int64_t n = slu_engine_encode(eval->engine, text, len, false, NULL, 0, err);
    if (n >= 0) {
        eval->ids = malloc(((size_t)n + 1) * sizeof *eval->ids);
        n = eval->ids
                ? slu_engine_encode(eval->engine, text, len, false, eval->ids, (size_t)n, err)
                : slu_err_set(err, SLU_ENOMEM, "%s: no memory for its tokens", eval->text_path);
    }
    free(text);
    eval->n_ids = n > 0 ? (size_t)n : 0;
    return n < 0 ? (int)n : 0;
}

static int eval_text(struct eval *eval, struct slu_err *err)
{
    int32_t bos = -1, *window = NULL;
    size_t n_bos = 0;
    int rc = encode_text(eval, err);
    if (rc == 0) {
        rc = begin_of_text(eval, &bos, &n_bos, err);
    }
    if (rc < 0) {
        return rc;
    }
    if (eval->n_ids + n_bos < 2) {
        return slu_err_set(err, SLU_EINVAL, "%s: too short for a perplexity", eval->text_path);
    }
    size_t room = slu_engine_plan(eval->engine)->ctx;
    if (room < 2) {
        return slu_err_set(err, SLU_EINVAL, "a perplexity needs a context of 2 tokens at least");
    }
    window = malloc(room * sizeof *window);
    if (!window) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for a window of %zu tokens", room);
    }
    for (size_t at = 0; at < eval->n_ids && rc == 0;) {
        size_t n = eval->n_ids - at < room - n_bos ? eval->n_ids - at : room - n_bos;
        window[0] = bos;
        memcpy(window + n_bos, eval->ids + at, n * sizeof *window);
        at += n;
        if (n + n_bos < 2) {
            break; /* a last token alone has nothing to be judged from */
        }
        struct slu_session *session;
        rc = slu_cli_session_create(eval->engine, &eval->engine_args, &session, err);
        if (rc == 0) {
            eval->window = window;
            eval->n_window = n + n_bos;
            eval->n_windows++;
            rc = compute(eval, session, window, n + n_bos, on_text_logits, err);
            slu_session_destroy(session);
        }
    }
    free(window);
    if (rc == 0 && isnan(eval->nll)) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: its logits are not numbers", eval->model);
    }
    return rc;
}

static int print_json(const struct eval *eval, struct slu_err *err)
{
    json_t *object = json_object();
    if (eval->text_path) {
        slu_json_real(object, "perplexity", exp(eval->nll / (double)eval->n_scored));
        slu_json_real(object, "nll", eval->nll);
        slu_json_whole(object, "n_scored", eval->n_scored);
        slu_json_whole(object, "n_windows", eval->n_windows);
    }
    slu_json_whole(object, "n_tokens", eval->n_ids);
    slu_json_whole(object, "n_vocab", eval->n_vocab);
    if (eval->logits_path) {
        slu_json_text(object, "logits", eval->logits_path, strlen(eval->logits_path));
    }
    if (eval->n_greedy) {
        json_t *greedy = json_array();
        for (uint32_t i = 0; i < eval->n_greedy_done; i++) {
            json_array_append_new(greedy, json_integer(eval->greedy[i]));
        }
        json_object_set_new(object, "greedy", greedy);
    }
    slu_cli_stats_json(eval->engine, &eval->result, object);
    return slu_json_print(object, err);
}

static void print_text(const struct eval *eval)
{
    if (eval->text_path) {
        printf("perplexity %.4f over %" PRIu64 " tokens", exp(eval->nll / (double)eval->n_scored),
               eval->n_scored);
        if (eval->n_windows > 1) {
            printf(" in %" PRIu32 " windows of %" PRIu32, eval->n_windows,
                   slu_engine_plan(eval->engine)->ctx);
        }
        putchar('\n');
    }
    for (uint32_t i = 0; i < eval->n_greedy_done; i++) {
        printf("%s%" PRId32, i ? " " : "", eval->greedy[i]);
    }
    if (eval->n_greedy_done) {
        putchar('\n');
    }
}

static int run(struct eval *eval, struct slu_err *err)
{
    int rc = slu_cli_engine_resolve(&eval->engine_args, err);
    if (rc < 0) {
        return rc;
    }
    struct slu_engine_params params = eval->engine_args.params;
    /* A long list of tokens brings its own context, unless one was asked for. */
    size_t needed = eval->n_ids + eval->n_greedy;
    if (!eval->engine_args.ctx_given && needed > 4096 && needed <= UINT32_MAX) {
        params.ctx = (uint32_t)needed;
    }
    rc = slu_engine_open(eval->model, &params, &eval->engine, err);
    if (rc < 0) {
        return rc;
    }
    eval->n_vocab = slu_engine_n_vocab(eval->engine);
    rc = eval->text_path ? eval_text(eval, err) : eval_tokens(eval, err);
    if (rc < 0) {
        return rc;
    }
    if (eval->is_stats) {
        struct slu_engine_stats stats;
        slu_engine_stats(eval->engine, &stats);
        slu_cli_stats_print(eval->engine, &eval->result);
        slu_cli_phases_print(stderr, &stats, NULL);
    }
    if (eval->is_json) {
        return print_json(eval, err);
    }
    print_text(eval);
    return 0;
}

int slu_cmd_eval(int argc, char **argv)
{
    struct eval eval = {.best = -1};
    struct slu_err err = {0};
    int parsed = parse(&eval, argc, argv);
    if (parsed != SLU_ARGS_OK) {
        free(eval.ids);
        return slu_cli_args_status(parsed);
    }
    slu_cli_catch_signals();
    int rc = run(&eval, &err);
    slu_engine_close(eval.engine);
    slu_cli_engine_args_finish(&eval.engine_args);
    free(eval.ids);
    free(eval.greedy);
    return rc < 0 ? slu_cli_fail(&err) : SLU_EXIT_DONE;
}
