/* Adapters from GGUF and PEFT: both ways lead to the same adapter. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "make.h"
#include "../model/fixture.h"

/* For one model: all that can be adapted, in each number format, by both ways. */
static void both_ways(const struct slu_synth_params *model)
{
    static const enum slu_fmt_id fmts[] = {SLU_FMT_F32, SLU_FMT_F16, SLU_FMT_BF16};
    struct lab lab;
    lab_open(&lab);
    lab_model(&lab, model);
    struct slu_base base = slu_adapter_base_view(&lab.base);
    struct slu_ledger *ledger = slu_ledger_create(0);
    for (unsigned i = 0; i < 3; i++) {
        struct slu_adapter_synth_params params = {
            .rank = 3 + i, .targets = (1u << SLU_TARGETS) - 1, .fmt = fmts[i], .seed = i};
        /* gpt-oss and granitemoe have no matrices of single experts in PEFT, but this project's
         * writer and reader needn't know. */
        char from_gguf[96], from_peft[96];
        snprintf(from_gguf, sizeof from_gguf, "%s/g.sla", lab.dir);
        snprintf(from_peft, sizeof from_peft, "%s/p.sla", lab.dir);
        params.form = SLU_ADAPTER_GGUF;
        lab_adapter(&lab, &params, from_gguf);
        params.form = SLU_ADAPTER_PEFT;
        lab_adapter(&lab, &params, from_peft);
        struct slu_adapter *a = lab_load(from_gguf, &base, ledger);
        struct slu_adapter *b = lab_load(from_peft, &base, ledger);
        cr_assert(!a->info.is_hf_order && b->info.is_hf_order);
        cr_assert_str_eq(a->info.arch, base.arch);
        cr_assert_eq(a->loras[0].a.fmt->id, fmts[i]);
        cr_assert_eq(a->loras[0].scale, 2.0f);
        lab_expect_equal(a, b);
        slu_adapter_close(a);
        slu_adapter_close(b);
    }
    slu_ledger_destroy(ledger);
    lab_close(&lab);
}

/* The same numbers as GGUF and as PEFT make the same adapter, for every architecture. */
Test(adapter_import, both_ways)
{
    static const enum slu_arch archs[] = {SLU_ARCH_GPT_OSS,  SLU_ARCH_QWEN3MOE, SLU_ARCH_OLMOE,
                                          SLU_ARCH_LLAMA,    SLU_ARCH_QWEN2MOE, SLU_ARCH_GRANITEMOE,
                                          SLU_ARCH_DEEPSEEK2};
    for (unsigned i = 0; i < sizeof archs / sizeof *archs; i++) {
        both_ways(&(struct slu_synth_params){.arch = archs[i], .n_layers = 2, .n_experts = 4});
    }
    both_ways(&(struct slu_synth_params){.arch = SLU_ARCH_DEEPSEEK2, .is_lite = true});
}

/* Rows of q and k come out of Hugging Face's order as GGUF's converters put them. */
Test(adapter_import, permutation)
{
    struct lab lab;
    lab_open(&lab);
    lab_model(&lab, &(struct slu_synth_params){.arch = SLU_ARCH_LLAMA, .n_embd = 64, .n_heads = 4});
    const struct lab_tensor tensors[] = {
        {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", "F32", 1, 64, 0, 1},
        {"base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight", "F32", 64, 1, 0, 1},
        {"base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight", "F32", 1, 64, 0, 1},
        {"base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight", "F32", 32, 1, 0, 1},
    };
    lab_peft(lab_path(&lab, "peft"), "{\"peft_type\":\"LORA\",\"r\":1,\"lora_alpha\":3}", tensors,
             4);
    lab_import(lab_path(&lab, "peft"), lab_path(&lab, "a.sla"), NULL);
    struct slu_base base = slu_adapter_base_view(&lab.base);
    struct slu_ledger *ledger = slu_ledger_create(0);
    struct slu_adapter *adapter = lab_load(lab_path(&lab, "a.sla"), &base, ledger);
    const struct slu_lora *q = slu_adapter_find(adapter, 1, SLU_TARGET_Q);
    const struct slu_lora *v = slu_adapter_find(adapter, 1, SLU_TARGET_V);
    cr_assert(q && v && !slu_adapter_find(adapter, 0, SLU_TARGET_Q));
    cr_assert_eq(q->scale, 3.0f);
    for (uint32_t h = 0; h < 4; h++) {
        for (uint32_t i = 0; i < 8; i++) {
            const float *rows = (const float *)(const void *)q->b.data + 16 * h;
            cr_assert_eq(rows[2 * i], (float)(16 * h + i));
            cr_assert_eq(rows[2 * i + 1], (float)(16 * h + 8 + i));
        }
    }
    cr_assert_eq(((const float *)(const void *)v->b.data)[5], 5.0f);
    slu_adapter_close(adapter);
    slu_ledger_destroy(ledger);
    lab_close(&lab);
}

/* Every LoRA of the data folder imports and fits its model, and rewritten as a PEFT folder it makes
 * the same adapter. */
Test(adapter_import, golden)
{
    char folder[256], path[600], model[600];
    if (!fixture_data("golden/lora", folder, sizeof folder)) {
        cr_skip_test("no data");
    }
    struct lab lab;
    lab_open(&lab);
    struct slu_ledger *ledger = slu_ledger_create(0);
    DIR *dir = opendir(folder);
    unsigned n = 0;
    for (struct dirent *entry; (entry = readdir(dir));) {
        char *dash = strrchr(entry->d_name, '-');
        if (!dash) {
            continue;
        }
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        snprintf(model, sizeof model, "%s/../models/%.*s.gguf", folder, (int)(dash - entry->d_name),
                 entry->d_name);
        struct slu_err err = {0};
        struct slu_adapter_base opened;
        cr_assert_eq(slu_adapter_base_open(model, &opened, &err), 0, "%s", err.text);
        struct slu_base base = slu_adapter_base_view(&opened);
        struct slu_adapter_info info = lab_import(path, lab_path(&lab, "a.sla"), NULL);
        cr_assert_str_eq(info.name, "tiny random lora");
        cr_assert_eq(info.n_layers, 3);
        cr_assert(info.rank_min == 8 && info.rank_max == 8);
        cr_assert_eq(slu_lora_gguf_to_peft(path, model, lab_path(&lab, "peft"), &err), 0, "%s",
                     err.text);
        lab_import(lab_path(&lab, "peft"), lab_path(&lab, "b.sla"), NULL);
        struct slu_adapter *a = lab_load(lab_path(&lab, "a.sla"), &base, ledger);
        struct slu_adapter *b = lab_load(lab_path(&lab, "b.sla"), &base, ledger);
        cr_assert_eq(a->loras[0].scale, 1.0f);
        lab_expect_equal(a, b);
        slu_adapter_close(a);
        slu_adapter_close(b);
        n++;
    }
    closedir(dir);
    cr_assert_gt(n, 0);
    slu_ledger_destroy(ledger);
    lab_close(&lab);
}

/* Bound to a pack: another one is refused by its fingerprint, and what doesn't fit by its shape. */
Test(adapter_import, bound_to_base)
{
    struct fixture f;
    struct lab lab;
    fixture_open(&f);
    lab_open(&lab);
    struct slu_synth_params model = {.arch = SLU_ARCH_QWEN3MOE, .n_experts = 4};
    fixture_synth(&f, &model, SLU_CODEC_ZSTD, 0);
    lab_model(&lab, &model);
    struct slu_adapter_synth_params params = {.base = lab.model};
    struct slu_err err = {0};
    cr_assert_eq(slu_adapter_synth_write(lab_path(&lab, "a.gguf"), &params, &err), 0);
    struct slu_adapter_info info =
        lab_import(lab_path(&lab, "a.gguf"), lab_path(&lab, "a.sla"), f.slu);
    struct slu_adapter_base pack;
    cr_assert_eq(slu_adapter_base_open(f.slu, &pack, &err), 0, "%s", err.text);
    cr_assert(pack.fingerprint && info.base_fingerprint == pack.fingerprint);
    struct slu_base base = slu_adapter_base_view(&pack);
    struct slu_ledger *ledger = slu_ledger_create(0);
    struct slu_adapter *adapter = lab_load(lab_path(&lab, "a.sla"), &base, ledger);
    slu_adapter_close(adapter);
    base.fingerprint++;
    int rc = lab_try(lab_path(&lab, "a.sla"), &base, ledger, &adapter, &err);
    lab_expect_refusal(rc, &err, SLU_EUNSUP, "fingerprint");

    struct slu_adapter_import_params import = {
        .in = lab_path(&lab, "a.gguf"), .out = lab_path(&lab, "no.sla"), .base = lab.model};
    rc = slu_adapter_import(&import, &info, &err);
    lab_expect_refusal(rc, &err, SLU_EUNSUP, "is no pack");
    model.n_embd = 128;
    fixture_synth(&f, &model, SLU_CODEC_ZSTD, 0);
    import.base = f.slu;
    rc = slu_adapter_import(&import, &info, &err);
    lab_expect_refusal(rc, &err, SLU_EFORMAT, "but the base has");
    model = (struct slu_synth_params){.arch = SLU_ARCH_OLMOE};
    fixture_synth(&f, &model, SLU_CODEC_ZSTD, 0);
    rc = slu_adapter_import(&import, &info, &err);
    lab_expect_refusal(rc, &err, SLU_EUNSUP, "was made for qwen3moe");
    cr_assert_eq(access(import.out, F_OK), -1);
    slu_ledger_destroy(ledger);
    lab_close(&lab);
    fixture_close(&f);
}

#define Q0   "base_model.model.model.layers.0.self_attn.q_proj"
#define E(e) "base_model.model.model.layers.0.mlp.experts." e ".gate_proj"

/* Scale: alpha / r, or alpha / sqrt(r); patterns take the place of either, the first that fits. */
Test(adapter_import, scales)
{
    static const struct {
        const char *settings;
        double scale;
    } cases[] = {
        {"\"r\":4,\"lora_alpha\":6", 1.5},
        {"\"r\":4,\"lora_alpha\":6,\"use_rslora\":true", 3},
        {"\"r\":8,\"lora_alpha\":6,\"rank_pattern\":{\"q_proj\":4}", 1.5},
        {"\"r\":8,\"lora_alpha\":6,\"rank_pattern\":{\"k_proj\":5,\"self_attn.q_proj\":4}", 1.5},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"q_proj\":2}", 0.5},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"_proj\":2}", 1.5},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\".*_proj\":2,\"q_proj\":1}", 0.5},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"layers\\\\.\\\\d\\\\.self_attn.q_proj\":1}",
         0.25},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"^model.layers.0.self_attn.q_proj\":1}",
         0.25},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"layers.1.self_attn.q_proj\":1}", 1.5},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"self.attn.q.proj\":1}", 0.25},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"attn.q_proj\":1}", 1.5},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"q_pro\":1,\"model\":2,\"\":3}", 1.5},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"model.layers.0.self_attn.q_proj\":1}",
         0.25},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"x.model.layers.0.self_attn.q_proj\":1}",
         1.5},
        {"\"r\":4,\"lora_alpha\":6,\"alpha_pattern\":{\"[qk]_proj\":1,\"q_proj\":2}", 0.25},
        {"\"r\":4,\"lora_alpha\":6,\"use_rslora\":true,\"alpha_pattern\":{\"q_proj\":1.5}", 0.75},
        {"\"r\":4,\"lora_alpha\":0", 0},
    };
    struct lab lab;
    lab_open(&lab);
    lab_model(&lab, &(struct slu_synth_params){.arch = SLU_ARCH_OLMOE});
    struct slu_base base = slu_adapter_base_view(&lab.base);
    struct slu_ledger *ledger = slu_ledger_create(0);
    const struct lab_tensor tensors[] = {
        {Q0 ".lora_A.default.weight", "BF16", 4, 64, 1, 0},
        {Q0 ".lora_B.default.weight", "F16", 64, 4, 0, 0.5f},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        char config[400];
        snprintf(config, sizeof config,
                 "{\"peft_type\":\"LORA\",%s,\"target_modules\":[\"q_proj\",\"x\"]}",
                 cases[i].settings);
        lab_peft(lab_path(&lab, "peft"), config, tensors, 2);
        lab_import(lab_path(&lab, "peft"), lab_path(&lab, "a.sla"), NULL);
        struct slu_adapter *a = lab_load(lab_path(&lab, "a.sla"), &base, ledger);
        cr_assert_float_eq(a->loras[0].scale, cases[i].scale, 1e-6, "case %u: %f", i,
                           (double)a->loras[0].scale);
        cr_assert(a->loras[0].a.fmt->id == SLU_FMT_BF16 && a->loras[0].b.fmt->id == SLU_FMT_F16);
        slu_adapter_close(a);
    }
    slu_ledger_destroy(ledger);
    lab_close(&lab);
}

/* Experts that come one by one: those left alone add nothing, and unequal ranks and scales come to
 * what each asked for. */
Test(adapter_import, experts_apart)
{
    struct fixture f;
    struct lab lab;
    fixture_open(&f);
    lab_open(&lab);
    fixture_synth(&f, &(struct slu_synth_params){.arch = SLU_ARCH_OLMOE, .n_experts = 6},
                  SLU_CODEC_RAW, 0);
    const struct lab_tensor tensors[] = {
        {E("1") ".lora_A.weight", "F32", 2, 64, 1, 0},
        {E("1") ".lora_B.weight", "F16", 96, 2, 1, 0},
        {E("3") ".lora_A.weight", "F16", 3, 64, 1, 0},
        {E("3") ".lora_B.weight", "F16", 96, 3, 1, 0},
    };
    const char *config = "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":8,\"rank_pattern\":"
                         "{\"experts.3.gate_proj\":3},\"alpha_pattern\":{\"3.gate_proj\":3}}";
    lab_peft(lab_path(&lab, "peft"), config, tensors, 4);
    struct slu_err err;
    struct slu_adapter_base pack;
    cr_assert_eq(slu_adapter_base_open(f.slu, &pack, &err), 0, "%s", err.text);
    struct slu_base base = slu_adapter_base_view(&pack);
    struct slu_ledger *ledger = slu_ledger_create(0);
    struct slu_adapter *a;
    /* Of the base's 6 experts the file names none behind the fourth. */
    lab_import(lab_path(&lab, "peft"), lab_path(&lab, "a.sla"), NULL);
    int rc = lab_try(lab_path(&lab, "a.sla"), &base, ledger, &a, &err);
    lab_expect_refusal(rc, &err, SLU_EFORMAT, "import it with --base");
    lab_import(lab_path(&lab, "peft"), lab_path(&lab, "a.sla"), f.slu);
    a = lab_load(lab_path(&lab, "a.sla"), &base, ledger);
    const struct slu_lora *pair = slu_adapter_find(a, 0, SLU_TARGET_EXPERT_GATE);
    cr_assert(pair && pair->n == 6 && pair->rank == 3);
    for (uint32_t e = 0; e < 6; e++) {
        /* What the pair adds to output 0 for an input of ones: rank * 64 * scale. */
        struct slu_lora one = lab_pair(a, pair, e);
        const float *ma = (const float *)(const void *)one.a.data;
        const float *mb = (const float *)(const void *)one.b.data;
        float sum = 0;
        for (uint32_t r = 0; r < 3; r++) {
            for (uint32_t i = 0; i < 64; i++) {
                sum += mb[r] * ma[r * 64 + i];
            }
        }
        float expected = e == 1 ? 2 * 64 * 4.0f : e == 3 ? 3 * 64 * 1.0f : 0.0f;
        cr_assert_float_eq(sum * pair->scale, expected, 1e-3, "expert %u", e);
    }
    slu_adapter_close(a);
    slu_ledger_destroy(ledger);
    lab_close(&lab);
    fixture_close(&f);
}
