#include "make.h"

#include <criterion/criterion.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "adapters/expert_stream.h"

void lab_open(struct lab *lab)
{
    *lab = (struct lab){0};
    const char *tmp = getenv("TMPDIR");
    snprintf(lab->dir, sizeof lab->dir, "%.40s/slu-lora-XXXXXX", tmp ? tmp : "/tmp");
    cr_assert_not_null(mkdtemp(lab->dir));
    snprintf(lab->model, sizeof lab->model, "%s/model.gguf", lab->dir);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

void lab_close(struct lab *lab)
{
    cr_assert_eq(nftw(lab->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS), 0);
}

const char *lab_path(const struct lab *lab, const char *name)
{
    static char paths[8][160];
    static unsigned at;
    char *path = paths[at++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", lab->dir, name);
    return path;
}

void lab_model(struct lab *lab, const struct slu_synth_params *params)
{
    struct slu_err err = {0};
    cr_assert_eq(slu_synth_write(lab->model, params, &err), 0, "%s", err.text);
    cr_assert_eq(slu_adapter_base_open(lab->model, &lab->base, &err), 0, "%s", err.text);
}

struct slu_adapter_info lab_import(const char *in, const char *out, const char *base)
{
    struct slu_adapter_import_params params = {.in = in, .out = out, .base = base};
    struct slu_adapter_info info = {0};
    struct slu_err err = {0};
    cr_assert_eq(slu_adapter_import(&params, &info, &err), 0, "%s", err.text);
    return info;
}

void lab_adapter(struct lab *lab, const struct slu_adapter_synth_params *params, const char *path)
{
    struct slu_adapter_synth_params p = *params;
    struct slu_err err = {0};
    char between[160];
    p.base = lab->model;
    snprintf(between, sizeof between, "%s/between%s", lab->dir,
             p.form == SLU_ADAPTER_GGUF ? ".gguf" : "");
    cr_assert_eq(slu_adapter_synth_write(between, &p, &err), 0, "%s", err.text);
    lab_import(between, path, NULL);
}

int lab_try(const char *path, const struct slu_base *base, struct slu_ledger *ledger,
            struct slu_adapter **ret_adapter, struct slu_err *err)
{
    struct slu_source *source;
    struct slu_adapter_info info;
    *err = (struct slu_err){0};
    uint64_t before = slu_ledger_used(ledger);
    uint64_t adapters = slu_ledger_account_used(ledger, SLU_ACCOUNT_ADAPTERS);
    cr_assert_eq(slu_source_open_file(path, &source, err), 0, "%s", err->text);
    int rc = slu_adapter_open(source, base, ledger, ret_adapter, err);
    if (rc == 0) {
        cr_assert_eq(slu_adapter_inspect(source, &info, err), 0);
        cr_assert_eq(slu_ledger_account_used(ledger, SLU_ACCOUNT_ADAPTERS) - adapters,
                     info.memory_bytes);
        before += info.memory_bytes;
    }
    cr_assert_eq(slu_ledger_used(ledger), before);
    slu_source_destroy(source);
    return rc;
}

struct slu_adapter *lab_load(const char *path, const struct slu_base *base,
                             struct slu_ledger *ledger)
{
    struct slu_adapter *adapter = NULL;
    struct slu_err err;
    cr_assert_eq(lab_try(path, base, ledger, &adapter, &err), 0, "%s", err.text);
    return adapter;
}

struct slu_lora lab_pair(const struct slu_adapter *adapter, const struct slu_lora *lora, uint32_t e)
{
    struct slu_lora pair = *lora;
    if (!lora->a.data) {
        slu_lora_of_expert(lora, slu_expert_bytes(adapter, lora->layer, e), &pair.a, &pair.b);
    }
    return pair;
}

static void expect_equal_mat(const struct slu_lora *pair, const struct slu_mat *a,
                             const struct slu_mat *b)
{
    const char *target = slu_target_name(pair->target);
    cr_assert_eq(a->fmt, b->fmt);
    cr_assert_eq(a->rows, b->rows);
    cr_assert_eq(a->cols, b->cols);
    cr_assert_eq(memcmp(a->data, b->data, a->at.bytes), 0, "%s of layer %u", target, pair->layer);
}

void lab_expect_equal(const struct slu_adapter *a, const struct slu_adapter *b)
{
    cr_assert_eq(a->info.n_loras, b->info.n_loras);
    cr_assert_eq(a->info.targets, b->info.targets);
    for (uint32_t i = 0; i < a->info.n_loras; i++) {
        const struct slu_lora *x = &a->loras[i], *y = &b->loras[i];
        cr_assert(x->target == y->target && x->layer == y->layer && x->rank == y->rank &&
                  x->n == y->n);
        cr_assert_eq(x->scale, y->scale);
        cr_assert_eq(slu_adapter_find(b, x->layer, x->target), y);
        for (uint32_t e = 0; e < x->n; e++) {
            struct slu_lora p = lab_pair(a, x, e), q = lab_pair(b, y, e);
            expect_equal_mat(x, &p.a, &q.a);
            expect_equal_mat(x, &p.b, &q.b);
        }
    }
}

void lab_expect_refusal(int rc, const struct slu_err *err, int code, const char *words)
{
    cr_assert_eq(rc, code, "%d, not %d: %s", rc, code, err->text);
    cr_assert_eq(err->code, code);
    cr_assert(strstr(err->text, words), "'%s' lacks '%s'", err->text, words);
    cr_assert_null(strchr(err->text, '\n'));
}

static void put_number(FILE *file, const char *dtype, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t half = strcmp(dtype, "F16") == 0 ? slu_f32_to_f16(value) : (uint16_t)(bits >> 16);
    if (strcmp(dtype, "F32") == 0 || strcmp(dtype, "I32") == 0) {
        fwrite(&bits, sizeof bits, 1, file);
    } else {
        fwrite(&half, sizeof half, 1, file);
    }
}

void lab_peft(const char *dir, const char *config, const struct lab_tensor *tensors, size_t n)
{
    char path[200], *header = NULL;
    size_t header_bytes = 0, offset = 0;
    mkdir(dir, 0777);
    if (config) {
        snprintf(path, sizeof path, "%s/adapter_config.json", dir);
        lab_write(path, config, strlen(config));
    }
    FILE *text = open_memstream(&header, &header_bytes);
    fprintf(text, "{");
    for (size_t i = 0; i < n; i++) {
        size_t item = strchr(tensors[i].dtype, '3') ? 4 : 2;
        size_t bytes = item * tensors[i].rows * tensors[i].cols;
        fprintf(text, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%u,%u],\"data_offsets\":[%zu,%zu]}",
                i ? "," : "", tensors[i].name, tensors[i].dtype, tensors[i].rows, tensors[i].cols,
                offset, offset + bytes);
        offset += bytes;
    }
    fprintf(text, "}");
    fclose(text);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
    FILE *file = fopen(path, "wb");
    cr_assert(file);
    uint64_t length = header_bytes;
    fwrite(&length, sizeof length, 1, file);
    fwrite(header, 1, header_bytes, file);
    for (size_t i = 0; i < n; i++) {
        for (uint32_t k = 0; k < tensors[i].rows * tensors[i].cols; k++) {
            put_number(file, tensors[i].dtype, tensors[i].fill + (float)k * tensors[i].step);
        }
    }
    cr_assert_eq(fclose(file), 0);
    free(header);
}

void lab_safetensors(const char *path, uint64_t claimed_bytes, const char *header,
                     size_t data_bytes)
{
    FILE *file = fopen(path, "wb");
    cr_assert(file);
    fwrite(&claimed_bytes, sizeof claimed_bytes, 1, file);
    fputs(header, file);
    for (size_t i = 0; i < data_bytes; i++) {
        fputc(0, file);
    }
    cr_assert_eq(fclose(file), 0);
}

void lab_write(const char *path, const void *data, size_t bytes)
{
    FILE *file = fopen(path, "wb");
    cr_assert(file, "%s", path);
    cr_assert_eq(fwrite(data, 1, bytes, file), bytes);
    cr_assert_eq(fclose(file), 0);
}

uint8_t *lab_read(const char *path, size_t *ret_bytes)
{
    FILE *file = fopen(path, "rb");
    cr_assert(file, "%s", path);
    cr_assert_eq(fseek(file, 0, SEEK_END), 0);
    long bytes = ftell(file);
    rewind(file);
    uint8_t *data = malloc((size_t)bytes + 1);
    cr_assert(data && fread(data, 1, (size_t)bytes, file) == (size_t)bytes);
    fclose(file);
    *ret_bytes = (size_t)bytes;
    return data;
}
