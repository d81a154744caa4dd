/* What quantizing does to what a model says. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"

enum { N_TOKENS = 400 };

struct packed {
    float *logits; /* [N_TOKENS][n_vocab] */
    uint32_t n_vocab;
    uint64_t expert_bytes; /* stored */
};

/* Packs a model of the data folder and runs it over tokens that follow from nothing but a seed. */
static struct packed run(const char *gguf, struct slu_packer_quant experts,
                         struct slu_packer_quant resident)
{
    struct fixture f;
    struct slu_err err = {0};
    struct slu_packer_report report = {0};
    fixture_open(&f);
    const struct slu_packer_params params = {.in = gguf,
                                             .out = f.slu,
                                             .codec = SLU_CODEC_ZSTD,
                                             .experts = experts,
                                             .resident = resident};
    cr_assert_eq(slu_packer_run(&params, &report, &err), 0, "%s", err.text);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 28, .ctx = 512});
    struct packed packed = {.n_vocab = slu_engine_n_vocab(engine),
                            .expert_bytes = report.expert_stored_bytes};
    int32_t ids[N_TOKENS];
    uint64_t state = 9;
    for (int i = 0; i < N_TOKENS; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        ids[i] = (int32_t)((state >> 33) % packed.n_vocab);
    }
    packed.logits = fixture_logits(engine, ids, N_TOKENS);
    slu_engine_close(engine);
    fixture_close(&f);
    return packed;
}

/* Mean divergence of b's next-token distributions from a's, in nats. */
static double divergence(const struct packed *a, const struct packed *b)
{
    double sum = 0;
    for (size_t t = 0; t < N_TOKENS; t++) {
        const float *x = a->logits + t * a->n_vocab, *y = b->logits + t * a->n_vocab;
        double x_sum = 0, y_sum = 0, kl = 0;
        for (uint32_t i = 0; i < a->n_vocab; i++) {
            x_sum += exp(x[i]);
            y_sum += exp(y[i]);
        }
        for (uint32_t i = 0; i < a->n_vocab; i++) {
            kl += exp(x[i]) / x_sum * ((x[i] - log(x_sum)) - (y[i] - log(y_sum)));
        }
        sum += kl;
    }
    return sum / N_TOKENS;
}

static bool data_path(const char *model, const char *types, char path[512])
{
    char name[128];
    snprintf(name, sizeof name, "golden/models/%s-%s.gguf", model, types);
    return fixture_data(name, path, 512);
}

/* q4e takes fewer bytes than Q4_0 and diverges less from the model in F32, with everything outside
 * the experts in Q8_0 both times. */
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
        struct packed whole = run(f32, keep, keep), old = run(q4_0, keep, keep),
                      new = run(q8_0, q4e, keep);
        double old_kl = divergence(&whole, &old), new_kl = divergence(&whole, &new);
        printf("%-14s Q4_0 %.5f in %llu bytes, q4e %.5f in %llu\n", models[i], old_kl,
               (unsigned long long)old.expert_bytes, new_kl, (unsigned long long)new.expert_bytes);
        cr_assert_lt(new.expert_bytes, old.expert_bytes);
        sums[0] += old_kl;
        sums[1] += new_kl;
        free(whole.logits);
        free(old.logits);
        free(new.logits);
    }
    cr_assert_lt(sums[1], sums[0]);
}
