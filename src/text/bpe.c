/*
 * Byte-level BPE on ids: a word begins as its bytes' tokens, and the neighbouring pair with the
 * lowest rank, the leftmost of equals, is merged until no pair has one. A binary heap of (rank,
 * position) makes that O(n log n); an entry is stale, and skipped, if the pair that its rank
 * stands for isn't at its position any more.
 */
#include "text/text_internal.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define NONE UINT32_MAX

static uint64_t pair_hash(const struct slu_tokenizer *tokenizer, uint32_t left, uint32_t right)
{
    uint32_t pair[2] = {left, right};
    return XXH3_64bits_withSeed(pair, sizeof pair, tokenizer->hash_seed);
}

/* The pair's rank, or NONE. */
static uint32_t find_merge(const struct slu_tokenizer *tokenizer, uint32_t left, uint32_t right)
{
    uint64_t h = pair_hash(tokenizer, left, right);
    uint32_t tag = (uint32_t)(h >> 56);
    for (uint32_t i = (uint32_t)h & tokenizer->merge_mask; tokenizer->merge_slots[i] != 0;
         i = (i + 1) & tokenizer->merge_mask) {
        uint32_t slot = tokenizer->merge_slots[i];
        uint32_t rank = (slot & 0xffffffu) - 1;
        if (slot >> 24 == tag && tokenizer->merges[rank].left == left &&
            tokenizer->merges[rank].right == right) {
            return rank;
        }
    }
    return NONE;
}

static void insert_merge(struct slu_tokenizer *tokenizer, struct slu_merge merge)
{
    if (find_merge(tokenizer, merge.left, merge.right) != NONE) {
        return;
    }
    uint64_t h = pair_hash(tokenizer, merge.left, merge.right);
    uint32_t i = (uint32_t)h & tokenizer->merge_mask;
    while (tokenizer->merge_slots[i] != 0) {
        i = (i + 1) & tokenizer->merge_mask;
    }
    tokenizer->merges[tokenizer->n_merges++] = merge;
    tokenizer->merge_slots[i] = (uint32_t)(h >> 56) << 24 | tokenizer->n_merges;
}

/* "left right", each spelled in printable characters. False for a merge that can never apply,
 * because it names a token that the vocabulary lacks. bytes has room for line.len. */
static bool read_merge(const struct slu_tokenizer *tokenizer, struct slu_str line, char *bytes,
                       struct slu_merge *ret_merge)
{
    if (line.len < 3) {
        return false;
    }
    const char *space = memchr(line.at + 1, ' ', line.len - 1);
    if (!space) {
        return false;
    }
    size_t left_len = (size_t)(space - line.at);
    int64_t n_left = slu_bytelevel_decode(line.at, left_len, bytes);
    if (n_left <= 0) {
        return false;
    }
    int64_t n_right = slu_bytelevel_decode(space + 1, line.len - left_len - 1, bytes + n_left);
    if (n_right <= 0) {
        return false;
    }
    int32_t left = slu_vocab_find(tokenizer, bytes, (size_t)n_left, SLU_TOKEN_TEXT);
    int32_t right = slu_vocab_find(tokenizer, bytes + n_left, (size_t)n_right, SLU_TOKEN_TEXT);
    int32_t merged = slu_vocab_find(tokenizer, bytes, (size_t)(n_left + n_right), SLU_TOKEN_TEXT);
    if (left < 0 || right < 0 || merged < 0) {
        return false;
    }
    *ret_merge = (struct slu_merge){(uint32_t)left, (uint32_t)right, (uint32_t)merged};
    return true;
}

static int find_merges(const struct slu_kvs *kvs, const struct slu_kv **ret_merges,
                       struct slu_err *err)
{
    const struct slu_kv *merges = slu_kvs_find(kvs, "tokenizer.ggml.merges");
    if (!merges || merges->type != SLU_KV_ARRAY ||
        (merges->item_type != SLU_KV_STRING && merges->n_items > 0)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "tokenizer.ggml.merges: there is no such array of strings");
    }
    if (merges->n_items > SLU_TEXT_INDEX_MAX) {
        return slu_err_set(err, SLU_EFORMAT,
                           "tokenizer.ggml.merges: %llu merges, where at most %u can be",
                           (unsigned long long)merges->n_items, SLU_TEXT_INDEX_MAX);
    }
    *ret_merges = merges;
    return SLU_OK;
}

int slu_bpe_load(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs, struct slu_err *err)
{
    const struct slu_kv *merges = NULL;
    int rc = find_merges(kvs, &merges, err);
    if (rc < 0) {
        return rc;
    }
    tokenizer->merge_mask = slu_slots_for(merges->n_items) - 1;
    tokenizer->merges = malloc((merges->n_items + 1) * sizeof *tokenizer->merges);
    tokenizer->merge_slots = calloc((size_t)tokenizer->merge_mask + 1, sizeof(uint32_t));
    char *bytes = malloc(2 * SLU_TOKEN_BYTES_MAX + 1);
    if (!tokenizer->merges || !tokenizer->merge_slots || !bytes) {
        free(bytes);
        return slu_err_set(err, SLU_ENOMEM, "tokenizer: no memory for %llu merges",
                           (unsigned long long)merges->n_items);
    }
    size_t cursor = 0;
    struct slu_str line;
    for (uint64_t i = 0; i < merges->n_items && slu_kv_next_str(merges, &cursor, &line); i++) {
        struct slu_merge merge;
        if (line.len <= 2 * SLU_TOKEN_BYTES_MAX + 1 && read_merge(tokenizer, line, bytes, &merge)) {
            insert_merge(tokenizer, merge);
        }
    }
    free(bytes);
    size_t kept = ((size_t)tokenizer->n_merges + 1) * sizeof *tokenizer->merges;
    struct slu_merge *shrunk = realloc(tokenizer->merges, kept);
    tokenizer->merges = shrunk ? shrunk : tokenizer->merges;
    return SLU_OK;
}

size_t slu_bpe_bytes(const struct slu_tokenizer *tokenizer)
{
    if (!tokenizer->merges) {
        return 0;
    }
    return ((size_t)tokenizer->n_merges + 1) * sizeof *tokenizer->merges +
           ((size_t)tokenizer->merge_mask + 1) * sizeof(uint32_t);
}

size_t slu_bpe_bytes_max(const struct slu_kvs *kvs)
{
    const struct slu_kv *merges = NULL;
    if (find_merges(kvs, &merges, NULL) < 0) {
        return 0;
    }
    return ((size_t)merges->n_items + 1) * sizeof(struct slu_merge) +
           (size_t)slu_slots_for(merges->n_items) * sizeof(uint32_t) + 2 * SLU_TOKEN_BYTES_MAX + 1;
}

/* Symbols of the word as a list threaded through an array; a merged one lives on in its left half,
 * and the right half's id is NONE. A byte that has no token never merges, and its id is NONE too.
 */
struct symbol {
    uint32_t id;
    uint32_t prev;
    uint32_t next;
};

struct session {
    const struct slu_tokenizer *tokenizer;
    struct slu_ids *ids;
    struct symbol *symbols;
    uint64_t *heap; /* rank << 32 | position */
    size_t n_heap;
    size_t n_max; /* symbols there is room for, and half as many as there are heap entries */
};

static void push(struct session *session, uint64_t key)
{
    uint64_t *heap = session->heap;
    size_t i = session->n_heap++;
    while (i > 0 && heap[(i - 1) / 2] > key) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = key;
}

static uint64_t pop(struct session *session)
{
    uint64_t *heap = session->heap;
    uint64_t top = heap[0];
    uint64_t key = heap[--session->n_heap];
    size_t i = 0;
    for (size_t child = 1; child < session->n_heap; child = 2 * i + 1) {
        if (child + 1 < session->n_heap && heap[child + 1] < heap[child]) {
            child++;
        }
        if (heap[child] >= key) {
            break;
        }
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = key;
    return top;
}

static void offer(struct session *session, uint32_t left)
{
    const struct symbol *symbols = session->symbols;
    if (left == NONE || symbols[left].next == NONE) {
        return;
    }
    uint32_t right = symbols[left].next;
    if (symbols[left].id == NONE || symbols[right].id == NONE) {
        return;
    }
    uint32_t rank = find_merge(session->tokenizer, symbols[left].id, symbols[right].id);
    if (rank != NONE) {
        push(session, (uint64_t)rank << 32 | left);
    }
}

static void merge_all(struct session *session)
{
    struct symbol *symbols = session->symbols;
    while (session->n_heap > 0) {
        uint64_t key = pop(session);
        uint32_t left = (uint32_t)key;
        const struct slu_merge *merge = &session->tokenizer->merges[key >> 32];
        uint32_t right = symbols[left].next;
        if (symbols[left].id != merge->left || right == NONE || symbols[right].id != merge->right) {
            continue;
        }
        symbols[left].id = merge->merged;
        symbols[left].next = symbols[right].next;
        symbols[right].id = NONE;
        if (symbols[left].next != NONE) {
            symbols[symbols[left].next].prev = left;
        }
        offer(session, symbols[left].prev);
        offer(session, left);
    }
}

static int reserve(struct session *session, size_t n)
{
    if (n <= session->n_max) {
        return SLU_OK;
    }
    n = n < 256 ? 256 : n;
    free(session->symbols);
    free(session->heap);
    session->n_max = 0;
    session->symbols = malloc(n * sizeof *session->symbols);
    /* Each merge takes one entry out and puts at most two in, and there are fewer than n. */
    session->heap = malloc(2 * n * sizeof *session->heap);
    if (!session->symbols || !session->heap) {
        return SLU_ENOMEM;
    }
    session->n_max = n;
    return SLU_OK;
}

static int encode_word(void *arg, const char *word, size_t len)
{
    struct session *session = arg;
    const struct slu_tokenizer *tokenizer = session->tokenizer;
    if (len >= UINT32_MAX) {
        return SLU_ENOMEM;
    }
    if (tokenizer->pre.ignore_merges && len <= tokenizer->text_bytes_max) {
        int32_t id = slu_vocab_find(tokenizer, word, len, SLU_TOKEN_TEXT);
        if (id >= 0) {
            slu_ids_put(session->ids, id);
            return SLU_OK;
        }
    }
    if (reserve(session, len) < 0) {
        return SLU_ENOMEM;
    }
    for (size_t i = 0; i < len; i++) {
        session->symbols[i] = (struct symbol){
            .id = (uint32_t)tokenizer->byte_ids[(unsigned char)word[i]],
            .prev = i > 0 ? (uint32_t)i - 1 : NONE,
            .next = i + 1 < len ? (uint32_t)i + 1 : NONE,
        };
    }
    session->n_heap = 0;
    for (size_t i = 0; i + 1 < len; i++) {
        offer(session, (uint32_t)i);
    }
    merge_all(session);
    for (uint32_t i = 0; i != NONE; i = session->symbols[i].next) {
        /* A byte without a token becomes the unknown one, or nothing where there is none. */
        uint32_t id = session->symbols[i].id;
        slu_ids_put(session->ids, id != NONE ? (int32_t)id : tokenizer->unk);
    }
    return SLU_OK;
}

int slu_bpe_encode(const struct slu_tokenizer *tokenizer, const char *text, size_t len,
                   struct slu_ids *ids)
{
    struct session session = {.tokenizer = tokenizer, .ids = ids};
    int rc = slu_pretokenize(&tokenizer->pre, text, len, encode_word, &session);
    free(session.symbols);
    free(session.heap);
    return rc;
}
