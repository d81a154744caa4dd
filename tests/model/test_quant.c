/* What quantizing does to what a model says. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>

#include "fixture.h"
#include "kern/format.h"
#include "tools/divergence.h"
#include "tools/retype.h"

enum { N_SEQUENCES = 8, N_TOKENS = 64, SEED = 9 };

struct packed {
    float *logits; /* [N_SEQUENCES][N_TOKENS][n_vocab] */
    uint32_t n_vocab;
    uint64_t expert_bytes; /* stored */
};

static int32_t ids[N_SEQUENCES * N_TOKENS];
static const struct slu_divergence_text text = {
    .ids = ids, .n_sequences = N_SEQUENCES, .n_tokens = N_TOKENS};

/* Packs a model and runs it over tokens that follow from nothing but a seed. */
static struct packed run(const char *gguf, struct slu_packer_quant experts)
{
    struct fixture f;
    struct slu_err err = {0};
    struct slu_packer_report report = {0};
    struct packed packed = {0};
    fixture_open(&f);
    const struct slu_packer_params params = {
        .in = gguf, .out = f.slu, .codec = SLU_CODEC_ZSTD, .experts = experts};
    cr_assert_eq(slu_packer_run(&params, &report, &err), 0, "%s", err.text);
    packed.expert_bytes = report.expert_stored_bytes;
    cr_assert_eq(slu_divergence_logits(f.slu, &text, &packed.logits, &packed.n_vocab, &err), 0,
                 "%s", err.text);
    fixture_close(&f);
    return packed;
}

static bool data_path(const char *model, const char *types, char path[512])
{
    char name[128];
    snprintf(name, sizeof name, "golden/models/%s-%s.gguf", model, types);
    return fixture_data(name, path, 512);
}

static struct packed run_retyped(const char *gguf, const struct slu_fmt *experts)
{
    struct fixture f;
    struct slu_err err = {0};
    fixture_open(&f);
    cr_assert_eq(slu_retype_write(gguf, f.gguf, &(struct slu_retype){.experts = experts}, &err), 0,
                 "%s", err.text);
    struct packed packed = run(f.gguf, (struct slu_packer_quant){0});
    fixture_close(&f);
    return packed;
}

/* q4e takes fewer bytes than Q4_0 and diverges less from the model: prints both, and adds
 * divergences up. */
static void check_order(const char *model, struct packed *whole, struct packed *old,
                        struct packed *new, double sums[2])
{
    double kls[2] = {slu_divergence_of(&text, whole->n_vocab, whole->logits, old->logits).mean,
                     slu_divergence_of(&text, whole->n_vocab, whole->logits, new->logits).mean};
    printf("%-14s Q4_0 %.5f in %llu bytes, q4e %.5f in %llu\n", model, kls[0],
           (unsigned long long)old->expert_bytes, kls[1], (unsigned long long)new->expert_bytes);
    cr_assert_gt(kls[1], 0);
    cr_assert_lt(new->expert_bytes, old->expert_bytes);
    cr_assert_lt(kls[1], kls[0], "%s", model);
    sums[0] += kls[0];
    sums[1] += kls[1];
    free(whole->logits);
    free(old->logits);
    free(new->logits);
}

/* Made from a golden model in F32, by either format's own rule and with all else in F32, experts in
 * q4e take fewer bytes than in Q4_0 and diverge less: each model by itself. */
Test(quant, of_f32_diverges_less_than_q4_0)
{
    static const char *const models[] = {"gpt-oss-s", "olmoe-s", "llama-s"};
    double sums[2] = {0}; /* each model stands for itself */
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        char f32[512];
        if (!data_path(models[i], "f32-f32", f32)) {
            cr_skip_test("the optional data are not there");
        }
        const struct slu_packer_quant keep = {0}, q4e = {.bits = 4};
        slu_divergence_random(&text, 256, SEED);
        struct packed whole = run(f32, keep);
        struct packed old = run_retyped(f32, slu_fmt_get(SLU_FMT_Q4_0)), new = run(f32, q4e);
        cr_assert_geq(whole.n_vocab, 256);
        check_order(models[i], &whole, &old, &new, sums);
    }
}

/* The same against files that others made in Q4_0, with everything outside the experts in Q8_0 both
 * times, and q4e made from Q8_0. */
Test(quant, diverges_less_than_q4_0)
{
    static const char *const models[] = {"gpt-oss-s", "qwen3moe-s"};
    double sums[2] = {0};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        char f32[512], q8_0[512], q4_0[512];
        if (!data_path(models[i], "f32-f32", f32) || !data_path(models[i], "q8_0-q8_0", q8_0) ||
            !data_path(models[i], "q4_0-q8_0", q4_0)) {
            cr_skip_test("the optional data are not there");
        }
        const struct slu_packer_quant keep = {0}, q4e = {.bits = 4};
        slu_divergence_random(&text, 256, SEED);
        struct packed whole = run(f32, keep), old = run(q4_0, keep), new = run(q8_0, q4e);
        check_order(models[i], &whole, &old, &new, sums);
    }
    cr_assert_lt(sums[1], sums[0]);
}
