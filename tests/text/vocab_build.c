#include "vocab_build.h"

#include <criterion/criterion.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put(struct meta *meta, const void *bytes, size_t len)
{
    if (meta->bytes + len > meta->bytes_max) {
        meta->bytes_max = 2 * (meta->bytes + len);
        meta->data = realloc(meta->data, meta->bytes_max);
        cr_assert_not_null(meta->data);
    }
    if (len > 0) {
        memcpy(meta->data + meta->bytes, bytes, len);
    }
    meta->bytes += len;
}

static void put_u64(struct meta *meta, uint64_t value)
{
    put(meta, &value, sizeof value);
}

void meta_item_u32(struct meta *meta, uint32_t value)
{
    put(meta, &value, sizeof value);
}

void meta_item_f32(struct meta *meta, float value)
{
    put(meta, &value, sizeof value);
}

void meta_item_str(struct meta *meta, const char *value, size_t len)
{
    put_u64(meta, len);
    put(meta, value, len);
}

static void put_key(struct meta *meta, const char *key, uint32_t type)
{
    meta_item_str(meta, key, strlen(key));
    meta_item_u32(meta, type);
    meta->n_pairs++;
}

void meta_str(struct meta *meta, const char *key, const char *value)
{
    put_key(meta, key, GGUF_STR);
    meta_item_str(meta, value, strlen(value));
}

void meta_u32(struct meta *meta, const char *key, uint32_t value)
{
    put_key(meta, key, GGUF_U32);
    meta_item_u32(meta, value);
}

void meta_bool(struct meta *meta, const char *key, bool value)
{
    uint8_t byte = value;
    put_key(meta, key, GGUF_BOOL);
    put(meta, &byte, 1);
}

void meta_array(struct meta *meta, const char *key, uint32_t gguf_type, uint64_t n)
{
    put_key(meta, key, GGUF_ARRAY);
    meta_item_u32(meta, gguf_type);
    put_u64(meta, n);
}

void meta_parse(struct meta *meta)
{
    struct slu_err err = {0};
    size_t used;
    int rc = slu_kvs_parse(meta->data, meta->bytes, meta->n_pairs, &meta->kvs, &used, "test", &err);
    cr_assert_eq(rc, 0, "%s", err.text);
    cr_assert_eq(used, meta->bytes);
}

void meta_finish(struct meta *meta)
{
    slu_kvs_finish(&meta->kvs);
    free(meta->data);
    memset(meta, 0, sizeof *meta);
}

/* GPT-2's spelling of a byte. Returns its length. */
static size_t spell(unsigned byte, char *ret_name)
{
    unsigned c = byte;
    if (byte <= 0x20) {
        c = 0x100 + byte;
    } else if (byte >= 0x7f && byte <= 0xa0) {
        c = 0x121 + byte - 0x7f;
    } else if (byte == 0xad) {
        c = 0x143;
    }
    if (c < 0x80) {
        ret_name[0] = (char)c;
        return 1;
    }
    ret_name[0] = (char)(0xc0 | c >> 6);
    ret_name[1] = (char)(0x80 | (c & 0x3f));
    return 2;
}

static uint64_t count(const struct vocab_token *tokens)
{
    uint64_t n = 0;
    while (tokens[n].name) {
        n++;
    }
    return n;
}

static void put_types(struct meta *meta, const struct vocab_token *tokens)
{
    for (size_t i = 0; tokens[i].name; i++) {
        meta_item_u32(meta, (uint32_t)(tokens[i].type ? tokens[i].type : 1));
    }
}

void meta_bpe(struct meta *meta, const char *pre, const struct vocab_token *tokens,
              const char *const *merges)
{
    meta_str(meta, "tokenizer.ggml.model", "gpt2");
    meta_str(meta, "tokenizer.ggml.pre", pre);
    meta_array(meta, "tokenizer.ggml.tokens", GGUF_STR, 256 + count(tokens));
    for (unsigned byte = 0; byte < 256; byte++) {
        char name[2];
        size_t len = spell(byte, name);
        meta_item_str(meta, name, len);
    }
    for (size_t i = 0; tokens[i].name; i++) {
        meta_item_str(meta, tokens[i].name, strlen(tokens[i].name));
    }
    meta_array(meta, "tokenizer.ggml.token_type", GGUF_I32, 256 + count(tokens));
    for (unsigned byte = 0; byte < 256; byte++) {
        meta_item_u32(meta, 1);
    }
    put_types(meta, tokens);
    uint64_t n_merges = 0;
    while (merges[n_merges]) {
        n_merges++;
    }
    meta_array(meta, "tokenizer.ggml.merges", GGUF_STR, n_merges);
    for (uint64_t i = 0; i < n_merges; i++) {
        meta_item_str(meta, merges[i], strlen(merges[i]));
    }
}

void meta_spm(struct meta *meta, const struct vocab_token *tokens)
{
    static const struct vocab_token first[] = {{"<unk>", 2, 0}, {"<s>", 3, 0}, {"</s>", 3, 0}, {0}};
    uint64_t n = 3 + 256 + count(tokens);
    meta_str(meta, "tokenizer.ggml.model", "llama");
    meta_array(meta, "tokenizer.ggml.tokens", GGUF_STR, n);
    for (size_t i = 0; first[i].name; i++) {
        meta_item_str(meta, first[i].name, strlen(first[i].name));
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", byte);
        meta_item_str(meta, name, 6);
    }
    for (size_t i = 0; tokens[i].name; i++) {
        meta_item_str(meta, tokens[i].name, strlen(tokens[i].name));
    }
    meta_array(meta, "tokenizer.ggml.token_type", GGUF_I32, n);
    put_types(meta, first);
    for (unsigned byte = 0; byte < 256; byte++) {
        meta_item_u32(meta, 6);
    }
    put_types(meta, tokens);
    meta_array(meta, "tokenizer.ggml.scores", GGUF_F32, n);
    for (unsigned i = 0; i < 3 + 256; i++) {
        meta_item_f32(meta, 0.0f);
    }
    for (size_t i = 0; tokens[i].name; i++) {
        meta_item_f32(meta, tokens[i].score);
    }
}

struct slu_tokenizer *meta_tokenizer(struct meta *meta)
{
    struct slu_tokenizer *tokenizer = NULL;
    struct slu_err err = {0};
    meta_parse(meta);
    int rc = slu_tokenizer_create(&meta->kvs, &tokenizer, &err);
    cr_assert_eq(rc, 0, "%s", err.text);
    cr_assert_str_empty(err.text);
    cr_assert_leq(slu_tokenizer_bytes(tokenizer), slu_tokenizer_bytes_max(&meta->kvs));
    return tokenizer;
}

void check_ids(const struct slu_tokenizer *tokenizer, const char *text, size_t len, unsigned flags,
               const int32_t *ids)
{
    int32_t got[256];
    int64_t n = slu_tokenizer_encode(tokenizer, text, len, flags, got, 256);
    int64_t n_expected = 0;
    while (ids[n_expected] >= 0) {
        n_expected++;
    }
    cr_expect_eq(n, n_expected, "'%s': %d ids, not %d", text, (int)n, (int)n_expected);
    for (int64_t i = 0; i < n && i < n_expected; i++) {
        cr_expect_eq(got[i], ids[i], "'%s': id %d is %d, not %d", text, (int)i, got[i], ids[i]);
    }
}

struct text {
    char *at;
    size_t len;
};

static void append(void *arg, const char *bytes, size_t len)
{
    struct text *text = arg;
    text->at = realloc(text->at, text->len + len + 1);
    cr_assert_not_null(text->at);
    memcpy(text->at + text->len, bytes, len);
    text->len += len;
    text->at[text->len] = '\0';
}

char *decode(const struct slu_tokenizer *tokenizer, const int32_t *ids, int64_t n,
             bool skip_special, size_t *ret_len)
{
    struct text text = {.at = calloc(1, 1)};
    struct slu_detok detok;
    slu_detok_init(&detok, tokenizer, skip_special);
    for (int64_t i = 0; i < n; i++) {
        slu_detok_push(&detok, ids[i], append, &text);
    }
    slu_detok_flush(&detok, append, &text);
    if (ret_len) {
        *ret_len = text.len;
    }
    return text.at;
}
