/*
 * The vocabulary of a file, be it a pack or a GGUF (with weights or without): text to ids and
 * back. Nothing but metadata is read.
 *
 * Thread safety: constant once opened.
 */
#ifndef SLU_TOOLS_VOCAB_H
#define SLU_TOOLS_VOCAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct slu_vocab;

/* Which of the two the file is shows in its first bytes. SLU_ENOENT, SLU_EIO, SLU_EFORMAT,
 * SLU_EUNSUP (an unknown tokenizer, by name), SLU_ENOMEM. */
int slu_vocab_open(const char *path, struct slu_vocab **ret_vocab, struct slu_err *err);
void slu_vocab_close(struct slu_vocab *vocab); /* NULL is fine */

/* Ids of len bytes of text, without BOS or EOS, into an array for the caller to free. special:
 * special tokens spelled out in the text are recognised. */
int slu_vocab_encode(const struct slu_vocab *vocab, const char *text, size_t len, bool special,
                     int32_t **ret_ids, size_t *ret_n, struct slu_err *err);

/* The text of n ids, special tokens by their names, to be freed; not terminated. SLU_ERANGE for an
 * id outside the vocabulary. */
int slu_vocab_decode(const struct slu_vocab *vocab, const int32_t *ids, size_t n, char **ret_text,
                     size_t *ret_len, struct slu_err *err);

#endif
