#include "tools/vocab.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "io/pack.h"
#include "text/tokenizer.h"

struct slu_vocab {
    struct slu_tokenizer *tokenizer;
};

static int create_from_pack(struct slu_source **source, struct slu_tokenizer **ret_tokenizer,
                            struct slu_err *err)
{
    struct slu_pack *pack;
    int rc = slu_pack_open(*source, &pack, err);
    if (rc < 0) {
        return rc;
    }
    *source = NULL; /* the pack's now */
    rc = slu_tokenizer_create(&pack->kvs, ret_tokenizer, err);
    slu_pack_close(pack);
    return rc;
}

static int create_from_gguf(struct slu_source *source, struct slu_tokenizer **ret_tokenizer,
                            struct slu_err *err)
{
    struct slu_gguf *gguf;
    int rc = slu_gguf_open(source, &gguf, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_tokenizer_create(&gguf->kvs, ret_tokenizer, err);
    if (rc < 0) {
        slu_err_prefix(err, "%s", source->name);
    }
    slu_gguf_close(gguf);
    return rc;
}

int slu_vocab_open(const char *path, struct slu_vocab **ret_vocab, struct slu_err *err)
{
    struct slu_source *source = NULL;
    char magic[sizeof SLU_PACK_MAGIC - 1] = {0};
    struct slu_vocab *vocab = calloc(1, sizeof *vocab);
    if (!vocab) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for its vocabulary", path);
    }
    int rc = slu_source_open_file(path, &source, err);
    if (rc == 0 && source->size_bytes >= sizeof magic) {
        rc = source->read_at(source, 0, magic, sizeof magic, err);
    }
    if (rc == 0) {
        rc = memcmp(magic, SLU_PACK_MAGIC, sizeof magic) == 0
                 ? create_from_pack(&source, &vocab->tokenizer, err)
                 : create_from_gguf(source, &vocab->tokenizer, err);
    }
    slu_source_destroy(source);
    if (rc < 0) {
        free(vocab);
        return rc;
    }
    *ret_vocab = vocab;
    return 0;
}

void slu_vocab_close(struct slu_vocab *vocab)
{
    if (vocab) {
        slu_tokenizer_destroy(vocab->tokenizer);
        free(vocab);
    }
}

int slu_vocab_encode(const struct slu_vocab *vocab, const char *text, size_t len, bool special,
                     int32_t **ret_ids, size_t *ret_n, struct slu_err *err)
{
    unsigned flags = special ? SLU_ENCODE_SPECIAL : 0;
    /* Most vocabularies give at most one id for each byte, and a space in front: the second round
     * is for those that don't. */
    size_t room = len + 16;
    for (;;) {
        int32_t *ids = malloc(room * sizeof *ids);
        int64_t n =
            ids ? slu_tokenizer_encode(vocab->tokenizer, text, len, flags, ids, room) : SLU_ENOMEM;
        if (n >= 0 && (uint64_t)n <= room) {
            *ret_ids = ids;
            *ret_n = (size_t)n;
            return 0;
        }
        free(ids);
        if (n < 0) {
            return slu_err_set(err, (int)n, "cannot encode %zu bytes of text: %s", len,
                               slu_strerror((int)n));
        }
        room = (size_t)n;
    }
}

/* Text as it grows. */
struct text {
    char *at;
    size_t len, capacity;
    bool has_failed;
};

static void append(void *arg, const char *bytes, size_t len)
{
    struct text *text = arg;
    if (len > text->capacity - text->len) {
        size_t capacity = 2 * text->capacity + len + 256;
        char *more = text->has_failed ? NULL : realloc(text->at, capacity);
        if (!more) {
            text->has_failed = true;
            return;
        }
        text->at = more;
        text->capacity = capacity;
    }
    memcpy(text->at + text->len, bytes, len);
    text->len += len;
}

int slu_vocab_decode(const struct slu_vocab *vocab, const int32_t *ids, size_t n, char **ret_text,
                     size_t *ret_len, struct slu_err *err)
{
    uint32_t n_vocab = slu_tokenizer_n_vocab(vocab->tokenizer);
    struct text text = {0};
    struct slu_detok detok;
    slu_detok_init(&detok, vocab->tokenizer, false);
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || (uint32_t)ids[i] >= n_vocab) {
            free(text.at);
            return slu_err_set(err, SLU_ERANGE,
                               "token id %" PRId32 " is not below the vocabulary's %" PRIu32,
                               ids[i], n_vocab);
        }
        slu_detok_push(&detok, ids[i], append, &text);
    }
    slu_detok_flush(&detok, append, &text);
    if (text.has_failed) {
        free(text.at);
        return slu_err_set(err, SLU_ENOMEM, "no memory for the text of %zu ids", n);
    }
    *ret_text = text.at;
    *ret_len = text.len;
    return 0;
}
