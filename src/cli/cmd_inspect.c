#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cli/cli.h"
#include "tools/inspect.h"

static void print_field(const char *name, const char *value)
{
    char clean[256];
    slu_cli_clean(clean, sizeof clean, value, strlen(value));
    printf("%-14s %s\n", name, clean);
}

static double part(uint64_t a, uint64_t b)
{
    return b ? (double)a / (double)b : 0;
}

static void print_config(const struct slu_config *config)
{
    printf("%-14s %u layers", "sizes", config->n_layers);
    if (config->n_dense_layers) {
        printf(" (%u dense ones first)", config->n_dense_layers);
    }
    printf(", width %u, %u heads", config->n_embd, config->n_heads);
    if (config->is_mla) {
        printf(", latent attention of rank %u\n", config->kv_lora);
    } else {
        printf(", %u of keys and values, %u wide\n", config->n_heads_kv, config->k_dim);
    }
    printf("%-14s %u in each layer, %u used by a token, %u neurons each", "experts",
           config->n_experts, config->n_used, config->n_ff_expert);
    if (config->n_ff_shared) {
        printf("; a shared one of %u", config->n_ff_shared);
    }
    printf("\n%-14s trained for %u tokens", "context", config->n_ctx_train);
    if (config->window) {
        printf(", every second layer sees %u", config->window);
    }
    printf("\n");
}

static void print_codec(const struct slu_inspect_codec *codec)
{
    char reason[sizeof codec->reason];
    slu_cli_clean(reason, sizeof reason, codec->reason, strlen(codec->reason));
    printf("%-14s auto, %.0f %% of the blocks to compress: %s\n", "codec", 100 * codec->share,
           reason);
    printf("%-14s for flash of %.0f MB/s and %" PRIu64
           " cores, each of which multiplies %.0f MB of "
           "blocks a second",
           "", codec->flash_mbps, codec->cores, codec->multiply_mbps);
    if (codec->unpack_mbps > 0) {
        printf(" and decodes %.0f", codec->unpack_mbps);
    }
    printf("\n");
}

static void print_blocks(const struct slu_inspect *inspect)
{
    printf("%-14s %" PRIu64 " of up to %s, %" PRIu64 " of them compressed\n", "expert blocks",
           inspect->n_blocks, slu_cli_size(inspect->block_bytes_max).text,
           inspect->n_blocks_compressed);
    printf("%-14s %s, stored in %s: compression saves %.1f %%\n", "expert bytes",
           slu_cli_size(inspect->expert_bytes).text,
           slu_cli_size(inspect->expert_stored_bytes).text,
           inspect->expert_bytes
               ? 100 - 100 * part(inspect->expert_stored_bytes, inspect->expert_bytes)
               : 0);
    if (inspect->codec.is_auto) {
        print_codec(&inspect->codec);
    }
    printf("%-14s %016" PRIx64 "\n", "fingerprint", inspect->fingerprint);
}

static void print_summary(const struct slu_inspect *inspect)
{
    printf("%-14s %s, version %u, %s\n", "file", inspect->is_pack ? "a pack of sluice" : "GGUF",
           inspect->version, slu_cli_size(inspect->file_bytes).text);
    if (inspect->n_splits > 1) {
        printf("%-14s one of %u files that the model is split into\n", "", inspect->n_splits);
    }
    print_field("architecture", inspect->arch[0] ? inspect->arch : "(none given)");
    if (inspect->name[0]) {
        print_field("name", inspect->name);
    }
    if (inspect->is_supported) {
        print_config(&inspect->config);
    } else {
        print_field("not runnable", inspect->problem.text);
    }
    if (inspect->tokenizer[0]) {
        char text[128];
        snprintf(text, sizeof text, "%s%s%s, %" PRIu64 " tokens", inspect->tokenizer,
                 inspect->pre[0] ? "/" : "", inspect->pre, inspect->n_tokens);
        print_field("tokenizer", text);
        print_field("chat template", inspect->chat);
    }
    for (uint32_t i = 0; i < inspect->n_formats; i++) {
        const struct slu_inspect_format *format = &inspect->formats[i];
        printf("%-14s %-8s %8" PRIu64 " tensors, %10s, %5.2f bits a weight\n", i ? "" : "formats",
               format->name, format->n_tensors, slu_cli_size(format->bytes).text,
               8 * part(format->bytes, format->n_weights));
    }
    if (inspect->is_pack) {
        print_blocks(inspect);
    } else if (inspect->expert_bytes) {
        printf("%-14s %s\n", "expert bytes", slu_cli_size(inspect->expert_bytes).text);
    }
}

static void print_tensors(const struct slu_inspect *inspect)
{
    printf("\n");
    for (uint64_t i = 0; i < inspect->n_tensors; i++) {
        const struct slu_inspect_tensor *tensor = &inspect->tensors[i];
        char clean[sizeof tensor->name], dims[96] = "";
        slu_cli_clean(clean, sizeof clean, tensor->name, strlen(tensor->name));
        size_t used = 0;
        for (uint32_t d = 0; d < tensor->n_dims && used < sizeof dims; d++) {
            used += (size_t)snprintf(dims + used, sizeof dims - used, "%s%" PRIu64, d ? " x " : "",
                                     tensor->dims[d]);
        }
        printf("%-40s %-7s %24s %11s\n", clean, tensor->format, dims,
               slu_cli_size(tensor->bytes).text);
    }
}

static void add_text(json_t *object, const char *key, const char *text)
{
    slu_json_text(object, key, text, strlen(text));
}

static json_t *config_json(const struct slu_config *config)
{
    json_t *object = json_object();
    slu_json_whole(object, "n_layers", config->n_layers);
    slu_json_whole(object, "n_dense_layers", config->n_dense_layers);
    slu_json_whole(object, "n_ctx_train", config->n_ctx_train);
    slu_json_whole(object, "n_embd", config->n_embd);
    slu_json_whole(object, "n_vocab", config->n_vocab);
    slu_json_whole(object, "n_heads", config->n_heads);
    slu_json_whole(object, "n_heads_kv", config->n_heads_kv);
    slu_json_whole(object, "k_dim", config->k_dim);
    slu_json_whole(object, "v_dim", config->v_dim);
    slu_json_whole(object, "n_experts", config->n_experts);
    slu_json_whole(object, "n_used", config->n_used);
    slu_json_whole(object, "n_ff_expert", config->n_ff_expert);
    slu_json_whole(object, "n_ff_shared", config->n_ff_shared);
    slu_json_whole(object, "n_ff_dense", config->n_ff_dense);
    slu_json_whole(object, "window", config->window);
    slu_json_bool(object, "is_mla", config->is_mla);
    return object;
}

static json_t *formats_json(const struct slu_inspect *inspect)
{
    json_t *array = json_array();
    for (uint32_t i = 0; i < inspect->n_formats; i++) {
        json_t *object = json_object();
        add_text(object, "name", inspect->formats[i].name);
        slu_json_whole(object, "n_tensors", inspect->formats[i].n_tensors);
        slu_json_whole(object, "n_weights", inspect->formats[i].n_weights);
        slu_json_whole(object, "bytes", inspect->formats[i].bytes);
        json_array_append_new(array, object);
    }
    return array;
}

static json_t *tensors_json(const struct slu_inspect *inspect)
{
    json_t *array = json_array();
    for (uint64_t i = 0; i < inspect->n_tensors; i++) {
        const struct slu_inspect_tensor *tensor = &inspect->tensors[i];
        json_t *object = json_object();
        json_t *dims = json_array();
        for (uint32_t d = 0; d < tensor->n_dims; d++) {
            json_array_append_new(dims, json_integer((json_int_t)tensor->dims[d]));
        }
        add_text(object, "name", tensor->name);
        add_text(object, "format", tensor->format);
        json_object_set_new(object, "dims", dims);
        slu_json_whole(object, "bytes", tensor->bytes);
        json_array_append_new(array, object);
    }
    return array;
}

static json_t *codec_json(const struct slu_inspect_codec *codec)
{
    json_t *object = json_object();
    add_text(object, "reason", codec->reason);
    slu_json_real(object, "share", codec->share);
    slu_json_real(object, "flash_mbps", codec->flash_mbps);
    slu_json_whole(object, "cores", codec->cores);
    slu_json_real(object, "unpack_mbps", codec->unpack_mbps);
    slu_json_real(object, "multiply_mbps", codec->multiply_mbps);
    slu_json_real(object, "ratio", codec->ratio);
    return object;
}

static int print_json(const struct slu_inspect *inspect, bool with_tensors, struct slu_err *err)
{
    json_t *object = json_object();
    add_text(object, "kind", inspect->is_pack ? "pack" : "gguf");
    slu_json_whole(object, "version", inspect->version);
    slu_json_whole(object, "file_bytes", inspect->file_bytes);
    slu_json_whole(object, "n_splits", inspect->n_splits);
    add_text(object, "architecture", inspect->arch);
    add_text(object, "name", inspect->name);
    slu_json_bool(object, "is_supported", inspect->is_supported);
    if (inspect->is_supported) {
        json_object_set_new(object, "config", config_json(&inspect->config));
    } else {
        add_text(object, "problem", inspect->problem.text);
    }
    add_text(object, "tokenizer", inspect->tokenizer);
    add_text(object, "pre_tokenizer", inspect->pre);
    slu_json_whole(object, "n_tokens", inspect->n_tokens);
    add_text(object, "chat", inspect->chat);
    slu_json_whole(object, "n_metadata", inspect->n_kvs);
    slu_json_whole(object, "n_tensors", inspect->n_tensors);
    json_object_set_new(object, "formats", formats_json(inspect));
    slu_json_whole(object, "expert_bytes", inspect->expert_bytes);
    if (inspect->is_pack) {
        char fingerprint[17];
        snprintf(fingerprint, sizeof fingerprint, "%016" PRIx64, inspect->fingerprint);
        add_text(object, "fingerprint", fingerprint);
        slu_json_whole(object, "n_blocks", inspect->n_blocks);
        slu_json_whole(object, "n_blocks_compressed", inspect->n_blocks_compressed);
        slu_json_whole(object, "block_bytes_max", inspect->block_bytes_max);
        slu_json_whole(object, "expert_stored_bytes", inspect->expert_stored_bytes);
        slu_json_real(object, "codec_ratio",
                      part(inspect->expert_stored_bytes, inspect->expert_bytes));
        if (inspect->codec.is_auto) {
            json_object_set_new(object, "codec_auto", codec_json(&inspect->codec));
        }
    }
    if (with_tensors) {
        json_object_set_new(object, "tensors", tensors_json(inspect));
    }
    return slu_json_print(object, err);
}

int slu_cmd_inspect(int argc, char **argv)
{
    bool is_json = false, with_tensors = false;
    const char *path;
    const struct slu_arg options[] = {
        {
            .name = "--tensors",
            .type = SLU_ARG_FLAG,
            .target = &with_tensors,
            .help = "list the tensors too (a pack keeps experts as blocks,\n"
                    "which aren't listed)",
        },
        {
            .name = "--json",
            .type = SLU_ARG_FLAG,
            .target = &is_json,
            .help = "print one JSON object",
        },
    };
    const struct slu_command_args args = {
        .command = "inspect",
        .synopsis = "MODEL.slu|MODEL.gguf [--tensors] [--json]",
        .about =
            "Says what a pack or a GGUF holds: architecture, sizes, experts, formats, tokenizer\n"
            "and chat template, and what compression saved. Reads no weights.",
        .operand = "MODEL.slu or MODEL.gguf",
        .tables = {{.title = "Options", .args = options, .n = sizeof options / sizeof *options}},
    };
    int parsed = slu_args_parse(&args, argc, argv, &path);
    if (parsed != SLU_ARGS_OK) {
        return slu_cli_args_status(parsed);
    }
    struct slu_inspect inspect;
    struct slu_err err = {0};
    if (slu_inspect_file(path, &inspect, &err) < 0) {
        return slu_cli_fail(&err);
    }
    int rc = 0;
    if (is_json) {
        rc = print_json(&inspect, with_tensors, &err);
    } else {
        print_summary(&inspect);
        if (with_tensors) {
            print_tensors(&inspect);
        }
    }
    slu_inspect_finish(&inspect);
    return rc < 0 ? slu_cli_fail(&err) : SLU_EXIT_DONE;
}
