#include "text/text_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

static bool is_str(struct slu_str str, const char *text)
{
    return str.len == strlen(text) && memcmp(str.at, text, str.len) == 0;
}

/* Unpredictable to whoever made the vocabulary is all that it has to be. */
static uint64_t random_seed(const void *address)
{
    uint64_t seed;
    if (getrandom(&seed, sizeof seed, GRND_NONBLOCK) != (ssize_t)sizeof seed) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        seed = (uint64_t)(uintptr_t)address * 0x9e3779b97f4a7c15u ^ (uint64_t)now.tv_nsec;
    }
    return seed;
}

static int read_model(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs,
                      struct slu_err *err)
{
    struct slu_str model;
    int rc = slu_kvs_str(kvs, "tokenizer.ggml.model", &model, err);
    if (rc == SLU_ENOENT) {
        return slu_err_set(err, SLU_EFORMAT,
                           "tokenizer.ggml.model: missing; the file has no tokenizer");
    }
    if (rc < 0) {
        return rc;
    }
    if (is_str(model, "gpt2")) {
        tokenizer->is_bpe = true;
    } else if (!is_str(model, "llama")) {
        return slu_err_set(err, SLU_EUNSUP,
                           "tokenizer.ggml.model: '%.*s' is not supported, only gpt2 and llama",
                           model.len > 64 ? 64 : (int)model.len, model.at);
    }
    return SLU_OK;
}

static int read_pre(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs, struct slu_err *err)
{
    struct slu_str name = {"default", 7};
    int rc = slu_kvs_str(kvs, "tokenizer.ggml.pre", &name, err);
    if (rc < 0 && rc != SLU_ENOENT) {
        return rc;
    }
    return slu_pretokenizer_init(&tokenizer->pre, name, err);
}

/* ret is left alone where the key is absent. */
static int read_bool(const struct slu_kvs *kvs, const char *key, bool *ret, struct slu_err *err)
{
    int rc = slu_kvs_bool(kvs, key, ret, err);
    return rc == SLU_ENOENT ? SLU_OK : rc;
}

static int load(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs, struct slu_err *err)
{
    int rc = read_model(tokenizer, kvs, err);
    if (rc == 0 && tokenizer->is_bpe) {
        rc = read_pre(tokenizer, kvs, err);
    }
    if (rc == 0) {
        rc = slu_vocab_load(tokenizer, kvs, err);
    }
    if (rc == 0 && tokenizer->is_bpe) {
        rc = slu_bpe_load(tokenizer, kvs, err);
    }
    tokenizer->add_bos = tokenizer->is_bpe ? tokenizer->pre.add_bos : true;
    tokenizer->add_space_prefix = !tokenizer->is_bpe;
    if (rc == 0) {
        rc = read_bool(kvs, "tokenizer.ggml.add_bos_token", &tokenizer->add_bos, err);
    }
    if (rc == 0 && !tokenizer->is_bpe) {
        rc = read_bool(kvs, "tokenizer.ggml.add_space_prefix", &tokenizer->add_space_prefix, err);
    }
    tokenizer->add_bos = tokenizer->add_bos && tokenizer->bos >= 0;
    if (rc == 0) {
        slu_chat_read_defaults(tokenizer, kvs);
    }
    return rc;
}

int slu_tokenizer_create(const struct slu_kvs *kvs, struct slu_tokenizer **ret_tokenizer,
                         struct slu_err *err)
{
    struct slu_tokenizer *tokenizer = calloc(1, sizeof *tokenizer);
    if (!tokenizer) {
        return slu_err_set(err, SLU_ENOMEM, "tokenizer: no memory");
    }
    tokenizer->hash_seed = random_seed(tokenizer);
    int rc = load(tokenizer, kvs, err);
    if (rc < 0) {
        slu_tokenizer_destroy(tokenizer);
        return rc;
    }
    *ret_tokenizer = tokenizer;
    return SLU_OK;
}

void slu_tokenizer_destroy(struct slu_tokenizer *tokenizer)
{
    if (!tokenizer) {
        return;
    }
    slu_pretokenizer_finish(&tokenizer->pre);
    free(tokenizer->pool);
    free(tokenizer->starts);
    free(tokenizer->attrs);
    free(tokenizer->scores);
    free(tokenizer->name_slots);
    free(tokenizer->merges);
    free(tokenizer->merge_slots);
    free(tokenizer);
}

size_t slu_tokenizer_bytes(const struct slu_tokenizer *tokenizer)
{
    return sizeof *tokenizer + slu_vocab_bytes(tokenizer) + slu_bpe_bytes(tokenizer) +
           slu_pretokenizer_bytes(&tokenizer->pre);
}

size_t slu_tokenizer_bytes_max(const struct slu_kvs *kvs)
{
    return sizeof(struct slu_tokenizer) + slu_vocab_bytes_max(kvs) + slu_bpe_bytes_max(kvs) +
           slu_pretokenizer_bytes_max();
}

uint32_t slu_tokenizer_n_vocab(const struct slu_tokenizer *tokenizer)
{
    return tokenizer->n_vocab;
}

/* The longest user-defined or, if asked for, special token that text begins with; -1 if none. */
static int32_t find_mark(const struct slu_tokenizer *tokenizer, const char *text, size_t len,
                         bool special, size_t *ret_len)
{
    const uint64_t *users = tokenizer->mark_lengths[0][(unsigned char)text[0]];
    const uint64_t *specials = tokenizer->mark_lengths[1][(unsigned char)text[0]];
    for (unsigned word = 4; word-- > 0;) {
        uint64_t lengths = users[word] | (special ? specials[word] : 0);
        while (lengths != 0) {
            unsigned bit = 63 - (unsigned)__builtin_clzll(lengths);
            lengths &= ~(1ull << bit);
            size_t n = word * 64 + bit;
            if (n > len) {
                continue;
            }
            int32_t id = special ? slu_vocab_find(tokenizer, text, n, SLU_TOKEN_SPECIAL) : -1;
            if (id < 0) {
                id = slu_vocab_find(tokenizer, text, n, SLU_TOKEN_USER);
            }
            if (id >= 0) {
                *ret_len = n;
                return id;
            }
        }
    }
    return -1;
}

static int encode_text(const struct slu_tokenizer *tokenizer, const char *text, size_t len,
                       bool is_first, struct slu_ids *ids)
{
    if (tokenizer->is_bpe) {
        return slu_bpe_encode(tokenizer, text, len, ids);
    }
    return slu_spm_encode(tokenizer, text, len, is_first && tokenizer->add_space_prefix, ids);
}

int64_t slu_tokenizer_encode(const struct slu_tokenizer *tokenizer, const char *text, size_t len,
                             unsigned flags, int32_t *ret_ids, size_t n_max)
{
    struct slu_ids ids = {.at = ret_ids, .n_max = ret_ids ? n_max : 0};
    bool special = (flags & SLU_ENCODE_SPECIAL) != 0;
    /* SentencePiece puts its space before the text, and before what follows a special token. */
    bool is_first = true;
    size_t done = 0;
    for (size_t at = 0; at < len;) {
        size_t mark_len = 0;
        int32_t mark = find_mark(tokenizer, text + at, len - at, special, &mark_len);
        if (mark < 0) {
            at++;
            continue;
        }
        if (at > done && encode_text(tokenizer, text + done, at - done, is_first, &ids) < 0) {
            return SLU_ENOMEM;
        }
        slu_ids_put(&ids, mark);
        is_first = true;
        at += mark_len;
        done = at;
    }
    if (len > done && encode_text(tokenizer, text + done, len - done, is_first, &ids) < 0) {
        return SLU_ENOMEM;
    }
    return ids.n;
}

int slu_tokenizer_piece(const struct slu_tokenizer *tokenizer, int32_t id, const char **ret_bytes)
{
    if (id < 0 || (uint32_t)id >= tokenizer->n_vocab) {
        return SLU_ERANGE;
    }
    *ret_bytes = tokenizer->pool + tokenizer->starts[id];
    return (int)(tokenizer->starts[id + 1] - tokenizer->starts[id]);
}

bool slu_tokenizer_is_special(const struct slu_tokenizer *tokenizer, int32_t id)
{
    return id >= 0 && (uint32_t)id < tokenizer->n_vocab &&
           slu_vocab_kind(tokenizer, (uint32_t)id) == SLU_TOKEN_SPECIAL;
}

int32_t slu_tokenizer_find(const struct slu_tokenizer *tokenizer, const char *text)
{
    static const enum slu_token_kind order[] = {SLU_TOKEN_SPECIAL, SLU_TOKEN_USER, SLU_TOKEN_TEXT,
                                                SLU_TOKEN_OTHER};
    size_t len = strlen(text);
    for (size_t i = 0; i < sizeof order / sizeof order[0]; i++) {
        int32_t id = slu_vocab_find(tokenizer, text, len, order[i]);
        if (id >= 0) {
            return id;
        }
    }
    return -1;
}

int32_t slu_tokenizer_bos(const struct slu_tokenizer *tokenizer)
{
    return tokenizer->bos;
}

bool slu_tokenizer_add_bos(const struct slu_tokenizer *tokenizer)
{
    return tokenizer->add_bos;
}

bool slu_tokenizer_is_end(const struct slu_tokenizer *tokenizer, int32_t id)
{
    return id >= 0 && (uint32_t)id < tokenizer->n_vocab &&
           (tokenizer->attrs[id] & SLU_TOKEN_END) != 0;
}
