#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "tools/adapter_import.h"

static const char about[] =
    "Usage: sluice adapter import DIR|FILE.safetensors|FILE.gguf -o NAME.sla [options]\n"
    "       sluice adapter inspect NAME.sla [--json]\n"
    "\n"
    "LoRA adapters: small files that change what a model is good at, without another copy of it.\n"
    "\n"
    "  import     turn a PEFT or GGUF LoRA into a .sla, the form that sluice loads\n"
    "  inspect    say what a .sla holds, and how much memory it takes\n"
    "\n"
    "`sluice adapter COMMAND --help` explains each. What was imported is used with\n"
    "\n"
    "  sluice run model.slu --adapter name.sla -p \"...\"\n";

static void print_field(const char *name, const char *value)
{
    char clean[512];
    slu_cli_clean(clean, sizeof clean, value, strlen(value));
    printf("%-14s %s\n", name, clean);
}

static void print_info(const struct slu_adapter_info *info)
{
    char text[400];
    print_field("name", info->name);
    if (info->description[0]) {
        print_field("description", info->description);
    }
    print_field("architecture", info->arch[0] ? info->arch : "any whose shapes fit");
    if (info->base_fingerprint) {
        snprintf(text, sizeof text, "the pack with fingerprint %016" PRIx64,
                 info->base_fingerprint);
        print_field("base", text);
    } else {
        print_field("base", "any whose shapes fit");
    }
    if (info->rank_min == info->rank_max) {
        snprintf(text, sizeof text, "%u", info->rank_max);
    } else {
        snprintf(text, sizeof text, "%u to %u", info->rank_min, info->rank_max);
    }
    print_field("rank", text);
    snprintf(text, sizeof text, "%u matrices, up to layer %u:", info->n_loras, info->n_layers - 1);
    size_t used = strlen(text);
    for (unsigned i = 0; i < SLU_TARGETS && used < sizeof text; i++) {
        if (info->targets >> i & 1) {
            used += (size_t)snprintf(text + used, sizeof text - used, " %s",
                                     slu_target_name((enum slu_target)i));
        }
    }
    print_field("changes", text);
    snprintf(text, sizeof text, "%s in the file, %s in memory", slu_cli_size(info->file_bytes).text,
             slu_cli_size(info->memory_bytes).text);
    print_field("size", text);
    if (info->n_blocks > 0) {
        snprintf(text, sizeof text,
                 "%s of it in %u blocks of up to %s, which may be streamed instead",
                 slu_cli_size(info->expert_bytes).text, info->n_blocks,
                 slu_cli_size(info->block_bytes).text);
        print_field("experts", text);
    }
}

static int print_json(const struct slu_adapter_info *info, struct slu_err *err)
{
    json_t *object = json_object(), *targets = json_array();
    char fingerprint[17] = "";
    if (info->base_fingerprint) {
        snprintf(fingerprint, sizeof fingerprint, "%016" PRIx64, info->base_fingerprint);
    }
    for (unsigned i = 0; i < SLU_TARGETS; i++) {
        if (info->targets >> i & 1) {
            json_array_append_new(targets, json_string(slu_target_name((enum slu_target)i)));
        }
    }
    slu_json_text(object, "name", info->name, strlen(info->name));
    slu_json_text(object, "description", info->description, strlen(info->description));
    slu_json_text(object, "architecture", info->arch, strlen(info->arch));
    slu_json_text(object, "base_fingerprint", fingerprint, strlen(fingerprint));
    slu_json_whole(object, "n_layers", info->n_layers);
    slu_json_whole(object, "n_matrices", info->n_loras);
    slu_json_whole(object, "rank_min", info->rank_min);
    slu_json_whole(object, "rank_max", info->rank_max);
    json_object_set_new(object, "targets", targets);
    slu_json_bool(object, "is_hf_order", info->is_hf_order);
    slu_json_whole(object, "file_bytes", info->file_bytes);
    slu_json_whole(object, "memory_bytes", info->memory_bytes);
    slu_json_whole(object, "expert_bytes", info->expert_bytes);
    slu_json_whole(object, "expert_blocks", info->n_blocks);
    slu_json_whole(object, "expert_block_bytes", info->block_bytes);
    return slu_json_print(object, err);
}

static int import(int argc, char **argv)
{
    struct slu_adapter_import_params params = {0};
    const struct slu_arg options[] = {
        {
            .name = "--output",
            .letter = 'o',
            .value = "NAME.sla",
            .type = SLU_ARG_TEXT,
            .target = &params.out,
            .help = "the adapter to write; it appears under this name when it is\n"
                    "complete and synced, and not before",
        },
        {
            .name = "--base",
            .value = "MODEL.slu",
            .type = SLU_ARG_TEXT,
            .target = &params.base,
            .help = "check it against this pack, and bind it to this very one\n"
                    "(default: it fits every model with matrices of its shapes)",
        },
        {
            .name = "--name",
            .value = "TEXT",
            .type = SLU_ARG_TEXT,
            .target = &params.name,
            .help = "what to call it (default: as the source does, or its file)",
        },
        {
            .name = "--description",
            .value = "TEXT",
            .type = SLU_ARG_TEXT,
            .target = &params.description,
            .help = "a sentence to keep in the file",
        },
    };
    const struct slu_command_args args = {
        .command = "adapter import",
        .synopsis = "DIR|FILE.safetensors|FILE.gguf -o NAME.sla [options]",
        .about =
            "Turns a LoRA into a .sla: a PEFT folder (adapter_config.json beside\n"
            "adapter_model.safetensors), a .safetensors with its configuration in the same "
            "folder,\n"
            "or a GGUF LoRA. Numbers keep their type and value. What isn't supported (DoRA, LoKr,\n"
            "modules_to_save, ...) is refused by name.",
        .after = "Example:\n  sluice adapter import ./summarize-lora -o summarize.sla",
        .operand = "DIR, FILE.safetensors or FILE.gguf",
        .tables = {{.title = "Options", .args = options, .n = sizeof options / sizeof *options}},
    };
    int parsed = slu_args_parse(&args, argc, argv, &params.in);
    if (parsed == SLU_ARGS_OK && (!params.out || !*params.out)) {
        parsed = slu_args_mistake(&args, "-o NAME.sla is missing");
    }
    if (parsed == SLU_ARGS_OK && slu_cli_is_same_file(params.in, params.out)) {
        parsed = slu_args_mistake(&args, "%s would overwrite itself", params.in);
    }
    for (size_t i = 0; parsed == SLU_ARGS_OK && i < 2; i++) {
        static const char *const parts[] = {"adapter_config.json", "adapter_model.safetensors"};
        char *part;
        if (asprintf(&part, "%s/%s", params.in, parts[i]) > 0) {
            if (slu_cli_is_same_file(part, params.out)) {
                parsed = slu_args_mistake(&args, "%s would overwrite what it is made of", part);
            }
            free(part);
        }
    }
    if (parsed == SLU_ARGS_OK && params.base && slu_cli_is_same_file(params.base, params.out)) {
        parsed = slu_args_mistake(&args, "the adapter would overwrite %s", params.base);
    }
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }
    struct slu_adapter_info info;
    struct slu_err err = {0};
    if (slu_adapter_import(&params, &info, &err) < 0) {
        return slu_cli_fail(&err);
    }
    print_info(&info);
    return SLU_EXIT_DONE;
}

static int inspect(int argc, char **argv)
{
    bool is_json = false;
    const char *path;
    const struct slu_arg options[] = {
        {
            .name = "--json",
            .type = SLU_ARG_FLAG,
            .target = &is_json,
            .help = "print one JSON object",
        },
    };
    const struct slu_command_args args = {
        .command = "adapter inspect",
        .synopsis = "NAME.sla [--json]",
        .about =
            "Says what an adapter changes, at which rank, for which base, and how much memory\n"
            "it takes. Reads none of its matrices.",
        .operand = "NAME.sla",
        .tables = {{.title = "Options", .args = options, .n = sizeof options / sizeof *options}},
    };
    int parsed = slu_args_parse(&args, argc, argv, &path);
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }
    struct slu_adapter_info info;
    struct slu_err err = {0};
    int rc = slu_adapter_inspect_file(path, &info, &err);
    if (rc == 0 && is_json) {
        rc = print_json(&info, &err);
    } else if (rc == 0) {
        print_info(&info);
    }
    return rc < 0 ? slu_cli_fail(&err) : SLU_EXIT_DONE;
}

int slu_cmd_adapter(int argc, char **argv)
{
    const char *name = argc > 0 ? argv[0] : "";
    if (strcmp(name, "import") == 0) {
        return import(argc - 1, argv + 1);
    }
    if (strcmp(name, "inspect") == 0) {
        return inspect(argc - 1, argv + 1);
    }
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        fputs(about, stdout);
        return SLU_EXIT_DONE;
    }
    if (argc < 1) {
        slu_cli_error("adapter: import or inspect is missing; see `sluice adapter --help`");
    } else {
        slu_cli_error("adapter: unknown %s '%s'; see `sluice adapter --help`",
                      name[0] == '-' ? "option" : "command", name);
    }
    return SLU_EXIT_USAGE;
}
