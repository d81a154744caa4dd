#include "text/text_internal.h"

#include <string.h>

static const char replacement[] = "\xef\xbf\xbd";

void slu_detok_init(struct slu_detok *detok, const struct slu_tokenizer *tokenizer,
                    bool skip_special)
{
    *detok =
        (struct slu_detok){.tokenizer = tokenizer, .skip_special = skip_special, .is_first = true};
}

/* Takes one byte: emits the sequence that it completes, or holds it. */
static void take(struct slu_detok *detok, unsigned char byte, slu_emit_fn emit, void *arg)
{
    detok->held[detok->n_held++] = byte;
    while (detok->n_held > 0) {
        if (slu_utf8_len(detok->held, detok->n_held) == detok->n_held) {
            emit(arg, (const char *)detok->held, detok->n_held);
            detok->n_held = 0;
        } else if (slu_utf8_is_start(detok->held, detok->n_held)) {
            return;
        } else if (detok->n_held == 1) {
            emit(arg, replacement, 3);
            detok->n_held = 0;
        } else {
            /* The last byte doesn't go on with what is held, and may begin something itself. */
            emit(arg, replacement, 3);
            detok->held[0] = byte;
            detok->n_held = 1;
        }
    }
}

void slu_detok_push(struct slu_detok *detok, int32_t id, slu_emit_fn emit, void *arg)
{
    const char *bytes;
    int len = slu_tokenizer_piece(detok->tokenizer, id, &bytes);
    bool special = slu_tokenizer_is_special(detok->tokenizer, id);
    if (len <= 0 || (special && detok->skip_special)) {
        return;
    }
    if (detok->is_first && detok->tokenizer->add_space_prefix && !special && bytes[0] == ' ') {
        bytes++;
        len--;
    }
    detok->is_first = false;
    const unsigned char *at = (const unsigned char *)bytes;
    for (int i = 0; i < len;) {
        /* Runs of whole characters go out in one call. */
        int end = i;
        while (detok->n_held == 0 && end < len) {
            unsigned n = slu_utf8_len(at + end, (size_t)(len - end));
            if (n == 0) {
                break;
            }
            end += (int)n;
        }
        if (end > i) {
            emit(arg, bytes + i, (size_t)(end - i));
            i = end;
        } else {
            take(detok, at[i], emit, arg);
            i++;
        }
    }
}

void slu_detok_flush(struct slu_detok *detok, slu_emit_fn emit, void *arg)
{
    if (detok->n_held > 0) {
        emit(arg, replacement, 3);
        detok->n_held = 0;
    }
}
