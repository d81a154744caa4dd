/*
 * Tokenizers under hostile vocabularies and texts. The first byte chooses:
 *
 *   bit 0    the rest is GGUF pairs as they stand (2 bytes of count first), then no text: creating
 *            from them must not crash, and a tokenizer that comes of it must take any text
 *   else     a built-in vocabulary; bits 1 to 4 are its pre-tokenizer, bit 5 is SLU_ENCODE_SPECIAL,
 *            bit 6 makes it SentencePiece; the rest is text, which has to come back from its ids
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/chat.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool holds)
{
    if (!holds) {
        abort();
    }
}

struct buffer {
    uint8_t bytes[32768];
    size_t len;
};

static void put(struct buffer *buffer, const void *bytes, size_t len)
{
    check(buffer->len + len <= sizeof buffer->bytes);
    memcpy(buffer->bytes + buffer->len, bytes, len);
    buffer->len += len;
}

static void put_u32(struct buffer *buffer, uint32_t value)
{
    put(buffer, &value, sizeof value);
}

static void put_str(struct buffer *buffer, const char *text, size_t len)
{
    uint64_t n = len;
    put(buffer, &n, sizeof n);
    put(buffer, text, len);
}

static void put_array(struct buffer *buffer, const char *key, uint32_t type, uint64_t n)
{
    put_str(buffer, key, strlen(key));
    put_u32(buffer, 9);
    put_u32(buffer, type);
    put(buffer, &n, sizeof n);
}

static void put_pair(struct buffer *buffer, const char *key, const char *value)
{
    put_str(buffer, key, strlen(key));
    put_u32(buffer, 8);
    put_str(buffer, value, strlen(value));
}

static const char *const words[] = {"ab", "abc",      "aa", "aaaa",    "\xc4\xa0\xc4\xa0",
                                    "he", "\xc3\xa9", "  ", "<|end|>", "<u>"};
static const uint32_t word_types[] = {1, 1, 1, 1, 1, 1, 1, 4, 3, 4};
static const char *const merges[] = {"a b", "ab c", "a a", "aa aa", "\xc4\xa0 \xc4\xa0", "h e"};
enum { N_WORDS = sizeof words / sizeof words[0], N_MERGES = sizeof merges / sizeof merges[0] };

static size_t spell(unsigned byte, char *ret_name)
{
    unsigned c = byte <= 0x20                   ? 0x100 + byte
                 : byte >= 0x7f && byte <= 0xa0 ? 0x121 + byte - 0x7f
                 : byte == 0xad                 ? 0x143
                                                : byte;
    ret_name[0] = (char)(c < 0x80 ? c : (0xc0 | c >> 6));
    ret_name[1] = (char)(0x80 | (c & 0x3f));
    return c < 0x80 ? 1 : 2;
}

static uint64_t build(struct buffer *buffer, bool spm, const char *pre)
{
    put_pair(buffer, "tokenizer.ggml.model", spm ? "llama" : "gpt2");
    put_pair(buffer, "tokenizer.ggml.pre", pre);
    put_array(buffer, "tokenizer.ggml.tokens", 8, 256 + N_WORDS);
    for (unsigned byte = 0; byte < 256; byte++) {
        char name[8];
        size_t len = spell(byte, name);
        if (spm) {
            snprintf(name, sizeof name, "<0x%02X>", byte);
            len = 6;
        }
        put_str(buffer, name, len);
    }
    for (int i = 0; i < N_WORDS; i++) {
        put_str(buffer, words[i], strlen(words[i]));
    }
    put_array(buffer, "tokenizer.ggml.token_type", 5, 256 + N_WORDS);
    for (unsigned i = 0; i < 256 + N_WORDS; i++) {
        put_u32(buffer, i >= 256 ? word_types[i - 256] : spm ? 6 : 1);
    }
    put_array(buffer, "tokenizer.ggml.scores", 6, 256 + N_WORDS);
    for (unsigned i = 0; i < 256 + N_WORDS; i++) {
        float score = -(float)(i % 7);
        put(buffer, &score, sizeof score);
    }
    put_array(buffer, "tokenizer.ggml.merges", 8, N_MERGES);
    for (int i = 0; i < N_MERGES; i++) {
        put_str(buffer, merges[i], strlen(merges[i]));
    }
    return 6;
}

static void nothing(void *arg, const char *bytes, size_t len)
{
    *(size_t *)arg += len;
    (void)bytes;
}

/* Encodes, and compares the ids' bytes with the text where the vocabulary can spell any. */
static void encode(const struct slu_tokenizer *tokenizer, const char *text, size_t len,
                   unsigned flags, bool round_trip)
{
    /* SentencePiece puts a space before what follows each special token, so that the worst text
     * gives two ids a byte. */
    size_t n_max = 2 * len + 2;
    int32_t *ids = malloc(n_max * sizeof *ids);
    check(ids != NULL);
    int64_t n = slu_tokenizer_encode(tokenizer, text, len, flags, ids, n_max);
    check(n >= 0 && (uint64_t)n <= n_max);
    struct slu_detok detok;
    size_t n_emitted = 0;
    size_t at = 0;
    slu_detok_init(&detok, tokenizer, false);
    for (int64_t i = 0; i < n; i++) {
        const char *piece;
        int piece_len = slu_tokenizer_piece(tokenizer, ids[i], &piece);
        check(piece_len >= 0);
        slu_detok_push(&detok, ids[i], nothing, &n_emitted);
        if (round_trip) {
            check(at + (size_t)piece_len <= len &&
                  memcmp(text + at, piece, (size_t)piece_len) == 0);
            at += (size_t)piece_len;
        }
    }
    slu_detok_flush(&detok, nothing, &n_emitted);
    check(!round_trip || at == len);
    free(ids);
}

static void fuzz_metadata(const uint8_t *data, size_t size)
{
    struct slu_kvs kvs;
    size_t used;
    struct slu_err err;
    if (size < 2 || slu_kvs_parse(data + 2, size - 2, (uint64_t)data[0] | (uint64_t)data[1] << 8,
                                  &kvs, &used, "fuzz", &err) < 0) {
        return;
    }
    struct slu_tokenizer *tokenizer;
    size_t bytes_max = slu_tokenizer_bytes_max(&kvs);
    if (slu_tokenizer_create(&kvs, &tokenizer, &err) == 0) {
        check(slu_tokenizer_bytes(tokenizer) <= bytes_max);
        size_t len = size < 4096 ? size : 4096;
        encode(tokenizer, (const char *)data, len, 0, false);
        encode(tokenizer, (const char *)data, len, SLU_ENCODE_SPECIAL, false);
        struct slu_message message = {SLU_ROLE_USER, (const char *)data, len};
        check(slu_chat_encode(slu_chat_detect(&kvs), tokenizer, &message, 1, NULL, 0, &err) >= 0);
        slu_tokenizer_destroy(tokenizer);
    }
    slu_kvs_finish(&kvs);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const names[16] = {
        "gpt-2",          "gpt-4o",      "llama-bpe", "qwen2",       "qwen35",  "deepseek-llm",
        "deepseek-coder", "deepseek-v3", "refact",    "falcon",      "default", "gpt-2",
        "gpt-4o",         "llama-bpe",   "qwen2",     "deepseek-llm"};
    if (size < 1) {
        return 0;
    }
    if (data[0] & 1) {
        fuzz_metadata(data + 1, size - 1);
        return 0;
    }
    bool spm = (data[0] & 0x40) != 0;
    struct buffer *buffer = calloc(1, sizeof *buffer);
    struct slu_kvs kvs;
    struct slu_tokenizer *tokenizer;
    size_t used;
    check(buffer != NULL);
    uint64_t n_pairs = build(buffer, spm, names[data[0] >> 1 & 15]);
    check(slu_kvs_parse(buffer->bytes, buffer->len, n_pairs, &kvs, &used, "built-in", NULL) == 0);
    check(slu_tokenizer_create(&kvs, &tokenizer, NULL) == 0);
    slu_kvs_finish(&kvs);
    encode(tokenizer, (const char *)data + 1, size - 1, data[0] & 0x20 ? SLU_ENCODE_SPECIAL : 0,
           !spm);
    slu_tokenizer_destroy(tokenizer);
    free(buffer);
    return 0;
}
