/* Reference logits of tiny models of every architecture, from an independent implementation. */
#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "tools/adapter_import.h"
#include "tools/adapter_synth.h"

struct golden {
    char gguf[512], logits[512];
    const char *name;
    bool is_f32, is_all_active; /* the latter: every expert active, so routing can't flip */
    int32_t ids[1024], greedy[64];
    size_t n, n_greedy, n_vocab;
    double margin[1024];
    char lora[512]; /* empty: none */
    double lora_scale;
};

static void read_case(json_t *item, struct golden *g)
{
    memset(g, 0, sizeof *g);
    g->name = json_string_value(json_object_get(item, "model"));
    char path[256];
    snprintf(path, sizeof path, "golden/%s", g->name);
    cr_assert(fixture_data(path, g->gguf, sizeof g->gguf));
    snprintf(path, sizeof path, "golden/%s", json_string_value(json_object_get(item, "logits")));
    cr_assert(fixture_data(path, g->logits, sizeof g->logits));
    g->is_f32 = !strcmp(json_string_value(json_object_get(item, "expert_type")), "F32") &&
                !strcmp(json_string_value(json_object_get(item, "dense_type")), "F32");
    g->is_all_active = strstr(g->name, "-a-") != NULL;
    g->n_vocab = (size_t)json_integer_value(json_object_get(item, "n_vocab"));
    size_t i;
    json_t *value;
    json_array_foreach(json_object_get(item, "tokens"), i, value)
    {
        g->ids[g->n++] = (int32_t)json_integer_value(value);
    }
    json_array_foreach(json_object_get(item, "greedy"), i, value)
    {
        g->greedy[g->n_greedy++] = (int32_t)json_integer_value(value);
    }
    json_array_foreach(json_object_get(item, "route_margin"), i, value)
    {
        g->margin[i] = json_number_value(value);
    }
    json_t *lora = json_object_get(item, "lora");
    if (lora) {
        snprintf(path, sizeof path, "golden/%s", json_string_value(json_object_get(lora, "file")));
        cr_assert(fixture_data(path, g->lora, sizeof g->lora));
        g->lora_scale = json_number_value(json_object_get(lora, "scale"));
    }
}

static float *read_reference(const struct golden *g)
{
    float *ref = calloc(g->n * g->n_vocab, sizeof *ref);
    FILE *file = fopen(g->logits, "rb");
    cr_assert(ref && file);
    cr_assert_eq(fread(ref, sizeof *ref, g->n * g->n_vocab, file), g->n * g->n_vocab);
    fclose(file);
    return ref;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double cosine(const float *a, const float *b, size_t n)
{
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < n; i++) {
        ab += (double)a[i] * b[i];
        aa += (double)a[i] * a[i];
        bb += (double)b[i] * b[i];
    }
    return ab / sqrt(aa * bb);
}

/* How close is close enough depends on the weights: float ones are held tightly, quantized ones to
 * what 8-bit activations cost, and where the router was near a tie only in the median. */
static void check_logits(const struct golden *g, const float *got, const float *ref)
{
    double all[1024], clear_least = 1, least = 1, diff = 0;
    for (size_t p = 0; p < g->n; p++) {
        if (g->is_f32 && g->margin[p] == 0) {
            all[p] = 1; /* a tie to six digits: the reference itself, given an f16 KV cache, chooses
                           otherwise than without one */
            continue;
        }
        const float *a = got + p * g->n_vocab, *b = ref + p * g->n_vocab;
        all[p] = cosine(a, b, g->n_vocab);
        least = fmin(least, all[p]);
        clear_least = g->margin[p] > 0.15 ? fmin(clear_least, all[p]) : clear_least;
        for (size_t i = 0; i < g->n_vocab; i++) {
            diff = fmax(diff, fabs((double)a[i] - b[i]));
        }
        cr_assert(all[p] == all[p], "%s: position %zu is not a number", g->name, p);
    }
    qsort(all, g->n, sizeof *all, compare);
    double median = all[g->n / 2];
    if (g->is_f32) {
        cr_expect_leq(diff, 0.05, "%s, %zu tokens: differs by %g", g->name, g->n, diff);
        cr_expect_geq(least, 0.9999, "%s, %zu tokens: cosine %g", g->name, g->n, least);
    } else if (g->is_all_active) {
        cr_expect_geq(least, 0.995, "%s, %zu tokens: cosine %g", g->name, g->n, least);
        cr_expect_geq(median, 0.999, "%s, %zu tokens: median %g", g->name, g->n, median);
    } else {
        cr_expect_geq(median, 0.97, "%s, %zu tokens: median %g", g->name, g->n, median);
        cr_expect_geq(clear_least, 0.99, "%s, %zu tokens: cosine %g where routing is clear",
                      g->name, g->n, clear_least);
    }
}

/* sla: the case's adapter, or NULL. */
static void check_case(const struct golden *g, const struct fixture *f, const char *sla)
{
    struct slu_engine_params params = {
        .ram_bytes = 1ull << 30, .ctx = 128, .n_threads = 2, .minimum_cache = true};
    struct slu_adapter_choice choice = {sla, (float)g->lora_scale};
    if (sla) {
        cr_assert_eq(slu_adapter_memory(NULL, sla, &params.adapter_bytes, NULL, NULL), 0);
    }
    struct slu_engine *engine = fixture_engine(f->slu, &params);
    float *ref = read_reference(g);
    float *got = fixture_logits_with(engine, &choice, sla ? 1 : 0, g->ids, g->n);
    check_logits(g, got, ref);
    if (g->n_greedy) {
        int32_t ids[64];
        fixture_greedy_with(engine, &choice, sla ? 1 : 0, g->ids, g->n, ids, (uint32_t)g->n_greedy);
        cr_expect(!memcmp(ids, g->greedy, g->n_greedy * sizeof *ids),
                  "%s, %zu tokens: greedy continuation differs", g->name, g->n);
    }
    free(ref);
    free(got);
    slu_engine_close(engine);
}

/* Writes a golden adapter to f->dir/a.sla, from its GGUF or from the same weights in a PEFT
 * folder. */
static void import_adapter(const struct golden *g, const struct fixture *f, bool is_peft,
                           char *ret_sla, size_t bytes)
{
    struct slu_err err = {0};
    const char *in = g->lora;
    char peft[128];
    if (is_peft) {
        snprintf(peft, sizeof peft, "%s/peft", f->dir);
        cr_assert_eq(slu_lora_gguf_to_peft(g->lora, g->gguf, peft, &err), 0, "%s", err.text);
        in = peft;
    }
    snprintf(ret_sla, bytes, "%s/a.sla", f->dir);
    struct slu_adapter_import_params params = {.in = in, .out = ret_sla};
    struct slu_adapter_info info;
    cr_assert_eq(slu_adapter_import(&params, &info, &err), 0, "%s", err.text);
}

enum adapters { NO_ADAPTER, GGUF_ADAPTER, PEFT_ADAPTER };

static void check_all(enum adapters adapters)
{
    char path[512];
    if (!fixture_data("golden/manifest.json", path, sizeof path)) {
        cr_skip_test("no golden models");
    }
    json_error_t error;
    json_t *manifest = json_load_file(path, 0, &error);
    cr_assert_not_null(manifest, "%s", error.text);
    struct fixture f;
    fixture_open(&f);
    struct golden *g = malloc(sizeof *g);
    char packed[512] = "", imported[512] = "", sla[128];
    size_t i, n_cases = 0;
    json_t *item;
    json_array_foreach(manifest, i, item)
    {
        if ((json_object_get(item, "lora") != NULL) != (adapters != NO_ADAPTER)) {
            continue;
        }
        read_case(item, g);
        if (strcmp(packed, g->gguf)) {
            fixture_pack(&f, g->gguf, SLU_CODEC_ZSTD, 16 << 10);
            snprintf(packed, sizeof packed, "%s", g->gguf);
        }
        if (strcmp(imported, g->lora)) {
            import_adapter(g, &f, adapters == PEFT_ADAPTER, sla, sizeof sla);
            snprintf(imported, sizeof imported, "%s", g->lora);
        }
        check_case(g, &f, adapters ? sla : NULL);
        n_cases++;
    }
    cr_assert_gt(n_cases, 0);
    free(g);
    json_decref(manifest);
    fixture_close(&f);
}

/* Every golden model, from GGUF through a pack with the smallest cache, is within tolerance. */
Test(golden, logits_and_greedy)
{
    check_all(NO_ADAPTER);
}

/* So is every golden adapter, from GGUF. */
Test(golden, adapters_from_gguf)
{
    check_all(GGUF_ADAPTER);
}

/* And from the same weights as a PEFT folder, in Hugging Face's order of rows. */
Test(golden, adapters_from_peft)
{
    check_all(PEFT_ADAPTER);
}
