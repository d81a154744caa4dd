/*
 * Chat. Each new message renders the whole conversation again, as the model's own template would,
 * and the session keeps whatever computed prefix is still the same: templates that drop an
 * earlier answer's reasoning, or move their system text, cost a new prefill and nothing else.
 */
#include <stdlib.h>
#include <string.h>

#include "session.h"

static int add_message(struct slu_session *s, enum slu_role role, const char *text, size_t len,
                       struct slu_err *err)
{
    char *copy = malloc(len + 1);
    struct slu_message *messages = realloc(s->messages, (s->n_messages + 1) * sizeof *s->messages);
    s->messages = messages ? messages : s->messages;
    if (!copy || !messages) {
        free(copy);
        return slu_err_set(err, SLU_ENOMEM, "out of memory for a message");
    }
    memcpy(copy, text, len);
    copy[len] = '\0';
    s->messages[s->n_messages++] = (struct slu_message){.role = role, .text = copy, .len = len};
    return 0;
}

static void drop_message(struct slu_session *s)
{
    free((char *)s->messages[--s->n_messages].text);
}

static int render(struct slu_session *s, struct slu_err *err)
{
    const struct slu_engine *e = s->engine;
    int64_t n = slu_chat_encode(e->chat, e->tokenizer, s->messages, s->n_messages, NULL, 0, err);
    if (n < 0) {
        return (int)n;
    }
    int32_t *ids = malloc(((size_t)n + 1) * sizeof *ids);
    if (!ids) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for %lld tokens", (long long)n);
    }
    n = slu_chat_encode(e->chat, e->tokenizer, s->messages, s->n_messages, ids, (size_t)n, err);
    int rc = n < 0 ? (int)n : slu_session_replace(s, ids, (size_t)n, err);
    free(ids);
    return rc;
}

int slu_session_chat(struct slu_session *s, const char *text, size_t len, struct slu_err *err)
{
    int rc = add_message(s, SLU_ROLE_USER, text, len, err);
    if (rc < 0) {
        return rc;
    }
    rc = render(s, err);
    if (rc < 0) {
        drop_message(s);
        return rc;
    }
    s->is_chat = true;
    s->has_answer = false;
    s->answer_from = s->n_ids;
    return 0;
}

/* What a template takes as an answer: with harmony the text behind the last channel's header. */
static uint32_t answer_start(const struct slu_session *s)
{
    uint32_t from = s->answer_from;
    if (s->engine->chat != SLU_CHAT_HARMONY) {
        return from;
    }
    int32_t mark = slu_tokenizer_find(s->engine->tokenizer, "<|message|>");
    for (uint32_t i = s->n_ids; mark >= 0 && i > from; i--) {
        if (s->ids[i - 1] == mark) {
            return i;
        }
    }
    return from;
}

int slu_session_answered(struct slu_session *s, struct slu_err *err)
{
    uint32_t from = answer_start(s), end = s->n_ids;
    while (end > from && slu_tokenizer_is_end(s->engine->tokenizer, s->ids[end - 1])) {
        end--;
    }
    int64_t len = slu_engine_decode(s->engine, s->ids + from, end - from, NULL, 0, err);
    if (len < 0) {
        return (int)len;
    }
    char *text = malloc((size_t)len + 1);
    if (!text) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for an answer");
    }
    len = slu_engine_decode(s->engine, s->ids + from, end - from, text, (size_t)len, err);
    if (s->has_answer) {
        drop_message(s); /* the beginning of this one */
    }
    int rc = len < 0 ? (int)len : add_message(s, SLU_ROLE_ASSISTANT, text, (size_t)len, err);
    s->has_answer = rc == 0;
    free(text);
    return rc;
}
