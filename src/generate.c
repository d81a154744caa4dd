/*
 * Generation: prefill what is pending, then token after token. Nothing is allocated between the
 * first and the last token.
 */
#include <string.h>

#include "base/clock.h"
#include "session.h"

/* Harmony answers come in channels: <|channel|>NAME<|message|>TEXT<|end|>. In a chat only the
 * channel named "final" is for the user. */
struct channel_filter {
    int32_t channel, message, start; /* marks; -1 where the vocabulary lacks them */
    bool is_on;
    bool in_header;
    bool is_hidden;
    char name[16];
    size_t n_name;
};

struct generation {
    struct slu_session *session;
    const struct slu_generate_params *params;
    struct slu_detok detok;
    struct channel_filter filter;
    int32_t token;   /* being emitted */
    bool is_stopped; /* by the callback */
    double prefill_end_s;
};

static void filter_init(struct channel_filter *f, const struct slu_session *s)
{
    const struct slu_tokenizer *tokenizer = s->engine->tokenizer;
    *f = (struct channel_filter){
        .is_on = s->is_chat && s->engine->chat == SLU_CHAT_HARMONY,
        .channel = slu_tokenizer_find(tokenizer, "<|channel|>"),
        .message = slu_tokenizer_find(tokenizer, "<|message|>"),
        .start = slu_tokenizer_find(tokenizer, "<|start|>"),
    };
}

/* True where the token's text is for the user. */
static bool filter_passes(struct channel_filter *f, const struct slu_tokenizer *tokenizer,
                          int32_t token)
{
    if (!f->is_on) {
        return true;
    }
    if (token == f->channel || token == f->start) {
        f->in_header = true;
        f->n_name = 0;
        return false;
    }
    if (token == f->message) {
        f->in_header = false;
        f->is_hidden = f->n_name >= 5 && memcmp(f->name, "final", 5) != 0;
        return false;
    }
    if (f->in_header) {
        const char *bytes;
        int n = slu_tokenizer_piece(tokenizer, token, &bytes);
        for (int i = 0; i < n && f->n_name < sizeof f->name; i++) {
            f->name[f->n_name++] = bytes[i];
        }
        return false;
    }
    return !f->is_hidden;
}

static void emit(void *arg, const char *bytes, size_t len)
{
    struct generation *g = arg;
    if (g->params->text && !g->is_stopped) {
        g->is_stopped = g->params->text(g->params->arg, bytes, len, g->token) != 0;
    }
}

static void emit_token(struct generation *g, int32_t token)
{
    g->token = token;
    if (filter_passes(&g->filter, g->session->engine->tokenizer, token)) {
        slu_detok_push(&g->detok, token, emit, g);
    }
}

/* Where the answer stood when it was stopped. */
static void filter_resume(struct channel_filter *f, const struct slu_session *s)
{
    for (uint32_t i = s->answer_from; f->is_on && i < s->n_ids; i++) {
        (void)filter_passes(f, s->engine->tokenizer, s->ids[i]);
    }
}

/* After the last pending token's chunk: what follows it, into *arg. */
static int sample_last(struct slu_session *s, void *arg, uint32_t first_position, uint32_t n)
{
    int32_t *ret_next = arg;
    if (first_position + n < s->n_ids) {
        return 0;
    }
    const float *logits = slu_model_logits(&s->engine->model, n - 1, 1);
    *ret_next = slu_sampler_next(s->sampler, logits, s->ids, s->n_ids);
    return *ret_next < 0 ? *ret_next : 0;
}

/* The next token after everything that is pending; a negative error otherwise. */
static int next_token(struct slu_session *s, int32_t *ret_token, struct slu_err *err)
{
    int rc = slu_session_compute(s, s->n_ids - 1, sample_last, ret_token, err);
    if (rc == SLU_ERANGE) {
        slu_err_set(err, SLU_EFORMAT, "the model's logits are not numbers%s",
                    s->adapters.n ? " with these adapters and scales" : "");
        rc = SLU_EFORMAT;
    }
    return rc;
}

/* With nothing pending, the last token is computed once more: its logits are gone. */
static int ensure_pending(struct slu_session *s, struct slu_err *err)
{
    if (s->n_ids == 0) {
        return slu_err_set(err, SLU_EINVAL, "there is no prompt to go on from");
    }
    if (s->kv.n == s->n_ids) {
        slu_kv_cache_truncate(&s->kv, &s->engine->weights.config, s->n_ids - 1);
    }
    return 0;
}

static int run(struct generation *g, struct slu_result *result, struct slu_err *err)
{
    struct slu_session *s = g->session;
    uint32_t n_max = g->params->n_max ? g->params->n_max : UINT32_MAX;
    result->stop = SLU_STOP_LENGTH;
    while (result->n_generated < n_max) {
        int32_t token = -1;
        int rc = next_token(s, &token, err);
        if (g->prefill_end_s == 0) {
            g->prefill_end_s = slu_now_s();
            if (rc >= 0) { /* otherwise the prompt isn't through yet */
                slu_session_begin_answer(s);
            }
        }
        s->is_decoding = true;
        if (rc == SLU_ECANCEL) {
            result->stop = SLU_STOP_CANCEL;
            slu_err_set(err, SLU_OK, "%s", ""); /* not an error here */
            return 0;
        }
        if (rc < 0) {
            return rc;
        }
        if (s->n_ids == s->ctx) {
            result->stop = SLU_STOP_CONTEXT;
            return 0;
        }
        s->ids[s->n_ids++] = token;
        if (!g->params->ignore_end && slu_tokenizer_is_end(s->engine->tokenizer, token)) {
            result->stop = SLU_STOP_END;
            return 0;
        }
        result->n_generated++;
        emit_token(g, token);
        if (g->is_stopped) {
            result->stop = SLU_STOP_CANCEL;
            return 0;
        }
    }
    return 0;
}

int slu_session_generate(struct slu_session *s, const struct slu_generate_params *params,
                         struct slu_result *ret_result, struct slu_err *err)
{
    struct generation g = {.session = s, .params = params};
    struct slu_result result = {0};
    int rc = ensure_pending(s, err);
    if (rc < 0) {
        return rc;
    }
    slu_sampler_start(s->sampler, &params->sampling);
    slu_detok_init(&g.detok, s->engine->tokenizer, true);
    /* Text that goes on where other text ends keeps the space before its first word. */
    g.detok.is_first = s->is_chat && s->n_ids == s->answer_from;
    filter_init(&g.filter, s);
    filter_resume(&g.filter, s);
    result.n_prompt = s->n_ids - s->kv.n;
    double start_s = slu_now_s();
    rc = run(&g, &result, err);
    s->is_decoding = false;
    slu_detok_flush(&g.detok, emit, &g);
    double end_s = slu_now_s();
    g.prefill_end_s = g.prefill_end_s ? g.prefill_end_s : end_s;
    result.prefill_s = g.prefill_end_s - start_s;
    result.decode_s = end_s - g.prefill_end_s;
    if (s->is_chat && (rc >= 0 || s->n_ids > s->answer_from)) {
        int answered = slu_session_answered(s, rc < 0 ? NULL : err);
        rc = rc < 0 ? rc : answered;
        s->is_chat = rc < 0 || result.stop != SLU_STOP_END;
    }
    if (rc >= 0 && ret_result) {
        *ret_result = result;
    }
    return rc;
}
