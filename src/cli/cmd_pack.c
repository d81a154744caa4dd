#include <stdio.h>

#include "cli/cli.h"
#include "cli/progress.h"
#include "tools/packer.h"

static const char *const codecs[] = {"raw", "zstd", NULL};
_Static_assert(SLU_CODEC_RAW == 0 && SLU_CODEC_ZSTD == 1, "codecs are in the order of their ids");

static void on_progress(void *arg, uint64_t done_bytes, uint64_t total_bytes)
{
    slu_progress_update(arg, done_bytes, total_bytes);
}

static void print_summary(const struct slu_packer_params *params,
                          const struct slu_packer_report *report)
{
    char name[256];
    snprintf(name, sizeof name, "%s", params->out);
    double saved = report->expert_raw_bytes ? 100 - 100.0 * (double)report->expert_stored_bytes /
                                                        (double)report->expert_raw_bytes
                                            : 0;
    printf("%s: %s from %s of GGUF; ", name, slu_cli_size(report->out_bytes).text,
           slu_cli_size(report->in_bytes).text);
    printf("%u expert blocks of up to %s", report->n_blocks,
           slu_cli_size(report->block_bytes_max).text);
    if (params->codec == SLU_CODEC_ZSTD) {
        printf(", compression saved %.1f %% of them (%u blocks are compressed)", saved,
               report->n_blocks_compressed);
    }
    printf("\n");
}

int slu_cmd_pack(int argc, char **argv)
{
    const char *out = NULL, *in;
    int codec = SLU_CODEC_ZSTD;
    uint64_t block_bytes = 0;
    const struct slu_arg options[] = {
        {
            .name = "--output",
            .letter = 'o',
            .value = "MODEL.slu",
            .type = SLU_ARG_TEXT,
            .target = &out,
            .help = "the pack to write; it appears under this name when it is\n"
                    "complete and synced, and not before",
        },
        {
            .name = "--codec",
            .value = "CODEC",
            .type = SLU_ARG_CHOICE,
            .choices = codecs,
            .target = &codec,
            .help = "zstd, the default, compresses what compresses; raw makes\n"
                    "a larger pack that costs less CPU to read",
        },
        {
            .name = "--block-size",
            .value = "SIZE",
            .type = SLU_ARG_SIZE,
            .min = 4096,
            .max = 1 << 30,
            .target = &block_bytes,
            .help = "what an expert block should come near, before compression\n"
                    "(default: 1M)",
        },
    };
    const struct slu_command_args args = {
        .command = "pack",
        .synopsis = "MODEL.gguf -o MODEL.slu [options]",
        .about =
            "Turns a mixture-of-experts GGUF into a pack. Of a split set, name the first file.\n"
            "Weights are rearranged and compressed without loss; a type that can't be is\n"
            "refused. Memory stays far below the model's size.",
        .after = "Example:\n  sluice pack gpt-oss-20b-mxfp4.gguf -o gpt-oss-20b.slu",
        .operand = "MODEL.gguf",
        .tables = {{.title = "Options", .args = options, .n = sizeof options / sizeof *options}},
    };
    int parsed = slu_args_parse(&args, argc, argv, &in);
    if (parsed == SLU_ARGS_OK && (!out || !*out)) {
        parsed = slu_args_mistake(&args, "-o MODEL.slu is missing");
    }
    if (parsed == SLU_ARGS_OK && slu_cli_is_same_file(in, out)) {
        parsed = slu_args_mistake(&args, "%s would overwrite itself", in);
    }
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }

    slu_cli_catch_signals();
    struct slu_progress progress;
    const struct slu_packer_params params = {
        .in = in,
        .out = out,
        .codec = (enum slu_codec_id)codec,
        .block_bytes = (uint32_t)block_bytes,
        .progress = on_progress,
        .arg = &progress,
        .cancel = slu_cli_interrupted(),
    };
    struct slu_packer_report report = {0};
    struct slu_err err = {0};
    slu_progress_begin(&progress, "packing");
    int rc = slu_packer_run(&params, &report, &err);
    slu_progress_end(&progress);
    if (rc < 0) {
        return slu_cli_fail(&err);
    }
    print_summary(&params, &report);
    return SLU_EXIT_DONE;
}
