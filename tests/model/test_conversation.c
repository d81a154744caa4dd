/* Answers and texts that are generated in several calls. */
#include <criterion/criterion.h>
#include <string.h>

#include "fixture.h"
#include "session.h"

static struct slu_session *session_of(struct slu_engine *engine)
{
    struct slu_session *session = NULL;
    struct slu_err err = {0};
    cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0, "%s", err.text);
    return session;
}

static int generate(struct slu_session *session, uint32_t n)
{
    return slu_session_generate(
        session, &(struct slu_generate_params){.n_max = n, .ignore_end = true}, NULL, NULL);
}

/* An answer generated in two calls is the one message that it is when generated in one. */
Test(conversation, answer_in_two_parts)
{
    struct fixture f;
    fixture_open(&f);
    struct slu_synth_params params = {.arch = SLU_ARCH_QWEN3MOE, .n_experts = 16};
    params.chat_template = "{% for m in messages %}<|im_start|>{{m.role}}<|im_end|>{% endfor %}";
    fixture_synth(&f, &params, SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 500});
    struct slu_session *once = session_of(engine), *twice = session_of(engine);
    cr_assert_eq(slu_session_chat(once, "one", 3, NULL), 0);
    cr_assert_eq(slu_session_chat(twice, "one", 3, NULL), 0);
    cr_assert_eq(generate(once, 12), 0);
    cr_assert_eq(generate(twice, 5), 0);
    cr_assert_eq(generate(twice, 7), 0);
    cr_assert_eq(once->n_messages, 2);
    cr_assert_eq(twice->n_messages, 2);
    cr_expect_str_eq(twice->messages[1].text, once->messages[1].text);
    slu_session_destroy(once);
    slu_session_destroy(twice);
    slu_engine_close(engine);
    fixture_close(&f);
}

struct heard {
    char text[256];
    size_t len;
};

static int hear(void *arg, const char *text, size_t len, int32_t token)
{
    struct heard *heard = arg;
    (void)token;
    cr_assert_lt(len, sizeof heard->text - heard->len);
    memcpy(heard->text + heard->len, text, len);
    heard->len += len;
    return 0;
}

/* A harmony answer that was stopped in a hidden channel is still in it when it goes on. */
Test(conversation, hidden_channel_stays_hidden)
{
    struct fixture f;
    fixture_open(&f);
    struct slu_synth_params params = {.arch = SLU_ARCH_GPT_OSS, .n_experts = 16};
    params.chat_template = "<|start|>{{role}}<|channel|>{{channel}}<|message|>{{text}}";
    fixture_synth(&f, &params, SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 500});
    const char *const headers[] = {"<|channel|>analysis<|message|>", "<|channel|>final<|message|>"};
    for (int i = 0; i < 2; i++) {
        struct slu_session *session = session_of(engine);
        struct heard heard = {0};
        cr_assert_eq(slu_session_chat(session, "one", 3, NULL), 0);
        cr_assert_eq(slu_session_text(session, headers[i], strlen(headers[i]), NULL), 0);
        struct slu_generate_params go = {
            .n_max = 5, .ignore_end = true, .text = hear, .arg = &heard};
        cr_assert_eq(slu_session_generate(session, &go, NULL, NULL), 0);
        cr_expect_eq(heard.len > 0, i == 1, "%s gave '%.*s'", headers[i], (int)heard.len,
                     heard.text);
        slu_session_destroy(session);
    }
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Generated text can be put behind the prompt as it is: the space before a first word is kept. */
Test(conversation, continued_text_keeps_its_space)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &(struct slu_synth_params){.arch = SLU_ARCH_LLAMA}, SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = 64});
    struct slu_session *session = session_of(engine);
    unsigned n_spaces = 0;
    for (uint64_t seed = 0; seed < 60; seed++) {
        struct heard heard = {0};
        cr_assert_eq(slu_session_replace(session, (int32_t[]){5, 6, 7}, 3, NULL), 0);
        struct slu_generate_params go = {.n_max = 1,
                                         .ignore_end = true,
                                         .sampling = {.temperature = 5, .seed = seed},
                                         .text = hear,
                                         .arg = &heard};
        cr_assert_eq(slu_session_generate(session, &go, NULL, NULL), 0);
        size_t n;
        const int32_t *ids = slu_session_ids(session, &n);
        const char *piece;
        int len = slu_tokenizer_piece(engine->tokenizer, ids[n - 1], &piece);
        if (len > 1 && piece[0] == ' ' &&
            !slu_tokenizer_is_special(engine->tokenizer, ids[n - 1])) {
            n_spaces++;
            cr_expect(heard.len == (size_t)len && !memcmp(heard.text, piece, heard.len));
        }
    }
    cr_expect_gt(n_spaces, 0);
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}
