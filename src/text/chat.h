/*
 * Chat templates. GGUF files carry a Jinja template; sluice recognises the family from its text
 * and renders the conversation itself. What a user wrote never becomes a special token: template
 * marks and message text are encoded apart.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_TEXT_CHAT_H
#define SLU_TEXT_CHAT_H

#include "text/tokenizer.h"

enum slu_chat {
    SLU_CHAT_NONE,     /* no template, or one not recognised: plain text */
    SLU_CHAT_CHATML,   /* <|im_start|>role\n...<|im_end|>\n (Qwen) */
    SLU_CHAT_HARMONY,  /* <|start|>role<|message|>...<|end|> (gpt-oss) */
    SLU_CHAT_MISTRAL,  /* [INST] ... [/INST] (Mixtral) */
    SLU_CHAT_OLMOE,    /* <|user|>\n...\n<|assistant|>\n */
    SLU_CHAT_GRANITE,  /* <|start_of_role|>user<|end_of_role|>...<|end_of_text|>\n */
    SLU_CHAT_DEEPSEEK, /* User: ...\n\nAssistant: (V2 and Lite) */
    SLU_CHAT_DEEPSEEK3 /* <｜User｜>...<｜Assistant｜> (V3) */
};

enum slu_role { SLU_ROLE_SYSTEM, SLU_ROLE_USER, SLU_ROLE_ASSISTANT };

struct slu_message {
    enum slu_role role;
    const char *text; /* len bytes */
    size_t len;
};

/* From tokenizer.chat_template; SLU_CHAT_NONE if absent or unknown. */
enum slu_chat slu_chat_detect(const struct slu_kvs *kvs);
const char *slu_chat_name(enum slu_chat chat);

/* The conversation as ids, with BOS where the model wants it, open for the assistant's answer.
 * Returns the number of ids, written up to n_max; or a negative error. */
int64_t slu_chat_encode(enum slu_chat chat, const struct slu_tokenizer *tokenizer,
                        const struct slu_message *messages, size_t n_messages, int32_t *ret_ids,
                        size_t n_max, struct slu_err *err);

#endif
