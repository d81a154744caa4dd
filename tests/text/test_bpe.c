#include <criterion/criterion.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vocab_build.h"

static const struct vocab_token tokens[] = {
    {"ab", 1, 0},           /* 256 */
    {"bc", 1, 0},           /* 257 */
    {"abc", 1, 0},          /* 258 */
    {"aa", 1, 0},           /* 259 */
    {"\xc4\xa0x", 1, 0},    /* 260: " x" */
    {"xyz", 1, 0},          /* 261: no merge makes it */
    {"<|end|>", 3, 0},      /* 262 */
    {"  ", 4, 0},           /* 263: user-defined */
    {"   ", 4, 0},          /* 264 */
    {"<|mark|>", 4, 0},     /* 265: user-defined, but looks special */
    {"\xe4\xb8\xad", 4, 0}, /* 266: a character that isn't a byte's spelling */
    {"aaaa", 1, 0},         /* 267 */
    {0},
};
static const char *const merges[] = {"a b",     "b c", "ab c", "a a",   "\xc4\xa0 x", "q nothere",
                                     "nospace", " ",   "a b",  "aa aa", NULL};

static struct slu_tokenizer *create(struct meta *meta, const char *pre)
{
    meta_bpe(meta, pre, tokens, merges);
    meta_u32(meta, "tokenizer.ggml.bos_token_id", 262);
    meta_u32(meta, "tokenizer.ggml.eos_token_id", 262);
    return meta_tokenizer(meta);
}

/* Merges go by rank, the leftmost of equal ones first; spaces are part of the word after them. */
Test(bpe, merges_by_rank_then_position)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta, "gpt-2");
    check_ids(tokenizer, "abc", 3, 0, IDS(258));
    check_ids(tokenizer, "bcab", 4, 0, IDS(257, 256));
    check_ids(tokenizer, "aabc", 4, 0, IDS('a', 258));
    check_ids(tokenizer, "aaa", 3, 0, IDS(259, 'a'));
    check_ids(tokenizer, "aaaaaa", 6, 0, IDS(267, 259));
    check_ids(tokenizer, "b x", 3, 0, IDS('b', 260));
    check_ids(tokenizer, "xyz", 3, 0, IDS('x', 'y', 'z'));
    check_ids(tokenizer, "", 0, 0, (const int32_t[]){-1});
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Llama 3's pre-tokenizer takes a piece that is a token whole, and adds BOS unless told not to. */
Test(bpe, ignore_merges)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta, "llama-bpe");
    check_ids(tokenizer, "xyz", 3, 0, IDS(261));
    check_ids(tokenizer, "xyzx", 4, 0, IDS('x', 'y', 'z', 'x'));
    cr_expect(slu_tokenizer_add_bos(tokenizer));
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);

    meta_bool(&meta, "tokenizer.ggml.add_bos_token", false);
    tokenizer = create(&meta, "llama-bpe");
    cr_expect(!slu_tokenizer_add_bos(tokenizer));
    cr_expect_eq(slu_tokenizer_bos(tokenizer), 262);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Special tokens in a text are text unless asked for; what looks like a mark is special even where
 * the file calls it user-defined. */
Test(bpe, special_tokens)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta, "gpt-2");
    check_ids(tokenizer, "<|end|>", 7, 0, IDS('<', '|', 'e', 'n', 'd', '|', '>'));
    check_ids(tokenizer, "b<|end|>ab", 10, SLU_ENCODE_SPECIAL, IDS('b', 262, 256));
    check_ids(tokenizer, "<|mark|>", 8, SLU_ENCODE_SPECIAL, IDS(265));
    cr_expect_eq(slu_tokenizer_encode(tokenizer, "<|mark|>", 8, 0, NULL, 0), 8);
    cr_expect(slu_tokenizer_is_special(tokenizer, 262));
    cr_expect(slu_tokenizer_is_special(tokenizer, 265));
    cr_expect(!slu_tokenizer_is_special(tokenizer, 264));
    cr_expect(!slu_tokenizer_is_special(tokenizer, -1));
    cr_expect(!slu_tokenizer_is_special(tokenizer, 1000));
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* User-defined tokens are cut out of any text, the longest first. */
Test(bpe, user_defined_tokens)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta, "gpt-2");
    check_ids(tokenizer, "a   b", 5, 0, IDS('a', 264, 'b'));
    check_ids(tokenizer, "a     b", 7, 0, IDS('a', 264, 263, 'b'));
    check_ids(tokenizer, "\xe4\xb8\xad", 3, 0, IDS(266));
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Ids are counted past the room there is, and nothing is written beyond it. */
Test(bpe, counts_beyond_room)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta, "gpt-2");
    int32_t ids[3] = {-7, -7, -7};
    cr_expect_eq(slu_tokenizer_encode(tokenizer, "qrst", 4, 0, ids, 2), 4);
    cr_expect_eq(ids[0], 'q');
    cr_expect_eq(ids[1], 'r');
    cr_expect_eq(ids[2], -7);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Any bytes come back from their ids, whether they are UTF-8 or not. */
Test(bpe, round_trip_of_any_bytes)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta, "gpt-4o");
    uint32_t state = 7;
    for (int round = 0; round < 500; round++) {
        char text[96];
        int32_t ids[96];
        size_t len = (size_t)round % sizeof text;
        for (size_t i = 0; i < len; i++) {
            state = state * 1664525u + 1013904223u;
            unsigned high = state >> 24;
            text[i] = state & 0x10000 ? (char)high : "abcx "[high % 5];
        }
        int64_t n = slu_tokenizer_encode(tokenizer, text, len, 0, ids, 96);
        size_t at = 0;
        for (int64_t i = 0; i < n; i++) {
            const char *piece;
            int piece_len = slu_tokenizer_piece(tokenizer, ids[i], &piece);
            cr_assert(piece_len > 0 && at + (size_t)piece_len <= len);
            cr_assert_eq(memcmp(text + at, piece, (size_t)piece_len), 0);
            at += (size_t)piece_len;
        }
        cr_assert_eq(at, len);
    }
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* A megabyte in one piece merges as a short one does: in fours, and what is left. */
Test(bpe, one_long_word, .timeout = 120)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta, "gpt-2");
    const size_t len = (1 << 20) + 3;
    char *text = malloc(len);
    int32_t *ids = malloc(len * sizeof *ids);
    memset(text, 'a', len);
    int64_t n = slu_tokenizer_encode(tokenizer, text, len, 0, ids, len);
    cr_assert_eq(n, (1 << 18) + 2);
    for (int64_t i = 0; i < 1 << 18; i++) {
        cr_assert_eq(ids[i], 267);
    }
    cr_expect_eq(ids[n - 2], 259);
    cr_expect_eq(ids[n - 1], 'a');
    free(text);
    free(ids);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* Tokens are found by their bytes; pieces of ids outside the vocabulary are refused. */
Test(bpe, find_and_piece)
{
    struct meta meta = {0};
    struct slu_tokenizer *tokenizer = create(&meta, "gpt-2");
    const char *bytes = NULL;
    cr_expect_eq(slu_tokenizer_n_vocab(tokenizer), 268);
    cr_expect_eq(slu_tokenizer_find(tokenizer, " x"), 260);
    cr_expect_eq(slu_tokenizer_find(tokenizer, "<|end|>"), 262);
    cr_expect_eq(slu_tokenizer_find(tokenizer, "abcd"), -1);
    cr_expect_eq(slu_tokenizer_find(tokenizer, ""), -1);
    cr_expect_eq(slu_tokenizer_piece(tokenizer, 260, &bytes), 2);
    cr_expect_eq(memcmp(bytes, " x", 2), 0);
    cr_expect_eq(slu_tokenizer_piece(tokenizer, -1, &bytes), SLU_ERANGE);
    cr_expect_eq(slu_tokenizer_piece(tokenizer, 268, &bytes), SLU_ERANGE);
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}

/* A byte that the vocabulary lacks becomes the unknown token, or nothing if there is none. */
Test(bpe, missing_bytes)
{
    for (int has_unk = 0; has_unk < 2; has_unk++) {
        struct meta meta = {0};
        meta_str(&meta, "tokenizer.ggml.model", "gpt2");
        meta_array(&meta, "tokenizer.ggml.tokens", GGUF_STR, 3);
        meta_item_str(&meta, "a", 1);
        meta_item_str(&meta, "b", 1);
        meta_item_str(&meta, "?", 1);
        meta_array(&meta, "tokenizer.ggml.merges", GGUF_STR, 0);
        if (has_unk) {
            meta_u32(&meta, "tokenizer.ggml.unknown_token_id", 2);
        }
        struct slu_tokenizer *tokenizer = meta_tokenizer(&meta);
        if (has_unk) {
            check_ids(tokenizer, "acb", 3, 0, IDS(0, 2, 1));
        } else {
            check_ids(tokenizer, "acb", 3, 0, IDS(0, 1));
        }
        slu_tokenizer_destroy(tokenizer);
        meta_finish(&meta);
    }
}

/* A vocabulary of one word many times over is indexed in linear time, and the first one counts. */
Test(bpe, duplicate_tokens, .timeout = 60)
{
    const uint32_t n = 300000;
    struct meta meta = {0};
    meta_str(&meta, "tokenizer.ggml.model", "gpt2");
    meta_array(&meta, "tokenizer.ggml.tokens", GGUF_STR, n);
    for (uint32_t i = 0; i < n; i++) {
        meta_item_str(&meta, "a", 1);
    }
    meta_array(&meta, "tokenizer.ggml.merges", GGUF_STR, 0);
    struct slu_tokenizer *tokenizer = meta_tokenizer(&meta);
    check_ids(tokenizer, "a", 1, 0, IDS(0));
    slu_tokenizer_destroy(tokenizer);
    meta_finish(&meta);
}
