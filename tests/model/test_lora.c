/* Adapters in sessions: a swap leaves no trace, and a refused one changes nothing. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fixture.h"
#include "session.h"
#include "tools/adapter_import.h"
#include "tools/adapter_synth.h"

static void make_adapter(const struct fixture *f, const char *name, unsigned seed, char *ret_sla,
                         size_t bytes)
{
    char gguf[128];
    struct slu_err err = {0};
    struct slu_adapter_info info;
    snprintf(gguf, sizeof gguf, "%s/%s.gguf", f->dir, name);
    snprintf(ret_sla, bytes, "%s/%s.sla", f->dir, name);
    struct slu_adapter_synth_params params = {
        .base = f->gguf, .gain = 2, .seed = seed, .targets = ~0u};
    cr_assert_eq(slu_adapter_synth_write(gguf, &params, &err), 0, "%s", err.text);
    struct slu_adapter_import_params import = {.in = gguf, .out = ret_sla, .base = f->slu};
    cr_assert_eq(slu_adapter_import(&import, &info, &err), 0, "%s", err.text);
}

static void answer(struct slu_session *session, int32_t *ret_ids)
{
    static const int32_t prompt[] = {3, 14, 15, 92, 65, 35};
    struct slu_err err = {0};
    struct slu_generate_params params = {.n_max = 12, .ignore_end = true};
    cr_assert_eq(slu_session_replace(session, prompt, 6, &err), 0, "%s", err.text);
    cr_assert_eq(slu_session_generate(session, &params, NULL, &err), 0, "%s", err.text);
    size_t n;
    memcpy(ret_ids, slu_session_ids(session, &n) + 6, 12 * sizeof *ret_ids);
}

static struct slu_session *open_session(struct fixture *f, struct slu_engine **ret_engine)
{
    fixture_open(f);
    fixture_synth(f, &(struct slu_synth_params){.arch = SLU_ARCH_QWEN2MOE}, SLU_CODEC_ZSTD, 8192);
    struct slu_engine_params params = {
        .ram_bytes = 1ull << 30, .ctx = 64, .adapter_bytes = 64ull << 20};
    *ret_engine = fixture_engine(f->slu, &params);
    struct slu_session *session = NULL;
    cr_assert_eq(slu_session_create(*ret_engine, NULL, &session, NULL), 0);
    return session;
}

/* Swap, generate, swap back: what a session says then is what it said before, and what a fresh one
 * says, bit for bit. */
Test(lora, swap_and_back)
{
    struct fixture f;
    struct slu_engine *engine;
    struct slu_session *session = open_session(&f, &engine);
    char a[128], b[128];
    make_adapter(&f, "a", 1, a, sizeof a);
    make_adapter(&f, "b", 2, b, sizeof b);
    struct slu_adapter_choice with_a = {a, 1.0f}, with_b = {b, .5f};
    int32_t plain[12], first[12], other[12], again[12];
    answer(session, plain);
    cr_assert_eq(slu_session_set_adapters(session, &with_a, 1, NULL), 0);
    answer(session, first);
    cr_assert_eq(slu_session_set_adapters(session, &with_b, 1, NULL), 0);
    answer(session, other);
    cr_assert_eq(slu_session_set_adapters(session, &with_a, 1, NULL), 0);
    answer(session, again);
    cr_expect(!memcmp(first, again, sizeof first));
    cr_expect(memcmp(first, plain, sizeof first), "the adapter changes the answer");
    cr_expect(memcmp(first, other, sizeof first), "adapters differ");
    cr_assert_eq(slu_session_set_adapters(session, NULL, 0, NULL), 0);
    answer(session, again);
    cr_expect(!memcmp(plain, again, sizeof plain));
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* A scale that takes an adapter's own past all numbers is refused; one that only takes the logits
 * there is told so, and the session goes on without it. */
Test(lora, scale_too_large)
{
    struct fixture f;
    struct slu_engine *engine;
    struct slu_session *session = open_session(&f, &engine);
    char a[128];
    make_adapter(&f, "a", 1, a, sizeof a); /* its own scale is 2 */
    struct slu_adapter_choice choice = {a, 3e38f};
    int32_t plain[12], again[12];
    answer(session, plain);
    struct slu_err err = {0};
    cr_expect_eq(slu_session_set_adapters(session, &choice, 1, &err), SLU_EINVAL);
    cr_expect(strstr(err.text, "too large for adapter"), "%s", err.text);
    choice.scale = 1e38f;
    cr_assert_eq(slu_session_set_adapters(session, &choice, 1, &err), 0, "%s", err.text);
    struct slu_generate_params params = {.n_max = 1};
    cr_expect_eq(slu_session_generate(session, &params, NULL, &err), SLU_EFORMAT);
    cr_expect(strstr(err.text, "with these adapters"), "%s", err.text);
    cr_assert_eq(slu_session_set_adapters(session, NULL, 0, NULL), 0);
    answer(session, again);
    cr_expect(!memcmp(plain, again, sizeof plain));
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* A file that is cut, overwritten or removed while the program has it loaded changes nothing for
 * who holds it, and is refused or loaded anew for who asks again. */
Test(lora, file_changes_underneath)
{
    struct fixture f;
    struct slu_engine *engine;
    struct slu_session *session = open_session(&f, &engine), *other = NULL;
    char a[128], b[128];
    make_adapter(&f, "a", 1, a, sizeof a);
    make_adapter(&f, "b", 2, b, sizeof b);
    struct slu_adapter_choice with_a = {a, 1.0f}, with_b = {b, 1.0f};
    int32_t first[12], second[12], got[12];
    cr_assert_eq(slu_session_set_adapters(session, &with_b, 1, NULL), 0);
    answer(session, second);
    cr_assert_eq(slu_session_set_adapters(session, &with_a, 1, NULL), 0);
    answer(session, first);

    cr_assert_eq(truncate(a, 9000), 0);
    answer(session, got);
    cr_expect(!memcmp(got, first, sizeof got));
    cr_assert_eq(slu_session_set_adapters(session, &with_b, 1, NULL), 0);
    struct slu_err err = {0};
    cr_expect_eq(slu_session_set_adapters(session, &with_a, 1, &err), SLU_EFORMAT);
    cr_expect(strstr(err.text, "truncated"), "%s", err.text);
    answer(session, got);
    cr_expect(!memcmp(got, second, sizeof got));

    cr_assert_eq(rename(b, a), 0);
    cr_expect_eq(slu_session_set_adapters(session, &with_b, 1, &err), SLU_ENOENT);
    cr_assert_eq(slu_session_create(engine, NULL, &other, &err), 0, "%s", err.text);
    cr_assert_eq(slu_session_set_adapters(other, &with_a, 1, &err), 0, "%s", err.text);
    answer(other, got);
    cr_expect(!memcmp(got, second, sizeof got));
    answer(session, got);
    cr_expect(!memcmp(got, second, sizeof got));
    slu_session_destroy(other);
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* A damaged, truncated or absent adapter, or a scale that is no number, is refused with a sentence,
 * and the session goes on with the adapter that it had. */
Test(lora, refusal_changes_nothing)
{
    struct fixture f;
    struct slu_engine *engine;
    struct slu_session *session = open_session(&f, &engine);
    char good[128], flipped[128], cut[128];
    make_adapter(&f, "good", 1, good, sizeof good);
    make_adapter(&f, "flipped", 2, flipped, sizeof flipped);
    make_adapter(&f, "cut", 3, cut, sizeof cut);
    FILE *file = fopen(flipped, "r+b");
    cr_assert_not_null(file);
    fseek(file, 5000, SEEK_SET);
    int byte = fgetc(file);
    fseek(file, 5000, SEEK_SET);
    fputc(byte ^ 4, file);
    fclose(file);
    cr_assert_eq(truncate(cut, 9000), 0);

    int32_t want[12], got[12];
    cr_assert_eq(slu_session_set_adapters(session, &(struct slu_adapter_choice){good, 1}, 1, NULL),
                 0);
    answer(session, want);
    struct slu_adapter_choice bad[] = {
        {flipped, 1}, {cut, 1}, {"/nonexistent/x.sla", 1}, {good, (float)strtod("nan", NULL)}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct slu_err err = {0};
        cr_expect_lt(slu_session_set_adapters(session, &bad[i], 1, &err), 0);
        cr_expect_gt(strlen(err.text), 10);
        answer(session, got);
        cr_expect(!memcmp(got, want, sizeof want), "after refusal %zu", i);
    }
    slu_session_destroy(session);
    slu_engine_close(engine);
    fixture_close(&f);
}
