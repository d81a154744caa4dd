#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "scratch.h"
#include "tools/predict_train.h"

#define PROMPTS 200u
#define TOKENS  4u

/* Token i's embedding are its four bits as signs. */
static int embed(void *arg, const int32_t *ids, uint32_t n, float *x, struct slu_err *err)
{
    (void)arg, (void)err;
    for (uint32_t i = 0; i < 4 * n; i++) {
        x[i] = (ids[i / 4] >> (i % 4)) & 1 ? 1 : -1;
    }
    return 0;
}

static const struct slu_trace_shape shape = {
    .n_layers = 1, .n_experts = 2, .n_used = 1, .n_vocab = 16, .n_routed = 1};

/* Prompts whose tokens all go to the expert that the exclusive or of two bits names, which no
 * linear layer tells from the mean of the embeddings. */
static void write_trace(const char *path)
{
    struct slu_trace_writer *writer;
    struct slu_err err = {0};
    cr_assert_eq(slu_trace_writer_create(path, &shape, NULL, &writer, &err), 0, "%s", err.text);
    uint32_t random = 1;
    for (uint32_t p = 0; p < PROMPTS; p++) {
        int32_t ids[TOKENS];
        uint16_t experts[TOKENS];
        const float weights[TOKENS] = {1, 1, 1, 1};
        for (uint32_t t = 0; t < TOKENS;) {
            random = random * 1664525 + 1013904223;
            ids[t] = (int32_t)(random >> 28);
            experts[t] = (uint16_t)((ids[t] ^ ids[t] >> 1) & 1);
            t += experts[t] == p % 2;
        }
        const struct slu_trace_prompt prompt = {TOKENS, 3, ids, experts, weights};
        cr_assert_eq(slu_trace_writer_append(writer, &prompt, &err), 0, "%s", err.text);
    }
    cr_assert_eq(slu_trace_writer_finish(writer, &err), 0);
    slu_trace_writer_destroy(writer, true);
}

struct fixture {
    struct scratch scratch;
    struct slu_source *source;
    struct slu_trace_reader *reader;
    struct slu_predict_data data;
};

static void open_data(struct fixture *f)
{
    struct slu_err err = {0};
    scratch_init(&f->scratch);
    const char *path = scratch_path(&f->scratch, "a.slt");
    write_trace(path);
    cr_assert_eq(slu_source_open_file(path, &f->source, &err), 0);
    cr_assert_eq(slu_trace_reader_create(f->source, &f->reader, &err), 0, "%s", err.text);
    cr_assert_eq(slu_predict_data_init(&f->data, f->reader, embed, NULL, 4, &err), 0);
    cr_assert_eq(f->data.n_prompts, PROMPTS);
}

static void close_data(struct fixture *f)
{
    slu_predict_data_finish(&f->data);
    slu_trace_reader_destroy(f->reader);
    slu_source_destroy(f->source);
    scratch_finish(&f->scratch);
}

static double coverage(const struct fixture *f, bool is_linear, uint64_t seed)
{
    struct slu_err err = {0};
    void *section;
    size_t bytes;
    struct slu_predictor *predictor;
    const struct slu_predict_train_params params = {
        .is_linear = is_linear, .n_hidden = 16, .seed = seed};
    cr_assert_eq(slu_predict_train(&f->data, &params, &section, &bytes, &err), 0, "%s", err.text);
    cr_assert_eq(slu_predictor_create(section, bytes, &predictor, &err), 0, "%s", err.text);
    const struct slu_predict_measure measure = {
        .kind = SLU_PREDICT_BY_PROMPT, .predictor = predictor, .share = .5, .held_out_only = true};
    struct slu_predict_quality quality;
    cr_assert_eq(slu_predict_measure(&f->data, &measure, &quality, &err), 0, "%s", err.text);
    slu_predictor_destroy(predictor);
    free(section);
    return quality.all;
}

/* The network learns what is not linear; the linear layer and the hottest experts don't; hindsight
 * covers all. */
Test(predict_train, network_beats_linear)
{
    struct fixture f;
    open_data(&f);
    double network = coverage(&f, false, 1), linear = coverage(&f, true, 1);
    cr_assert_gt(network, .95, "%f", network);
    cr_assert_lt(linear, .85, "%f", linear);
    float hottest[2];
    struct slu_err err;
    struct slu_predict_quality quality;
    struct slu_predict_measure measure = {
        .kind = SLU_PREDICT_HOTTEST, .scores = hottest, .share = .5, .held_out_only = true};
    cr_assert_eq(slu_predict_hottest(&f.data, hottest, &err), 0);
    cr_assert_eq(slu_predict_measure(&f.data, &measure, &quality, &err), 0);
    cr_assert_lt(quality.all, .7, "%f", quality.all);
    measure.kind = SLU_PREDICT_HINDSIGHT;
    cr_assert_eq(slu_predict_measure(&f.data, &measure, &quality, &err), 0);
    cr_assert_float_eq(quality.all, 1, 1e-9);
    cr_assert_float_eq(quality.recall, 1, 1e-9);
    close_data(&f);
}

/* The same seed gives the same bytes; another one others. */
Test(predict_train, is_reproducible)
{
    struct fixture f;
    open_data(&f);
    void *sections[3];
    size_t bytes[3];
    struct slu_err err;
    for (int i = 0; i < 3; i++) {
        const struct slu_predict_train_params params = {
            .n_hidden = 8, .n_epochs = 2, .seed = i == 2 ? 5 : 4};
        cr_assert_eq(slu_predict_train(&f.data, &params, &sections[i], &bytes[i], &err), 0);
        cr_assert_eq(bytes[i], bytes[0]);
    }
    cr_assert_arr_eq(sections[0], sections[1], bytes[0]);
    cr_assert_neq(memcmp(sections[0], sections[2], bytes[0]), 0);
    for (int i = 0; i < 3; i++) {
        free(sections[i]);
    }
    close_data(&f);
}

/* A request to stop is heeded. */
Test(predict_train, can_be_cancelled)
{
    struct fixture f;
    open_data(&f);
    atomic_bool cancel = true;
    const struct slu_predict_train_params params = {.cancel = &cancel};
    void *section;
    size_t bytes;
    struct slu_err err;
    cr_assert_eq(slu_predict_train(&f.data, &params, &section, &bytes, &err), SLU_ECANCEL);
    close_data(&f);
}
