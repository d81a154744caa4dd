/*
 * The vocabulary: tokens' bytes, kinds, and the hash table that finds them by their bytes.
 *
 * A BPE file spells bytes as printable characters (GPT-2's table); they are turned back into bytes
 * once, here, and so is SentencePiece's U+2581 for the space. What the pool holds is therefore
 * what a token stands for, and encoding compares it with the text as it is.
 */
#include "text/text_internal.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* tokenizer.ggml.token_type */
enum {
    TYPE_NORMAL = 1,
    TYPE_UNKNOWN = 2,
    TYPE_CONTROL = 3,
    TYPE_USER_DEFINED = 4,
    TYPE_UNUSED = 5,
    TYPE_BYTE = 6,
};

/* Tokens at which generation ends, whatever the metadata say: converters often name only one of
 * a model's several. */
static const char *const end_names[] = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "</s>",
    "<end_of_turn>",
    "<eos>",
    "<EOT>",
    "<|EOT|>",
    "<\xef\xbd\x9c"
    "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>",
};

uint32_t slu_slots_for(uint64_t n)
{
    uint32_t slots = 8;
    while (slots < 2 * n) {
        slots *= 2;
    }
    return slots;
}

/* The byte that a character stands for in GPT-2's table, or -1. Printable Latin-1 characters are
 * themselves; the 68 others are U+0100 and up, in order. */
static int bytelevel_byte(uint32_t c)
{
    if ((c >= 0x21 && c <= 0x7e) || (c >= 0xa1 && c <= 0xff && c != 0xad)) {
        return (int)c;
    }
    if (c >= 0x100 && c <= 0x120) {
        return (int)(c - 0x100);
    }
    if (c >= 0x121 && c <= 0x142) {
        return (int)(c - 0x121 + 0x7f);
    }
    return c == 0x143 ? 0xad : -1;
}

int64_t slu_bytelevel_decode(const char *name, size_t len, char *ret_bytes)
{
    const unsigned char *at = (const unsigned char *)name;
    int64_t n = 0;
    for (size_t i = 0; i < len;) {
        unsigned step = slu_utf8_len(at + i, len - i);
        if (step != 1 && step != 2) {
            return -1;
        }
        uint32_t c = step == 1 ? at[i] : (at[i] & 0x1fu) << 6 | (at[i + 1] & 0x3fu);
        int byte = bytelevel_byte(c);
        if (byte < 0) {
            return -1;
        }
        ret_bytes[n++] = (char)byte;
        i += step;
    }
    return n;
}

static uint64_t hash(const struct slu_tokenizer *tokenizer, const char *bytes, size_t len)
{
    return XXH3_64bits_withSeed(bytes, len, tokenizer->hash_seed);
}

static bool is_token(const struct slu_tokenizer *tokenizer, uint32_t id, const char *bytes,
                     size_t len)
{
    const uint32_t *starts = tokenizer->starts;
    return starts[id + 1] - starts[id] == len &&
           memcmp(tokenizer->pool + starts[id], bytes, len) == 0;
}

int32_t slu_vocab_find(const struct slu_tokenizer *tokenizer, const char *bytes, size_t len,
                       enum slu_token_kind kind)
{
    uint64_t h = hash(tokenizer, bytes, len);
    uint32_t tag = (uint32_t)(h >> 56);
    for (uint32_t i = (uint32_t)h & tokenizer->name_mask; tokenizer->name_slots[i] != 0;
         i = (i + 1) & tokenizer->name_mask) {
        uint32_t slot = tokenizer->name_slots[i];
        uint32_t id = (slot & 0xffffffu) - 1;
        if (slot >> 24 == tag && slu_vocab_kind(tokenizer, id) == kind &&
            is_token(tokenizer, id, bytes, len)) {
            return (int32_t)id;
        }
    }
    return -1;
}

/* The first of several tokens of one kind with the same bytes is the one that is found; the others
 * aren't entered, so that a vocabulary of one word repeated doesn't make a chain. */
static void insert(struct slu_tokenizer *tokenizer, uint32_t id)
{
    const char *bytes = tokenizer->pool + tokenizer->starts[id];
    size_t len = tokenizer->starts[id + 1] - tokenizer->starts[id];
    if (len == 0 || slu_vocab_find(tokenizer, bytes, len, slu_vocab_kind(tokenizer, id)) >= 0) {
        return;
    }
    uint64_t h = hash(tokenizer, bytes, len);
    uint32_t i = (uint32_t)h & tokenizer->name_mask;
    while (tokenizer->name_slots[i] != 0) {
        i = (i + 1) & tokenizer->name_mask;
    }
    tokenizer->name_slots[i] = (uint32_t)(h >> 56) << 24 | (id + 1);
}

static bool starts_with(const char *text, size_t len, const char *prefix)
{
    size_t n = strlen(prefix);
    return len >= n && memcmp(text, prefix, n) == 0;
}

static bool ends_with(const char *text, size_t len, const char *suffix)
{
    size_t n = strlen(suffix);
    return len >= n && memcmp(text + len - n, suffix, n) == 0;
}

/* Converters have marked template marks as user-defined, which would let anyone's text spell
 * them: <|...|> and DeepSeek's fullwidth form are always special. */
static bool looks_special(const char *name, size_t len)
{
    return len >= 5 &&
           ((starts_with(name, len, "<|") && ends_with(name, len, "|>")) ||
            (starts_with(name, len, "<\xef\xbd\x9c") && ends_with(name, len, "\xef\xbd\x9c>")));
}

static bool is_end_name(const char *name, size_t len)
{
    for (size_t i = 0; i < sizeof end_names / sizeof end_names[0]; i++) {
        if (strlen(end_names[i]) == len && memcmp(end_names[i], name, len) == 0) {
            return true;
        }
    }
    return false;
}

/* <0x0A> */
static int byte_token_value(const char *name, size_t len)
{
    int value = 0;
    if (len != 6 || memcmp(name, "<0x", 3) != 0 || name[5] != '>') {
        return -1;
    }
    for (int i = 3; i < 5; i++) {
        char c = name[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                           : -1;
        if (digit < 0) {
            return -1;
        }
        value = value * 16 + digit;
    }
    return value;
}

static size_t unescape_space(const char *name, size_t len, char *ret_bytes)
{
    size_t n = 0;
    for (size_t i = 0; i < len;) {
        if (len - i >= 3 && memcmp(name + i, "\xe2\x96\x81", 3) == 0) {
            ret_bytes[n++] = ' ';
            i += 3;
        } else {
            ret_bytes[n++] = name[i++];
        }
    }
    return n;
}

/* Writes the bytes that a name stands for and decides its kind. Returns their number. */
static size_t read_token(struct slu_tokenizer *tokenizer, uint32_t id, struct slu_str name,
                         int64_t type, char *ret_bytes)
{
    enum slu_token_kind kind = SLU_TOKEN_TEXT;
    size_t n = name.len;
    int byte = -1;
    bool end = is_end_name(name.at, name.len) && type != TYPE_NORMAL;
    if (looks_special(name.at, name.len)) {
        end = is_end_name(name.at, name.len);
        kind = SLU_TOKEN_SPECIAL;
    } else if (type == TYPE_CONTROL || type == TYPE_UNKNOWN || end) {
        kind = SLU_TOKEN_SPECIAL;
    } else if (type == TYPE_USER_DEFINED) {
        kind = SLU_TOKEN_USER;
    } else if (type == TYPE_BYTE && (byte = byte_token_value(name.at, name.len)) >= 0) {
        kind = SLU_TOKEN_OTHER;
    }
    if (byte >= 0) {
        ret_bytes[0] = (char)byte;
        n = 1;
        if (tokenizer->byte_ids[byte] < 0) {
            tokenizer->byte_ids[byte] = (int32_t)id;
        }
    } else if (kind == SLU_TOKEN_TEXT && tokenizer->is_bpe) {
        int64_t decoded = slu_bytelevel_decode(name.at, name.len, ret_bytes);
        if (decoded < 0) {
            kind = SLU_TOKEN_OTHER;
            memcpy(ret_bytes, name.at, name.len);
        } else {
            n = (size_t)decoded;
        }
    } else if (kind == SLU_TOKEN_TEXT) {
        n = unescape_space(name.at, name.len, ret_bytes);
    } else if (name.len > 0) {
        memcpy(ret_bytes, name.at, name.len);
    }
    tokenizer->attrs[id] = (uint8_t)(kind | (end ? SLU_TOKEN_END : 0));
    return n;
}

static int find_tokens(const struct slu_kvs *kvs, const struct slu_kv **ret_tokens,
                       struct slu_err *err)
{
    const struct slu_kv *tokens = slu_kvs_find(kvs, "tokenizer.ggml.tokens");
    if (!tokens || tokens->type != SLU_KV_ARRAY || tokens->item_type != SLU_KV_STRING) {
        return slu_err_set(err, SLU_EFORMAT,
                           "tokenizer.ggml.tokens: there is no such array of strings");
    }
    if (tokens->n_items == 0 || tokens->n_items > SLU_TEXT_INDEX_MAX) {
        return slu_err_set(err, SLU_EFORMAT,
                           "tokenizer.ggml.tokens: %llu tokens, where 1 to %u can be",
                           (unsigned long long)tokens->n_items, SLU_TEXT_INDEX_MAX);
    }
    if (tokens->items_bytes > SLU_VOCAB_BYTES_MAX) {
        return slu_err_set(err, SLU_EFORMAT,
                           "tokenizer.ggml.tokens: %zu bytes, where at most %u can be",
                           tokens->items_bytes, SLU_VOCAB_BYTES_MAX);
    }
    *ret_tokens = tokens;
    return SLU_OK;
}

/* A numeric array with an item for each token; *ret_array is NULL if there is none. */
static int find_numbers(const struct slu_kvs *kvs, const char *key, bool floats, uint64_t n_tokens,
                        const struct slu_kv **ret_array, struct slu_err *err)
{
    const struct slu_kv *array = slu_kvs_find(kvs, key);
    *ret_array = array;
    if (!array) {
        return SLU_OK;
    }
    bool is_float = array->item_type == SLU_KV_F32 || array->item_type == SLU_KV_F64;
    bool is_integer = array->item_type != SLU_KV_STRING && array->item_type != SLU_KV_ARRAY &&
                      array->item_type != SLU_KV_BOOL && !is_float;
    if (array->type != SLU_KV_ARRAY || !(is_integer || (floats && is_float))) {
        return slu_err_set(err, SLU_EFORMAT, "%s: not an array of numbers", key);
    }
    if (array->n_items < n_tokens) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %llu items for %llu tokens", key,
                           (unsigned long long)array->n_items, (unsigned long long)n_tokens);
    }
    return SLU_OK;
}

static int read_tokens(struct slu_tokenizer *tokenizer, const struct slu_kv *tokens,
                       const struct slu_kv *types, const struct slu_kv *scores, struct slu_err *err)
{
    size_t cursor = 0;
    size_t at = 0;
    struct slu_str name;
    for (uint32_t id = 0; id < tokenizer->n_vocab; id++) {
        if (!slu_kv_next_str(tokens, &cursor, &name)) {
            return slu_err_set(err, SLU_EFORMAT, "tokenizer.ggml.tokens: ends at token %u", id);
        }
        if (name.len > SLU_TOKEN_BYTES_MAX) {
            return slu_err_set(err, SLU_EFORMAT,
                               "tokenizer.ggml.tokens: token %u is %zu bytes long, more than %u",
                               id, name.len, SLU_TOKEN_BYTES_MAX);
        }
        int64_t type = types ? slu_kv_item_i64(types, id) : TYPE_NORMAL;
        tokenizer->starts[id] = (uint32_t)at;
        at += read_token(tokenizer, id, name, type, tokenizer->pool + at);
        tokenizer->starts[id + 1] = (uint32_t)at;
        if (tokenizer->scores) {
            tokenizer->scores[id] = scores ? (float)slu_kv_item_f64(scores, id) : 0.0f;
        }
    }
    tokenizer->pool_bytes = at;
    return SLU_OK;
}

static void index_tokens(struct slu_tokenizer *tokenizer)
{
    for (uint32_t id = 0; id < tokenizer->n_vocab; id++) {
        insert(tokenizer, id);
        enum slu_token_kind kind = slu_vocab_kind(tokenizer, id);
        const unsigned char *bytes = (unsigned char *)tokenizer->pool + tokenizer->starts[id];
        uint32_t len = tokenizer->starts[id + 1] - tokenizer->starts[id];
        if (kind == SLU_TOKEN_TEXT) {
            if (len > tokenizer->text_bytes_max) {
                tokenizer->text_bytes_max = len;
            }
            /* A BPE vocabulary's bytes are text tokens of length 1, SentencePiece's are not: there
             * the character "a" and the byte <0x61> differ. */
            if (tokenizer->is_bpe && len == 1 && tokenizer->byte_ids[bytes[0]] < 0) {
                tokenizer->byte_ids[bytes[0]] = (int32_t)id;
            }
        } else if (kind != SLU_TOKEN_OTHER && len > 0 && len <= SLU_MARK_BYTES_MAX) {
            uint64_t *lengths = tokenizer->mark_lengths[kind == SLU_TOKEN_SPECIAL][bytes[0]];
            lengths[len / 64] |= 1ull << len % 64;
        }
    }
}

static int read_id(const struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs,
                   const char *key, int32_t *ret_id, struct slu_err *err)
{
    uint64_t id;
    int rc = slu_kvs_u64(kvs, key, &id, err);
    if (rc == SLU_ENOENT) {
        return SLU_OK;
    }
    if (rc < 0) {
        /* -1 for "none" has been seen in files, where the specification asks for unsigned. */
        const struct slu_kv *kv = slu_kvs_find(kvs, key);
        if (kv && kv->type != SLU_KV_ARRAY && kv->type != SLU_KV_STRING) {
            *ret_id = -1;
            return SLU_OK;
        }
        return rc;
    }
    if (id == UINT32_MAX) {
        *ret_id = -1;
        return SLU_OK;
    }
    if (id >= tokenizer->n_vocab) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %llu, in a vocabulary of %u tokens", key,
                           (unsigned long long)id, tokenizer->n_vocab);
    }
    *ret_id = (int32_t)id;
    return SLU_OK;
}

/* gpt-oss ends every message with <|end|>, those of its analysis too, and only <|return|> and
 * <|call|> hand over: there <|end|> isn't the end. */
static void unend_harmony(struct slu_tokenizer *tokenizer)
{
    int32_t end = slu_vocab_find(tokenizer, "<|end|>", 7, SLU_TOKEN_SPECIAL);
    if (end >= 0 && slu_vocab_find(tokenizer, "<|return|>", 10, SLU_TOKEN_SPECIAL) >= 0 &&
        slu_vocab_find(tokenizer, "<|call|>", 8, SLU_TOKEN_SPECIAL) >= 0) {
        tokenizer->attrs[end] &= (uint8_t)~SLU_TOKEN_END;
    }
}

static int read_special_ids(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs,
                            struct slu_err *err)
{
    /* What SentencePiece models have where nothing is said. */
    bool spm = !tokenizer->is_bpe && tokenizer->n_vocab > 2;
    int32_t eot = -1;
    int32_t eom = -1;
    tokenizer->bos = spm ? 1 : -1;
    tokenizer->eos = spm ? 2 : -1;
    tokenizer->unk = spm ? 0 : -1;
    struct {
        const char *key;
        int32_t *id;
    } keys[] = {
        {"tokenizer.ggml.bos_token_id", &tokenizer->bos},
        {"tokenizer.ggml.unknown_token_id", &tokenizer->unk},
        {"tokenizer.ggml.eos_token_id", &tokenizer->eos},
        {"tokenizer.ggml.eot_token_id", &eot},
        {"tokenizer.ggml.eom_token_id", &eom},
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        int rc = read_id(tokenizer, kvs, keys[i].key, keys[i].id, err);
        if (rc < 0) {
            return rc;
        }
    }
    const int32_t ends[] = {tokenizer->eos, eot, eom};
    for (size_t i = 0; i < 3; i++) {
        if (ends[i] >= 0) {
            tokenizer->attrs[ends[i]] |= SLU_TOKEN_END;
        }
    }
    unend_harmony(tokenizer);
    return SLU_OK;
}

int slu_vocab_load(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs, struct slu_err *err)
{
    const struct slu_kv *tokens = NULL;
    const struct slu_kv *types;
    const struct slu_kv *scores;
    int rc = find_tokens(kvs, &tokens, err);
    if (rc < 0) {
        return rc;
    }
    rc = find_numbers(kvs, "tokenizer.ggml.token_type", false, tokens->n_items, &types, err);
    if (rc < 0) {
        return rc;
    }
    rc = find_numbers(kvs, "tokenizer.ggml.scores", true, tokens->n_items, &scores, err);
    if (rc < 0) {
        return rc;
    }
    if (!tokenizer->is_bpe && !scores) {
        return slu_err_set(err, SLU_EFORMAT,
                           "tokenizer.ggml.scores: missing; a SentencePiece vocabulary needs it");
    }
    tokenizer->n_vocab = (uint32_t)tokens->n_items;
    memset(tokenizer->byte_ids, 0xff, sizeof tokenizer->byte_ids);
    tokenizer->name_mask = slu_slots_for(tokens->n_items) - 1;
    tokenizer->pool = malloc(tokens->items_bytes + 1);
    tokenizer->starts = malloc((tokens->n_items + 1) * sizeof *tokenizer->starts);
    tokenizer->attrs = malloc(tokens->n_items);
    tokenizer->name_slots = calloc((size_t)tokenizer->name_mask + 1, sizeof(uint32_t));
    tokenizer->scores =
        tokenizer->is_bpe ? NULL : malloc(tokens->n_items * sizeof *tokenizer->scores);
    if (!tokenizer->pool || !tokenizer->starts || !tokenizer->attrs || !tokenizer->name_slots ||
        (!tokenizer->is_bpe && !tokenizer->scores)) {
        return slu_err_set(err, SLU_ENOMEM, "tokenizer: no memory for %u tokens",
                           tokenizer->n_vocab);
    }
    rc = read_tokens(tokenizer, tokens, types, scores, err);
    if (rc < 0) {
        return rc;
    }
    char *pool = realloc(tokenizer->pool, tokenizer->pool_bytes + 1);
    tokenizer->pool = pool ? pool : tokenizer->pool;
    index_tokens(tokenizer);
    return read_special_ids(tokenizer, kvs, err);
}

size_t slu_vocab_bytes(const struct slu_tokenizer *tokenizer)
{
    size_t n = tokenizer->n_vocab;
    return tokenizer->pool_bytes + 1 + (n + 1) * sizeof(uint32_t) + n +
           (tokenizer->scores ? n * sizeof(float) : 0) +
           ((size_t)tokenizer->name_mask + 1) * sizeof(uint32_t);
}

size_t slu_vocab_bytes_max(const struct slu_kvs *kvs)
{
    const struct slu_kv *tokens = NULL;
    if (find_tokens(kvs, &tokens, NULL) < 0) {
        return 0;
    }
    size_t n = (size_t)tokens->n_items;
    return tokens->items_bytes + 1 + (n + 1) * sizeof(uint32_t) + n + n * sizeof(float) +
           (size_t)slu_slots_for(n) * sizeof(uint32_t);
}
