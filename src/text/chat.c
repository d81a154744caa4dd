/*
 * Rendering is a walk over the messages that emits two things: marks, looked up as tokens by name,
 * and text, which is collected between marks and encoded with special tokens unrecognised. So a
 * text that spells a mark stays text. Where a vocabulary has no token for a mark (OLMoE's
 * <|user|>, Mixtral's [INST]), the mark is text too, as it was in training.
 *
 * The forms are those of the published templates, without the lines in which they state today's
 * date: the same conversation gives the same ids on any day.
 */
#include "text/chat.h"

#include <stdlib.h>
#include <string.h>

#include "text/text_internal.h"

#define BAR          "\xef\xbd\x9c" /* the fullwidth vertical line of DeepSeek's marks */
#define DS_USER      "<" BAR "User" BAR ">"
#define DS_ASSISTANT "<" BAR "Assistant" BAR ">"

#define HARMONY_SYSTEM                                                                             \
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\n"    \
    "Reasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be "         \
    "included "                                                                                    \
    "for every message."
#define GRANITE_SYSTEM                                                                             \
    "Knowledge Cutoff Date: April 2024.\nYou are Granite, developed by IBM. You are a helpful AI " \
    "assistant."

static const char *find(struct slu_str text, const char *what)
{
    return memmem(text.at ? text.at : "", text.len, what, strlen(what));
}

static unsigned count(struct slu_str text, const char *what)
{
    unsigned n = 0;
    const char *end = text.at + text.len;
    for (const char *hit = find(text, what); hit; hit = find(text, what)) {
        n++;
        text.at = hit + strlen(what);
        text.len = (size_t)(end - text.at);
    }
    return n;
}

static enum slu_chat detect(struct slu_str text)
{
    if (find(text, "<|im_start|>")) {
        return find(text, "<|im_sep|>") || find(text, "<end_of_utterance>") ? SLU_CHAT_NONE
                                                                            : SLU_CHAT_CHATML;
    }
    if (find(text, "<|start|>") && find(text, "<|message|>") && find(text, "<|channel|>")) {
        return SLU_CHAT_HARMONY;
    }
    if (find(text, "<|start_of_role|>")) {
        return SLU_CHAT_GRANITE;
    }
    if (find(text, "[INST]")) {
        /* Llama 2 and later Mistral models mark the system text otherwise. */
        return find(text, "<<SYS>>") || find(text, "[SYSTEM_PROMPT]") ? SLU_CHAT_NONE
                                                                      : SLU_CHAT_MISTRAL;
    }
    if (find(text, DS_USER) && find(text, DS_ASSISTANT)) {
        return SLU_CHAT_DEEPSEEK3;
    }
    if (find(text, "<|user|>") && find(text, "<|assistant|>")) {
        /* Of several families that look like this, OLMoE's ends only the assistant's turns, and
         * names the end-of-text token at most once more, at its beginning. */
        bool is_other = find(text, "<|end|>") || find(text, "[gMASK]") || find(text, "</s>") ||
                        find(text, "<|endoftext|>");
        unsigned n_ends = count(text, "eos_token");
        return is_other || n_ends < 1 || n_ends > 2 ? SLU_CHAT_NONE : SLU_CHAT_OLMOE;
    }
    if (find(text, "User: ") && find(text, "Assistant: ") && find(text, "eos_token")) {
        return SLU_CHAT_DEEPSEEK;
    }
    return SLU_CHAT_NONE;
}

enum slu_chat slu_chat_detect(const struct slu_kvs *kvs)
{
    struct slu_str text;
    if (slu_kvs_str(kvs, "tokenizer.chat_template", &text, NULL) < 0) {
        return SLU_CHAT_NONE;
    }
    return detect(text);
}

const char *slu_chat_name(enum slu_chat chat)
{
    switch (chat) {
    case SLU_CHAT_NONE:
        return "none";
    case SLU_CHAT_CHATML:
        return "chatml";
    case SLU_CHAT_HARMONY:
        return "harmony";
    case SLU_CHAT_MISTRAL:
        return "mistral";
    case SLU_CHAT_OLMOE:
        return "olmoe";
    case SLU_CHAT_GRANITE:
        return "granite";
    case SLU_CHAT_DEEPSEEK:
        return "deepseek";
    case SLU_CHAT_DEEPSEEK3:
        return "deepseek3";
    }
    return "unknown";
}

static void set_system(struct slu_tokenizer *tokenizer, const char *text, size_t len)
{
    if (len <= sizeof tokenizer->system) {
        memcpy(tokenizer->system, text, len);
        tokenizer->system_len = len;
    }
}

/* ChatML templates that supply a system text spell it out whole, in one literal:
 * '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n'. */
static void read_chatml_system(struct slu_tokenizer *tokenizer, struct slu_str text)
{
    static const char opening[] = "<|im_start|>system";
    const char *end = text.at + text.len;
    for (const char *hit = find(text, opening); hit; hit = find(text, opening)) {
        text.at = hit + sizeof opening - 1;
        text.len = (size_t)(end - text.at);
        if (text.len > 2 && memcmp(text.at, "\\n", 2) == 0) {
            text.at += 2;
        } else if (text.len > 1 && text.at[0] == '\n') {
            text.at += 1;
        } else {
            continue;
        }
        text.len = (size_t)(end - text.at);
        const char *close = find(text, "<|im_end|>");
        size_t len = close ? (size_t)(close - text.at) : 0;
        bool literal = len > 0 && !memchr(text.at, '\'', len) && !memchr(text.at, '"', len) &&
                       !memchr(text.at, '{', len) && !memchr(text.at, '\\', len);
        if (literal) {
            set_system(tokenizer, text.at, len);
            return;
        }
    }
}

void slu_chat_read_defaults(struct slu_tokenizer *tokenizer, const struct slu_kvs *kvs)
{
    struct slu_str text;
    tokenizer->chat_bos = tokenizer->bos;
    if (slu_kvs_str(kvs, "tokenizer.chat_template", &text, NULL) < 0) {
        return;
    }
    enum slu_chat chat = detect(text);
    /* OLMoE begins with its end-of-text token, which its files don't give as BOS. */
    if (chat == SLU_CHAT_OLMOE && (tokenizer->bos < 0 || find(text, "{{ eos_token }}"))) {
        tokenizer->chat_bos = tokenizer->eos;
    }
    if (chat == SLU_CHAT_CHATML) {
        read_chatml_system(tokenizer, text);
    } else if (chat == SLU_CHAT_GRANITE && find(text, "Knowledge Cutoff Date: April 2024.") &&
               find(text, "You are Granite, developed by IBM.")) {
        set_system(tokenizer, GRANITE_SYSTEM, sizeof GRANITE_SYSTEM - 1);
    }
}

struct render {
    const struct slu_tokenizer *tokenizer;
    const struct slu_message *messages;
    size_t n_messages;
    struct slu_ids ids;
    char *text; /* not yet encoded */
    size_t len;
    size_t len_max;
    int rc;
};

static void put_bytes(struct render *render, const char *bytes, size_t len)
{
    if (render->rc < 0 || len == 0) {
        return;
    }
    if (len > render->len_max - render->len) {
        size_t len_max = render->len_max * 2 + 256;
        if (len > SIZE_MAX / 4 || render->len_max > SIZE_MAX / 4) {
            render->rc = SLU_ENOMEM;
            return;
        }
        len_max = len_max < render->len + len ? render->len + len : len_max;
        char *text = realloc(render->text, len_max);
        if (!text) {
            render->rc = SLU_ENOMEM;
            return;
        }
        render->text = text;
        render->len_max = len_max;
    }
    memcpy(render->text + render->len, bytes, len);
    render->len += len;
}

static void put_text(struct render *render, const char *text)
{
    put_bytes(render, text, strlen(text));
}

static void put_message(struct render *render, const struct slu_message *message)
{
    put_bytes(render, message->text, message->len);
}

static void flush(struct render *render)
{
    if (render->rc < 0 || render->len == 0) {
        return;
    }
    struct slu_ids *ids = &render->ids;
    size_t n_room = (uint64_t)ids->n < ids->n_max ? ids->n_max - (size_t)ids->n : 0;
    int64_t n = slu_tokenizer_encode(render->tokenizer, render->text, render->len, 0,
                                     n_room > 0 ? ids->at + ids->n : NULL, n_room);
    render->len = 0;
    if (n < 0) {
        render->rc = (int)n;
    } else {
        ids->n += n;
    }
}

static void put_id(struct render *render, int32_t id)
{
    flush(render);
    slu_ids_put(&render->ids, id);
}

static int32_t find_mark(const struct render *render, const char *name)
{
    int32_t id = slu_vocab_find(render->tokenizer, name, strlen(name), SLU_TOKEN_SPECIAL);
    return id >= 0 ? id : slu_vocab_find(render->tokenizer, name, strlen(name), SLU_TOKEN_USER);
}

static void put_mark(struct render *render, const char *name)
{
    int32_t id = find_mark(render, name);
    if (id >= 0) {
        put_id(render, id);
    } else {
        put_text(render, name);
    }
}

static bool has_system(const struct render *render)
{
    return render->messages[0].role == SLU_ROLE_SYSTEM;
}

static const char *role_name(enum slu_role role)
{
    return role == SLU_ROLE_SYSTEM ? "system" : role == SLU_ROLE_USER ? "user" : "assistant";
}

static void render_none(struct render *render)
{
    for (size_t i = 0; i < render->n_messages; i++) {
        put_text(render, i > 0 ? "\n" : "");
        put_message(render, &render->messages[i]);
    }
}

static void put_chatml(struct render *render, enum slu_role role, const char *text, size_t len)
{
    put_mark(render, "<|im_start|>");
    put_text(render, role_name(role));
    put_text(render, "\n");
    put_bytes(render, text, len);
    put_mark(render, "<|im_end|>");
    put_text(render, "\n");
}

static void render_chatml(struct render *render)
{
    const struct slu_tokenizer *tokenizer = render->tokenizer;
    if (!has_system(render) && tokenizer->system_len > 0) {
        put_chatml(render, SLU_ROLE_SYSTEM, tokenizer->system, tokenizer->system_len);
    }
    for (size_t i = 0; i < render->n_messages; i++) {
        const struct slu_message *message = &render->messages[i];
        put_chatml(render, message->role, message->text, message->len);
    }
    put_mark(render, "<|im_start|>");
    put_text(render, "assistant\n");
}

/* The model's own system message, then the user's system text as instructions of the developer. */
static void render_harmony(struct render *render)
{
    put_mark(render, "<|start|>");
    put_text(render, "system");
    put_mark(render, "<|message|>");
    put_text(render, HARMONY_SYSTEM);
    put_mark(render, "<|end|>");
    for (size_t i = 0; i < render->n_messages; i++) {
        const struct slu_message *message = &render->messages[i];
        bool system = message->role == SLU_ROLE_SYSTEM;
        put_mark(render, "<|start|>");
        put_text(render, system ? "developer" : role_name(message->role));
        if (message->role == SLU_ROLE_ASSISTANT) {
            put_mark(render, "<|channel|>");
            put_text(render, "final");
        }
        put_mark(render, "<|message|>");
        put_text(render, system ? "# Instructions\n\n" : "");
        put_message(render, message);
        put_text(render, system ? "\n\n" : "");
        put_mark(render, "<|end|>");
    }
    put_mark(render, "<|start|>");
    put_text(render, "assistant");
}

/* Mixtral has no system role: the text goes before the next user's. Where [INST] is a token, the
 * space after it is the one that SentencePiece puts there by itself. */
static void render_mistral(struct render *render)
{
    bool marked = find_mark(render, "[INST]") >= 0;
    bool open = false;
    for (size_t i = 0; i < render->n_messages; i++) {
        const struct slu_message *message = &render->messages[i];
        if (message->role == SLU_ROLE_ASSISTANT) {
            put_text(render, marked ? "" : " ");
            put_message(render, message);
            put_id(render, render->tokenizer->eos);
            continue;
        }
        if (!open) {
            put_mark(render, "[INST]");
            put_text(render, marked ? "" : " ");
        }
        put_message(render, message);
        open = message->role == SLU_ROLE_SYSTEM;
        if (open) {
            put_text(render, "\n\n");
        } else {
            put_text(render, marked ? "" : " ");
            put_mark(render, "[/INST]");
        }
    }
    if (open) {
        put_text(render, marked ? "" : " ");
        put_mark(render, "[/INST]");
    }
}

static void render_olmoe(struct render *render)
{
    for (size_t i = 0; i < render->n_messages; i++) {
        const struct slu_message *message = &render->messages[i];
        put_mark(render, message->role == SLU_ROLE_SYSTEM ? "<|system|>"
                         : message->role == SLU_ROLE_USER ? "<|user|>"
                                                          : "<|assistant|>");
        put_text(render, "\n");
        put_message(render, message);
        if (message->role == SLU_ROLE_ASSISTANT) {
            put_id(render, render->tokenizer->eos);
        }
        put_text(render, "\n");
    }
    put_mark(render, "<|assistant|>");
    put_text(render, "\n");
}

static void put_granite(struct render *render, enum slu_role role, const char *text, size_t len)
{
    put_mark(render, "<|start_of_role|>");
    put_text(render, role_name(role));
    put_mark(render, "<|end_of_role|>");
    put_bytes(render, text, len);
    put_mark(render, "<|end_of_text|>");
    put_text(render, "\n");
}

static void render_granite(struct render *render)
{
    const struct slu_tokenizer *tokenizer = render->tokenizer;
    if (!has_system(render) && tokenizer->system_len > 0) {
        put_granite(render, SLU_ROLE_SYSTEM, tokenizer->system, tokenizer->system_len);
    }
    for (size_t i = 0; i < render->n_messages; i++) {
        const struct slu_message *message = &render->messages[i];
        put_granite(render, message->role, message->text, message->len);
    }
    put_mark(render, "<|start_of_role|>");
    put_text(render, "assistant");
    put_mark(render, "<|end_of_role|>");
}

static void render_deepseek(struct render *render)
{
    for (size_t i = 0; i < render->n_messages; i++) {
        const struct slu_message *message = &render->messages[i];
        put_text(render, message->role == SLU_ROLE_USER        ? "User: "
                         : message->role == SLU_ROLE_ASSISTANT ? "Assistant: "
                                                               : "");
        put_message(render, message);
        if (message->role == SLU_ROLE_ASSISTANT) {
            put_id(render, render->tokenizer->eos);
        } else {
            put_text(render, "\n\n");
        }
    }
    put_text(render, "Assistant:");
}

/* All system texts come first, whatever their place in the conversation. */
static void render_deepseek3(struct render *render)
{
    bool first = true;
    for (size_t i = 0; i < render->n_messages; i++) {
        if (render->messages[i].role == SLU_ROLE_SYSTEM) {
            put_text(render, first ? "" : "\n\n");
            put_message(render, &render->messages[i]);
            first = false;
        }
    }
    for (size_t i = 0; i < render->n_messages; i++) {
        const struct slu_message *message = &render->messages[i];
        if (message->role == SLU_ROLE_USER) {
            put_mark(render, DS_USER);
            put_message(render, message);
        } else if (message->role == SLU_ROLE_ASSISTANT) {
            put_mark(render, DS_ASSISTANT);
            put_message(render, message);
            put_id(render, render->tokenizer->eos);
        }
    }
    put_mark(render, DS_ASSISTANT);
}

int64_t slu_chat_encode(enum slu_chat chat, const struct slu_tokenizer *tokenizer,
                        const struct slu_message *messages, size_t n_messages, int32_t *ret_ids,
                        size_t n_max, struct slu_err *err)
{
    static const struct {
        void (*render)(struct render *render);
        bool bos; /* the template begins with it, whatever add_bos_token says */
    } forms[] = {
        [SLU_CHAT_NONE] = {render_none, false},
        [SLU_CHAT_CHATML] = {render_chatml, false},
        [SLU_CHAT_HARMONY] = {render_harmony, false},
        [SLU_CHAT_MISTRAL] = {render_mistral, true},
        [SLU_CHAT_OLMOE] = {render_olmoe, true},
        [SLU_CHAT_GRANITE] = {render_granite, false},
        [SLU_CHAT_DEEPSEEK] = {render_deepseek, true},
        [SLU_CHAT_DEEPSEEK3] = {render_deepseek3, true},
    };
    if ((size_t)chat >= sizeof forms / sizeof forms[0]) {
        return slu_err_set(err, SLU_EINVAL, "there is no chat template number %d", (int)chat);
    }
    if (n_messages == 0) {
        return slu_err_set(err, SLU_EINVAL, "a conversation needs at least one message");
    }
    struct render render = {
        .tokenizer = tokenizer,
        .messages = messages,
        .n_messages = n_messages,
        .ids = {.at = ret_ids, .n_max = ret_ids ? n_max : 0},
    };
    if (forms[chat].bos) {
        slu_ids_put(&render.ids, tokenizer->chat_bos);
    } else if (tokenizer->add_bos) {
        slu_ids_put(&render.ids, tokenizer->bos);
    }
    forms[chat].render(&render);
    flush(&render);
    free(render.text);
    if (render.rc < 0) {
        return slu_err_set(err, render.rc, "no memory to encode a conversation of %zu messages",
                           n_messages);
    }
    return render.ids.n;
}
