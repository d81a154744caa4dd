#include "tools/adapter_import.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tools/adapter_base.h"
#include "tools/adapter_parts.h"

#define CONFIG_BYTES_MAX (4u << 20)

static bool has_suffix(const char *text, const char *suffix)
{
    size_t n = strlen(text), m = strlen(suffix);
    return n >= m && strcmp(text + n - m, suffix) == 0;
}

/* The last part of a path, without its ending. */
static void name_from_path(const char *path, char *out, size_t out_bytes)
{
    size_t end = strlen(path);
    while (end > 1 && path[end - 1] == '/') {
        end--;
    }
    size_t start = end;
    while (start > 0 && path[start - 1] != '/') {
        start--;
    }
    size_t len = end - start;
    const char *dot = memrchr(path + start, '.', len);
    if (dot && dot > path + start) {
        len = (size_t)(dot - (path + start));
    }
    len = len < out_bytes ? len : out_bytes - 1;
    memcpy(out, path + start, len);
    out[len] = '\0';
}

static void copy_text(char *out, size_t out_bytes, const char *text)
{
    size_t len = strnlen(text, out_bytes - 1);
    memcpy(out, text, len);
    out[len] = '\0';
}

int slu_adapter_inspect_file(const char *path, struct slu_adapter_info *ret_info,
                             struct slu_err *err)
{
    struct slu_source *source;
    int rc = slu_source_open_file(path, &source, err);
    if (rc == 0) {
        rc = slu_adapter_inspect(source, ret_info, err);
        slu_source_destroy(source);
    }
    return rc;
}

/* A whole small text file. */
static int read_text(const char *path, char **ret_text, size_t *ret_len, struct slu_err *err)
{
    struct slu_source *source;
    char *text = NULL;
    int rc = slu_source_open_file(path, &source, err);
    if (rc < 0) {
        return rc;
    }
    size_t len = (size_t)source->size_bytes;
    if (source->size_bytes > CONFIG_BYTES_MAX) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: is too large for a configuration", path);
    } else if (!(text = malloc(len + 1))) {
        rc = slu_err_set(err, SLU_ENOMEM, "%s: no memory to read it", path);
    }
    rc = rc < 0 ? rc : source->read_at(source, 0, text, len, err);
    slu_source_destroy(source);
    if (rc < 0) {
        free(text);
        return rc;
    }
    *ret_text = text;
    *ret_len = len;
    return 0;
}

/* The files of a PEFT adapter. `in` is its folder, or its .safetensors. */
static int peft_paths(const char *in, char **ret_weights, char **ret_config, struct slu_err *err)
{
    struct stat st;
    bool is_folder = stat(in, &st) == 0 && S_ISDIR(st.st_mode);
    const char *slash = strrchr(in, '/');
    int folder_len = is_folder ? (int)strlen(in) : slash ? (int)(slash - in) : 1;
    const char *folder = is_folder || slash ? in : ".";
    char *weights = NULL, *config = NULL;
    int n = is_folder ? asprintf(&weights, "%s/adapter_model.safetensors", in)
                      : asprintf(&weights, "%s", in);
    if (n < 0 || asprintf(&config, "%.*s/adapter_config.json", folder_len, folder) < 0) {
        if (n >= 0) {
            free(weights);
        }
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for its names", in);
    }
    int rc = 0;
    char *pickle = NULL;
    if (is_folder && access(weights, F_OK) != 0 &&
        asprintf(&pickle, "%s/adapter_model.bin", in) >= 0 && access(pickle, F_OK) == 0) {
        rc = slu_err_set(err, SLU_EUNSUP,
                         "%s: Python pickles are not supported; save the adapter as safetensors",
                         pickle);
    }
    free(pickle);
    if (rc < 0) {
        free(weights);
        free(config);
        return rc;
    }
    *ret_weights = weights;
    *ret_config = config;
    return 0;
}

static int read_peft(const char *in, struct slu_source **ret_source, struct slu_import *import,
                     struct slu_err *err)
{
    char *weights = NULL, *config = NULL, *text = NULL;
    size_t len = 0;
    int rc = peft_paths(in, &weights, &config, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_source_open_file(weights, ret_source, err);
    rc = rc < 0 ? rc : read_text(config, &text, &len, err);
    rc = rc < 0 ? rc : slu_import_peft(*ret_source, text, len, config, import, err);
    free(text);
    free(weights);
    free(config);
    return rc;
}

/* Which of the three forms it is. */
static int read_any(const char *in, struct slu_source **ret_source, struct slu_import *import,
                    struct slu_err *err)
{
    struct stat st;
    if (stat(in, &st) != 0) {
        int rc = errno == ENOENT || errno == ENOTDIR ? SLU_ENOENT : SLU_EIO;
        return slu_err_set(err, rc, "%s: cannot be opened: %s", in, strerror(errno));
    }
    if (S_ISDIR(st.st_mode) || has_suffix(in, ".safetensors")) {
        return read_peft(in, ret_source, import, err);
    }
    if (!has_suffix(in, ".gguf")) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: is neither a folder nor a .safetensors or .gguf file", in);
    }
    int rc = slu_source_open_file(in, ret_source, err);
    return rc < 0 ? rc : slu_import_gguf(*ret_source, import, err);
}

/* Names and texts that the caller or the path gives. */
static void set_texts(const struct slu_adapter_import_params *params, struct slu_adapter_info *info)
{
    if (params->name) {
        copy_text(info->name, sizeof info->name, params->name);
    } else if (!info->name[0]) {
        name_from_path(params->in, info->name, sizeof info->name);
    }
    if (params->description) {
        copy_text(info->description, sizeof info->description, params->description);
    }
}

/* Binds the import to a pack. */
static int bind(const char *path, struct slu_import *import, struct slu_adapter_base *base,
                struct slu_err *err)
{
    int rc = slu_adapter_base_open(path, base, err);
    if (rc < 0) {
        return rc;
    }
    const char *arch = slu_arch_name(base->config.arch);
    if (base->fingerprint == 0) {
        return slu_err_set(err, SLU_EUNSUP, "%s: is no pack; `sluice pack` makes one of it", path);
    }
    if (import->info.arch[0] && strcmp(import->info.arch, arch) != 0) {
        return slu_err_set(err, SLU_EUNSUP, "%s: is %s, but the adapter was made for %s", path,
                           arch, slu_printable(import->info.arch, strlen(import->info.arch)).text);
    }
    copy_text(import->info.arch, sizeof import->info.arch, arch);
    import->info.base_fingerprint = base->fingerprint;
    import->n_experts = base->config.n_experts;
    return 0;
}

int slu_adapter_import(const struct slu_adapter_import_params *params,
                       struct slu_adapter_info *ret_info, struct slu_err *err)
{
    struct slu_import import = {0};
    struct slu_source *source = NULL;
    struct slu_adapter_base base;
    struct slu_base view;
    int rc = read_any(params->in, &source, &import, err);
    if (rc == 0 && params->base) {
        rc = bind(params->base, &import, &base, err);
        view = rc == 0 ? slu_adapter_base_view(&base) : (struct slu_base){0};
    }
    rc = rc < 0 ? rc : slu_import_check(&import, params->base ? &view : NULL, err);
    if (rc == 0) {
        set_texts(params, &import.info);
        rc = slu_import_write(&import, params->out, err);
    }
    rc = rc < 0 ? rc : slu_adapter_inspect_file(params->out, ret_info, err);
    slu_import_finish(&import);
    slu_source_destroy(source);
    return rc;
}
