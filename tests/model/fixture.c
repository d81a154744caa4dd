#include "fixture.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void fixture_open(struct fixture *f)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(f->dir, sizeof f->dir, "%.40s/sluice-test-XXXXXX", tmp ? tmp : "/tmp");
    cr_assert_not_null(mkdtemp(f->dir));
    snprintf(f->gguf, sizeof f->gguf, "%s/m.gguf", f->dir);
    snprintf(f->slu, sizeof f->slu, "%s/m.slu", f->dir);
}

void fixture_close(struct fixture *f)
{
    DIR *dir = opendir(f->dir);
    cr_assert_not_null(dir);
    for (struct dirent *entry; (entry = readdir(dir));) {
        unlinkat(dirfd(dir), entry->d_name, 0);
    }
    closedir(dir);
    rmdir(f->dir);
}

void fixture_pack(struct fixture *f, const char *gguf, enum slu_codec_id codec,
                  uint32_t block_bytes)
{
    struct slu_packer_params params = {
        .in = gguf, .out = f->slu, .codec = codec, .block_bytes = block_bytes};
    struct slu_packer_report report;
    struct slu_err err = {0};
    cr_assert_eq(slu_packer_run(&params, &report, &err), 0, "%s", err.text);
}

void fixture_synth(struct fixture *f, const struct slu_synth_params *params,
                   enum slu_codec_id codec, uint32_t block_bytes)
{
    struct slu_err err = {0};
    cr_assert_eq(slu_synth_write(f->gguf, params, &err), 0, "%s", err.text);
    fixture_pack(f, f->gguf, codec, block_bytes);
}

bool fixture_data(const char *relative, char *ret_path, size_t bytes)
{
    const char *folder = getenv("SLUICE_DATA");
    if (folder) {
        snprintf(ret_path, bytes, "%s/%s", folder, relative);
    } else {
        bool is_absolute = SLU_TEST_DATA[0] == '/';
        snprintf(ret_path, bytes, "%s%s%s/%s", is_absolute ? "" : SLU_TEST_SOURCE_ROOT,
                 is_absolute ? "" : "/", SLU_TEST_DATA, relative);
    }
    if (access(ret_path, R_OK) != 0) {
        fprintf(stderr, "skipped: the optional data %s is not there\n", ret_path);
        return false;
    }
    return true;
}

struct slu_engine *fixture_engine(const char *path, const struct slu_engine_params *params)
{
    struct slu_engine *engine = NULL;
    struct slu_err err = {0};
    cr_assert_eq(slu_engine_open(path, params, &engine, &err), 0, "%s", err.text);
    return engine;
}

struct sink {
    float *logits;
    uint32_t n_vocab;
};

static int keep(void *arg, uint32_t position, const float *logits)
{
    struct sink *sink = arg;
    memcpy(sink->logits + (size_t)position * sink->n_vocab, logits, sink->n_vocab * sizeof *logits);
    return 0;
}

static struct slu_session *start(struct slu_engine *engine,
                                 const struct slu_adapter_choice *choices, size_t n_choices,
                                 const int32_t *ids, size_t n)
{
    struct slu_session *session = NULL;
    struct slu_err err = {0};
    cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0, "%s", err.text);
    cr_assert_eq(slu_session_set_adapters(session, choices, n_choices, &err), 0, "%s", err.text);
    cr_assert_eq(slu_session_tokens(session, ids, n, &err), 0, "%s", err.text);
    return session;
}

float *fixture_logits_with(struct slu_engine *engine, const struct slu_adapter_choice *choices,
                           size_t n_choices, const int32_t *ids, size_t n)
{
    struct sink sink = {.n_vocab = slu_engine_n_vocab(engine)};
    sink.logits = calloc(n * sink.n_vocab, sizeof *sink.logits);
    cr_assert_not_null(sink.logits);
    struct slu_session *session = start(engine, choices, n_choices, ids, n);
    struct slu_err err = {0};
    cr_assert_eq(slu_session_eval(session, keep, &sink, &err), 0, "%s", err.text);
    slu_session_destroy(session);
    return sink.logits;
}

float *fixture_logits(struct slu_engine *engine, const int32_t *ids, size_t n)
{
    return fixture_logits_with(engine, NULL, 0, ids, n);
}

void fixture_greedy_with(struct slu_engine *engine, const struct slu_adapter_choice *choices,
                         size_t n_choices, const int32_t *ids, size_t n_ids, int32_t *ret_ids,
                         uint32_t n)
{
    struct slu_session *session = start(engine, choices, n_choices, ids, n_ids);
    struct slu_generate_params params = {.n_max = n, .ignore_end = true};
    struct slu_result result;
    struct slu_err err = {0};
    cr_assert_eq(slu_session_generate(session, &params, &result, &err), 0, "%s", err.text);
    cr_assert_eq(result.n_generated, n);
    size_t n_all;
    const int32_t *all = slu_session_ids(session, &n_all);
    cr_assert_eq(n_all, n_ids + n);
    memcpy(ret_ids, all + n_ids, n * sizeof *ret_ids);
    slu_session_destroy(session);
}

void fixture_greedy(struct slu_engine *engine, const int32_t *ids, size_t n_ids, int32_t *ret_ids,
                    uint32_t n)
{
    fixture_greedy_with(engine, NULL, 0, ids, n_ids, ret_ids, n);
}
