#include <criterion/criterion.h>

#include <stdlib.h>
#include <string.h>

#include "vocab_build.h"

static const struct vocab_token tokens[] = {
    {"he", 1, 0},                       /* 256 */
    {"<|end|>", 3, 0},                  /* 257 */
    {"\xc3\xb0\xc5\x81\xc2\xa6", 1, 0}, /* 258: f0 9f a6, three bytes of an emoji */
    {"\xc4\xbb"
     "ok",
     1, 0}, /* 259: 99 and "ok" */
    {0},
};
static const char *const merges[] = {NULL};

struct calls {
    char text[256];
    size_t len;
    size_t n;
};

static void record(void *arg, const char *bytes, size_t len)
{
    struct calls *calls = arg;
    cr_assert(len > 0 && calls->len + len < sizeof calls->text);
    memcpy(calls->text + calls->len, bytes, len);
    calls->len += len;
    calls->n++;
}

/* Half a character is held until the rest comes, and goes out with it. */
Test(detok, holds_half_characters)
{
    struct meta meta = {0};
    meta_bpe(&meta, "gpt-2", tokens, merges);
    struct slu_tokenizer *tokenizer = meta_tokenizer(&meta);
    struct slu_detok detok;
    struct calls calls = {0};
    slu_detok_init(&detok, tokenizer, true);
    slu_detok_push(&detok, 256, record, &calls);
    cr_expect_str_eq(calls.text, "he");
    slu_detok_push(&detok, 258, record, &calls);
    cr_expect_eq(calls.len, 2);
    slu_detok_push(&detok, 259, record, &calls);
    cr_expect_str_eq(calls.text, "he\xf0\x9f\xa6\x99ok");
    slu_detok_flush(&detok, record, &calls);
    cr_expect_eq(calls.len, 8);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Bytes that can't become a character any more, and half ones at the end, are U+FFFD. */
Test(detok, replaces_broken_bytes)
{
    static const struct {
        int32_t ids[6];
        const char *text;
    } cases[] = {
        {{0xff, 'a', -1},
         "\xef\xbf\xbd"
         "a"},
        {{0xe2, 0x82, -1}, "\xef\xbf\xbd"},
        {{0xe2, 0x82, 'b', -1},
         "\xef\xbf\xbd"
         "b"},
        {{0xf0, 0x9f, 0xc3, 0xa9, -1}, "\xef\xbf\xbd\xc3\xa9"},
        {{0xed, 0xa0, 0x80, -1}, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {{0xc0, 0x80, -1}, "\xef\xbf\xbd\xef\xbf\xbd"},
        {{258, 'z', -1},
         "\xef\xbf\xbd"
         "z"},
    };
    struct meta meta = {0};
    meta_bpe(&meta, "gpt-2", tokens, merges);
    struct slu_tokenizer *tokenizer = meta_tokenizer(&meta);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int64_t n = 0;
        while (cases[i].ids[n] >= 0) {
            n++;
        }
        char *text = decode(tokenizer, cases[i].ids, n, true, NULL);
        cr_expect_str_eq(text, cases[i].text, "case %zu: %s", i, text);
        free(text);
    }
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Special tokens are left out or given by name; ids outside the vocabulary emit nothing. */
Test(detok, special_and_unknown_ids)
{
    struct meta meta = {0};
    meta_bpe(&meta, "gpt-2", tokens, merges);
    struct slu_tokenizer *tokenizer = meta_tokenizer(&meta);
    const int32_t ids[] = {256, 257, -1, 260, 1 << 30, 'y'};
    char *text = decode(tokenizer, ids, 6, true, NULL);
    cr_expect_str_eq(text, "hey");
    free(text);
    text = decode(tokenizer, ids, 6, false, NULL);
    cr_expect_str_eq(text, "he<|end|>y");
    free(text);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}
