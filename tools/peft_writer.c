/*
 * A GGUF LoRA as a PEFT folder: the way back of lora_peft.c, by code of its own, so that each can
 * be tested with the other.
 */
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tools/adapter_base.h"
#include "tools/adapter_parts.h"
#include "tools/adapter_synth.h"

struct writer {
    const struct slu_adapter_base *base;
    const char *dir;
    struct slu_import import;
    FILE *file;
    json_t *header, *config, *ranks;
    uint32_t rank; /* of the first pair */
    double alpha;
    uint64_t offset;
};

static int system_error(const struct writer *w, const char *doing, struct slu_err *err)
{
    return slu_err_set(err, SLU_EIO, "%s: %s failed: %s", w->dir, doing, strerror(errno));
}

/* The module as the base's own code calls it. */
static void module_name(enum slu_arch arch, const struct slu_import_half *half, uint32_t expert,
                        char *out, size_t bytes)
{
    static const char *const attention[] = {
        "q_proj",   "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa",
        "kv_b_proj"};
    static const char *const parts[] = {"gate_proj", "up_proj", "down_proj"};
    static const char *const mixtral[] = {"w1", "w3", "w2"};
    bool is_mixtral = arch == SLU_ARCH_LLAMA || arch == SLU_ARCH_GRANITEMOE;
    unsigned t = half->target, l = half->layer;
    if (t <= SLU_TARGET_KV_B) {
        snprintf(out, bytes, "model.layers.%u.self_attn.%s", l, attention[t]);
    } else if (t == SLU_TARGET_ROUTER) {
        snprintf(out, bytes, "model.layers.%u.%s", l,
                 arch == SLU_ARCH_LLAMA        ? "block_sparse_moe.gate"
                 : arch == SLU_ARCH_GRANITEMOE ? "block_sparse_moe.router.layer"
                 : arch == SLU_ARCH_GPT_OSS    ? "mlp.router"
                                               : "mlp.gate");
    } else if (t <= SLU_TARGET_FFN_DOWN) {
        snprintf(out, bytes, "model.layers.%u.mlp.%s", l, parts[t - SLU_TARGET_FFN_GATE]);
    } else if (t <= SLU_TARGET_SHARED_DOWN) {
        snprintf(out, bytes, "model.layers.%u.mlp.shared_expert%s.%s", l,
                 arch == SLU_ARCH_DEEPSEEK2 ? "s" : "", parts[t - SLU_TARGET_SHARED_GATE]);
    } else if (t <= SLU_TARGET_EXPERT_DOWN) {
        unsigned part = t - SLU_TARGET_EXPERT_GATE;
        snprintf(out, bytes, "model.layers.%u.%s.experts.%u.%s", l,
                 is_mixtral ? "block_sparse_moe" : "mlp", expert,
                 is_mixtral ? mixtral[part] : parts[part]);
    } else {
        snprintf(out, bytes, "%s", t == SLU_TARGET_HEAD ? "lm_head" : "model.embed_tokens");
    }
}

static void tensor_name(const struct slu_import_half *half, const char *module, char *out,
                        size_t bytes)
{
    bool is_embedding = half->target == SLU_TARGET_EMBEDDING;
    snprintf(out, bytes, "base_model.model.%s.lora_%s%c%s", module,
             is_embedding ? "embedding_" : "", half->is_b ? 'B' : 'A',
             is_embedding ? "" : ".weight");
}

/* Lists the tensors of a half, one for each of its experts. */
static void list_half(struct writer *w, const struct slu_import_half *half)
{
    const struct slu_import_matrix *m = &half->matrix;
    const struct slu_fmt *fmt = slu_fmt_get(m->fmt);
    uint64_t bytes = (uint64_t)m->rows * m->cols * (fmt->bits / 8u);
    uint32_t rank = half->is_b ? m->cols : m->rows;
    char module[128], name[192];
    for (uint32_t i = 0; i < m->n; i++) {
        uint32_t expert = half->expert == SLU_IMPORT_NO_EXPERT ? i : half->expert;
        module_name(w->base->config.arch, half, expert, module, sizeof module);
        tensor_name(half, module, name, sizeof name);
        json_object_set_new(w->header, name,
                            json_pack("{s:s, s:[I,I], s:[I,I]}", "dtype", fmt->name, "shape",
                                      (json_int_t)m->rows, (json_int_t)m->cols, "data_offsets",
                                      (json_int_t)w->offset, (json_int_t)(w->offset + bytes)));
        w->offset += bytes;
        if (rank != w->rank) {
            json_object_set_new(w->ranks, module, json_integer(rank));
        }
    }
    /* What PEFT calls targets are the last parts of names. */
    const char *dot = strrchr(module, '.');
    json_t *targets = json_object_get(w->config, "target_modules");
    const char *last = dot ? dot + 1 : module;
    for (size_t i = 0; i < json_array_size(targets); i++) {
        if (strcmp(json_string_value(json_array_get(targets, i)), last) == 0) {
            return;
        }
    }
    json_array_append_new(targets, json_string(last));
}

static int list_all(struct writer *w, struct slu_err *err)
{
    const struct slu_import_half *first = &w->import.halves[0];
    w->rank = first->matrix.rows; /* sorted: an A */
    w->alpha = first->scale * w->rank;
    w->header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    w->ranks = json_object();
    w->config =
        json_pack("{s:s, s:s, s:i, s:f, s:f, s:b, s:s, s:[], s:b, s:n, s:O}", "peft_type", "LORA",
                  "task_type", "CAUSAL_LM", "r", (int)w->rank, "lora_alpha", w->alpha,
                  "lora_dropout", 0.0, "use_rslora", 0, "bias", "none", "target_modules",
                  "use_dora", 0, "modules_to_save", "rank_pattern", w->ranks);
    if (!w->header || !w->config || !w->ranks) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", w->dir);
    }
    for (size_t i = 0; i < w->import.n_halves; i++) {
        list_half(w, &w->import.halves[i]);
    }
    return 0;
}

static int write_text(const struct writer *w, const char *name, const json_t *json,
                      struct slu_err *err)
{
    char *path;
    if (asprintf(&path, "%s/%s", w->dir, name) < 0) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", w->dir);
    }
    int rc = json_dump_file(json, path, JSON_INDENT(2));
    free(path);
    return rc == 0 ? 0 : system_error(w, "writing", err);
}

/* The length and the JSON, filled up with blanks to whole 8 bytes as is the custom. */
static int write_header(struct writer *w, struct slu_err *err)
{
    char *text = json_dumps(w->header, JSON_COMPACT);
    if (!text) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", w->dir);
    }
    size_t len = strlen(text), whole = (len + 7) / 8 * 8;
    uint8_t le[8];
    for (unsigned i = 0; i < 8; i++) {
        le[i] = (uint8_t)((uint64_t)whole >> (8 * i));
    }
    bool is_written = fwrite(le, 1, 8, w->file) == 8 && fwrite(text, 1, len, w->file) == len &&
                      fwrite("        ", 1, whole - len, w->file) == whole - len;
    free(text);
    return is_written ? 0 : system_error(w, "writing", err);
}

/* Row r of Hugging Face's order, in GGUF's: the halves of RoPE's pairs come one after another
 * there, side by side here. */
static uint32_t gguf_row(uint32_t r, uint32_t rows, uint32_t n_heads)
{
    if (n_heads == 0) {
        return r;
    }
    uint32_t width = rows / n_heads, in = r % width;
    return r - in + 2 * (in % (width / 2)) + in / (width / 2);
}

static int write_half(struct writer *w, const struct slu_import_half *half, struct slu_err *err)
{
    const struct slu_import_matrix *m = &half->matrix;
    struct slu_base base = slu_adapter_base_view(w->base);
    struct slu_target_shape shape = {0};
    base.shape(base.arg, half->target, half->layer, &shape);
    uint32_t heads = half->is_b ? shape.permute_heads : 0;
    size_t item = slu_fmt_get(m->fmt)->bits / 8u, bytes = item * m->rows * m->cols;
    uint8_t *data = malloc(bytes);
    int rc = data ? 0 : slu_err_set(err, SLU_ENOMEM, "%s: out of memory", w->dir);
    for (uint32_t i = 0; i < m->n && rc == 0; i++) {
        rc = m->source->read_at(m->source, m->offset + i * bytes, data, bytes, err);
        bool is_written = true;
        for (uint32_t r = 0; r < m->rows && rc == 0 && is_written; r++) {
            if (!m->is_transposed) {
                const uint8_t *row = data + (size_t)gguf_row(r, m->rows, heads) * m->cols * item;
                is_written = fwrite(row, item, m->cols, w->file) == m->cols;
                continue;
            }
            for (uint32_t c = 0; c < m->cols && is_written; c++) {
                is_written = fwrite(data + ((size_t)c * m->rows + r) * item, item, 1, w->file) == 1;
            }
        }
        rc = rc == 0 && !is_written ? system_error(w, "writing", err) : rc;
    }
    free(data);
    return rc;
}

static int write_weights(struct writer *w, struct slu_err *err)
{
    char *path;
    if (asprintf(&path, "%s/adapter_model.safetensors", w->dir) < 0) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", w->dir);
    }
    w->file = fopen(path, "wb");
    free(path);
    if (!w->file) {
        return system_error(w, "making its weights", err);
    }
    int rc = write_header(w, err);
    for (size_t i = 0; i < w->import.n_halves && rc == 0; i++) {
        rc = write_half(w, &w->import.halves[i], err);
    }
    if (fclose(w->file) != 0 && rc == 0) {
        rc = system_error(w, "writing", err);
    }
    return rc;
}

int slu_lora_gguf_to_peft(const char *gguf, const char *base_path, const char *dir,
                          struct slu_err *err)
{
    struct slu_adapter_base base;
    struct slu_source *source = NULL;
    struct writer w = {.base = &base, .dir = dir};
    int rc = slu_adapter_base_open(base_path, &base, err);
    rc = rc < 0 ? rc : slu_source_open_file(gguf, &source, err);
    rc = rc < 0 ? rc : slu_import_gguf(source, &w.import, err);
    if (rc == 0) {
        struct slu_base view = slu_adapter_base_view(&base);
        w.import.n_experts = base.config.n_experts;
        rc = slu_import_check(&w.import, &view, err);
    }
    if (rc == 0 && mkdir(dir, 0777) != 0 && errno != EEXIST) {
        rc = system_error(&w, "making the folder", err);
    }
    rc = rc < 0 ? rc : list_all(&w, err);
    rc = rc < 0 ? rc : write_text(&w, "adapter_config.json", w.config, err);
    rc = rc < 0 ? rc : write_weights(&w, err);
    json_decref(w.header);
    json_decref(w.config);
    json_decref(w.ranks);
    slu_import_finish(&w.import);
    slu_source_destroy(source);
    return rc;
}
