/*
 * slu-synth-adapter OUT --base MODEL [options]: a random LoRA adapter for a model, as a GGUF LoRA
 * or as a PEFT folder, with the same numbers in both.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/adapter_synth.h"

static const char usage[] =
    "usage: slu-synth-adapter OUT --base MODEL.gguf|MODEL.slu [options]\n"
    "  --format gguf|peft      a file, or a folder (gguf)\n"
    "  --rank N                (8)\n"
    "  --alpha X               (2 * rank)\n"
    "  --gain X                deviation of what it adds, roughly, for x of deviation 1 (0.5)\n"
    "  --targets WHICH         attention, experts, both or all (attention)\n"
    "  --type F32|F16|BF16     (F32)\n"
    "  --seed N                (0)\n";

static int choose(const char *text, const char *const *choices, int n)
{
    for (int i = 0; i < n; i++) {
        if (strcmp(choices[i], text) == 0) {
            return i;
        }
    }
    fprintf(stderr, "slu-synth-adapter: '%s' is not one of its choices\n%s", text, usage);
    exit(2);
}

static const char *const forms[] = {"gguf", "peft"};
static const char *const targets[] = {"attention", "experts", "both", "all"};
static const uint32_t masks[] = {SLU_ADAPTER_ATTENTION, SLU_ADAPTER_EXPERTS,
                                 SLU_ADAPTER_ATTENTION | SLU_ADAPTER_EXPERTS,
                                 (1u << SLU_TARGETS) - 1};
static const char *const types[] = {"F32", "F16", "BF16"};

static const struct option options[] = {
    {"base", required_argument, NULL, 'b'}, {"format", required_argument, NULL, 'f'},
    {"rank", required_argument, NULL, 'r'}, {"alpha", required_argument, NULL, 'a'},
    {"gain", required_argument, NULL, 'g'}, {"targets", required_argument, NULL, 't'},
    {"type", required_argument, NULL, 'y'}, {"seed", required_argument, NULL, 's'},
    {"help", no_argument, NULL, 'h'},       {NULL, 0, NULL, 0},
};

int main(int argc, char **argv)
{
    struct slu_adapter_synth_params params = {0};
    struct slu_err err = {0};
    for (int option; (option = getopt_long(argc, argv, "h", options, NULL)) != -1;) {
        switch (option) {
        case 'b':
            params.base = optarg;
            break;
        case 'f':
            params.form = (enum slu_adapter_form)choose(optarg, forms, 2);
            break;
        case 'r':
            params.rank = (uint32_t)strtoul(optarg, NULL, 10);
            break;
        case 'a':
            params.alpha = strtof(optarg, NULL);
            break;
        case 'g':
            params.gain = strtof(optarg, NULL);
            break;
        case 't':
            params.targets = masks[choose(optarg, targets, 4)];
            break;
        case 'y':
            params.fmt = (enum slu_fmt_id)choose(optarg, types, 3);
            break;
        case 's':
            params.seed = strtoull(optarg, NULL, 10);
            break;
        default:
            fputs(usage, option == 'h' ? stdout : stderr);
            return option == 'h' ? 0 : 2;
        }
    }
    if (optind + 1 != argc || !params.base) {
        fputs(usage, stderr);
        return 2;
    }
    if (slu_adapter_synth_write(argv[optind], &params, &err) < 0) {
        fprintf(stderr, "slu-synth-adapter: %s\n", err.text);
        return 1;
    }
    return 0;
}
