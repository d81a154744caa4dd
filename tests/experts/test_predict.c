#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "experts/predict.h"

static const struct slu_predict_shape net = {.n_embd = 3,
                                             .n_layers = 2,
                                             .n_experts = 4,
                                             .n_hidden = 5,
                                             .has_direct = 1,
                                             .n_tokens_max = 8,
                                             .n_answer = 2};

static size_t n_weights(const struct slu_predict_shape *shape)
{
    size_t n = 0;
    for (int i = 0; i < SLU_PREDICT_PARTS; i++) {
        uint32_t rows, cols;
        slu_predict_part_shape(shape, (enum slu_predict_part)i, &rows, &cols);
        n += (size_t)rows * cols;
    }
    return n;
}

/* A section of reproducible weights. */
static uint8_t *section(const struct slu_predict_shape *shape, size_t *ret_bytes)
{
    size_t n = n_weights(shape);
    float *weights = malloc(n * sizeof *weights);
    for (size_t i = 0; i < n; i++) {
        weights[i] = (float)(i * 7919 % 41) / 20 - 1;
    }
    *ret_bytes = slu_predict_store(shape, weights, NULL, 0);
    uint8_t *data = malloc(*ret_bytes);
    cr_assert_eq(slu_predict_store(shape, weights, data, *ret_bytes), *ret_bytes);
    free(weights);
    return data;
}

static void run_and_check(struct slu_predictor *p, const float *x, uint32_t n)
{
    const struct slu_predict_shape *shape = slu_predictor_shape(p);
    float score[8];
    slu_predictor_run(p, x, n, score);
    for (uint32_t l = 0; l < shape->n_layers; l++) {
        float sum = 0;
        for (uint32_t e = 0; e < shape->n_experts; e++) {
            cr_assert(score[l * shape->n_experts + e] >= 0);
            sum += score[l * shape->n_experts + e];
        }
        cr_assert_float_eq(sum, 1, 1e-4);
    }
}

/* Each layer's scores are shares, for network and linear layer, prompts of any length, and even for
 * embeddings that are 0, huge or no numbers. */
Test(predict, scores_are_shares)
{
    struct slu_predict_shape linear = net;
    linear.n_hidden = 0;
    const struct slu_predict_shape *shapes[] = {&net, &linear};
    float x[40 * 3];
    for (size_t i = 0; i < 120; i++) {
        x[i] = i < 3 ? 0 : i < 6 ? 1e30f : i < 9 ? NAN : i < 12 ? INFINITY : (float)(i % 7) - 3;
    }
    for (int which = 0; which < 2; which++) {
        struct slu_predictor *p;
        struct slu_err err;
        size_t bytes;
        uint8_t *data = section(shapes[which], &bytes);
        cr_assert_eq(slu_predictor_create(data, bytes, &p, &err), 0, "%s", err.text);
        cr_assert_geq(slu_predictor_bytes(data, bytes), bytes);
        for (uint32_t n = 1; n <= 40; n += 13) {
            run_and_check(p, x, n);
        }
        slu_predictor_destroy(p);
        free(data);
    }
}

/* What is cut off, too long, or has a header or scale that can't be is refused; whatever else a
 * byte is, running it gives numbers. */
Test(predict, hostile_sections)
{
    size_t bytes;
    uint8_t *data = section(&net, &bytes), *copy = malloc(bytes + 1);
    struct slu_predictor *p;
    struct slu_err err;
    const float x[6] = {1, 2, 3, -1, 0, 1};
    for (size_t n = 0; n <= bytes + 1; n++) {
        memcpy(copy, data, n < bytes ? n : bytes);
        cr_assert(n == bytes || slu_predictor_create(copy, n, &p, &err) < 0, "%zu bytes", n);
    }
    for (size_t i = 0; i < bytes; i++) {
        for (int flip = 1; flip < 256; flip *= 2) {
            memcpy(copy, data, bytes);
            copy[i] ^= (uint8_t)flip;
            if (slu_predictor_create(copy, bytes, &p, &err) == 0) {
                if (slu_predictor_shape(p)->n_layers * slu_predictor_shape(p)->n_experts == 8) {
                    run_and_check(p, x, 2);
                }
                slu_predictor_destroy(p);
            }
        }
    }
    memset(copy + 12, 0xff, 24); /* all sizes */
    cr_assert_eq(slu_predictor_create(copy, bytes, &p, &err), SLU_EFORMAT);
    memcpy(copy, data, bytes);
    copy[8] = 2;
    cr_assert_eq(slu_predictor_create(copy, bytes, &p, &err), SLU_EUNSUP);
    free(copy);
    free(data);
}
