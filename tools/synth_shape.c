/* Shapes of generated models: those of two that exist, and any from JSON. */
#include <jansson.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "io/printable.h"
#include "tools/synth.h"

bool slu_synth_shape(const char *name, struct slu_synth_params *ret_params)
{
    static const struct slu_synth_params shapes[] = {
        {
            .name = "gpt-oss-20b",
            .arch = SLU_ARCH_GPT_OSS,
            .n_layers = 24,
            .n_ctx = 131072,
            .n_embd = 2880,
            .n_ff = 2880,
            .n_experts = 32,
            .n_used = 4,
            .n_heads = 64,
            .n_heads_kv = 8,
            .head_dim = 64,
            .window = 128,
            .n_vocab = 201088,
            .expert_type = "MXFP4",
            .dense_type = "Q8_0",
        },
        {
            .name = "qwen3-30b-a3b",
            .arch = SLU_ARCH_QWEN3MOE,
            .has_more_bits = true,
            .n_layers = 48,
            .n_ctx = 40960,
            .n_embd = 2048,
            .n_ff = 768,
            .n_experts = 128,
            .n_used = 8,
            .n_heads = 32,
            .n_heads_kv = 4,
            .head_dim = 128,
            .n_vocab = 151936,
            .expert_type = "Q4_K",
            .dense_type = "Q4_K",
        },
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        if (strcmp(shapes[i].name, name) == 0) {
            *ret_params = shapes[i];
            return true;
        }
    }
    return false;
}

bool slu_synth_arch(const char *name, struct slu_synth_params *params)
{
    /* The second names are those of published checkpoints' config.json. */
    static const struct {
        const char *name;
        enum slu_arch arch;
    } others[] = {
        {"deepseek2-lite", SLU_ARCH_DEEPSEEK2},
        {"deepseek_v2", SLU_ARCH_DEEPSEEK2},
        {"deepseek_v3", SLU_ARCH_DEEPSEEK2},
        {"gpt_oss", SLU_ARCH_GPT_OSS},
        {"qwen3_moe", SLU_ARCH_QWEN3MOE},
        {"qwen2_moe", SLU_ARCH_QWEN2MOE},
        {"mixtral", SLU_ARCH_LLAMA},
    };
    for (unsigned arch = 0; arch <= SLU_ARCH_DEEPSEEK2; arch++) {
        if (strcmp(name, slu_arch_name(arch)) == 0) {
            params->arch = arch;
            return true;
        }
    }
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        if (strcmp(name, others[i].name) == 0) {
            params->arch = others[i].arch;
            params->is_lite = i == 0;
            return true;
        }
    }
    return false;
}

enum member_type { MEMBER_COUNT, MEMBER_TEXT, MEMBER_FLAG, MEMBER_SEED, MEMBER_ARCH };

struct member {
    const char *name, *other; /* other: as config.json has it */
    enum member_type type;
    size_t offset; /* into struct slu_synth_params */
};

#define AT(field) offsetof(struct slu_synth_params, field)

static const struct member members[] = {
    {"arch", "model_type", MEMBER_ARCH, 0},
    {"name", NULL, MEMBER_TEXT, AT(name)},
    {"n_layers", "num_hidden_layers", MEMBER_COUNT, AT(n_layers)},
    {"n_ctx", "max_position_embeddings", MEMBER_COUNT, AT(n_ctx)},
    {"n_embd", "hidden_size", MEMBER_COUNT, AT(n_embd)},
    {"n_ff", "moe_intermediate_size", MEMBER_COUNT, AT(n_ff)},
    {"n_experts", "num_experts", MEMBER_COUNT, AT(n_experts)},
    {"n_used", "num_experts_per_tok", MEMBER_COUNT, AT(n_used)},
    {"n_heads", "num_attention_heads", MEMBER_COUNT, AT(n_heads)},
    {"n_heads_kv", "num_key_value_heads", MEMBER_COUNT, AT(n_heads_kv)},
    {"head_dim", NULL, MEMBER_COUNT, AT(head_dim)},
    {"window", "sliding_window", MEMBER_COUNT, AT(window)},
    {"n_vocab", "vocab_size", MEMBER_COUNT, AT(n_vocab)},
    {"expert_type", NULL, MEMBER_TEXT, AT(expert_type)},
    {"down_type", NULL, MEMBER_TEXT, AT(down_type)},
    {"dense_type", NULL, MEMBER_TEXT, AT(dense_type)},
    {"embd_type", NULL, MEMBER_TEXT, AT(embd_type)},
    {"vector_type", NULL, MEMBER_TEXT, AT(vector_type)},
    {"chat_template", NULL, MEMBER_TEXT, AT(chat_template)},
    {"has_more_bits", NULL, MEMBER_FLAG, AT(has_more_bits)},
    {"is_tied", "tie_word_embeddings", MEMBER_FLAG, AT(is_tied)},
    {"seed", NULL, MEMBER_SEED, AT(seed)},
    /* Some checkpoints call the same by other names. */
    {"num_local_experts", NULL, MEMBER_COUNT, AT(n_experts)},
    {"n_routed_experts", NULL, MEMBER_COUNT, AT(n_experts)},
    {"intermediate_size", NULL, MEMBER_COUNT, AT(n_ff)},
};

static const struct member *find_member(const char *name)
{
    for (size_t i = 0; i < sizeof members / sizeof *members; i++) {
        const struct member *m = &members[i];
        if (strcmp(name, m->name) == 0 || (m->other && strcmp(name, m->other) == 0)) {
            return m;
        }
    }
    return NULL;
}

static int take_member(const struct member *member, const json_t *value, const char *key,
                       struct slu_synth_params *params, struct slu_err *err)
{
    char *at = (char *)params + member->offset;
    json_int_t number = json_integer_value(value);
    const char *text = json_string_value(value);
    if (json_is_null(value) && strcmp(key, member->name) != 0) {
        return 0; /* config.json may say so of what a model lacks */
    }
    switch (member->type) {
    case MEMBER_COUNT:
        if (!json_is_integer(value) || number < 1 || number > 1 << 24) {
            return slu_err_set(err, SLU_EINVAL, "'%s' is not a number from 1 to 16777216", key);
        }
        *(uint32_t *)at = (uint32_t)number;
        return 0;
    case MEMBER_SEED:
        if (!json_is_integer(value) || number < 0) {
            return slu_err_set(err, SLU_EINVAL, "'%s' is not a whole number", key);
        }
        *(uint64_t *)at = (uint64_t)number;
        return 0;
    case MEMBER_FLAG:
        if (!json_is_boolean(value)) {
            return slu_err_set(err, SLU_EINVAL, "'%s' is neither true nor false", key);
        }
        *(bool *)at = json_is_true(value);
        return 0;
    case MEMBER_TEXT:
        if (!text) {
            return slu_err_set(err, SLU_EINVAL, "'%s' is not a string", key);
        }
        *(const char **)at = text;
        return 0;
    case MEMBER_ARCH:
        if (!text || !slu_synth_arch(text, params)) {
            return slu_err_set(err, SLU_EINVAL, "'%s' names no supported architecture: %s", key,
                               text ? slu_printable(text, strlen(text)).text : "not a string");
        }
        return 0;
    }
    return 0;
}

int slu_synth_shape_parse(const char *text, size_t len, struct slu_synth_params *ret_params,
                          void **ret_owned, struct slu_err *err)
{
    json_error_t error;
    json_t *object = json_loadb(text, len, JSON_REJECT_DUPLICATES, &error);
    struct slu_synth_params params = {0};
    int code = 0;
    if (!object || !json_is_object(object)) {
        code = slu_err_set(err, SLU_EINVAL, "line %d: %s", object ? 1 : error.line,
                           object ? "not a JSON object"
                                  : slu_printable(error.text, strlen(error.text)).text);
    }
    /* A checkpoint's config.json has members that don't matter here. */
    bool is_config = code == 0 && json_object_get(object, "model_type");
    if (code == 0 && !is_config && !json_object_get(object, "arch")) {
        code = slu_err_set(err, SLU_EINVAL, "'arch' is missing: the architecture's name");
    }
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value)
    {
        const struct member *member = find_member(key);
        bool is_other = strcmp(key, "intermediate_size") == 0 && is_config &&
                        json_object_get(object, "moe_intermediate_size");
        if (code == 0 && member && !is_other) {
            code = take_member(member, value, key, &params, err);
        } else if (code == 0 && !member && !is_config) {
            code = slu_err_set(err, SLU_EINVAL, "'%s' is no member of a shape",
                               slu_printable(key, strlen(key)).text);
        }
    }
    if (code < 0) {
        json_decref(object);
        return code;
    }
    *ret_params = params;
    *ret_owned = object;
    return 0;
}

void slu_synth_shape_free(void *owned)
{
    json_decref(owned);
}
