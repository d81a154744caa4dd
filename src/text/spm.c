/*
 * SentencePiece's BPE: a text begins as its characters, and the two neighbours whose union is the
 * token with the highest score, the leftmost of equals, are merged until no union is a token.
 * What isn't a token in the end is one character, and is spelled in byte tokens. The heap is as
 * in bpe.c; an entry is stale if the two symbols at its position no longer have its length.
 *
 * Spaces are compared as spaces, since the vocabulary's U+2581 have become such; U+2581 in the text
 * means a space too, as it does in SentencePiece.
 */
#include "text/text_internal.h"

#include <stdlib.h>
#include <string.h>

#define NONE UINT32_MAX

struct symbol {
    uint32_t at;
    uint32_t len; /* 0: merged into the one before */
    uint32_t prev;
    uint32_t next;
};

struct entry {
    uint64_t key; /* ~score << 32 | position, so that the smallest comes first */
    uint32_t len;
};

struct session {
    const struct slu_tokenizer *tokenizer;
    const char *text;
    struct symbol *symbols;
    struct entry *heap;
    size_t n_heap;
};

/* An unsigned number that falls as the score rises. Not-a-number, which only a broken file has,
 * gets some fixed place. */
static uint32_t score_key(float score)
{
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    /* -0 and 0 are one score. */
    bits = score == 0.0f ? 0 : bits;
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

static void push(struct session *session, struct entry entry)
{
    struct entry *heap = session->heap;
    size_t i = session->n_heap++;
    while (i > 0 && heap[(i - 1) / 2].key > entry.key) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = entry;
}

static struct entry pop(struct session *session)
{
    struct entry *heap = session->heap;
    struct entry top = heap[0];
    struct entry entry = heap[--session->n_heap];
    size_t i = 0;
    for (size_t child = 1; child < session->n_heap; child = 2 * i + 1) {
        if (child + 1 < session->n_heap && heap[child + 1].key < heap[child].key) {
            child++;
        }
        if (heap[child].key >= entry.key) {
            break;
        }
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = entry;
    return top;
}

static void offer(struct session *session, uint32_t left)
{
    const struct symbol *symbols = session->symbols;
    if (left == NONE || symbols[left].next == NONE) {
        return;
    }
    uint32_t len = symbols[left].len + symbols[symbols[left].next].len;
    if (len > session->tokenizer->text_bytes_max) {
        return;
    }
    int32_t id =
        slu_vocab_find(session->tokenizer, session->text + symbols[left].at, len, SLU_TOKEN_TEXT);
    if (id >= 0) {
        uint64_t key = score_key(session->tokenizer->scores[id]);
        push(session, (struct entry){key << 32 | left, len});
    }
}

static void merge_all(struct session *session)
{
    struct symbol *symbols = session->symbols;
    while (session->n_heap > 0) {
        struct entry entry = pop(session);
        uint32_t left = (uint32_t)entry.key;
        uint32_t right = symbols[left].next;
        if (symbols[left].len == 0 || right == NONE ||
            symbols[left].len + symbols[right].len != entry.len) {
            continue;
        }
        symbols[left].len = entry.len;
        symbols[left].next = symbols[right].next;
        symbols[right].len = 0;
        if (symbols[left].next != NONE) {
            symbols[symbols[left].next].prev = left;
        }
        offer(session, symbols[left].prev);
        offer(session, left);
    }
}

static void put_symbol(const struct session *session, const struct symbol *symbol,
                       struct slu_ids *ids)
{
    const struct slu_tokenizer *tokenizer = session->tokenizer;
    const char *bytes = session->text + symbol->at;
    int32_t id = slu_vocab_find(tokenizer, bytes, symbol->len, SLU_TOKEN_TEXT);
    if (id >= 0) {
        slu_ids_put(ids, id);
        return;
    }
    for (uint32_t i = 0; i < symbol->len; i++) {
        id = tokenizer->byte_ids[(unsigned char)bytes[i]];
        slu_ids_put(ids, id >= 0 ? id : tokenizer->unk);
    }
}

/* The text with its prefix, and U+2581 made spaces. Returns its length. */
static size_t normalize(const char *text, size_t len, bool space_prefix, char *ret_text)
{
    size_t n = 0;
    if (space_prefix) {
        ret_text[n++] = ' ';
    }
    for (size_t i = 0; i < len;) {
        if (len - i >= 3 && memcmp(text + i, "\xe2\x96\x81", 3) == 0) {
            ret_text[n++] = ' ';
            i += 3;
        } else {
            ret_text[n++] = text[i++];
        }
    }
    return n;
}

/* One symbol for each character; a byte that isn't part of one stands alone. */
static uint32_t cut(struct symbol *symbols, const char *text, size_t len)
{
    uint32_t n = 0;
    for (size_t at = 0; at < len;) {
        unsigned step = slu_utf8_len((const unsigned char *)text + at, len - at);
        step = step > 0 ? step : 1;
        symbols[n] = (struct symbol){
            .at = (uint32_t)at,
            .len = step,
            .prev = n > 0 ? n - 1 : NONE,
            .next = at + step < len ? n + 1 : NONE,
        };
        n++;
        at += step;
    }
    return n;
}

int slu_spm_encode(const struct slu_tokenizer *tokenizer, const char *text, size_t len,
                   bool space_prefix, struct slu_ids *ids)
{
    if (len == 0) {
        return SLU_OK;
    }
    if (len >= UINT32_MAX - 1) {
        return SLU_ENOMEM;
    }
    struct session session = {.tokenizer = tokenizer};
    char *copy = malloc(len + 1);
    session.symbols = malloc((len + 1) * sizeof *session.symbols);
    session.heap = malloc(2 * (len + 1) * sizeof *session.heap);
    int rc = SLU_ENOMEM;
    if (copy && session.symbols && session.heap) {
        session.text = copy;
        uint32_t n = cut(session.symbols, copy, normalize(text, len, space_prefix, copy));
        for (uint32_t i = 0; i + 1 < n; i++) {
            offer(&session, i);
        }
        merge_all(&session);
        for (uint32_t i = 0; i != NONE; i = session.symbols[i].next) {
            put_symbol(&session, &session.symbols[i], ids);
        }
        rc = SLU_OK;
    }
    free(copy);
    free(session.symbols);
    free(session.heap);
    return rc;
}
