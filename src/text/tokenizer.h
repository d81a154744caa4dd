/*
 * Tokenizers, built from GGUF metadata: byte-level BPE with a pre-tokenizer regex (PCRE2), and
 * SentencePiece with scores and byte fallback. Text in, ids out, and back; a streaming
 * detokenizer that never emits half a UTF-8 sequence.
 *
 * Thread safety: a tokenizer is constant once created, and encode may be called from any thread;
 * a detokenizer belongs to one.
 */
#ifndef SLU_TEXT_TOKENIZER_H
#define SLU_TEXT_TOKENIZER_H

#include <stdbool.h>

#include "io/gguf.h"

struct slu_tokenizer;

/* Keys tokenizer.ggml.*. Copies what it needs from kvs. SLU_EFORMAT (missing or inconsistent
 * keys), SLU_EUNSUP (an unknown model or pre-tokenizer, by name), SLU_ENOMEM. */
int slu_tokenizer_create(const struct slu_kvs *kvs, struct slu_tokenizer **ret_tokenizer,
                         struct slu_err *err);
void slu_tokenizer_destroy(struct slu_tokenizer *tokenizer); /* NULL is fine */

/* Heap bytes that it holds, for the ledger; and a bound known before it exists. */
size_t slu_tokenizer_bytes(const struct slu_tokenizer *tokenizer);
size_t slu_tokenizer_bytes_max(const struct slu_kvs *kvs);

uint32_t slu_tokenizer_n_vocab(const struct slu_tokenizer *tokenizer);

enum { SLU_ENCODE_SPECIAL = 1 }; /* recognise special tokens spelled out in the text */

/* Encodes len bytes (any bytes: invalid UTF-8 is encoded too). No BOS or EOS is added. Returns the
 * number of ids, which are written up to n_max (NULL and 0: count only), or SLU_ENOMEM. */
int64_t slu_tokenizer_encode(const struct slu_tokenizer *tokenizer, const char *text, size_t len,
                             unsigned flags, int32_t *ret_ids, size_t n_max);

/* The bytes that an id stands for; special (control) tokens give their name. Returns their number;
 * SLU_ERANGE for ids outside the vocabulary. *ret_bytes points into the tokenizer. */
int slu_tokenizer_piece(const struct slu_tokenizer *tokenizer, int32_t id, const char **ret_bytes);
bool slu_tokenizer_is_special(const struct slu_tokenizer *tokenizer, int32_t id);

/* The id of a token spelled exactly so, special or not; -1 if there is none. */
int32_t slu_tokenizer_find(const struct slu_tokenizer *tokenizer, const char *text);

int32_t slu_tokenizer_bos(const struct slu_tokenizer *tokenizer); /* -1: none */
bool slu_tokenizer_add_bos(const struct slu_tokenizer *tokenizer);
/* End of text or of a turn: generation stops there (eos, eot, <|im_end|>, <|return|>, ...). */
bool slu_tokenizer_is_end(const struct slu_tokenizer *tokenizer, int32_t id);

/* Streaming detokenizer. Holds back an incomplete UTF-8 sequence until it is complete; bytes that
 * can never become valid are emitted as U+FFFD. */
struct slu_detok {
    const struct slu_tokenizer *tokenizer;
    bool skip_special; /* leave special tokens out */
    bool is_first;     /* nothing emitted yet: SentencePiece drops the space it added */
    unsigned char held[4];
    unsigned n_held;
};
void slu_detok_init(struct slu_detok *detok, const struct slu_tokenizer *tokenizer,
                    bool skip_special);
/* Calls emit with whole UTF-8 sequences; ids outside the vocabulary emit nothing. */
typedef void (*slu_emit_fn)(void *arg, const char *bytes, size_t len);
void slu_detok_push(struct slu_detok *detok, int32_t id, slu_emit_fn emit, void *arg);
void slu_detok_flush(struct slu_detok *detok, slu_emit_fn emit, void *arg);

#endif
