#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "scratch.h"
#include "io/gguf.h"
#include "tools/gguf_writer.h"
#include "tools/synth.h"
#include "text/tokenizer.h"

static struct slu_gguf *open_gguf(const char *path, struct slu_source **ret_source)
{
    struct slu_gguf *gguf;
    struct slu_err err = {0};
    cr_assert_eq(slu_source_open_file(path, ret_source, &err), 0, "%s", err.text);
    cr_assert_eq(slu_gguf_open(*ret_source, &gguf, &err), 0, "%s", err.text);
    return gguf;
}

/* Every architecture's file has a configuration that gives back what was asked for. */
Test(synth, configurations)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "model.gguf");
    for (unsigned arch = 0; arch <= SLU_ARCH_DEEPSEEK2; arch++) {
        for (unsigned lite = 0; lite <= (arch == SLU_ARCH_DEEPSEEK2); lite++) {
            struct slu_synth_params params = {
                .arch = arch,
                .is_lite = lite,
                .n_layers = 4,
                .n_embd = 128,
                .n_ff = 64,
                .n_experts = 6,
                .n_used = 3,
                .n_heads = 8,
                .head_dim = 32,
                .n_vocab = 1000,
                .n_ctx = 1024,
            };
            struct slu_err err = {0};
            cr_assert_eq(slu_synth_write(path, &params, &err), 0, "%s", err.text);
            struct slu_source *source;
            struct slu_gguf *gguf = open_gguf(path, &source);
            struct slu_config config;
            cr_assert_eq(slu_config_read(&gguf->kvs, &config, &err), 0, "%s", err.text);
            cr_assert_eq(config.arch, arch);
            cr_assert_eq(config.n_layers, 4);
            cr_assert_eq(config.n_embd, 128);
            cr_assert_eq(config.n_ff_expert, 64);
            cr_assert_eq(config.n_experts, 6);
            cr_assert_eq(config.n_used, 3);
            cr_assert_eq(config.n_heads, 8);
            cr_assert_eq(config.k_dim, arch == SLU_ARCH_DEEPSEEK2 ? 48 : 32);
            cr_assert_eq(config.n_vocab, 1000);
            cr_assert_eq(config.n_ctx_train, 1024);
            cr_assert_eq(config.q_lora == 0, arch != SLU_ARCH_DEEPSEEK2 || lite);
            cr_assert_eq(config.n_dense_layers, arch == SLU_ARCH_DEEPSEEK2);
            slu_gguf_close(gguf);
            slu_source_destroy(source);
        }
    }
    scratch_finish(&scratch);
}

/* The seed alone decides the weights. */
Test(synth, seeds)
{
    struct scratch scratch;
    struct slu_err err;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "model.gguf");
    uint8_t *data[3];
    size_t bytes[3];
    for (unsigned i = 0; i < 3; i++) {
        struct slu_synth_params params = {.seed = i == 2 ? 8 : 7, .n_layers = 1};
        cr_assert_eq(slu_synth_write(path, &params, &err), 0);
        data[i] = scratch_read(path, &bytes[i]);
    }
    cr_assert_eq(bytes[0], bytes[1]);
    cr_assert_arr_eq(data[0], data[1], bytes[0]);
    cr_assert_eq(bytes[0], bytes[2]);
    cr_assert_neq(memcmp(data[0], data[2], bytes[0]), 0);
    for (unsigned i = 0; i < 3; i++) {
        free(data[i]);
    }
    scratch_finish(&scratch);
}

/* Weights have the mean, deviation and tails that were asked for. */
Test(synth, statistics)
{
    struct scratch scratch;
    struct slu_err err;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "model.gguf");
    struct slu_synth_params params = {.dense_type = "F32", .n_layers = 1, .n_vocab = 2000};
    cr_assert_eq(slu_synth_write(path, &params, &err), 0);
    struct slu_source *source;
    struct slu_gguf *gguf = open_gguf(path, &source);
    const struct slu_gguf_tensor *tensor = slu_gguf_find(gguf, "token_embd.weight");
    cr_assert(tensor && tensor->type == 0);
    size_t n = tensor->bytes / sizeof(float), n_beyond = 0;
    float *x = malloc(tensor->bytes);
    cr_assert_eq(source->read_at(source, tensor->offset, x, tensor->bytes, &err), 0);
    double sum = 0, squares = 0, products = 0;
    for (size_t i = 0; i < n; i++) {
        sum += x[i];
        squares += (double)x[i] * x[i];
        products += i > 0 ? (double)x[i] * x[i - 1] : 0;
        n_beyond += fabsf(x[i]) > 2;
    }
    cr_assert_float_eq(sum / (double)n, 0, 0.02);
    cr_assert_float_eq(squares / (double)n, 1, 0.02);
    cr_assert_float_eq(products / (double)n, 0, 0.02);
    cr_assert_float_eq((double)n_beyond / (double)n, 0.044, 0.006);
    free(x);
    slu_gguf_close(gguf);
    slu_source_destroy(source);
    scratch_finish(&scratch);
}

/* Parameters that make no model are refused, and leave no file. */
Test(synth, refused)
{
    static const struct slu_synth_params cases[] = {
        {.expert_type = "Q9_9"},
        {.vector_type = "Q8_0"},
        {.n_vocab = 100},
        {.n_experts = 4, .n_used = 5},
        {.n_heads = 5, .n_heads_kv = 2},
        {.arch = SLU_ARCH_QWEN3MOE, .head_dim = 3},
        {.arch = SLU_ARCH_QWEN3MOE, .has_expert_tensors = true},
        {.arch = SLU_ARCH_LLAMA, .is_lite = true},
        {.n_layers = 100000},
        {.arch = 99},
    };
    struct scratch scratch;
    scratch_init(&scratch);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct slu_err err;
        cr_assert_eq(slu_synth_write(scratch_path(&scratch, "model.gguf"), &cases[i], &err),
                     SLU_EINVAL, "case %zu", i);
        cr_assert_gt(strlen(err.text), 10);
    }
    cr_assert_eq(scratch_count(&scratch), 0);
    struct slu_err err;
    cr_assert_eq(slu_synth_write(scratch_path(&scratch, "no/model.gguf"),
                                 &(struct slu_synth_params){0}, &err),
                 SLU_EIO);
    scratch_finish(&scratch);
}

/* Tokens are all different, merges make tokens, and the template is as given. */
Test(synth, tokenizer)
{
    struct scratch scratch;
    struct slu_err err;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "model.gguf");
    struct slu_synth_params params = {.n_vocab = 9000, .n_layers = 1, .chat_template = "{{ x }}"};
    cr_assert_eq(slu_synth_write(path, &params, &err), 0);
    struct slu_source *source;
    struct slu_gguf *gguf = open_gguf(path, &source);
    const struct slu_kv *tokens = slu_kvs_find(&gguf->kvs, "tokenizer.ggml.tokens");
    cr_assert_eq(tokens->n_items, 9000);
    struct slu_str *all = calloc(9000, sizeof *all);
    size_t cursor = 0, n = 0;
    while (n < 9000 && slu_kv_next_str(tokens, &cursor, &all[n])) {
        for (size_t i = 0; i < n; i++) {
            cr_assert(all[i].len != all[n].len || memcmp(all[i].at, all[n].at, all[n].len),
                      "tokens %zu and %zu", i, n);
        }
        n++;
    }
    cr_assert_eq(n, 9000);
    const struct slu_kv *merges = slu_kvs_find(&gguf->kvs, "tokenizer.ggml.merges");
    cr_assert_eq(merges->n_items, 60);
    struct slu_str merge, template;
    cursor = 0;
    for (size_t m = 0; slu_kv_next_str(merges, &cursor, &merge); m++) {
        char joined[32];
        size_t len = 0;
        for (size_t i = 0; i < merge.len; i++) {
            if (merge.at[i] != ' ') {
                joined[len++] = merge.at[i];
            }
        }
        cr_assert_eq(len, merge.len - 1);
        cr_assert(all[256 + m].len == len && !memcmp(all[256 + m].at, joined, len));
    }
    cr_assert_eq(slu_kvs_str(&gguf->kvs, "tokenizer.chat_template", &template, &err), 0);
    cr_assert(template.len == 7 && !memcmp(template.at, "{{ x }}", 7));
    free(all);
    slu_gguf_close(gguf);
    slu_source_destroy(source);
    scratch_finish(&scratch);
}

/* Every architecture's tokenizer is one that can be used: text goes in and comes back out. */
Test(synth, tokenizers)
{
    static const char text[] = "The weather, and 12 things in it: caf\xc3\xa9!";
    struct scratch scratch;
    struct slu_err err = {0};
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "model.gguf");
    for (unsigned arch = 0; arch <= SLU_ARCH_DEEPSEEK2; arch++) {
        struct slu_synth_params params = {.arch = arch, .n_layers = 1};
        cr_assert_eq(slu_synth_write(path, &params, &err), 0, "%s", err.text);
        struct slu_source *source;
        struct slu_gguf *gguf = open_gguf(path, &source);
        struct slu_tokenizer *tokenizer;
        cr_assert_eq(slu_tokenizer_create(&gguf->kvs, &tokenizer, &err), 0, "%s", err.text);
        int32_t ids[64];
        int64_t n = slu_tokenizer_encode(tokenizer, text, sizeof text - 1, 0, ids, 64);
        cr_assert(n > 0 && n < (int64_t)sizeof text - 1, "%lld ids", (long long)n);
        char back[256] = "";
        size_t len = 0;
        for (int64_t i = 0; i < n; i++) {
            const char *piece;
            int bytes = slu_tokenizer_piece(tokenizer, ids[i], &piece);
            cr_assert_geq(bytes, 0);
            memcpy(back + len, piece, (size_t)bytes);
            len += (size_t)bytes;
        }
        /* SentencePiece puts a space before the text. */
        cr_assert_str_eq(back + (back[0] == ' '), text);
        slu_tokenizer_destroy(tokenizer);
        slu_gguf_close(gguf);
        slu_source_destroy(source);
    }
    scratch_finish(&scratch);
}

/* A writer destroyed before it has finished leaves nothing. */
Test(gguf_writer, abandoned)
{
    struct scratch scratch;
    struct slu_gguf_writer *writer;
    struct slu_err err;
    scratch_init(&scratch);
    cr_assert_eq(slu_gguf_writer_create(scratch_path(&scratch, "a.gguf"), &writer, &err), 0);
    slu_gguf_writer_u32(writer, "key", 1);
    slu_gguf_writer_tensor(writer, "t", 0, 1, (const uint64_t[]){4}, 16);
    cr_assert_eq(slu_gguf_writer_begin(writer, &err), 0);
    cr_assert_eq(slu_gguf_writer_data(writer, "0123456789abcdef", 16, &err), 0);
    slu_gguf_writer_destroy(writer);
    cr_assert_eq(scratch_count(&scratch), 0);
    slu_gguf_writer_destroy(NULL);
    scratch_finish(&scratch);
}
