/* Importing what can't be imported: one sentence that says what, and no file. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "make.h"
#include "tools/gguf_writer.h"
#include "tools/peft.h"

static int import(const struct lab *lab, const char *in, struct slu_err *err)
{
    struct slu_adapter_info info;
    struct slu_adapter_import_params params = {.in = in, .out = lab_path(lab, "out.sla")};
    *err = (struct slu_err){0};
    int rc = slu_adapter_import(&params, &info, err);
    cr_assert_eq(access(lab_path(lab, "out.sla"), F_OK), rc == 0 ? 0 : -1);
    if (rc == 0) {
        remove(params.out);
    }
    return rc;
}

/* ---- PEFT -------------------------------------------------------------------------------- */

#define L0    "base_model.model.model.layers.0."
#define Q     L0 "self_attn.q_proj"
#define PLAIN "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4}"

/* Settings that change results are refused by name; those that don't are taken. */
Test(adapter_import_bad, settings)
{
    static const struct {
        const char *settings;
        int code;
        const char *words;
    } cases[] = {
        {"\"use_dora\":true", SLU_EUNSUP, "DoRA"},
        {"\"modules_to_save\":[\"lm_head\"]", SLU_EUNSUP, "modules_to_save"},
        {"\"layer_replication\":[[0,4],[2,5]]", SLU_EUNSUP, "layer_replication"},
        {"\"lora_bias\":true", SLU_EUNSUP, "lora_bias"},
        {"\"bias\":\"all\"", SLU_EUNSUP, "bias other than"},
        {"\"fan_in_fan_out\":true", SLU_EUNSUP, "fan_in_fan_out"},
        {"\"target_parameters\":[\"mlp.experts.gate_up_proj\"]", SLU_EUNSUP, "target_parameters"},
        {"\"trainable_token_indices\":[1]", SLU_EUNSUP, "trainable_token_indices"},
        {"\"alora_invocation_tokens\":[1]", SLU_EUNSUP, "activated LoRA"},
        {"\"use_qalora\":true", SLU_EUNSUP, "use_qalora"},
        {"\"megatron_config\":{\"a\":1}", SLU_EUNSUP, "megatron_config"},
        {"\"some_new_thing\":3", SLU_EUNSUP, "some_new_thing"},
        {"\"init_lora_weights\":\"pissa_niter_4\"", SLU_EUNSUP, "pissa_niter_4"},
        {"\"init_lora_weights\":\"loftq\"", SLU_EUNSUP, "loftq"},
        {"\"target_modules\":3", SLU_EFORMAT, "target_modules"},
        {"\"target_modules\":[\"k_proj\",\"_proj\"]", SLU_EFORMAT, "doesn't name that module"},
        {"\"rank_pattern\":[1]", SLU_EFORMAT, "rank_pattern is no object"},
        {"\"rank_pattern\":{\"q_proj\":3}", SLU_EFORMAT, "says 3"},
        {"\"rank_pattern\":{\"q_proj\":0}", SLU_EFORMAT, "q_proj is missing or not a number"},
        {"\"alpha_pattern\":{\"q_proj\":\"4\"}", SLU_EFORMAT, "q_proj is missing or not"},
        {"\"alpha_pattern\":{\"(q_proj\":4}", SLU_EUNSUP, "can't be read as an expression"},
        {"\"alpha_pattern\":{\"(.+)+(.+)+[A-Z]\":4}", SLU_EUNSUP, "too long"},
        {"\"use_rslora\":3", SLU_EFORMAT, "use_rslora"},
        {"\"r\":2", SLU_EFORMAT, "no JSON object"}, /* twice */
        {"\"use_dora\":false,\"modules_to_save\":null,\"layer_replication\":[],\"bias\":\"none\","
         "\"loftq_config\":{},\"init_lora_weights\":true,\"inference_mode\":true,"
         "\"peft_version\":\"0.18.0\",\"lora_dropout\":0.05,\"layers_to_transform\":[0,1],"
         "\"qalora_group_size\":16,\"megatron_core\":\"megatron.core\",\"some_new_thing\":false,"
         "\"target_modules\":\".*q_proj\",\"base_model_name_or_path\":\"x/y\"",
         0, ""},
    };
    const struct lab_tensor tensors[] = {{Q ".lora_A.weight", "F32", 2, 8, 1, 0},
                                         {Q ".lora_B.weight", "F32", 8, 2, 1, 0}};
    struct lab lab;
    struct slu_err err;
    lab_open(&lab);
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        char config[700];
        snprintf(config, sizeof config, "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,%s}",
                 cases[i].settings);
        lab_peft(lab_path(&lab, "p"), config, tensors, 2);
        int rc = import(&lab, lab_path(&lab, "p"), &err);
        if (cases[i].code == 0) {
            cr_assert_eq(rc, 0, "%s", err.text);
            continue;
        }
        lab_expect_refusal(rc, &err, cases[i].code, cases[i].words);
        cr_assert(strstr(err.text, "adapter_config.json"), "%s", err.text);
    }
    static const struct {
        const char *config;
        int code;
        const char *words;
    } whole[] = {
        {"{\"peft_type\":\"LOKR\",\"r\":2,\"alpha\":4}", SLU_EUNSUP, "LOKR"},
        {"{\"r\":2,\"lora_alpha\":4}", SLU_EUNSUP, "(none)"},
        {"{\"peft_type\":\"LORA\",\"lora_alpha\":4}", SLU_EFORMAT, "r is missing"},
        {"{\"peft_type\":\"LORA\",\"r\":2.5,\"lora_alpha\":4}", SLU_EFORMAT, "r is missing or not"},
        {"{\"peft_type\":\"LORA\",\"r\":2}", SLU_EFORMAT, "lora_alpha is missing"},
        {"{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":1e999}", SLU_EFORMAT, "no JSON object"},
        {"[]", SLU_EFORMAT, "no JSON object"},
        {"{", SLU_EFORMAT, "no JSON object"},
        {"", SLU_EFORMAT, "no JSON object"},
    };
    for (unsigned i = 0; i < sizeof whole / sizeof *whole; i++) {
        lab_peft(lab_path(&lab, "p"), whole[i].config, tensors, 2);
        lab_expect_refusal(import(&lab, lab_path(&lab, "p"), &err), &err, whole[i].code,
                           whole[i].words);
    }
    lab_close(&lab);
}

/* {"peft_type":"LORA",...,"alpha_pattern":{PATTERN with each number up to n: 1}}, to be freed. */
static char *config_of_patterns(const char *pattern, unsigned n)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *file = open_memstream(&text, &bytes);
    fprintf(file, "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,\"alpha_pattern\":{");
    for (unsigned i = 0; i < n; i++) {
        fprintf(file, "%s\"%s%u\":1", i ? "," : "", pattern, i);
    }
    fprintf(file, "}}");
    fclose(file);
    return text;
}

/* Patterns that each stay within bounds, but not together: refused for their time and memory. */
Test(adapter_import_bad, patterns_together)
{
    static const char module[] = "model.layers.0.self_attn.q_proj";
    struct slu_peft *peft = NULL;
    struct slu_err err = {0};
    uint32_t rank;
    double scale;
    char *text = config_of_patterns("(a|b){500}", 5000);
    int rc = slu_peft_open(text, strlen(text), "config", &peft, &err);
    lab_expect_refusal(rc, &err, SLU_EUNSUP, "take too much memory");
    free(text);
    text = config_of_patterns(".*.*.*[QZ]{2}", 10000);
    cr_assert_eq(slu_peft_open(text, strlen(text), "config", &peft, &err), 0, "%s", err.text);
    rc = 0;
    for (unsigned i = 0; i < 10 && rc == 0; i++) {
        rc = slu_peft_module(peft, module, strlen(module), &rank, &scale, &err);
    }
    lab_expect_refusal(rc, &err, SLU_EUNSUP, "takes too long");
    slu_peft_close(peft);
    free(text);
}

/* Tensors that are no half of a supported pair are refused by name, and so are halves alone. */
Test(adapter_import_bad, tensors)
{
    static const struct {
        const char *name; /* of a tensor beside a good pair */
        int code;
        const char *words;
    } cases[] = {
        {Q ".lora_magnitude_vector", SLU_EUNSUP, "DoRA"},
        {Q ".lora_B.bias", SLU_EUNSUP, "lora_bias"},
        {"base_model.model.lm_head.modules_to_save.weight", SLU_EUNSUP, "modules_to_save"},
        {"base_model.model.lm_head.weight", SLU_EUNSUP, "whole matrix"},
        {"base_model.model.model.embed_tokens.base_layer.weight", SLU_EUNSUP,
         "save_embedding_layers=False"},
        {"base_model.model.model.embed_tokens.lora_A.weight", SLU_EUNSUP, "embed_tokens"},
        {Q ".lokr_w1", SLU_EUNSUP, "lokr_w1 is not supported"},
        {Q ".hada_w1_a", SLU_EUNSUP, "hada_w1_a is not supported"},
        {Q ".lora_A.x.y.weight", SLU_EUNSUP, "not supported"},
        {Q ".lora_A", SLU_EUNSUP, "not supported"},
        {L0 "self_attn.q_norm.lora_A.weight", SLU_EUNSUP, "self_attn.q_norm are not supported"},
        {L0 "mlp.experts.gate_up_proj.lora_A.weight", SLU_EUNSUP, "fused"},
        {L0 "mlp.experts.base_layer.lora_A.weight", SLU_EUNSUP, "fused"},
        {L0 "block_sparse_moe.input_linear.lora_A.weight", SLU_EUNSUP, "fused"},
        {L0 "block_sparse_moe.output_linear.lora_A.weight", SLU_EUNSUP, "fused"},
        {L0 "mlp.shared_expert_gate.lora_A.weight", SLU_EUNSUP, "takes no pair"},
        {L0 "mlp.experts.x.up_proj.lora_A.weight", SLU_EUNSUP, "not supported"},
        {L0 "mlp.experts.99999999999.up_proj.lora_A.weight", SLU_EUNSUP, "not supported"},
        {L0 "mlp.experts.2000.up_proj.lora_A.weight", SLU_EFORMAT,
         "an expert that the model lacks"},
        {"base_model.model.model.layers..self_attn.q_proj.lora_A.weight", SLU_EUNSUP, "not supp"},
        {"base_model.model.model.layers.000000.self_attn.q_proj.lora_A.weight", SLU_EUNSUP,
         "not supp"},
        {"base_model.model.model.layers.0self_attn.q_proj.lora_A.weight", SLU_EUNSUP, "not supp"},
        {L0 "self_attn.k_proj.lora_A.weight", SLU_EFORMAT, "has no B beside it"},
        {Q ".lora_A.other.weight", SLU_EFORMAT, "are for the same matrix"},
        {"x\\u001b[31m", SLU_EUNSUP, "x?[31m is not supported"},
    };
    struct lab lab;
    struct slu_err err;
    lab_open(&lab);
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct lab_tensor tensors[] = {{Q ".lora_A.weight", "F32", 2, 8, 1, 0},
                                             {Q ".lora_B.weight", "F32", 8, 2, 1, 0},
                                             {cases[i].name, "F32", 2, 8, 1, 0}};
        lab_peft(lab_path(&lab, "p"), PLAIN, tensors, 3);
        lab_expect_refusal(import(&lab, lab_path(&lab, "p"), &err), &err, cases[i].code,
                           cases[i].words);
    }
    lab_close(&lab);
}

/* Pairs whose halves don't fit, types that aren't floats, numbers that aren't finite. */
Test(adapter_import_bad, pairs)
{
    static const struct {
        struct lab_tensor a, b;
        int code;
        const char *words;
    } cases[] = {
        {{0, "I32", 2, 8, 0, 0}, {0, "F32", 8, 2, 1, 0}, SLU_EUNSUP, "type I32"},
        {{0, "F32", 3, 8, 0, 0}, {0, "F32", 8, 2, 1, 0}, SLU_EFORMAT, "has rank 3"},
        {{0, "F32", 2, 8, 0, 0}, {0, "F32", 8, 3, 1, 0}, SLU_EFORMAT, "has rank 3"},
        {{0, "F32", 2, 0, 0, 0}, {0, "F32", 8, 2, 1, 0}, SLU_EFORMAT, "a size that can't be"},
        {{0, "F32", 2, 8, NAN, 0}, {0, "F32", 8, 2, 1, 0}, SLU_EFORMAT, "lora_A.weight holds inf"},
        {{0, "F32", 2, 8, 0, 0}, {0, "F16", 8, 2, 65504, 9e9f}, SLU_EFORMAT, "lora_B.weight holds"},
        {{0, "BF16", 2, 8, INFINITY, 0}, {0, "F32", 8, 2, 1, 0}, SLU_EFORMAT, "infinities or NaNs"},
    };
    struct lab lab;
    struct slu_err err;
    lab_open(&lab);
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct lab_tensor tensors[] = {cases[i].a, cases[i].b};
        tensors[0].name = Q ".lora_A.weight";
        tensors[1].name = Q ".lora_B.weight";
        lab_peft(lab_path(&lab, "p"), PLAIN, tensors, 2);
        lab_expect_refusal(import(&lab, lab_path(&lab, "p"), &err), &err, cases[i].code,
                           cases[i].words);
    }
    /* A rank beyond reason. */
    const struct lab_tensor large[] = {{Q ".lora_A.weight", "F16", 4097, 1, 0, 0},
                                       {Q ".lora_B.weight", "F16", 1, 4097, 0, 0}};
    lab_peft(lab_path(&lab, "p"), "{\"peft_type\":\"LORA\",\"r\":4097,\"lora_alpha\":4}", large, 2);
    lab_expect_refusal(import(&lab, lab_path(&lab, "p"), &err), &err, SLU_EUNSUP, "rank 4097");
    lab_close(&lab);
}

/* Headers of safetensors that lie. */
Test(adapter_import_bad, safetensors)
{
#define T(type, shape, offsets)                                                                    \
    "{\"" Q ".lora_A.weight\":{\"dtype\":\"" type "\",\"shape\":" shape                            \
    ",\"data_offsets\":" offsets "}}"
    static const struct {
        const char *header;
        uint64_t claimed_bytes; /* 0: as it is */
        size_t data_bytes;
        const char *words;
    } cases[] = {
        {"{}", UINT64_MAX, 0, "claims a header"},
        {"{}", 1u << 20, 0, "claims a header"},
        {"{}", 1, 0, "claims a header"},
        {"{}", 0, 0, "no LoRA matrices"},
        {"{}", 0, 8, "belong to none"},
        {"[]", 0, 0, "no JSON object"},
        {"{\"a\":", 0, 0, "no JSON object"},
        {"{\"a\":1}", 0, 0, "has no dtype"},
        {"{\"a\":{},\"a\":{}}", 0, 0, "no JSON object"},
        {T("F33", "[2,8]", "[0,64]"), 0, 64, "unknown type F33"},
        {T("F32", "8", "[0,64]"), 0, 64, "no shape"},
        {T("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 0, 4, "too many dimensions"},
        {T("F32", "[-2,-8]", "[0,64]"), 0, 64, "a shape that can't be"},
        {T("F32", "[4294967296,4294967296,16]", "[0,64]"), 0, 64, "a shape that can't be"},
        {T("F32", "[2,8]", "[0]"), 0, 64, "offsets that don't lie"},
        {T("F32", "[2,8]", "[64,0]"), 0, 64, "offsets that don't lie"},
        {T("F32", "[2,8]", "[0,65]"), 0, 64, "offsets that don't lie"},
        {T("F32", "[2,8]", "[0,1e3]"), 0, 64, "offsets that don't lie"},
        {T("F16", "[2,8]", "[0,64]"), 0, 64, "don't make its number of bytes"},
        {T("F32", "[2,8]", "[8,72]"), 0, 72, "bytes of nobody's"},
        {T("F32", "[2,8]", "[0,64]"), 0, 72, "belong to none"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\","
         "\"shape\":[4],\"data_offsets\":[2,6]}}",
         0, 6, "overlaps another"},
        {T("F32", "[2,4,2]", "[0,64]"), 0, 64, "a matrix is expected"},
    };
    struct lab lab;
    struct slu_err err;
    lab_open(&lab);
    lab_peft(lab_path(&lab, "p"), PLAIN, NULL, 0);
    char path[160];
    snprintf(path, sizeof path, "%s/p/adapter_model.safetensors", lab.dir);
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t length = cases[i].claimed_bytes ? cases[i].claimed_bytes : strlen(cases[i].header);
        lab_safetensors(path, length, cases[i].header, cases[i].data_bytes);
        int rc = import(&lab, path, &err);
        lab_expect_refusal(rc, &err, rc == SLU_EUNSUP ? SLU_EUNSUP : SLU_EFORMAT, cases[i].words);
    }
    lab_write(path, "abc", 3);
    lab_expect_refusal(import(&lab, path, &err), &err, SLU_EFORMAT, "too short");
    lab_close(&lab);
}

/* Folders and files that aren't adapters. */
Test(adapter_import_bad, places)
{
    struct lab lab;
    struct slu_err err;
    lab_open(&lab);
    lab_expect_refusal(import(&lab, lab_path(&lab, "none"), &err), &err, SLU_ENOENT, "none");
    lab_expect_refusal(import(&lab, lab.dir, &err), &err, SLU_ENOENT, "adapter_model.safetensors");
    lab_write(lab_path(&lab, "adapter_model.bin"), "x", 1);
    lab_expect_refusal(import(&lab, lab.dir, &err), &err, SLU_EUNSUP, "pickles");
    lab_expect_refusal(import(&lab, lab_path(&lab, "adapter_model.bin"), &err), &err, SLU_EUNSUP,
                       "neither a folder nor");
    lab_peft(lab_path(&lab, "p"), NULL, NULL, 0);
    lab_expect_refusal(import(&lab, lab_path(&lab, "p"), &err), &err, SLU_ENOENT,
                       "adapter_config.json");
    lab_close(&lab);
}

/* ---- GGUF -------------------------------------------------------------------------------- */

struct gguf_case {
    const char *type, *adapter;    /* general.type and adapter.type */
    const char *a, *b;             /* names of the two tensors */
    uint32_t ggml_type;            /* of A */
    uint64_t a_dims[3], b_dims[3]; /* 0: not there */
    float first;                   /* number of A */
    int code;
    const char *words;
};

static void write_gguf(const char *path, const struct gguf_case *c)
{
    struct slu_gguf_writer *writer;
    struct slu_err err = {0};
    static const float zeros[4096];
    cr_assert_eq(slu_gguf_writer_create(path, &writer, &err), 0, "%s", err.text);
    slu_gguf_writer_str(writer, "general.architecture", "olmoe");
    slu_gguf_writer_str(writer, "general.type", c->type);
    slu_gguf_writer_str(writer, "adapter.type", c->adapter);
    uint64_t bytes[2];
    for (unsigned i = 0; i < 2 && (i == 0 || c->b); i++) {
        const uint64_t *dims = i ? c->b_dims : c->a_dims;
        uint32_t n_dims = dims[2] ? 3 : 2;
        bytes[i] = dims[0] * dims[1] * (dims[2] ? dims[2] : 1) * 4;
        if (i == 0 && c->ggml_type == 8) {
            bytes[i] = bytes[i] / 4 / 32 * 34;
        }
        slu_gguf_writer_tensor(writer, i ? c->b : c->a, i ? 0 : c->ggml_type, n_dims, dims,
                               bytes[i]);
    }
    cr_assert_eq(slu_gguf_writer_begin(writer, &err), 0);
    slu_gguf_writer_data(writer, &c->first, 4, &err);
    slu_gguf_writer_data(writer, zeros, bytes[0] - 4, &err);
    if (c->b) {
        slu_gguf_writer_data(writer, zeros, bytes[1], &err);
    }
    cr_assert_eq(slu_gguf_writer_finish(writer, &err), 0);
    slu_gguf_writer_destroy(writer);
}

/* GGUF files that are no LoRA, or hold what isn't supported. */
Test(adapter_import_bad, gguf)
{
#define QA "blk.0.attn_q.weight.lora_a"
#define QB "blk.0.attn_q.weight.lora_b"
    static const struct gguf_case cases[] = {
        {"model", "lora", QA, QB, 0, {32, 2}, {2, 8}, 0, SLU_EUNSUP, "general.type is 'model'"},
        {"adapter", "vec", QA, QB, 0, {32, 2}, {2, 8}, 0, SLU_EUNSUP, "type 'vec'"},
        {"adapter", "lora", QA, NULL, 0, {32, 2}, {0}, 0, SLU_EFORMAT, "has no B beside it"},
        {"adapter", "lora", QB, NULL, 0, {32, 2}, {0}, 0, SLU_EFORMAT, "has no A beside it"},
        {"adapter", "lora", QA, QB, 0, {32, 2}, {3, 8}, 0, SLU_EFORMAT, "make no pair"},
        {"adapter", "lora", QA, QB, 0, {32, 2, 2}, {2, 8, 2}, 0, SLU_EFORMAT, "don't fit its name"},
        {"adapter", "lora", QA, QB, 8, {32, 2}, {2, 8}, 0, SLU_EUNSUP, "type Q8_0"},
        {"adapter", "lora", QA, QB, 0, {32, 2}, {2, 8}, NAN, SLU_EFORMAT, "infinities or NaNs"},
        {"adapter",
         "lora",
         QA,
         "blk.0.attn_q.bias",
         0,
         {32, 2},
         {2, 8},
         0,
         SLU_EUNSUP,
         "blk.0.attn_q.bias is not supported"},
        {"adapter",
         "lora",
         "blk.0.attn_norm.weight.lora_a",
         NULL,
         0,
         {32, 2},
         {0},
         0,
         SLU_EUNSUP,
         "blk.0.attn_norm.weight.lora_a is not supported"},
        {"adapter",
         "lora",
         "blk.0.attn_k_b.weight.lora_a",
         NULL,
         0,
         {32, 2},
         {0},
         0,
         SLU_EUNSUP,
         "attn_k_b"},
        {"adapter",
         "lora",
         "blk.0.token_embd.weight.lora_a",
         NULL,
         0,
         {32, 2},
         {0},
         0,
         SLU_EUNSUP,
         "not supported"},
        {"adapter",
         "lora",
         "attn_q.weight.lora_a",
         NULL,
         0,
         {32, 2},
         {0},
         0,
         SLU_EUNSUP,
         "not supported"},
        {"adapter",
         "lora",
         "blk.x.attn_q.weight.lora_a",
         NULL,
         0,
         {32, 2},
         {0},
         0,
         SLU_EUNSUP,
         "not supported"},
        {"adapter",
         "lora",
         "blk.600.attn_q.weight.lora_a",
         "blk.600.attn_q.weight.lora_b",
         0,
         {32, 2},
         {2, 8},
         0,
         SLU_EUNSUP,
         "below 512"},
        {"adapter",
         "lora",
         "blk.0.ffn_up_exps.weight.lora_a",
         "blk.0.ffn_up_exps.weight.lora_b",
         0,
         {32, 2, 3},
         {2, 8, 2},
         0,
         SLU_EFORMAT,
         "make no pair"},
        {"adapter", "lora", QA, QB, 0, {32, 2}, {2, 8}, 0, 0, ""},
    };
    struct lab lab;
    struct slu_err err;
    lab_open(&lab);
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_gguf(lab_path(&lab, "a.gguf"), &cases[i]);
        int rc = import(&lab, lab_path(&lab, "a.gguf"), &err);
        if (cases[i].code == 0) {
            cr_assert_eq(rc, 0, "%s", err.text);
        } else {
            lab_expect_refusal(rc, &err, cases[i].code, cases[i].words);
        }
    }
    lab_close(&lab);
}
