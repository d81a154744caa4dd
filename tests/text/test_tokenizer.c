/* What metadata are refused, and what the special ids of accepted ones are. */
#include <criterion/criterion.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vocab_build.h"

static const struct vocab_token no_tokens[] = {{0}};
static const char *const no_merges[] = {NULL};

/* Parses and creates, which has to fail with this code and a sentence that names this; the bound
 * on its memory has to be computable all the same. */
static void check_refused(struct meta *meta, int code, const char *named)
{
    struct slu_tokenizer *tokenizer = NULL;
    struct slu_err err = {0};
    meta_parse(meta);
    cr_expect_eq(slu_tokenizer_create(&meta->kvs, &tokenizer, &err), code, "%s", err.text);
    cr_expect_not_null(strstr(err.text, named), "'%s' doesn't name %s", err.text, named);
    cr_expect_null(tokenizer);
    cr_expect_gt(slu_tokenizer_bytes_max(&meta->kvs), 0);
    cr_expect_eq(slu_tokenizer_create(&meta->kvs, &tokenizer, NULL), code);
    meta_finish(meta);
}

/* Models and pre-tokenizers that aren't known are refused by name. */
Test(tokenizer, refuses_unknown_kinds)
{
    struct meta meta = {0};
    meta_str(&meta, "tokenizer.ggml.model", "bert");
    check_refused(&meta, SLU_EUNSUP, "'bert'");
    meta_bpe(&meta, "kimi-k2", no_tokens, no_merges);
    check_refused(&meta, SLU_EUNSUP, "'kimi-k2'");
}

/* Missing or ill-typed keys are refused by name. */
Test(tokenizer, refuses_missing_keys)
{
    struct meta meta = {0};
    meta_str(&meta, "general.name", "x");
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.model");
    meta_u32(&meta, "tokenizer.ggml.model", 3);
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.model");
    meta_str(&meta, "tokenizer.ggml.model", "gpt2");
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.tokens");
    meta_str(&meta, "tokenizer.ggml.model", "gpt2");
    meta_array(&meta, "tokenizer.ggml.tokens", GGUF_STR, 0);
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.tokens");
    meta_str(&meta, "tokenizer.ggml.model", "gpt2");
    meta_array(&meta, "tokenizer.ggml.tokens", GGUF_STR, 1);
    meta_item_str(&meta, "a", 1);
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.merges");
    meta_str(&meta, "tokenizer.ggml.model", "llama");
    meta_array(&meta, "tokenizer.ggml.tokens", GGUF_STR, 1);
    meta_item_str(&meta, "a", 1);
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.scores");
}

/* Arrays that are shorter than the vocabulary, or of another type, are refused. */
Test(tokenizer, refuses_inconsistent_arrays)
{
    struct meta meta = {0};
    meta_str(&meta, "tokenizer.ggml.model", "llama");
    meta_array(&meta, "tokenizer.ggml.tokens", GGUF_STR, 2);
    meta_item_str(&meta, "a", 1);
    meta_item_str(&meta, "b", 1);
    meta_array(&meta, "tokenizer.ggml.scores", GGUF_F32, 1);
    meta_item_f32(&meta, 0.0f);
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.scores");
    meta_str(&meta, "tokenizer.ggml.model", "gpt2");
    meta_array(&meta, "tokenizer.ggml.tokens", GGUF_STR, 1);
    meta_item_str(&meta, "a", 1);
    meta_array(&meta, "tokenizer.ggml.token_type", GGUF_F32, 1);
    meta_item_f32(&meta, 1.0f);
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.token_type");
}

/* Ids of special tokens have to be in the vocabulary. */
Test(tokenizer, refuses_ids_out_of_range)
{
    struct meta meta = {0};
    meta_bpe(&meta, "gpt-2", no_tokens, no_merges);
    meta_u32(&meta, "tokenizer.ggml.bos_token_id", 256);
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.bos_token_id");
    meta_bpe(&meta, "gpt-2", no_tokens, no_merges);
    meta_str(&meta, "tokenizer.ggml.eot_token_id", "end");
    check_refused(&meta, SLU_EFORMAT, "tokenizer.ggml.eot_token_id");
}

/* Tokens beyond 64 KiB are refused. */
Test(tokenizer, refuses_huge_tokens)
{
    struct meta meta = {0};
    char *name = malloc(65537);
    memset(name, 'a', 65537);
    meta_str(&meta, "tokenizer.ggml.model", "gpt2");
    meta_array(&meta, "tokenizer.ggml.tokens", GGUF_STR, 1);
    meta_item_str(&meta, name, 65537);
    meta_array(&meta, "tokenizer.ggml.merges", GGUF_STR, 0);
    check_refused(&meta, SLU_EFORMAT, "65537");
    free(name);
}

/* Odd but harmless metadata: empty tokens, merges of absent or endless names, an id of -1. */
Test(tokenizer, accepts_oddities)
{
    static const struct vocab_token tokens[] = {{"", 1, 0}, {"", 3, 0}, {"aa", 1, 0}, {0}};
    char *longest = malloc(200001);
    memset(longest, 'a', 200000);
    longest[100000] = ' ';
    longest[200000] = '\0';
    const char *const merges[] = {"", " ", "  ", "x y", longest, "a a", NULL};
    struct meta meta = {0};
    meta_bpe(&meta, "gpt-2", tokens, merges);
    meta_u32(&meta, "tokenizer.ggml.bos_token_id", UINT32_MAX);
    struct slu_tokenizer *tokenizer = meta_tokenizer(&meta);
    check_ids(tokenizer, "aaxy", 4, 0, IDS(258, 'x', 'y'));
    cr_expect_eq(slu_tokenizer_bos(tokenizer), -1);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
    free(longest);
}

/* Generation ends at the ids that the file names, and at special tokens known by name. */
Test(tokenizer, end_tokens)
{
    static const struct vocab_token tokens[] = {
        {"<stop>", 3, 0},
        {"<turn>", 3, 0},
        {"<|im_end|>", 4, 0},
        {"<|im_start|>", 3, 0},
        {"</s>", 1, 0},
        {"<|end|>", 3, 0},
        {0},
    };
    struct meta meta = {0};
    meta_bpe(&meta, "gpt-2", tokens, no_merges);
    meta_u32(&meta, "tokenizer.ggml.eos_token_id", 256);
    meta_u32(&meta, "tokenizer.ggml.eot_token_id", 257);
    struct slu_tokenizer *tokenizer = meta_tokenizer(&meta);
    cr_expect(slu_tokenizer_is_end(tokenizer, 256));
    cr_expect(slu_tokenizer_is_end(tokenizer, 257));
    cr_expect(slu_tokenizer_is_end(tokenizer, 258));
    cr_expect(!slu_tokenizer_is_end(tokenizer, 259));
    cr_expect(!slu_tokenizer_is_end(tokenizer, 260), "a word like any other");
    cr_expect(slu_tokenizer_is_end(tokenizer, 261));
    cr_expect(!slu_tokenizer_is_end(tokenizer, -1));
    cr_expect(!slu_tokenizer_is_end(tokenizer, 999));
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* gpt-oss: <|end|> closes its analysis as well, so only <|return|> and <|call|> end. */
Test(tokenizer, harmony_ends)
{
    static const struct vocab_token tokens[] = {
        {"<|end|>", 3, 0}, {"<|return|>", 3, 0}, {"<|call|>", 3, 0}, {0}};
    struct meta meta = {0};
    meta_bpe(&meta, "gpt-4o", tokens, no_merges);
    meta_u32(&meta, "tokenizer.ggml.eos_token_id", 257);
    struct slu_tokenizer *tokenizer = meta_tokenizer(&meta);
    cr_expect(!slu_tokenizer_is_end(tokenizer, 256));
    cr_expect(slu_tokenizer_is_end(tokenizer, 257));
    cr_expect(slu_tokenizer_is_end(tokenizer, 258));
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Destroying nothing is fine. */
Test(tokenizer, destroy_null)
{
    slu_tokenizer_destroy(NULL);
}
