/*
 * slu_synth: writes a random model as a GGUF file. For demonstrations and benches; nothing that is
 * installed uses it.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/synth.h"

static const char usage[] =
    "usage: slu_synth OUT.gguf [options]\n"
    "\n"
    "Writes a mixture-of-experts model with random weights: it computes all that a trained one\n"
    "does, and says nothing. The same options give the same bytes.\n"
    "\n"
    "  --arch NAME         gpt-oss, qwen3moe (default), olmoe, llama, qwen2moe, granitemoe,\n"
    "                      deepseek2\n"
    "  --layers N          layers\n"
    "  --embd N            width of the embedding\n"
    "  --ff N              neurons of an expert\n"
    "  --experts N         experts of a layer\n"
    "  --used N            experts that a token uses\n"
    "  --vocab N           tokens in the vocabulary\n"
    "  --ctx N             context that it claims to be trained for\n"
    "  --expert-type TYPE  of experts' weights, as GGUF names it (default Q4_0)\n"
    "  --dense-type TYPE   of all other matrices (default Q8_0)\n"
    "  --seed N            another model\n";

struct option_entry {
    const char *name;
    uint32_t *number;
    const char **text;
};

static bool parse_u32(const char *text, uint32_t *ret_value)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || value > UINT32_MAX) {
        return false;
    }
    *ret_value = (uint32_t)value;
    return true;
}

static bool parse_arch(const char *name, enum slu_arch *ret_arch)
{
    for (int arch = SLU_ARCH_GPT_OSS; arch <= SLU_ARCH_DEEPSEEK2; arch++) {
        if (strcmp(slu_arch_name((enum slu_arch)arch), name) == 0) {
            *ret_arch = (enum slu_arch)arch;
            return true;
        }
    }
    return false;
}

/* 0, or the exit status to end with. */
static int parse(int argc, char **argv, struct slu_synth_params *params, const char **ret_path)
{
    uint32_t seed = 0;
    const char *arch = "qwen3moe";
    const struct option_entry entries[] = {
        {"arch", NULL, &arch},
        {"layers", &params->n_layers, NULL},
        {"embd", &params->n_embd, NULL},
        {"ff", &params->n_ff, NULL},
        {"experts", &params->n_experts, NULL},
        {"used", &params->n_used, NULL},
        {"vocab", &params->n_vocab, NULL},
        {"ctx", &params->n_ctx, NULL},
        {"expert-type", NULL, &params->expert_type},
        {"dense-type", NULL, &params->dense_type},
        {"seed", &seed, NULL},
    };
    enum { N_ENTRIES = sizeof entries / sizeof *entries };
    struct option options[N_ENTRIES + 2] = {{.name = "help", .val = 'h'}};
    for (int i = 0; i < N_ENTRIES; i++) {
        options[i + 1] = (struct option){.name = entries[i].name, .has_arg = required_argument};
    }
    int index;
    for (int found; (found = getopt_long(argc, argv, "h", options, &index)) != -1;) {
        if (found == 'h') {
            fputs(usage, stdout);
            return -1;
        }
        if (found != 0) {
            return 2; /* getopt has told what is wrong */
        }
        const struct option_entry *entry = &entries[index - 1];
        if (entry->text) {
            *entry->text = optarg;
        } else if (!parse_u32(optarg, entry->number)) {
            fprintf(stderr, "slu_synth: --%s takes a number, not '%s'\n", entry->name, optarg);
            return 2;
        }
    }
    if (!parse_arch(arch, &params->arch)) {
        fprintf(stderr, "slu_synth: there is no architecture '%s'\n", arch);
        return 2;
    }
    if (optind != argc - 1) {
        fputs(usage, stderr);
        return 2;
    }
    params->seed = seed;
    *ret_path = argv[optind];
    return 0;
}

int main(int argc, char **argv)
{
    struct slu_synth_params params = {0};
    const char *path;
    int status = parse(argc, argv, &params, &path);
    if (status) {
        return status < 0 ? 0 : status;
    }
    struct slu_err err = {0};
    if (slu_synth_write(path, &params, &err) < 0) {
        fprintf(stderr, "slu_synth: %s\n", err.text);
        return 1;
    }
    return 0;
}
