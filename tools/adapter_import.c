#include "tools/adapter_import.h"

#include <stdlib.h>
#include <string.h>

#include "tools/adapter_parts.h"

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

static int inspect(const char *path, struct slu_adapter_info *ret_info, struct slu_err *err)
{
    struct slu_source *source;
    int rc = slu_source_open_file(path, &source, err);
    if (rc == 0) {
        rc = slu_adapter_inspect(source, ret_info, err);
        slu_source_destroy(source);
    }
    return rc;
}

int slu_adapter_import(const struct slu_adapter_import_params *params,
                       struct slu_adapter_info *ret_info, struct slu_err *err)
{
    struct slu_import import = {0};
    struct slu_source *source = NULL;
    int rc;
    if (!has_suffix(params->in, ".gguf") || params->base) {
        return slu_err_set(err, SLU_EUNSUP, "%s: is of a kind that can't be imported yet",
                           params->in);
    }
    rc = slu_source_open_file(params->in, &source, err);
    rc = rc < 0 ? rc : slu_import_gguf(source, &import, err);
    if (rc == 0) {
        rc = slu_import_check(&import, NULL, err);
    }
    if (rc == 0) {
        struct slu_adapter_info *info = &import.info;
        if (params->name) {
            copy_text(info->name, sizeof info->name, params->name);
        } else if (!info->name[0]) {
            name_from_path(params->in, info->name, sizeof info->name);
        }
        if (params->description) {
            copy_text(info->description, sizeof info->description, params->description);
        }
        rc = slu_import_write(&import, params->out, err);
    }
    if (rc == 0) {
        rc = inspect(params->out, ret_info, err);
    }
    slu_import_finish(&import);
    slu_source_destroy(source);
    return rc;
}
