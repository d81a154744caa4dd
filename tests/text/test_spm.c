#include <criterion/criterion.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vocab_build.h"

#define SP      "\xe2\x96\x81"
#define BYTE(b) (3 + (b))

static const struct vocab_token tokens[] = {
    {SP, 1, -10},     /* 259 */
    {"a", 1, -11},    /* 260 */
    {"b", 1, -12},    /* 261 */
    {SP "a", 1, -3},  /* 262 */
    {"ab", 1, -2},    /* 263 */
    {SP "ab", 1, -1}, /* 264 */
    {"aa", 1, -5},    /* 265 */
    {SP SP, 1, -4},   /* 266 */
    {"<tool>", 4, 0}, /* 267: user-defined */
    {0},
};

static struct slu_tokenizer *create(struct meta *meta)
{
    meta_spm(meta, tokens);
    return meta_tokenizer(meta);
}

/* The highest score merges first, the leftmost of equals; a space goes before the text. */
Test(spm, merges_by_score_then_position)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta);
    check_ids(tokenizer, "ab", 2, 0, IDS(264));
    check_ids(tokenizer, "aab", 3, 0, IDS(262, 263));
    check_ids(tokenizer, "baaa", 4, 0, IDS(259, 261, 265, 260));
    check_ids(tokenizer, " ab", 3, 0, IDS(259, 264));
    check_ids(tokenizer, "b  b", 4, 0, IDS(259, 261, 266, 261));
    check_ids(tokenizer, "", 0, 0, (const int32_t[]){-1});
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Characters that aren't tokens, and bytes that aren't characters, are spelled in byte tokens. */
Test(spm, byte_fallback)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta);
    check_ids(tokenizer, "\xc3\xa9", 2, 0, IDS(259, BYTE(0xc3), BYTE(0xa9)));
    check_ids(tokenizer, "b\xff\xe2\x82", 4, 0, IDS(259, 261, BYTE(0xff), BYTE(0xe2), BYTE(0x82)));
    check_ids(tokenizer, "b\n", 2, 0, IDS(259, 261, BYTE('\n')));
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Special and user-defined tokens stand alone, and what follows them gets its space again. */
Test(spm, special_tokens)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta);
    check_ids(tokenizer, "<s>", 3, 0, IDS(259, BYTE('<'), BYTE('s'), BYTE('>')));
    check_ids(tokenizer, "ab<s>ab", 7, SLU_ENCODE_SPECIAL, IDS(264, 1, 264));
    check_ids(tokenizer, "<tool>ab", 8, 0, IDS(267, 264));
    cr_expect_eq(slu_tokenizer_bos(tokenizer), 1);
    cr_expect(slu_tokenizer_add_bos(tokenizer));
    cr_expect(slu_tokenizer_is_end(tokenizer, 2));
    cr_expect(!slu_tokenizer_is_end(tokenizer, 1));
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* add_space_prefix false: no space is added, and none is taken away in decoding. */
Test(spm, no_space_prefix)
{
    struct meta meta = {0};
    meta_bool(&meta, "tokenizer.ggml.add_space_prefix", false);
    struct slu_tokenizer *tokenizer = create(&meta);
    check_ids(tokenizer, "ab", 2, 0, IDS(263));
    char *text = decode(tokenizer, IDS(264), 1, true, NULL);
    cr_expect_str_eq(text, " ab");
    free(text);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Decoding drops the space that encoding put first, and only that. */
Test(spm, round_trip)
{
    static const char *const texts[] = {"ab", " ab", "  a b", "a\nb", "\xf0\x9f\xa6\x99 a", "<s>"};
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta);
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        int32_t ids[64];
        int64_t n = slu_tokenizer_encode(tokenizer, texts[i], strlen(texts[i]), 0, ids, 64);
        char *text = decode(tokenizer, ids, n, true, NULL);
        cr_expect_str_eq(text, texts[i]);
        free(text);
    }
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Scores that aren't numbers don't upset anything: the ids still spell the text. */
Test(spm, not_a_number_scores)
{
    struct vocab_token odd[sizeof tokens / sizeof tokens[0]];
    memcpy(odd, tokens, sizeof tokens);
    odd[3].score = NAN;
    odd[4].score = -NAN;
    odd[5].score = INFINITY;
    odd[6].score = -INFINITY;
    struct meta meta = {0};
    meta_spm(&meta, odd);
    struct slu_tokenizer *tokenizer = meta_tokenizer(&meta);
    int32_t ids[64];
    int64_t n = slu_tokenizer_encode(tokenizer, "abaab aa ab", 11, 0, ids, 64);
    char *text = decode(tokenizer, ids, n, true, NULL);
    cr_expect_str_eq(text, "abaab aa ab");
    free(text);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* A megabyte of one letter merges in pairs. */
Test(spm, long_text, .timeout = 120)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta);
    const size_t len = 1 << 20;
    char *text = malloc(len);
    memset(text, 'a', len);
    text[0] = 'b';
    /* The space, the b, and the a's in twos from the left with one over. */
    cr_expect_eq(slu_tokenizer_encode(tokenizer, text, len, 0, NULL, 0), 2 + (1 << 19));
    free(text);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}
