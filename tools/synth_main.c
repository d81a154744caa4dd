/* slu-synth: writes a random model (tools/synth.h). For the demonstration and for benches. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/synth.h"

static const char usage[] =
    "usage: slu-synth [OPTION]... OUT.gguf\n"
    "Writes a random mixture-of-experts model.\n"
    "\n"
    "  --arch NAME       gpt-oss, qwen3moe, olmoe, llama, qwen2moe, granitemoe, deepseek2,\n"
    "                    or deepseek2-lite (default gpt-oss)\n"
    "  --layers N        --embd N   --ff N (neurons of an expert)   --experts N   --used N\n"
    "  --heads N         --kv-heads N   --head-dim N   --vocab N   --ctx N\n"
    "  --expert-type T   weights of experts, as GGUF names them: MXFP4, Q4_0, Q4_K, ...\n"
    "  --down-type T     of the experts' down matrices, if other\n"
    "  --dense-type T    of everything else\n"
    "  --tied            the embedding serves as the head\n"
    "  --template FILE   chat template to put into the metadata\n"
    "  --seed N\n";

enum {
    OPT_ARCH = 1,
    OPT_LAYERS,
    OPT_EMBD,
    OPT_FF,
    OPT_EXPERTS,
    OPT_USED,
    OPT_HEADS,
    OPT_KV_HEADS,
    OPT_HEAD_DIM,
    OPT_VOCAB,
    OPT_CTX,
    OPT_EXPERT_TYPE,
    OPT_DOWN_TYPE,
    OPT_DENSE_TYPE,
    OPT_TIED,
    OPT_TEMPLATE,
    OPT_SEED,
    OPT_HELP
};

static const struct option options[] = {
    {"arch", required_argument, NULL, OPT_ARCH},
    {"layers", required_argument, NULL, OPT_LAYERS},
    {"embd", required_argument, NULL, OPT_EMBD},
    {"ff", required_argument, NULL, OPT_FF},
    {"experts", required_argument, NULL, OPT_EXPERTS},
    {"used", required_argument, NULL, OPT_USED},
    {"heads", required_argument, NULL, OPT_HEADS},
    {"kv-heads", required_argument, NULL, OPT_KV_HEADS},
    {"head-dim", required_argument, NULL, OPT_HEAD_DIM},
    {"vocab", required_argument, NULL, OPT_VOCAB},
    {"ctx", required_argument, NULL, OPT_CTX},
    {"expert-type", required_argument, NULL, OPT_EXPERT_TYPE},
    {"down-type", required_argument, NULL, OPT_DOWN_TYPE},
    {"dense-type", required_argument, NULL, OPT_DENSE_TYPE},
    {"tied", no_argument, NULL, OPT_TIED},
    {"template", required_argument, NULL, OPT_TEMPLATE},
    {"seed", required_argument, NULL, OPT_SEED},
    {"help", no_argument, NULL, OPT_HELP},
    {NULL, 0, NULL, 0},
};

static int complain(const char *what, const char *value)
{
    fprintf(stderr, "slu-synth: %s%s%s\n", what, *value ? " " : "", value);
    return 1;
}

static int parse_arch(const char *name, struct slu_synth_params *params)
{
    if (strcmp(name, "deepseek2-lite") == 0) {
        params->arch = SLU_ARCH_DEEPSEEK2;
        params->is_lite = true;
        return 0;
    }
    for (unsigned arch = 0; arch <= SLU_ARCH_DEEPSEEK2; arch++) {
        if (strcmp(name, slu_arch_name(arch)) == 0) {
            params->arch = arch;
            return 0;
        }
    }
    return complain("unknown architecture", name);
}

static int parse_number(const char *text, uint32_t *ret_value)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    if (end == text || *end || value == 0 || value > 1u << 24) {
        return complain("not a number from 1 to 16777216:", text);
    }
    *ret_value = (uint32_t)value;
    return 0;
}

/* The whole file as a string, which lives as long as the program. */
static int read_template(const char *path, struct slu_synth_params *params)
{
    static char text[1 << 16];
    FILE *file = fopen(path, "rb");
    if (!file) {
        return complain("cannot open", path);
    }
    size_t n = fread(text, 1, sizeof text - 1, file);
    text[n] = 0;
    fclose(file);
    params->chat_template = text;
    return 0;
}

static int parse_option(int option, struct slu_synth_params *params)
{
    uint32_t *const numbers[] = {
        [OPT_LAYERS] = &params->n_layers,
        [OPT_EMBD] = &params->n_embd,
        [OPT_FF] = &params->n_ff,
        [OPT_EXPERTS] = &params->n_experts,
        [OPT_USED] = &params->n_used,
        [OPT_HEADS] = &params->n_heads,
        [OPT_KV_HEADS] = &params->n_heads_kv,
        [OPT_HEAD_DIM] = &params->head_dim,
        [OPT_VOCAB] = &params->n_vocab,
        [OPT_CTX] = &params->n_ctx,
    };
    switch (option) {
    case OPT_ARCH:
        return parse_arch(optarg, params);
    case OPT_EXPERT_TYPE:
        params->expert_type = optarg;
        return 0;
    case OPT_DOWN_TYPE:
        params->down_type = optarg;
        return 0;
    case OPT_DENSE_TYPE:
        params->dense_type = optarg;
        return 0;
    case OPT_TIED:
        params->is_tied = true;
        return 0;
    case OPT_TEMPLATE:
        return read_template(optarg, params);
    case OPT_SEED:
        params->seed = strtoull(optarg, NULL, 0);
        return 0;
    default:
        return parse_number(optarg, numbers[option]);
    }
}

int main(int argc, char **argv)
{
    struct slu_synth_params params = {0};
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (option == 'h' || option == OPT_HELP) {
            fputs(usage, stdout);
            return 0;
        }
        if (option == '?') {
            return 1;
        }
        if (parse_option(option, &params) != 0) {
            return 1;
        }
    }
    if (optind + 1 != argc) {
        fputs(usage, stderr);
        return 1;
    }
    struct slu_err err;
    if (slu_synth_write(argv[optind], &params, &err) < 0) {
        return complain(err.text, "");
    }
    return 0;
}
