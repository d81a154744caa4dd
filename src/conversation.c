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

int slu_session_system(struct slu_session *s, const char *text, size_t len, struct slu_err *err)
{
    if (s->n_messages > 0) {
        return slu_err_set(err, SLU_EINVAL, "a system message comes before all others");
    }
    return add_message(s, SLU_ROLE_SYSTEM, text, len, err);
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

/* Whether the harmony header that ends in the mark at ids[mark] opens the final channel. */
static bool opens_final(const struct slu_session *s, uint32_t from, uint32_t mark, int32_t channel)
{
    uint32_t start = mark;
    while (start > from && s->ids[start - 1] != channel) {
        start--;
    }
    char name[6] = "";
    int64_t n = slu_engine_decode(s->engine, s->ids + start, mark - start, name, 5, NULL);
    return start > from && n >= 5 && memcmp(name, "final", 5) == 0;
}

/* What a template takes as an answer: with harmony the text of the final channel, nothing where
 * the model was stopped before it got there, and all of it where it used no channels. */
static uint32_t answer_start(const struct slu_session *s)
{
    const struct slu_tokenizer *tokenizer = s->engine->tokenizer;
    uint32_t from = s->answer_from;
    int32_t message = slu_tokenizer_find(tokenizer, "<|message|>");
    int32_t channel = slu_tokenizer_find(tokenizer, "<|channel|>");
    if (s->engine->chat != SLU_CHAT_HARMONY || message < 0 || channel < 0) {
        return from;
    }
    bool has_channels = false;
    for (uint32_t i = s->n_ids; i > from; i--) {
        if (s->ids[i - 1] == message && opens_final(s, from, i - 1, channel)) {
            return i;
        }
        has_channels = has_channels || s->ids[i - 1] == channel;
    }
    return has_channels ? s->n_ids : from;
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
