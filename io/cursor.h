/*
 * A cursor over encoded bytes, little-endian, that never reads past their end. GGUF headers are
 * read a growing piece at a time, so it remembers whether a refusal was for want of bytes (more of
 * the file may help) or for what the bytes say.
 *
 * Thread safety: a cursor belongs to its caller.
 */
#ifndef SLU_IO_CURSOR_H
#define SLU_IO_CURSOR_H

#include <stdbool.h>
#include <string.h>

#include "io/gguf.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read as they lie in memory");

struct slu_cursor {
    const uint8_t *data;
    size_t at;
    size_t bytes;         /* that are here */
    uint64_t whole_bytes; /* that there can be: of the file, or the largest header; >= bytes */
    bool is_short;        /* refused for want of bytes that can still be read */
};

static inline size_t slu_cursor_left(const struct slu_cursor *cursor)
{
    return cursor->bytes - cursor->at;
}

/* The next n bytes, or NULL when there are fewer. */
static inline const uint8_t *slu_cursor_take(struct slu_cursor *cursor, uint64_t n)
{
    if (n > slu_cursor_left(cursor)) {
        cursor->is_short = n <= cursor->whole_bytes - cursor->at;
        return NULL;
    }
    const uint8_t *taken = cursor->data + cursor->at;
    cursor->at += (size_t)n;
    return taken;
}

static inline bool slu_cursor_u32(struct slu_cursor *cursor, uint32_t *ret)
{
    const uint8_t *at = slu_cursor_take(cursor, sizeof *ret);
    if (at) {
        memcpy(ret, at, sizeof *ret);
    }
    return at != NULL;
}

static inline bool slu_cursor_u64(struct slu_cursor *cursor, uint64_t *ret)
{
    const uint8_t *at = slu_cursor_take(cursor, sizeof *ret);
    if (at) {
        memcpy(ret, at, sizeof *ret);
    }
    return at != NULL;
}

/* A u64 length and so many bytes. */
static inline bool slu_cursor_str(struct slu_cursor *cursor, struct slu_str *ret)
{
    uint64_t len;
    if (!slu_cursor_u64(cursor, &len)) {
        return false;
    }
    const uint8_t *at = slu_cursor_take(cursor, len);
    if (at) {
        *ret = (struct slu_str){.at = (const char *)at, .len = (size_t)len};
    }
    return at != NULL;
}

/* slu_kvs_parse from where the cursor stands. */
int slu_kvs_parse_at(struct slu_cursor *cursor, uint64_t n_pairs, struct slu_kvs *ret_kvs,
                     const char *name, struct slu_err *err);

/* memcmp order, shorter first among equals. */
int slu_str_cmp(struct slu_str a, struct slu_str b);

#endif
