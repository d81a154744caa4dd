/*
 * What quantizing a model's experts does to what it says: the divergence of next-token
 * distributions from those of the model as it is, in nats a token, beside the bytes of the experts
 * and of the whole pack. The same sequences of tokens go through all.
 *
 *     build/bench/kl [MODEL.gguf...] [--sequences N] [--tokens N] [--seed N] [--dense TYPE]
 *                    [--text FILE] [--calibrate FILE] [--importance] [--error E] [--json]
 *
 * Models are the golden ones in F32 unless given. --dense: matrices outside the experts become
 * TYPE first, for all but the reference. --text: sequences of a text, from all over it, in place of
 * random tokens. --importance: q4e with the weights of columns too, as `sluice calibrate
 * --importance` measures them, on the text given by --calibrate or on other random tokens. --error:
 * what q4e aims at. The spread is the standard deviation of the sequences' means. `q4e=Q4_0` has
 * the error at which its experts take as many bytes as those in Q4_0.
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/divergence.h"
#include "tools/importance_record.h"
#include "tools/packer.h"
#include "tools/retype.h"

#define BISECTIONS      7
#define CALIBRATE_SEED  0x5eed
#define CALIBRATE_TIMES 4 /* as many sequences as are measured */

struct options {
    uint32_t n_sequences, n_tokens;
    uint64_t seed;
    float error;
    const char *dense, *text, *calibrate;
    bool has_importance, is_json;
};

struct bench {
    struct options o;
    char dir[64], base[96], gguf[96], slu[96], importance[96];
    const char *source;
    struct slu_divergence_text text;
    float *reference;
    uint32_t n_vocab;
    json_t *rows;
};

static void *must(void *memory)
{
    if (!memory) {
        fprintf(stderr, "kl: out of memory\n");
        exit(1);
    }
    return memory;
}

static void check(int code, const struct slu_err *err)
{
    if (code < 0) {
        fprintf(stderr, "kl: %s\n", err->text);
        exit(1);
    }
}

/* ---- texts -------------------------------------------------------------------------------- */

static char *read_text(const char *path, size_t *ret_len)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0) {
        perror(path);
        exit(1);
    }
    *ret_len = (size_t)ftell(file);
    rewind(file);
    char *text = must(malloc(*ret_len + 1));
    *ret_len = fread(text, 1, *ret_len, file);
    fclose(file);
    return text;
}

/* Sequences from all over the file's tokens. */
static void cut_text(struct slu_engine *engine, const char *path,
                     const struct slu_divergence_text *text)
{
    struct slu_err err = {0};
    size_t len, wanted = (size_t)text->n_sequences * text->n_tokens;
    char *bytes = read_text(path, &len);
    int32_t *ids = must(malloc((len + 8) * sizeof *ids));
    int64_t n = slu_engine_encode(engine, bytes, len, false, ids, len + 8, &err);
    check(n < 0 ? (int)n : 0, &err);
    if ((size_t)n < wanted) {
        fprintf(stderr, "kl: %s has %lld tokens, of %zu that are asked for\n", path, (long long)n,
                wanted);
        exit(1);
    }
    for (size_t s = 0; s < text->n_sequences; s++) {
        size_t at = ((size_t)n - text->n_tokens) * s / text->n_sequences;
        memcpy(text->ids + s * text->n_tokens, ids + at, text->n_tokens * sizeof *ids);
    }
    free(ids);
    free(bytes);
}

static void make_text(struct slu_engine *engine, const char *path, uint64_t seed,
                      struct slu_divergence_text *text)
{
    text->ids = must(malloc((size_t)text->n_sequences * text->n_tokens * sizeof *text->ids));
    if (path) {
        cut_text(engine, path, text);
    } else {
        slu_divergence_random(text, slu_engine_n_vocab(engine), seed);
    }
}

/* ---- cases -------------------------------------------------------------------------------- */

static struct slu_packer_report pack(struct bench *b, const char *in, struct slu_packer_quant quant,
                                     const char *importance)
{
    struct slu_packer_report report;
    struct slu_err err = {0};
    const struct slu_packer_params params = {.in = in,
                                             .out = b->slu,
                                             .codec = SLU_CODEC_ZSTD,
                                             .experts = quant,
                                             .importance = importance};
    check(slu_packer_run(&params, &report, &err), &err);
    return report;
}

/* Runs the pack and tells of it. */
static void measure(struct bench *b, const char *format, const struct slu_packer_report *report)
{
    struct slu_err err = {0};
    float *logits;
    uint32_t n_vocab;
    check(slu_divergence_logits(b->slu, &b->text, &logits, &n_vocab, &err), &err);
    struct slu_divergence d = slu_divergence_of(&b->text, n_vocab, b->reference, logits);
    free(logits);
    if (!b->rows) {
        printf("%-16s %-10s %9.5f %9.5f %11llu %11llu", b->source, format, d.mean, d.spread,
               (unsigned long long)report->expert_stored_bytes,
               (unsigned long long)report->out_bytes);
        printf(report->quant_error > 0 ? " %7.4f\n" : "\n", report->quant_error);
        fflush(stdout);
        return;
    }
    json_array_append_new(b->rows, json_pack("{ss ss sf sf sf sI sI}", "source", b->source,
                                             "format", format, "kl", d.mean, "kl_spread", d.spread,
                                             "error", (double)report->quant_error, "expert_bytes",
                                             (json_int_t)report->expert_stored_bytes, "pack_bytes",
                                             (json_int_t)report->out_bytes));
}

static const struct slu_fmt *find_fmt(const char *name)
{
    for (unsigned id = 0; id < SLU_FMT_GGUFS; id++) {
        if (!strcmp(slu_fmt_get(id)->name, name)) {
            return slu_fmt_get(id);
        }
    }
    fprintf(stderr, "kl: no type of GGUF that is known is called %s\n", name);
    exit(2);
}

static uint64_t run_type(struct bench *b, const char *type)
{
    struct slu_err err = {0};
    const struct slu_retype types = {.experts = find_fmt(type)};
    check(slu_retype_write(b->base, b->gguf, &types, &err), &err);
    struct slu_packer_report report = pack(b, b->gguf, (struct slu_packer_quant){0}, NULL);
    measure(b, type, &report);
    unlink(b->gguf);
    return report.expert_stored_bytes;
}

static void run_quant(struct bench *b, const char *name, struct slu_packer_quant quant,
                      const char *importance)
{
    struct slu_packer_report report = pack(b, b->base, quant, importance);
    measure(b, name, &report);
}

/* q4e with the least error at which experts take no more than so many bytes. */
static void run_at_bytes(struct bench *b, const char *name, uint64_t bytes, const char *importance)
{
    float low = 0.04f, high = 0.16f;
    for (int i = 0; i < BISECTIONS; i++) {
        float error = (low + high) / 2;
        struct slu_packer_quant quant = {.bits = 4, .error = error};
        if (pack(b, b->base, quant, importance).expert_stored_bytes <= bytes) {
            high = error;
        } else {
            low = error;
        }
    }
    run_quant(b, name, (struct slu_packer_quant){.bits = 4, .error = high}, importance);
}

/* Second moments of inputs over a text that isn't the one measured on. */
static void calibrate(struct bench *b, struct slu_engine *engine)
{
    struct slu_importance_record *record;
    struct slu_err err = {0};
    struct slu_divergence_text text = b->text;
    text.n_sequences *= CALIBRATE_TIMES;
    make_text(engine, b->o.calibrate, b->o.seed ^ CALIBRATE_SEED, &text);
    check(slu_importance_record_create(engine, &record, &err), &err);
    check(slu_divergence_eval(engine, &text, NULL, &err), &err);
    check(slu_importance_record_write(record, b->importance, &err), &err);
    slu_importance_record_destroy(record);
    free(text.ids);
}

/* The model as it is: texts in its tokens, and what it says. */
static void make_reference(struct bench *b, const char *path)
{
    struct slu_err err = {0};
    struct slu_engine *engine;
    struct slu_packer_report report = pack(b, path, (struct slu_packer_quant){0}, NULL);
    const struct slu_engine_params params = {
        .ram_bytes = 1ull << 30, .ctx = b->o.n_tokens + 1, .n_threads = 1};
    check(slu_engine_open(b->slu, &params, &engine, &err), &err);
    b->text =
        (struct slu_divergence_text){.n_sequences = b->o.n_sequences, .n_tokens = b->o.n_tokens};
    make_text(engine, b->o.text, b->o.seed, &b->text);
    if (b->o.has_importance) {
        calibrate(b, engine);
    }
    slu_engine_close(engine);
    check(slu_divergence_logits(b->slu, &b->text, &b->reference, &b->n_vocab, &err), &err);
    measure(b, "as it is", &report);
}

static void run_model(struct bench *b, const char *path)
{
    static const char *const types[] = {"Q4_0", "MXFP4", "IQ4_NL"};
    static const char *const made[] = {"q3e", "q4e", "q5e"};
    const char *slash = strrchr(path, '/'), *at = slash ? slash + 1 : path;
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)strcspn(at, "."), at);
    char *types_at = strstr(name, "-f32-f32"); /* of golden models */
    if (types_at) {
        *types_at = 0;
    }
    b->source = name;
    make_reference(b, path);
    snprintf(b->base, sizeof b->base, "%s/base.gguf", b->dir);
    const struct slu_retype retype = {.resident = b->o.dense ? find_fmt(b->o.dense) : NULL};
    struct slu_err err = {0};
    check(slu_retype_write(path, b->base, &retype, &err), &err);
    uint64_t old_bytes = 0;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        uint64_t bytes = run_type(b, types[i]);
        old_bytes = i == 0 ? bytes : old_bytes;
    }
    for (unsigned i = 0; i < sizeof made / sizeof *made; i++) {
        struct slu_packer_quant quant = {.bits = 3 + i, .error = i == 1 ? b->o.error : 0};
        run_quant(b, made[i], quant, NULL);
    }
    run_at_bytes(b, "q4e=Q4_0", old_bytes, NULL);
    if (b->o.has_importance) {
        const struct slu_packer_quant q4e = {.bits = 4, .error = b->o.error};
        run_quant(b, "q4e+imp", q4e, b->importance);
        run_at_bytes(b, "q4e+imp=Q4_0", old_bytes, b->importance);
        unlink(b->importance);
    }
    unlink(b->base);
    unlink(b->slu);
    free(b->reference);
    free(b->text.ids);
}

static void run_golden(struct bench *b)
{
    static const char *const golden[] = {"deepseek2-s", "gpt-oss-s",  "granitemoe-s", "llama-s",
                                         "olmoe-s",     "qwen2moe-s", "qwen3moe-s"};
    const char *folder = getenv("SLUICE_DATA") ? getenv("SLUICE_DATA") : "../shared";
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/golden/models/%s-f32-f32.gguf", folder, golden[i]);
        if (access(path, R_OK) != 0) {
            fprintf(stderr, "kl: skipping %s, which is not there\n", path);
        } else {
            run_model(b, path);
        }
    }
}

static struct options parse(int argc, char **argv, const char **models, int *ret_n)
{
    struct options o = {.n_sequences = 32, .n_tokens = 64, .seed = 1};
    for (int i = 1; i < argc; i++) {
        const char *next = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--json")) {
            o.is_json = true;
        } else if (!strcmp(argv[i], "--importance")) {
            o.has_importance = true;
        } else if (!strcmp(argv[i], "--sequences")) {
            o.n_sequences = (uint32_t)strtoul(next, NULL, 10), i++;
        } else if (!strcmp(argv[i], "--tokens")) {
            o.n_tokens = (uint32_t)strtoul(next, NULL, 10), i++;
        } else if (!strcmp(argv[i], "--seed")) {
            o.seed = strtoull(next, NULL, 10), i++;
        } else if (!strcmp(argv[i], "--error")) {
            o.error = strtof(next, NULL), i++;
        } else if (!strcmp(argv[i], "--dense")) {
            o.dense = next, i++;
        } else if (!strcmp(argv[i], "--text")) {
            o.text = next, i++;
        } else if (!strcmp(argv[i], "--calibrate")) {
            o.calibrate = next, i++;
        } else if (argv[i][0] == '-') {
            fprintf(stderr, "kl: %s is no option; the head of bench/kl.c lists them\n", argv[i]);
            exit(2);
        } else {
            models[(*ret_n)++] = argv[i];
        }
    }
    o.n_sequences = o.n_sequences ? o.n_sequences : 1;
    o.n_tokens = o.n_tokens ? o.n_tokens : 1;
    return o;
}

int main(int argc, char **argv)
{
    const char **models = must(calloc((size_t)argc, sizeof *models));
    const char *tmp = getenv("TMPDIR");
    int n = 0;
    struct bench b = {.o = parse(argc, argv, models, &n)};
    snprintf(b.dir, sizeof b.dir, "%.40s/sluice-kl-XXXXXX", tmp ? tmp : "/tmp");
    must(mkdtemp(b.dir));
    snprintf(b.gguf, sizeof b.gguf, "%s/m.gguf", b.dir);
    snprintf(b.slu, sizeof b.slu, "%s/m.slu", b.dir);
    snprintf(b.importance, sizeof b.importance, "%s/m.imp", b.dir);
    b.rows = b.o.is_json ? json_array() : NULL;
    if (!b.rows) {
        printf("%-16s %-10s %9s %9s %11s %11s %7s\n", "source", "format", "kl", "spread", "experts",
               "pack", "error");
    }
    for (int i = 0; i < n; i++) {
        run_model(&b, models[i]);
    }
    if (n == 0) {
        run_golden(&b);
    }
    if (b.rows) {
        json_dumpf(b.rows, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(6));
        printf("\n");
        json_decref(b.rows);
    }
    rmdir(b.dir);
    free(models);
    return 0;
}
