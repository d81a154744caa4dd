#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "cli/cli.h"
#include "tools/vocab.h"

static int print_ids(const struct slu_vocab *vocab, const char *text, size_t len, bool is_special,
                     struct slu_err *err)
{
    int32_t *ids;
    size_t n;
    int rc = slu_vocab_encode(vocab, text, len, is_special, &ids, &n, err);
    if (rc < 0) {
        return rc;
    }
    for (size_t i = 0; i < n; i++) {
        printf("%s%" PRId32, i ? " " : "", ids[i]);
    }
    putchar('\n');
    free(ids);
    return 0;
}

static int print_text(const struct slu_vocab *vocab, const char *list, size_t list_len,
                      struct slu_err *err)
{
    int32_t *ids = NULL;
    char *text = NULL;
    size_t n = 0, len = 0;
    int rc = slu_args_ids(list, list_len, &ids, &n, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_vocab_decode(vocab, ids, n, &text, &len, err);
    if (rc == 0 && len > 0) {
        fwrite(text, 1, len, stdout);
    }
    free(ids);
    free(text);
    return rc;
}

int slu_cmd_tokenize(int argc, char **argv)
{
    bool is_special = false, is_decode = false;
    const char *path;
    const struct slu_arg options[] = {
        {
            .name = "--special",
            .type = SLU_ARG_FLAG,
            .target = &is_special,
            .help = "recognise special tokens spelled out in the text, such as\n"
                    "<|im_start|>; else they are plain text",
        },
        {
            .name = "--decode",
            .type = SLU_ARG_FLAG,
            .target = &is_decode,
            .help = "the reverse: ids on standard input, text on standard\n"
                    "output",
        },
    };
    const struct slu_command_args args = {
        .command = "tokenize",
        .synopsis = "MODEL.slu|VOCAB.gguf [--special] < TEXT\n"
                    "       sluice tokenize MODEL.slu|VOCAB.gguf --decode < IDS",
        .about =
            "Prints the token ids of the text on standard input, separated by spaces, without\n"
            "BOS or EOS.",
        .after = "Example:\n  printf 'Hello, world' | sluice tokenize model.slu",
        .operand = "MODEL.slu or VOCAB.gguf",
        .tables = {{.title = "Options", .args = options, .n = sizeof options / sizeof *options}},
    };
    int parsed = slu_args_parse(&args, argc, argv, &path);
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }
    struct slu_vocab *vocab = NULL;
    char *text = NULL;
    size_t len = 0;
    struct slu_err err = {0};
    int rc = slu_vocab_open(path, &vocab, &err);
    if (rc == 0) {
        rc = slu_cli_read_file("-", &text, &len, &err);
    }
    if (rc == 0) {
        rc = is_decode ? print_text(vocab, text, len, &err)
                       : print_ids(vocab, text, len, is_special, &err);
    }
    free(text);
    slu_vocab_close(vocab);
    return rc < 0 ? slu_cli_fail(&err) : SLU_EXIT_DONE;
}
