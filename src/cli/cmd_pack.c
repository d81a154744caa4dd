#include <stdio.h>

#include "cli/cli.h"
#include "cli/progress.h"
#include "cli/quant_args.h"
#include "tools/packer.h"

static const char *const codecs[] = {"raw", "zstd", "auto", NULL};
#define CODEC_AUTO 2
_Static_assert(SLU_CODEC_RAW == 0 && SLU_CODEC_ZSTD == 1, "codecs are in the order of their ids");

static void on_progress(void *arg, uint64_t done_bytes, uint64_t total_bytes)
{
    slu_progress_update(arg, done_bytes, total_bytes);
}

static void print_choice(const struct slu_packer_choice *chosen)
{
    const struct slu_codec_costs *costs = &chosen->costs;
    printf("codec auto: %.0f %% of the blocks to compress: %s\n", 100 * chosen->choice.share,
           slu_codec_reason_text(chosen->choice.reason));
    printf("  flash %.0f MB/s (%s); a core multiplies %.0f MB of blocks a second",
           1e-6 * costs->flash_bytes_s, chosen->is_flash_measured ? "measured" : "given",
           1e-6 * costs->multiply_bytes_s);
    if (costs->unpack_bytes_s > 0) {
        printf(", and decodes %.0f", 1e-6 * costs->unpack_bytes_s);
    }
    printf("; %u core%s; compressed blocks take %.1f %% of their bytes\n", costs->cores,
           costs->cores == 1 ? "" : "s", 100 * costs->ratio);
    printf("  a GB of blocks is expected to take %.3f s; all raw %.3f s, all compressed %.3f s\n",
           1e9 * chosen->choice.chosen_s, 1e9 * chosen->choice.raw_s, 1e9 * chosen->choice.zstd_s);
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
    if (params->automatic.is_on || params->codec == SLU_CODEC_ZSTD) {
        printf(", compression saved %.1f %% of them (%u blocks are compressed)", saved,
               report->n_blocks_compressed);
    }
    printf("\n");
    if (params->automatic.is_on) {
        print_choice(&report->codec);
    }
    slu_cli_quant_print(params, report);
}

int slu_cmd_pack(int argc, char **argv)
{
    const char *out = NULL, *in;
    int codec = SLU_CODEC_ZSTD;
    float flash_mbps = 0;
    uint32_t cores = 0;
    bool has_flash = false, has_cores = false;
    uint64_t block_bytes = 0;
    struct slu_cli_quant_args quant = {0};
    const char *importance = NULL;
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
            .help = "zstd, the default, compresses what gains by it; raw makes\n"
                    "a larger pack that costs less CPU to read; auto\n"
                    "compresses as many blocks as make flash and CPU finish\n"
                    "together, and says why",
        },
        {
            .name = "--flash-mbps",
            .value = "N",
            .type = SLU_ARG_FLOAT,
            .min = 0.1,
            .max = 1e7,
            .target = &flash_mbps,
            .ret_given = &has_flash,
            .help = "with auto: megabytes a second that the flash reads, which\n"
                    "the pack will be run from (default: measured in the\n"
                    "output's folder)",
        },
        {
            .name = "--cores",
            .value = "N",
            .type = SLU_ARG_U32,
            .min = 1,
            .max = 1024,
            .target = &cores,
            .ret_given = &has_cores,
            .help = "with auto: cores that it will be run on (default: this\n"
                    "machine's)",
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
        {
            .name = "--importance",
            .value = "FILE",
            .type = SLU_ARG_TEXT,
            .target = &importance,
            .help = "weigh errors by what columns matter, as sluice calibrate\n"
                    "has measured it",
        },
    };
    const struct slu_command_args args = {
        .command = "pack",
        .synopsis = "MODEL.gguf -o MODEL.slu [options]",
        .about =
            "Turns a mixture-of-experts GGUF into a pack. Of a split set, name the first file.\n"
            "Weights are rearranged and compressed without loss, unless they are to be\n"
            "quantized; a type that can't be is refused. Memory stays far below the model's\n"
            "size.",
        .after = "Examples:\n"
                 "  sluice pack gpt-oss-20b-mxfp4.gguf -o gpt-oss-20b.slu\n"
                 "  sluice pack qwen3-30b-a3b-bf16.gguf -o qwen3.slu --quant q4e \\\n"
                 "         --codec auto --flash-mbps 400 --cores 4",
        .operand = "MODEL.gguf",
        .tables = {{.title = "Options", .args = options, .n = sizeof options / sizeof *options},
                   slu_cli_quant_args_init(&quant)},
    };
    int parsed = slu_args_parse(&args, argc, argv, &in);
    if (parsed == SLU_ARGS_OK && (!out || !*out)) {
        parsed = slu_args_mistake(&args, "-o MODEL.slu is missing");
    }
    if (parsed == SLU_ARGS_OK && codec != CODEC_AUTO && (has_flash || has_cores)) {
        parsed = slu_args_mistake(&args, "%s is for --codec auto",
                                  has_flash ? "--flash-mbps" : "--cores");
    }
    if (parsed == SLU_ARGS_OK && slu_cli_is_same_file(in, out)) {
        parsed = slu_args_mistake(&args, "%s would overwrite itself", in);
    }
    if (parsed == SLU_ARGS_OK && slu_cli_is_same_path(out, importance)) {
        parsed = slu_args_mistake(&args, "%s would overwrite the importance", out);
    }
    if (parsed == SLU_ARGS_OK) {
        parsed = slu_cli_quant_args_check(&quant, &args);
    }
    if (parsed == SLU_ARGS_OK && importance && !quant.experts && !quant.resident) {
        parsed = slu_args_mistake(
            &args, "--importance is for quantizing, but --quant and --dense-quant are missing");
    }
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }

    slu_cli_catch_signals();
    struct slu_progress progress;
    struct slu_packer_params params = {
        .in = in,
        .out = out,
        .codec = codec == CODEC_AUTO ? SLU_CODEC_ZSTD : (enum slu_codec_id)codec,
        .automatic = {.is_on = codec == CODEC_AUTO,
                      .flash_bytes_s = 1e6 * (double)flash_mbps,
                      .cores = cores},
        .block_bytes = (uint32_t)block_bytes,
        .importance = importance,
        .progress = on_progress,
        .arg = &progress,
        .cancel = slu_cli_interrupted(),
    };
    slu_cli_quant_args_apply(&quant, &params);
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
