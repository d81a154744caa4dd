#include <criterion/criterion.h>

#include <stdlib.h>
#include <string.h>

#include "text/text_internal.h"

struct pieces {
    char text[512]; /* joined with | */
    size_t len;
};

static int join(void *arg, const char *word, size_t len)
{
    struct pieces *pieces = arg;
    cr_assert_lt(pieces->len + len + 1, sizeof pieces->text);
    if (pieces->len > 0) {
        pieces->text[pieces->len++] = '|';
    }
    memcpy(pieces->text + pieces->len, word, len);
    pieces->len += len;
    return 0;
}

static void init(struct slu_pretokenizer *pre, const char *name)
{
    struct slu_err err = {0};
    int rc = slu_pretokenizer_init(pre, (struct slu_str){name, strlen(name)}, &err);
    cr_assert_eq(rc, 0, "%s", err.text);
    cr_assert_leq(slu_pretokenizer_bytes(pre), slu_pretokenizer_bytes_max());
}

static void check(const char *name, const char *text, const char *expected)
{
    struct slu_pretokenizer pre;
    struct pieces pieces = {0};
    init(&pre, name);
    cr_assert_eq(slu_pretokenize(&pre, text, strlen(text), join, &pieces), 0);
    cr_expect_str_eq(pieces.text, expected, "%s: '%s', not '%s'", name, pieces.text, expected);
    slu_pretokenizer_finish(&pre);
}

static const char *const all[] = {
    "default", "gpt-2",  "refact",       "falcon",         "llama-bpe",   "qwen2",
    "qwen35",  "gpt-4o", "deepseek-llm", "deepseek-coder", "deepseek-v3",
};

/* GPT-2's: contractions, a space with the word after it, runs of spaces but for the last. */
Test(pretokenize, gpt_2)
{
    check("gpt-2", "Hello  world's 123!\n", "Hello| | world|'s| 123|!|\n");
    check("gpt-2", "we'VE   ", "we|'|VE|   ");
    check("olmo", "x\n\n  y", "x|\n\n | y");
}

/* What is white space is Unicode's property: U+00A0 is, U+180E isn't. */
Test(pretokenize, white_space)
{
    check("gpt-2",
          "a\xc2\xa0"
          "b",
          "a|\xc2\xa0|b");
    check("gpt-2",
          "a \xe1\xa0\x8e"
          "b",
          "a| \xe1\xa0\x8e|b");
}

/* Digits one by one before GPT-2's expression. */
Test(pretokenize, refact)
{
    check("refact", "a 123", "a| |1|2|3");
    check("command-r", "x12 y", "x|1|2| y");
}

/* Llama 3's: contractions in either case, three digits at most, line ends with what is before. */
Test(pretokenize, llama_bpe)
{
    check("llama-bpe", "I'VE 12345x\r\n\n  y", "I|'VE| |123|45|x|\r\n\n| | y");
    check("llama-bpe", "(foo);\n\n\tbar", "(foo|);\n\n|\tbar");
    check("llama-bpe", "e\xcc\x81x", "e|\xcc\x81x");
}

/* Qwen2's: as Llama 3's, but each digit alone. */
Test(pretokenize, qwen2)
{
    check("qwen2", "12ab don't", "1|2|ab| don|'t");
    check("qwen2", " \n \n x", " \n \n| x");
    check("qwen35", "e\xcc\x81x1", "e\xcc\x81x|1");
}

/* gpt-4o's: words change at a capital, keep their marks and contractions, slashes go with line
 * ends; other scripts' capitals count as well as Latin ones. */
Test(pretokenize, gpt_4o)
{
    check("gpt-4o", "HTTPServer camelCase'LL 1234/\n", "HTTPServer| camel|Case'LL| |123|4|/\n");
    check("gpt-4o", "e\xcc\x81x", "e\xcc\x81x");
    check("gpt-4o", "\xd0\xbc\xd0\xb8\xd1\x80\xd0\x9c\xd0\xb8\xd1\x80",
          "\xd0\xbc\xd0\xb8\xd1\x80|\xd0\x9c\xd0\xb8\xd1\x80");
}

/* DeepSeek's six passes: line ends, cased letters, punctuation, trailing space, CJK, digits. */
Test(pretokenize, deepseek_llm)
{
    check("deepseek-llm", "a12b\n\xe4\xb8\xad\xe6\x96\x87 x  ",
          "a|1|2|b|\n|\xe4\xb8\xad\xe6\x96\x87| x|  ");
    check("deepseek-llm", "foo (bar)\t ", "foo| (|bar|)|\t ");
}

/* DeepSeek Coder's: all letters, all punctuation; symbols keep their space. */
Test(pretokenize, deepseek_coder)
{
    check("deepseek-coder", "x = y1\xe4\xb8\xad", "x| =| y|1|\xe4\xb8\xad");
    check("deepseek-coder", "a.b\n\n", "a|.|b|\n|\n");
}

/* DeepSeek V3's: three digits, CJK, then words with the punctuation before them. */
Test(pretokenize, deepseek_v3)
{
    check("deepseek-v3", "1234 \xe3\x81\x82\xe3\x81\x84x.foo\n",
          "123|4| |\xe3\x81\x82\xe3\x81\x84|x|.foo|\n");
}

/* The default: punctuation apart, digits in threes. */
Test(pretokenize, default_and_falcon)
{
    check("default", "ab+cd 12345", "ab|+|cd| |123|45");
    check("falcon", "a`b 1234", "a|`|b| |123|4");
}

/* A name that isn't known is refused, and the sentence says which. */
Test(pretokenize, unknown_name)
{
    struct slu_pretokenizer pre;
    struct slu_err err = {0};
    struct slu_str name = {"kimi-k2", 7};
    cr_assert_eq(slu_pretokenizer_init(&pre, name, &err), SLU_EUNSUP);
    cr_expect_not_null(strstr(err.text, "'kimi-k2'"), "%s", err.text);
    cr_assert_eq(slu_pretokenizer_init(&pre, (struct slu_str){"", 0}, &err), SLU_EUNSUP);
}

/* Bytes that aren't UTF-8 are matched as U+FFFD and come out as they were. */
Test(pretokenize, invalid_utf8)
{
    check("gpt-2", "ab\xff\xfe c\xe2\x82", "ab|\xff\xfe| c|\xe2\x82");
    check("llama-bpe", "x\xed\xa0\x80y\n", "x|\xed\xa0\x80|y|\n");
}

struct walk {
    const char *at;
    size_t n;
};

static int walk(void *arg, const char *word, size_t len)
{
    struct walk *walk = arg;
    cr_assert_eq(walk->at, word);
    cr_assert_gt(len, 0);
    walk->at += len;
    walk->n++;
    return 0;
}

/* Whatever the bytes, the pieces are the text, one after another. */
Test(pretokenize, pieces_cover_any_bytes)
{
    static const char alphabet[] = "aZ1 '\n\r\t.-\xe4\xb8\xad\xcc\x81\xf0\x9f\xa6\x99\xff\xc2\xa0s";
    char text[64];
    uint32_t state = 1;
    for (size_t f = 0; f < sizeof all / sizeof all[0]; f++) {
        struct slu_pretokenizer pre;
        init(&pre, all[f]);
        for (int round = 0; round < 2000; round++) {
            size_t len = round % sizeof text;
            for (size_t i = 0; i < len; i++) {
                state = state * 1664525u + 1013904223u;
                text[i] = alphabet[(state >> 16) % (sizeof alphabet - 1)];
            }
            struct walk seen = {.at = text};
            cr_assert_eq(slu_pretokenize(&pre, text, len, walk, &seen), 0);
            cr_assert_eq(seen.at, text + len, "%s", all[f]);
        }
        slu_pretokenizer_finish(&pre);
    }
}

/* A megabyte of what makes backtracking matchers quadratic is done at all. */
Test(pretokenize, long_runs_terminate, .timeout = 300)
{
    static const char *const units[] = {" ", "A", "\t\n", "'", "\xe4\xb8\xad", "1", "\xff", "\x01"};
    const size_t len = 1 << 20;
    char *text = malloc(len);
    for (size_t u = 0; u < sizeof units / sizeof units[0]; u++) {
        for (size_t i = 0; i < len; i++) {
            text[i] = units[u][i % strlen(units[u])];
        }
        text[len - 1] = 'x';
        for (size_t f = 0; f < sizeof all / sizeof all[0]; f++) {
            struct slu_pretokenizer pre;
            struct walk seen = {.at = text};
            init(&pre, all[f]);
            cr_assert_eq(slu_pretokenize(&pre, text, len, walk, &seen), 0);
            cr_assert_eq(seen.at, text + len);
            slu_pretokenizer_finish(&pre);
        }
    }
    free(text);
}
