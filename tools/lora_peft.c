/*
 * The tensors of a PEFT adapter. Their names are those of Hugging Face's modules, which differ a
 * little from one architecture to the next but nowhere contradict each other; so the architecture
 * needn't be known.
 */
#include <string.h>

#include "tools/adapter_parts.h"
#include "tools/peft.h"
#include "tools/safetensors.h"

/* Modules behind "layers.N."; E stands for an expert's number. */
static const struct {
    const char *name;
    enum slu_target target;
} modules[] = {
    {"self_attn.q_proj", SLU_TARGET_Q},
    {"self_attn.k_proj", SLU_TARGET_K},
    {"self_attn.v_proj", SLU_TARGET_V},
    {"self_attn.o_proj", SLU_TARGET_OUT},
    {"self_attn.q_a_proj", SLU_TARGET_Q_A},
    {"self_attn.q_b_proj", SLU_TARGET_Q_B},
    {"self_attn.kv_a_proj_with_mqa", SLU_TARGET_KV_A},
    {"self_attn.kv_b_proj", SLU_TARGET_KV_B},
    {"mlp.gate", SLU_TARGET_ROUTER},
    {"mlp.router", SLU_TARGET_ROUTER},
    {"block_sparse_moe.gate", SLU_TARGET_ROUTER},
    {"block_sparse_moe.router.layer", SLU_TARGET_ROUTER},
    {"mlp.gate_proj", SLU_TARGET_FFN_GATE},
    {"mlp.up_proj", SLU_TARGET_FFN_UP},
    {"mlp.down_proj", SLU_TARGET_FFN_DOWN},
    {"mlp.shared_expert.gate_proj", SLU_TARGET_SHARED_GATE},
    {"mlp.shared_expert.up_proj", SLU_TARGET_SHARED_UP},
    {"mlp.shared_expert.down_proj", SLU_TARGET_SHARED_DOWN},
    {"mlp.shared_experts.gate_proj", SLU_TARGET_SHARED_GATE},
    {"mlp.shared_experts.up_proj", SLU_TARGET_SHARED_UP},
    {"mlp.shared_experts.down_proj", SLU_TARGET_SHARED_DOWN},
    {"mlp.experts.E.gate_proj", SLU_TARGET_EXPERT_GATE},
    {"mlp.experts.E.up_proj", SLU_TARGET_EXPERT_UP},
    {"mlp.experts.E.down_proj", SLU_TARGET_EXPERT_DOWN},
    {"block_sparse_moe.experts.E.w1", SLU_TARGET_EXPERT_GATE},
    {"block_sparse_moe.experts.E.w3", SLU_TARGET_EXPERT_UP},
    {"block_sparse_moe.experts.E.w2", SLU_TARGET_EXPERT_DOWN},
};

/* Modules known well enough to say why they are refused. */
static const struct {
    const char *name, *why;
} refused[] = {
    {"mlp.experts", "all experts are one fused parameter there, not a matrix for each"},
    {"mlp.experts.base_layer", "all experts are one fused parameter there, not a matrix for each"},
    {"mlp.experts.gate_up_proj", "gate and up of all experts are one fused parameter there"},
    {"mlp.experts.down_proj", "all experts are one fused parameter there, not a matrix for each"},
    {"block_sparse_moe.input_linear", "gate and up of all experts are one fused parameter there"},
    {"block_sparse_moe.output_linear",
     "all experts are one fused parameter there, not a matrix for each"},
    {"shared_mlp.input_linear", "gate and up of the shared expert are one fused matrix there"},
    {"shared_mlp.output_linear", "the shared expert's gate and up are fused there"},
    {"mlp.shared_expert_gate", "the gate of the shared expert is a vector that takes no pair"},
};

enum kind { KIND_A, KIND_B, KIND_OTHER };

/* A span of a tensor's name. */
struct span {
    const char *at;
    size_t len;
};

static bool skip(struct span *span, const char *prefix)
{
    size_t n = strlen(prefix);
    if (span->len < n || memcmp(span->at, prefix, n) != 0) {
        return false;
    }
    span->at += n;
    span->len -= n;
    return true;
}

static bool is(struct span span, const char *text)
{
    return span.len == strlen(text) && memcmp(span.at, text, span.len) == 0;
}

/* Does the name read as the template, whose E is a number? */
static bool fits(struct span name, const char *template, uint32_t *ret_expert)
{
    const char *hole = strstr(template, ".E.");
    if (!hole) {
        return is(name, template);
    }
    size_t head = (size_t)(hole - template) + 1;
    if (name.len < head || memcmp(name.at, template, head) != 0) {
        return false;
    }
    size_t digits = slu_import_number(name.at + head, name.len - head, ret_expert);
    struct span rest = {name.at + head + digits, name.len - head - digits};
    return digits > 0 && is(rest, hole + 2);
}

/* Cuts the name into module and what of a pair it is. */
static enum kind split(const char *name, struct span *ret_module, bool *ret_is_embedding)
{
    static const struct {
        const char *mark;
        enum kind kind;
        bool is_embedding;
    } marks[] = {{".lora_A", KIND_A, false},
                 {".lora_B", KIND_B, false},
                 {".lora_embedding_A", KIND_A, true},
                 {".lora_embedding_B", KIND_B, true}};
    for (unsigned i = 0; i < 4; i++) {
        const char *at = strstr(name, marks[i].mark);
        if (!at) {
            continue;
        }
        /* Behind the mark: ".weight" for matrices, with the adapter's name before it or not. */
        struct span tail = {at + strlen(marks[i].mark), strlen(at) - strlen(marks[i].mark)};
        const char *weight = ".weight";
        if (!marks[i].is_embedding) {
            if (tail.len < strlen(weight) ||
                memcmp(tail.at + tail.len - strlen(weight), weight, strlen(weight)) != 0) {
                return KIND_OTHER;
            }
            tail.len -= strlen(weight);
        }
        bool is_plain = tail.len == 0 || (tail.at[0] == '.' && tail.len > 1 &&
                                          !memchr(tail.at + 1, '.', tail.len - 1));
        *ret_module = (struct span){name, (size_t)(at - name)};
        *ret_is_embedding = marks[i].is_embedding;
        skip(ret_module, "base_model.model.");
        return is_plain ? marks[i].kind : KIND_OTHER;
    }
    return KIND_OTHER;
}

/* A tensor that is no half of a pair. */
static int refuse_tensor(const char *file, const char *name, struct slu_err *err)
{
    struct slu_printable shown = slu_printable(name, strlen(name));
    const char *why = "is not supported in an adapter";
    if (strstr(name, ".lora_magnitude_vector")) {
        why = "belongs to DoRA, which is not supported";
    } else if (strstr(name, ".lora_B") && strstr(name, ".bias")) {
        why = "is a bias of B (lora_bias), which is not supported";
    } else if (strstr(name, "modules_to_save")) {
        why = "is a whole matrix (modules_to_save), which is not supported";
    } else if (strstr(name, "embed_tokens.base_layer.") || strstr(name, "lm_head.base_layer.")) {
        why = "is the base's own matrix, saved beside its pair, which may differ from the base's; "
              "save the adapter with save_embedding_layers=False";
    } else if (!strstr(name, "lora_") && strstr(name, ".weight")) {
        why = "is a whole matrix in place of the base's, which is not supported";
    }
    return slu_err_set(err, SLU_EUNSUP, "%s: tensor %s %s", file, shown.text, why);
}

static int find_target(const char *file, struct span module, bool is_embedding,
                       struct slu_import_half *half, struct slu_err *err)
{
    struct span rest = module;
    skip(&rest, "model.");
    if (is_embedding != is(rest, "embed_tokens")) {
        return slu_err_set(err, SLU_EUNSUP, "%s: %s: only embed_tokens has an embedding's pair",
                           file, half->name.text);
    }
    if (is_embedding || is(rest, "lm_head")) {
        half->target = is_embedding ? SLU_TARGET_EMBEDDING : SLU_TARGET_HEAD;
        return 0;
    }
    size_t digits = 0;
    if (skip(&rest, "layers.")) {
        digits = slu_import_number(rest.at, rest.len, &half->layer);
        rest.at += digits;
        rest.len -= digits;
    }
    if (digits > 0 && skip(&rest, ".")) {
        for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
            if (fits(rest, modules[i].name, &half->expert)) {
                half->target = modules[i].target;
                return 0;
            }
        }
        for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
            if (is(rest, refused[i].name)) {
                return slu_err_set(err, SLU_EUNSUP, "%s: adapters of %s are not supported: %s",
                                   file, slu_printable(module.at, module.len).text, refused[i].why);
            }
        }
    }
    return slu_err_set(err, SLU_EUNSUP, "%s: adapters of module %s are not supported", file,
                       slu_printable(module.at, module.len).text);
}

static int read_matrix(const struct slu_safetensors_tensor *tensor, struct slu_source *source,
                       struct slu_import_half *half, struct slu_err *err)
{
    static const enum slu_fmt_id fmts[] = {SLU_FMT_F32, SLU_FMT_F16, SLU_FMT_BF16};
    unsigned fmt = 0;
    while (fmt < 3 && strcmp(tensor->dtype, slu_fmt_get(fmts[fmt])->name) != 0) {
        fmt++;
    }
    if (fmt == 3) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: tensor %s is of type %s; adapters may be F32, F16 or BF16",
                           source->name, half->name.text, tensor->dtype);
    }
    const uint64_t *dims = tensor->dims;
    if (tensor->n_dims != 2 || dims[0] == 0 || dims[1] == 0 || dims[0] > 1u << 24 ||
        dims[1] > 1u << 24) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: tensor %s has %u dimensions, or a size that "
                           "can't be; a matrix is expected",
                           source->name, half->name.text, tensor->n_dims);
    }
    half->matrix = (struct slu_import_matrix){
        .source = source,
        .offset = tensor->offset,
        .fmt = fmts[fmt],
        .rows = (uint32_t)dims[0],
        .cols = (uint32_t)dims[1],
        .n = 1,
    };
    return 0;
}

static int read_half(const struct slu_safetensors_tensor *tensor, struct slu_source *source,
                     const struct slu_peft *peft, struct slu_import *import, struct slu_err *err)
{
    struct span module = {0};
    bool is_embedding = false;
    enum kind kind = split(tensor->name, &module, &is_embedding);
    if (kind == KIND_OTHER) {
        return refuse_tensor(source->name, tensor->name, err);
    }
    struct slu_import_half half = {
        .name = slu_printable(tensor->name, strlen(tensor->name)),
        .expert = SLU_IMPORT_NO_EXPERT,
        .is_b = kind == KIND_B,
    };
    int rc = find_target(source->name, module, is_embedding, &half, err);
    rc = rc < 0 ? rc : read_matrix(tensor, source, &half, err);
    if (rc < 0) {
        return rc;
    }
    if (!slu_peft_has_module(peft, module.at, module.len)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: has %s, but target_modules of its adapter_config.json doesn't name "
                           "that module",
                           source->name, half.name.text);
    }
    uint32_t rank = 0;
    rc = slu_peft_module(peft, module.at, module.len, &rank, &half.scale, err);
    if (rc < 0) {
        return rc;
    }
    uint32_t has = half.is_b ? half.matrix.cols : half.matrix.rows;
    if (has != rank) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s has rank %u, but its adapter_config.json says %u", source->name,
                           half.name.text, has, rank);
    }
    return slu_import_add(import, &half, err);
}

int slu_import_peft(struct slu_source *source, const char *config, size_t config_len,
                    const char *config_name, struct slu_import *import, struct slu_err *err)
{
    struct slu_peft *peft = NULL;
    struct slu_safetensors file = {0};
    int rc = slu_peft_open(config, config_len, config_name, &peft, err);
    rc = rc < 0 ? rc : slu_safetensors_open(source, &file, err);
    for (size_t i = 0; i < file.n && rc == 0; i++) {
        rc = read_half(&file.tensors[i], source, peft, import, err);
    }
    import->info.is_hf_order = true;
    slu_safetensors_close(&file);
    slu_peft_close(peft);
    return rc;
}
