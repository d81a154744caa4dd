#include <math.h>
#include <stdio.h>
#include <string.h>

#include "io/gguf.h"
#include "tools/adapter_parts.h"
#include "tools/planes.h"

static bool str_is(struct slu_str str, const char *text)
{
    return str.len == strlen(text) && memcmp(str.at, text, str.len) == 0;
}

static void copy_str(char *out, size_t out_bytes, struct slu_str str)
{
    size_t n = str.len < out_bytes ? str.len : out_bytes - 1;
    memcpy(out, str.at, n);
    out[n] = '\0';
}

/* A string key; empty where it is absent or of another type. */
static struct slu_str text_of(const struct slu_gguf *gguf, const char *key)
{
    struct slu_str str = {"", 0};
    slu_kvs_str(&gguf->kvs, key, &str, NULL);
    return str;
}

static int read_keys(const struct slu_gguf *gguf, const char *name, struct slu_import *import,
                     double *ret_alpha, struct slu_err *err)
{
    struct slu_str type = text_of(gguf, "general.type");
    if (!str_is(type, "adapter")) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: is no adapter: general.type is '%s', not 'adapter'", name,
                           slu_printable(type.at, type.len).text);
    }
    type = text_of(gguf, "adapter.type");
    if (!str_is(type, "lora")) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: adapters of type '%s' are not supported, only 'lora'", name,
                           slu_printable(type.at, type.len).text);
    }
    if (slu_kvs_find(&gguf->kvs, "adapter.alora.invocation_tokens")) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: adapter.alora.invocation_tokens makes it an activated LoRA, which "
                           "is not supported",
                           name);
    }
    double alpha = 0;
    int rc = slu_kvs_f64(&gguf->kvs, "adapter.lora.alpha", &alpha, err);
    if (rc < 0 && rc != SLU_ENOENT) {
        slu_err_prefix(err, "%s", name);
        return rc;
    }
    if (!isfinite(alpha)) {
        return slu_err_set(err, SLU_EFORMAT, "%s: adapter.lora.alpha isn't finite", name);
    }
    struct slu_adapter_info *info = &import->info;
    copy_str(info->arch, sizeof info->arch, text_of(gguf, "general.architecture"));
    copy_str(info->name, sizeof info->name, text_of(gguf, "general.name"));
    copy_str(info->description, sizeof info->description, text_of(gguf, "general.description"));
    info->is_hf_order = false;
    *ret_alpha = alpha;
    return 0;
}

/* What a tensor's name says; false if it is no half of a pair that is supported. */
static bool parse_name(struct slu_str name, struct slu_import_half *half)
{
    static const char a[] = ".weight.lora_a", b[] = ".weight.lora_b";
    size_t suffix = sizeof a - 1;
    if (name.len <= suffix) {
        return false;
    }
    size_t len = name.len - suffix;
    half->is_b = memcmp(name.at + len, b, suffix) == 0;
    if (!half->is_b && memcmp(name.at + len, a, suffix) != 0) {
        return false;
    }
    const char *at = name.at;
    bool is_layer = len > 4 && memcmp(at, "blk.", 4) == 0;
    if (is_layer) {
        size_t digits = slu_import_number(at + 4, len - 4, &half->layer);
        if (digits == 0 || 4 + digits >= len || at[4 + digits] != '.') {
            return false;
        }
        at += 4 + digits + 1;
        len -= 4 + digits + 1;
    }
    if (!slu_import_target(at, len, &half->target, &half->expert)) {
        return false;
    }
    return is_layer == (half->target < SLU_TARGET_EMBEDDING);
}

static bool is_stack(const struct slu_import_half *half)
{
    return half->target >= SLU_TARGET_EXPERT_GATE && half->target <= SLU_TARGET_EXPERT_DOWN &&
           half->expert == SLU_IMPORT_NO_EXPERT;
}

static int read_tensor(const struct slu_gguf_tensor *tensor, struct slu_source *source,
                       struct slu_import_half *half, struct slu_err *err)
{
    const char *file = source->name;
    half->name = slu_printable(tensor->name.at, tensor->name.len);
    half->expert = SLU_IMPORT_NO_EXPERT;
    if (!parse_name(tensor->name, half)) {
        return slu_err_set(err, SLU_EUNSUP, "%s: tensor %s is not supported in an adapter", file,
                           half->name.text);
    }
    const struct slu_fmt *fmt = NULL;
    if (slu_planes_fmt(tensor->type, &fmt, NULL) < 0 || fmt->scale != SLU_SCALE_NONE) {
        const char *type = slu_ggml_type_name(tensor->type);
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: tensor %s is of type %s; adapters may be F32, F16 or BF16", file,
                           half->name.text, type ? type : "unknown");
    }
    const uint64_t *dims = tensor->dims;
    bool is_flat = dims[3] == 1 && (dims[2] == 1 || is_stack(half));
    if (!is_flat || dims[0] > 1u << 24 || dims[1] > 1u << 24 || dims[2] > 1u << 16) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: tensor %s has dimensions %llu x %llu x %llu x %llu, which don't "
                           "fit its name",
                           file, half->name.text, (unsigned long long)dims[0],
                           (unsigned long long)dims[1], (unsigned long long)dims[2],
                           (unsigned long long)dims[3]);
    }
    /* The embedding's A is looked up by token, so GGUF has a row for each. */
    bool is_transposed = half->target == SLU_TARGET_EMBEDDING && !half->is_b;
    half->matrix = (struct slu_import_matrix){
        .source = source,
        .offset = tensor->offset,
        .fmt = fmt->id,
        .rows = (uint32_t)dims[is_transposed ? 0 : 1],
        .cols = (uint32_t)dims[is_transposed ? 1 : 0],
        .n = (uint32_t)dims[2],
        .is_transposed = is_transposed,
    };
    return 0;
}

int slu_import_gguf(struct slu_source *source, struct slu_import *import, struct slu_err *err)
{
    struct slu_gguf *gguf;
    double alpha = 0;
    int rc = slu_gguf_open(source, &gguf, err);
    if (rc < 0) {
        return rc;
    }
    rc = read_keys(gguf, source->name, import, &alpha, err);
    for (uint64_t i = 0; i < gguf->n_tensors && rc == 0; i++) {
        struct slu_import_half half = {0};
        rc = read_tensor(&gguf->tensors[i], source, &half, err);
        if (rc == 0) {
            /* Of a B the columns are the rank, and of an A the rows: both say the same. */
            uint32_t rank = half.is_b ? half.matrix.cols : half.matrix.rows;
            half.scale = alpha != 0 ? alpha / rank : 1;
            rc = slu_import_add(import, &half, err);
        }
    }
    slu_gguf_close(gguf);
    return rc;
}
