/*
 * Builds the metadata of small vocabularies in memory, in GGUF's encoding, so that tests go through
 * the same parser as files do.
 */
#ifndef SLU_TESTS_TEXT_VOCAB_BUILD_H
#define SLU_TESTS_TEXT_VOCAB_BUILD_H

#include "text/tokenizer.h"

struct meta {
    uint8_t *data;
    size_t bytes;
    size_t bytes_max;
    uint64_t n_pairs;
    struct slu_kvs kvs; /* after meta_parse */
};

/* A token and its type; lists end with a NULL name. */
struct vocab_token {
    const char *name;
    int type; /* 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte; 0 means 1 */
    float score;
};

void meta_str(struct meta *meta, const char *key, const char *value);
void meta_u32(struct meta *meta, const char *key, uint32_t value);
void meta_bool(struct meta *meta, const char *key, bool value);
/* Arrays: the head, then as many items as it says. */
void meta_array(struct meta *meta, const char *key, uint32_t gguf_type, uint64_t n);
void meta_item_str(struct meta *meta, const char *value, size_t len);
void meta_item_u32(struct meta *meta, uint32_t value);
void meta_item_f32(struct meta *meta, float value);
void meta_parse(struct meta *meta);
void meta_finish(struct meta *meta);

enum { GGUF_U32 = 4, GGUF_I32 = 5, GGUF_F32 = 6, GGUF_BOOL = 7, GGUF_STR = 8, GGUF_ARRAY = 9 };

/* A BPE vocabulary of the 256 bytes, each with its value as its id, and then the tokens. merges
 * ends with NULL. More pairs may be added before meta_parse. */
void meta_bpe(struct meta *meta, const char *pre, const struct vocab_token *tokens,
              const char *const *merges);
/* A SentencePiece vocabulary: <unk>, <s>, </s>, the 256 bytes from id 3, and then the tokens. */
void meta_spm(struct meta *meta, const struct vocab_token *tokens);

/* Parses, creates, and asserts that it works. */
struct slu_tokenizer *meta_tokenizer(struct meta *meta);

/* Asserts that text encodes to the ids, which end with -1. */
void check_ids(const struct slu_tokenizer *tokenizer, const char *text, size_t len, unsigned flags,
               const int32_t *ids);
#define IDS(...)                                                                                   \
    (const int32_t[])                                                                              \
    {                                                                                              \
        __VA_ARGS__, -1                                                                            \
    }

/* The text of ids, special tokens by name. NUL-terminated, on the heap. */
char *decode(const struct slu_tokenizer *tokenizer, const int32_t *ids, int64_t n,
             bool skip_special, size_t *ret_len);

#endif
