/*
 * What the files of src/text share: the tokenizer's tables and the seams between vocabulary,
 * pre-tokenizer, BPE and SentencePiece. Not for other modules.
 *
 * Every table is a flat array indexed by token id or merge rank; the hash tables hold 4-byte
 * slots (8 bits of the hash, 24 bits of index + 1) and compare against the arrays, so that a
 * vocabulary of 200,000 tokens with 200,000 merges takes about 9 MB. Hashes are seeded at random
 * per tokenizer: a hostile vocabulary can't be built to collide.
 *
 * Thread safety: constant after slu_tokenizer_create.
 */
#ifndef SLU_TEXT_INTERNAL_H
#define SLU_TEXT_INTERNAL_H

#include "text/tokenizer.h"

/* Index + 1 has to fit in 24 bits. */
#define SLU_TEXT_INDEX_MAX  ((1u << 24) - 2)
#define SLU_TOKEN_BYTES_MAX 65536u
#define SLU_VOCAB_BYTES_MAX (256u << 20)
/* Special tokens longer than this are never recognised inside a text. */
#define SLU_MARK_BYTES_MAX   255u
#define SLU_PRETOKEN_PASSES  6
#define SLU_SYSTEM_BYTES_MAX 512u

/* What a token is good for. Look-ups name a kind, since a special token and a piece of ordinary
 * text may be spelled alike and must not be taken for each other. */
enum slu_token_kind {
    SLU_TOKEN_TEXT,    /* produced by encoding text */
    SLU_TOKEN_USER,    /* user-defined: cut out of the text before anything else looks at it */
    SLU_TOKEN_SPECIAL, /* control and unknown: only where the caller asks for them */
    SLU_TOKEN_OTHER,   /* byte fallbacks, and names that no text can produce */
    SLU_TOKEN_KINDS
};

#define SLU_TOKEN_KIND_MASK 0x0fu
#define SLU_TOKEN_END       0x80u

struct slu_merge {
    uint32_t left;
    uint32_t right;
    uint32_t merged;
};

/* One pass of a pre-tokenizer: a regex, or code NULL for "the white space that ends the piece"
 * (\s+$, which a backtracking matcher does in quadratic time). */
struct slu_pretoken_pass {
    void *code; /* pcre2_code */
};

struct slu_pretokenizer {
    struct slu_pretoken_pass passes[SLU_PRETOKEN_PASSES];
    unsigned n_passes;
    bool ignore_merges; /* a piece that is a token as it stands is taken whole */
    bool add_bos;       /* default of tokenizer.ggml.add_bos_token */
};

struct slu_tokenizer {
    bool is_bpe;
    bool add_bos;
    bool add_space_prefix;
    int32_t bos; /* -1: none */
    int32_t eos;
    int32_t unk;
    uint64_t hash_seed;

    uint32_t n_vocab;
    uint32_t text_bytes_max; /* longest token of kind TEXT */
    size_t pool_bytes;
    char *pool;       /* the tokens' bytes, one after another */
    uint32_t *starts; /* [n_vocab + 1] into pool */
    uint8_t *attrs;   /* [n_vocab] kind, and whether generation ends there */
    float *scores;    /* [n_vocab], SentencePiece only */
    uint32_t *name_slots;
    uint32_t name_mask;
    int32_t byte_ids[256]; /* the token for each single byte, -1 where there is none */

    uint32_t n_merges;
    uint32_t merge_mask;
    struct slu_merge *merges; /* [n_merges] by rank */
    uint32_t *merge_slots;

    /* Lengths of user-defined [0] and special [1] tokens by their first byte, a bit each. */
    uint64_t mark_lengths[2][256][4];

    struct slu_pretokenizer pre;

    /* From the chat template: the id that it begins with, -1 if none, and the system text that it
     * supplies where the conversation has none. */
    int32_t chat_bos;
    char system[SLU_SYSTEM_BYTES_MAX];
    size_t system_len;
};

/* Where encoded ids go: counted always, written while there is room. */
struct slu_ids {
    int32_t *at;
    size_t n_max;
    int64_t n;
};

static inline void slu_ids_put(struct slu_ids *ids, int32_t id)
{
    if (id < 0) {
        return;
    }
    if ((uint64_t)ids->n < ids->n_max) {
        ids->at[ids->n] = id;
    }
    ids->n++;
}

/* vocab.c: reads tokens, types, scores and ids of special tokens into a zeroed tokenizer whose
 * is_bpe and hash_seed are set. */
int slu_vocab_load(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs, struct slu_err *err);
size_t slu_vocab_bytes(const struct slu_tokenizer *tokenizer);
size_t slu_vocab_bytes_max(const struct slu_kvs *kvs);
/* The id of the token of this kind with exactly these bytes, or -1. */
int32_t slu_vocab_find(const struct slu_tokenizer *tokenizer, const char *bytes, size_t len,
                       enum slu_token_kind kind);
static inline enum slu_token_kind slu_vocab_kind(const struct slu_tokenizer *tokenizer, uint32_t id)
{
    return (enum slu_token_kind)(tokenizer->attrs[id] & SLU_TOKEN_KIND_MASK);
}
/* Slots of a hash table for n entries: a power of two, at most half full. */
uint32_t slu_slots_for(uint64_t n);
/* Undoes GPT-2's spelling of bytes as printable characters. Returns the bytes written to
 * ret_bytes (never more than len), or -1 where a character isn't one of the 256. */
int64_t slu_bytelevel_decode(const char *name, size_t len, char *ret_bytes);

/* utf8.c: bytes of the well-formed sequence at text (Unicode's table 3-7), 0 if ill-formed. */
unsigned slu_utf8_len(const unsigned char *text, size_t len);
/* True if the len bytes could begin a well-formed sequence that needs more of them. */
bool slu_utf8_is_start(const unsigned char *text, size_t len);

/* bpe.c */
int slu_bpe_load(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs, struct slu_err *err);
size_t slu_bpe_bytes(const struct slu_tokenizer *tokenizer);
size_t slu_bpe_bytes_max(const struct slu_kvs *kvs);
int slu_bpe_encode(const struct slu_tokenizer *tokenizer, const char *text, size_t len,
                   struct slu_ids *ids);

/* spm.c: text is encoded with a space before it if space_prefix. */
int slu_spm_encode(const struct slu_tokenizer *tokenizer, const char *text, size_t len,
                   bool space_prefix, struct slu_ids *ids);

/* chat.c: sets chat_bos and system from tokenizer.chat_template. */
void slu_chat_read_defaults(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs);

/* pretokenize.c: name is tokenizer.ggml.pre. SLU_EUNSUP for unknown ones. */
int slu_pretokenizer_init(struct slu_pretokenizer *pre, struct slu_str name, struct slu_err *err);
void slu_pretokenizer_finish(struct slu_pretokenizer *pre);
size_t slu_pretokenizer_bytes(const struct slu_pretokenizer *pre);
size_t slu_pretokenizer_bytes_max(void);
/* Hands the pieces of text to word, in order; together they are the text, byte for byte. Stops at
 * the first non-zero return of word, and returns it; or SLU_ENOMEM. */
typedef int (*slu_word_fn)(void *arg, const char *word, size_t len);
int slu_pretokenize(const struct slu_pretokenizer *pre, const char *text, size_t len,
                    slu_word_fn word, void *arg);

#endif
