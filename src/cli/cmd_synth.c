#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "cli/progress.h"
#include "cli/quant_args.h"
#include "tools/synth.h"

static const char *const codecs[] = {"raw", "zstd", NULL};

struct synth {
    /* The command line. */
    const char *shape, *out, *gguf, *arch, *template_file;
    int codec;
    uint64_t block_bytes;
    struct slu_cli_quant_args quant;
    struct slu_synth_params given; /* zero where not given */
    /* What follows. */
    struct slu_synth_params params;
    char *template_text, *shape_text;
    void *shape_owned;
};

static int parse(struct synth *synth, int argc, char **argv)
{
    struct slu_synth_params *given = &synth->given;
    const struct slu_arg options[] = {
        {
            .name = "--shape",
            .value = "SHAPE",
            .type = SLU_ARG_TEXT,
            .target = &synth->shape,
            .help = "gpt-oss-20b, qwen3-30b-a3b, or a JSON file: a checkpoint's\n"
                    "config.json, or an object with members arch, n_layers,\n"
                    "n_embd, n_ff, n_experts, n_used, n_heads, n_heads_kv,\n"
                    "head_dim, n_vocab, n_ctx, expert_type, dense_type, ...",
        },
        {
            .name = "--output",
            .letter = 'o',
            .value = "MODEL.slu",
            .type = SLU_ARG_TEXT,
            .target = &synth->out,
            .help = "the pack to write",
        },
        {
            .name = "--gguf",
            .value = "MODEL.gguf",
            .type = SLU_ARG_TEXT,
            .target = &synth->gguf,
            .help = "write the same weights, byte for byte, as a GGUF; what is\n"
                    "quantized for the pack is in it as it was before",
        },
        {
            .name = "--seed",
            .value = "N",
            .type = SLU_ARG_U64,
            .target = &given->seed,
            .help = "what the weights follow from (default: 0)",
        },
        {
            .name = "--codec",
            .value = "CODEC",
            .type = SLU_ARG_CHOICE,
            .choices = codecs,
            .target = &synth->codec,
            .help = "of the pack: zstd, the default, or raw",
        },
        {
            .name = "--block-size",
            .value = "SIZE",
            .type = SLU_ARG_SIZE,
            .min = 4096,
            .max = 1 << 30,
            .target = &synth->block_bytes,
            .help = "of the pack: what an expert block should come near\n"
                    "(default: 1M)",
        },
    };
#define COUNT(option, letters, field, text)                                                        \
    {                                                                                              \
        .name = option, .value = letters, .type = SLU_ARG_U32, .min = 1, .max = 1 << 24,           \
        .target = &given->field, .help = text,                                                     \
    }
#define TYPE(option, field, text)                                                                  \
    {                                                                                              \
        .name = option, .value = "TYPE", .type = SLU_ARG_TEXT, .target = &given->field,            \
        .help = text,                                                                              \
    }
    const struct slu_arg sizes[] = {
        {
            .name = "--arch",
            .value = "NAME",
            .type = SLU_ARG_TEXT,
            .target = &synth->arch,
            .help = "gpt-oss, qwen3moe, olmoe, llama, qwen2moe, granitemoe,\n"
                    "deepseek2 or deepseek2-lite",
        },
        COUNT("--layers", "N", n_layers, "layers"),
        COUNT("--embd", "N", n_embd, "width of the embedding"),
        COUNT("--ff", "N", n_ff, "neurons of an expert"),
        COUNT("--experts", "N", n_experts, "experts of a layer"),
        COUNT("--used", "N", n_used, "experts that a token uses in a layer"),
        COUNT("--heads", "N", n_heads, "attention heads"),
        COUNT("--kv-heads", "N", n_heads_kv, "of them with keys and values"),
        COUNT("--head-dim", "N", head_dim, "width of a head"),
        COUNT("--vocab", "N", n_vocab, "tokens of the vocabulary"),
        COUNT("--ctx", "N", n_ctx, "context that it is trained for"),
        TYPE("--expert-type", expert_type, "of experts, as GGUF names it: MXFP4, Q4_0, Q4_K, ..."),
        TYPE("--down-type", down_type, "of the experts' down matrices, if other"),
        TYPE("--dense-type", dense_type, "of everything else"),
        {
            .name = "--tied",
            .type = SLU_ARG_FLAG,
            .target = &given->is_tied,
            .help = "the embedding serves as the head",
        },
        {
            .name = "--template",
            .value = "FILE",
            .type = SLU_ARG_TEXT,
            .target = &synth->template_file,
            .help = "chat template to put into the metadata",
        },
    };
#undef COUNT
#undef TYPE
    const struct slu_command_args args = {
        .command = "synth",
        .synopsis = "--shape SHAPE -o MODEL.slu [--gguf MODEL.gguf] [options]",
        .about =
            "Makes a model of random weights, for measurements and tests: what it says is noise,\n"
            "but it computes all that a trained one of its shape does. Equal options make equal\n"
            "weights on every machine. Memory stays bounded, whatever the model's size.",
        .after = "Examples:\n"
                 "  sluice synth --shape gpt-oss-20b -o gpt-oss-20b.slu\n"
                 "  sluice synth --arch qwen3moe --experts 16 -o small.slu --gguf small.gguf\n"
                 "  sluice synth --shape qwen3-30b-a3b --quant q4e -o qwen3-q4e.slu",
        .tables = {{.title = "Options", .args = options, .n = sizeof options / sizeof *options},
                   {.title = "Sizes, in place of a shape or of parts of it",
                    .args = sizes,
                    .n = sizeof sizes / sizeof *sizes},
                   slu_cli_quant_args_init(&synth->quant)},
    };
    synth->codec = SLU_CODEC_ZSTD;
    const char *none;
    int parsed = slu_args_parse(&args, argc, argv, &none);
    if (parsed == SLU_ARGS_OK && !synth->shape && !synth->arch) {
        parsed = slu_args_mistake(&args, "--shape SHAPE or --arch NAME is missing");
    }
    if (parsed == SLU_ARGS_OK && !synth->out && !synth->gguf) {
        parsed = slu_args_mistake(&args, "-o MODEL.slu or --gguf MODEL.gguf is missing");
    }
    const char *outputs[] = {synth->out, synth->gguf};
    /* A shape may be no file but a name. */
    bool is_file = synth->shape && access(synth->shape, F_OK) == 0;
    const char *inputs[] = {is_file ? synth->shape : NULL, synth->template_file};
    const char *clash = slu_cli_find_clash(outputs, 2, inputs, 2);
    if (parsed == SLU_ARGS_OK && clash) {
        parsed = slu_args_mistake(
            &args, "%s would overwrite the shape, the template or the other output", clash);
    }
    if (parsed == SLU_ARGS_OK) {
        parsed = slu_cli_quant_args_check(&synth->quant, &args);
    }
    if (parsed == SLU_ARGS_OK && !synth->out && (synth->quant.experts || synth->quant.resident)) {
        parsed = slu_args_mistake(&args, "packs are quantized, but -o MODEL.slu is missing");
    }
    struct slu_synth_params arch;
    if (parsed == SLU_ARGS_OK && synth->arch && !slu_synth_arch(synth->arch, &arch)) {
        parsed = slu_args_mistake(&args, "unknown architecture '%s'", synth->arch);
    }
    return parsed;
}

/* What is to be quantized has to be of a type that can be: F16 where none is told. */
static void unquantize(struct slu_synth_params *params, const struct slu_synth_params *given,
                       const struct slu_cli_quant_args *quant)
{
    if (quant->experts && !given->expert_type) {
        params->expert_type = "F16";
        params->down_type = given->down_type;
    }
    if (quant->resident && !given->dense_type) {
        /* Rows of embeddings stay as they are. */
        const char *was = params->dense_type ? params->dense_type : "Q8_0";
        params->embd_type = params->embd_type ? params->embd_type : was;
        params->dense_type = "F16";
    }
}

/* What is given one by one takes the place of the shape's. */
static void override(struct slu_synth_params *params, const struct slu_synth_params *given)
{
    uint32_t *const counts[][2] = {
        {&params->n_layers, (uint32_t *)&given->n_layers},
        {&params->n_embd, (uint32_t *)&given->n_embd},
        {&params->n_ff, (uint32_t *)&given->n_ff},
        {&params->n_experts, (uint32_t *)&given->n_experts},
        {&params->n_used, (uint32_t *)&given->n_used},
        {&params->n_heads, (uint32_t *)&given->n_heads},
        {&params->n_heads_kv, (uint32_t *)&given->n_heads_kv},
        {&params->head_dim, (uint32_t *)&given->head_dim},
        {&params->n_vocab, (uint32_t *)&given->n_vocab},
        {&params->n_ctx, (uint32_t *)&given->n_ctx},
    };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        *counts[i][0] = *counts[i][1] ? *counts[i][1] : *counts[i][0];
    }
    if (given->expert_type || given->dense_type) {
        params->has_more_bits = false; /* that is a matter of the types that it came with */
    }
    params->expert_type = given->expert_type ? given->expert_type : params->expert_type;
    params->down_type = given->down_type     ? given->down_type
                        : given->expert_type ? NULL
                                             : params->down_type;
    params->dense_type = given->dense_type ? given->dense_type : params->dense_type;
    params->is_tied = params->is_tied || given->is_tied;
    params->seed = given->seed ? given->seed : params->seed;
}

static int read_shape(struct synth *synth, struct slu_err *err)
{
    if (!synth->shape || slu_synth_shape(synth->shape, &synth->params)) {
        return 0;
    }
    size_t len;
    int rc = slu_cli_read_file(synth->shape, &synth->shape_text, &len, err);
    if (rc == SLU_ENOENT) {
        return slu_err_set(err, rc,
                           "no shape and no file is called %s; shapes are gpt-oss-20b and "
                           "qwen3-30b-a3b",
                           synth->shape);
    }
    if (rc == 0) {
        rc =
            slu_synth_shape_parse(synth->shape_text, len, &synth->params, &synth->shape_owned, err);
        if (rc < 0) {
            slu_err_prefix(err, "%s", synth->shape);
        }
    }
    return rc;
}

static int resolve(struct synth *synth, struct slu_err *err)
{
    int rc = read_shape(synth, err);
    if (rc < 0) {
        return rc;
    }
    if (synth->arch) {
        (void)slu_synth_arch(synth->arch, &synth->params);
    }
    override(&synth->params, &synth->given);
    unquantize(&synth->params, &synth->given, &synth->quant);
    if (synth->template_file) {
        size_t len; /* a zero byte in the file would end the text early, which harms nobody */
        rc = slu_cli_read_file(synth->template_file, &synth->template_text, &len, err);
        char *ended = rc == 0 ? strndup(synth->template_text, len) : NULL;
        free(synth->template_text);
        synth->template_text = ended;
        synth->params.chat_template = ended;
        if (rc == 0 && !ended) {
            rc = slu_err_set(err, SLU_ENOMEM, "out of memory for the template");
        }
    }
    return rc;
}

static void on_progress(void *arg, uint64_t done_bytes, uint64_t total_bytes)
{
    slu_progress_update(arg, done_bytes, total_bytes);
}

static int write_gguf(struct synth *synth, struct slu_err *err)
{
    struct slu_progress progress;
    synth->params.progress = on_progress;
    synth->params.arg = &progress;
    synth->params.cancel = slu_cli_interrupted();
    slu_progress_begin(&progress, "writing");
    int rc = slu_synth_write(synth->gguf, &synth->params, err);
    slu_progress_end(&progress);
    return rc;
}

static int write_pack(const struct synth *synth, struct slu_err *err)
{
    struct slu_source *source;
    int rc = slu_synth_open(&synth->params, &source, err);
    if (rc < 0) {
        return rc;
    }
    struct slu_progress progress;
    struct slu_packer_params params = {
        .in = source->name,
        .source = source,
        .out = synth->out,
        .codec = (enum slu_codec_id)synth->codec,
        .block_bytes = (uint32_t)synth->block_bytes,
        .progress = on_progress,
        .arg = &progress,
        .cancel = slu_cli_interrupted(),
    };
    slu_cli_quant_args_apply(&synth->quant, &params);
    struct slu_packer_report report = {0};
    slu_progress_begin(&progress, "packing");
    rc = slu_packer_run(&params, &report, err);
    slu_progress_end(&progress);
    slu_source_destroy(source);
    if (rc == 0) {
        printf("%s: %s; %u expert blocks of up to %s, %u of them compressed\n", synth->out,
               slu_cli_size(report.out_bytes).text, report.n_blocks,
               slu_cli_size(report.block_bytes_max).text, report.n_blocks_compressed);
        slu_cli_quant_print(&params, &report);
    }
    return rc;
}

int slu_cmd_synth(int argc, char **argv)
{
    struct synth synth = {0};
    struct slu_err err = {0};
    int parsed = parse(&synth, argc, argv);
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }
    slu_cli_catch_signals();
    int rc = resolve(&synth, &err);
    if (rc == 0 && synth.gguf) {
        rc = write_gguf(&synth, &err);
    }
    if (rc == 0 && synth.out) {
        rc = write_pack(&synth, &err);
    }
    slu_synth_shape_free(synth.shape_owned);
    free(synth.shape_text);
    free(synth.template_text);
    return rc < 0 ? slu_cli_fail(&err) : slu_cli_exit_status(SLU_EXIT_DONE);
}
