#include "experts/predict.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC   "SLUPREDI"
#define VERSION 1u

/* As stored, little-endian; the parts follow, each rows of f32 scale and i8 numbers. */
struct header {
    char magic[8];
    uint32_t version, n_embd, n_layers, n_experts, n_hidden, has_direct, n_tokens_max;
    float n_answer;
};
_Static_assert(sizeof(struct header) == 40, "as stored");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "structs are stored as they are");

struct matrix {
    const uint8_t *at; /* rows of 4 + cols bytes */
    uint32_t rows, cols;
};

struct slu_predictor {
    struct slu_predict_shape shape;
    struct matrix parts[SLU_PREDICT_PARTS];
    float *scratch;
    float *mean;                               /* d */
    float *window[SLU_PREDICT_BEFORE];         /* d, newest first */
    float *hidden, *hidden_base, *hidden_mean; /* h */
    float *logits, *prompt, *answer;           /* layers * experts */
    uint8_t data[];
};

static uint32_t n_out(const struct slu_predict_shape *shape)
{
    return shape->n_layers * shape->n_experts;
}

void slu_predict_part_shape(const struct slu_predict_shape *shape, enum slu_predict_part part,
                            uint32_t *ret_rows, uint32_t *ret_cols)
{
    uint32_t d = shape->n_embd, h = shape->n_hidden, out = n_out(shape);
    *ret_rows = part == SLU_PREDICT_BIAS ? 1 : part <= SLU_PREDICT_A3 && h ? d : h;
    *ret_cols = part <= SLU_PREDICT_A3 ? h : out;
    if (part == SLU_PREDICT_BIAS) {
        *ret_cols = h + 2 * out;
    } else if (part == SLU_PREDICT_R || (part == SLU_PREDICT_P && h == 0)) {
        *ret_rows = part == SLU_PREDICT_P || shape->has_direct ? d : 0;
    }
}

static size_t part_bytes(const struct slu_predict_shape *shape, enum slu_predict_part part)
{
    uint32_t rows, cols;
    slu_predict_part_shape(shape, part, &rows, &cols);
    return (size_t)rows * (4 + (size_t)cols);
}

size_t slu_predict_store(const struct slu_predict_shape *shape, const float *weights, void *ret,
                         size_t bytes_max)
{
    size_t bytes = sizeof(struct header);
    for (int i = 0; i < SLU_PREDICT_PARTS; i++) {
        bytes += part_bytes(shape, (enum slu_predict_part)i);
    }
    if (bytes > bytes_max) {
        return bytes;
    }
    const struct header header = {
        .magic = MAGIC,
        .version = VERSION,
        .n_embd = shape->n_embd,
        .n_layers = shape->n_layers,
        .n_experts = shape->n_experts,
        .n_hidden = shape->n_hidden,
        .has_direct = shape->has_direct,
        .n_tokens_max = shape->n_tokens_max,
        .n_answer = shape->n_answer,
    };
    uint8_t *at = ret;
    memcpy(at, &header, sizeof header);
    at += sizeof header;
    for (int i = 0; i < SLU_PREDICT_PARTS; i++) {
        uint32_t rows, cols;
        slu_predict_part_shape(shape, (enum slu_predict_part)i, &rows, &cols);
        for (uint32_t r = 0; r < rows; r++, weights += cols, at += 4 + cols) {
            float largest = 0;
            for (uint32_t c = 0; c < cols; c++) {
                largest = fabsf(weights[c]) > largest ? fabsf(weights[c]) : largest;
            }
            float scale = largest / 127.0f;
            memcpy(at, &scale, 4);
            for (uint32_t c = 0; c < cols; c++) {
                at[4 + c] = (uint8_t)(int8_t)(scale > 0 ? lrintf(weights[c] / scale) : 0);
            }
        }
    }
    return bytes;
}

static int check_header(const struct header *h, size_t bytes, struct slu_err *err)
{
    if (bytes < sizeof *h || memcmp(h->magic, MAGIC, sizeof h->magic) != 0) {
        return slu_err_set(err, SLU_EFORMAT, "the predictor doesn't begin as one");
    }
    if (h->version > VERSION) {
        return slu_err_set(err, SLU_EUNSUP,
                           "the predictor is of version %u, newer than this program knows (%u)",
                           h->version, VERSION);
    }
    bool is_sound = h->version > 0 && h->n_embd > 0 && h->n_embd <= 65536 && h->n_layers > 0 &&
                    h->n_layers <= 4096 && h->n_experts > 0 && h->n_experts <= 65536 &&
                    (uint64_t)h->n_layers * h->n_experts <= (1u << 20) &&
                    h->n_hidden <= SLU_PREDICT_HIDDEN_MAX && h->has_direct <= 1 &&
                    (h->n_hidden || h->has_direct) && h->n_tokens_max > 0 &&
                    h->n_tokens_max <= 65536 && h->n_answer >= 0 && h->n_answer <= 1e6f;
    return is_sound ? 0 : slu_err_set(err, SLU_EFORMAT, "the predictor's header makes no sense");
}

/* The matrices, whose scales must be numbers: the results of a run are then numbers too. */
static int find_parts(struct slu_predictor *p, size_t bytes, struct slu_err *err)
{
    size_t at = sizeof(struct header);
    for (int i = 0; i < SLU_PREDICT_PARTS; i++) {
        struct matrix *m = &p->parts[i];
        slu_predict_part_shape(&p->shape, (enum slu_predict_part)i, &m->rows, &m->cols);
        size_t part = part_bytes(&p->shape, (enum slu_predict_part)i);
        if (part > bytes - at) {
            return slu_err_set(err, SLU_EFORMAT, "the predictor is cut off");
        }
        m->at = p->data + at;
        at += part;
        for (uint32_t r = 0; r < m->rows; r++) {
            float scale;
            memcpy(&scale, m->at + (size_t)r * (4 + m->cols), 4);
            if (!(scale >= 0 && scale < 1e4f)) {
                return slu_err_set(err, SLU_EFORMAT, "the predictor's weights are not numbers");
            }
        }
    }
    return at == bytes
               ? 0
               : slu_err_set(err, SLU_EFORMAT, "the predictor has %zu bytes too many", bytes - at);
}

static size_t scratch_floats(const struct slu_predict_shape *shape)
{
    return (size_t)shape->n_embd * (1 + SLU_PREDICT_BEFORE) + 3 * (size_t)shape->n_hidden +
           3 * (size_t)n_out(shape);
}

static int take_scratch(struct slu_predictor *p, struct slu_err *err)
{
    size_t d = p->shape.n_embd, h = p->shape.n_hidden, out = n_out(&p->shape);
    p->scratch = calloc(scratch_floats(&p->shape), sizeof *p->scratch);
    if (!p->scratch) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for the predictor");
    }
    float *at = p->scratch;
    p->mean = at;
    at += d;
    for (uint32_t i = 0; i < SLU_PREDICT_BEFORE; i++, at += d) {
        p->window[i] = at;
    }
    p->hidden = at;
    p->hidden_base = at + h;
    p->hidden_mean = at + 2 * h;
    at += 3 * h;
    p->logits = at;
    p->prompt = at + out;
    p->answer = at + 2 * out;
    return 0;
}

static struct slu_predict_shape shape_of(const struct header *header)
{
    return (struct slu_predict_shape){
        .n_embd = header->n_embd,
        .n_layers = header->n_layers,
        .n_experts = header->n_experts,
        .n_hidden = header->n_hidden,
        .has_direct = header->has_direct,
        .n_tokens_max = header->n_tokens_max,
        .n_answer = header->n_answer,
    };
}

size_t slu_predictor_bytes(const void *data, size_t bytes)
{
    struct header header = {0};
    if (bytes > 0) { /* data may be NULL otherwise */
        memcpy(&header, data, bytes < sizeof header ? bytes : sizeof header);
    }
    if (check_header(&header, bytes, NULL) < 0) {
        return 0;
    }
    struct slu_predict_shape shape = shape_of(&header);
    size_t wanted = sizeof header;
    for (int i = 0; i < SLU_PREDICT_PARTS; i++) {
        wanted += part_bytes(&shape, (enum slu_predict_part)i);
    }
    if (wanted != bytes) { /* what is claimed must be there before memory is planned for it */
        return 0;
    }
    return sizeof(struct slu_predictor) + bytes + sizeof(float) * scratch_floats(&shape);
}

int slu_predictor_create(const void *data, size_t bytes, struct slu_predictor **ret_predictor,
                         struct slu_err *err)
{
    struct header header = {0};
    memcpy(&header, data, bytes < sizeof header ? bytes : sizeof header);
    int rc = check_header(&header, bytes, err);
    if (rc == 0 && bytes > SLU_PREDICT_BYTES_MAX) {
        rc = slu_err_set(err, SLU_EFORMAT, "the predictor is too large");
    }
    if (rc < 0) {
        return rc;
    }
    struct slu_predictor *p = calloc(1, sizeof *p + bytes);
    if (!p) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for the predictor");
    }
    memcpy(p->data, data, bytes);
    p->shape = shape_of(&header);
    rc = find_parts(p, bytes, err);
    rc = rc < 0 ? rc : take_scratch(p, err);
    if (rc < 0) {
        slu_predictor_destroy(p);
        return rc;
    }
    *ret_predictor = p;
    return 0;
}

void slu_predictor_destroy(struct slu_predictor *p)
{
    if (p) {
        free(p->scratch);
        free(p);
    }
}

const struct slu_predict_shape *slu_predictor_shape(const struct slu_predictor *p)
{
    return &p->shape;
}

uint32_t slu_predictor_taken(const struct slu_predictor *p, uint32_t n)
{
    return n < p->shape.n_tokens_max ? n : p->shape.n_tokens_max;
}

/* y[cols] += x[rows] of matrix m. */
static void add_product(float *y, const struct matrix *m, const float *x)
{
    for (uint32_t r = 0; r < m->rows; r++) {
        const int8_t *row = (const int8_t *)m->at + (size_t)r * (4 + m->cols) + 4;
        float scale;
        memcpy(&scale, row - 4, 4);
        float factor = scale * x[r];
        for (uint32_t c = 0; c < m->cols && factor != 0; c++) {
            y[c] += factor * (float)row[c];
        }
    }
}

/* y = part of the bias row. */
static void set_bias(const struct slu_predictor *p, float *y, uint32_t from, uint32_t n)
{
    const int8_t *row = (const int8_t *)p->parts[SLU_PREDICT_BIAS].at + 4;
    float scale;
    memcpy(&scale, row - 4, 4);
    for (uint32_t i = 0; i < n; i++) {
        y[i] = scale * (float)row[from + i];
    }
}

/* sum[l] += softmax(logits[l]) over the experts of each layer. */
static void add_softmax(const struct slu_predict_shape *shape, float *logits, float *sum)
{
    uint32_t n = shape->n_experts;
    for (uint32_t l = 0; l < shape->n_layers; l++, logits += n, sum += n) {
        float high = logits[0], total = 0;
        for (uint32_t e = 1; e < n; e++) {
            high = logits[e] > high ? logits[e] : high;
        }
        for (uint32_t e = 0; e < n; e++) {
            logits[e] = expf(logits[e] - high);
            total += logits[e];
        }
        for (uint32_t e = 0; e < n; e++) {
            sum[e] += logits[e] / total;
        }
    }
}

/* out = x over its root mean square. */
static void normalize(const float *x, float *out, uint32_t n)
{
    float sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += x[i] * x[i];
    }
    float scale = sum > 0 && isfinite(sum) ? 1.0f / sqrtf(sum / (float)n) : 0;
    for (uint32_t i = 0; i < n; i++) {
        out[i] = scale > 0 ? x[i] * scale : 0;
    }
}

static void take_mean(struct slu_predictor *p, const float *x, uint32_t n)
{
    uint32_t d = p->shape.n_embd;
    memset(p->mean, 0, d * sizeof *p->mean);
    for (uint32_t t = 0; t < n; t++) {
        normalize(x + (size_t)t * d, p->window[0], d);
        for (uint32_t i = 0; i < d; i++) {
            p->mean[i] += p->window[0][i] / (float)n;
        }
    }
}

/* One token's guess, added to those before. */
static void add_token(struct slu_predictor *p, const float *x, uint32_t t)
{
    uint32_t d = p->shape.n_embd, h = p->shape.n_hidden, out = n_out(&p->shape);
    memcpy(p->hidden, p->hidden_base, h * sizeof *p->hidden);
    for (uint32_t back = 0; back < SLU_PREDICT_BEFORE && back <= t; back++) {
        normalize(x + (size_t)(t - back) * d, p->window[back], d);
        add_product(p->hidden, &p->parts[SLU_PREDICT_A0 + back], p->window[back]);
    }
    for (uint32_t i = 0; i < h; i++) {
        p->hidden[i] = p->hidden[i] > 0 ? p->hidden[i] : 0;
        p->hidden_mean[i] += p->hidden[i];
    }
    set_bias(p, p->logits, h, out);
    add_product(p->logits, &p->parts[SLU_PREDICT_P], p->hidden);
    add_softmax(&p->shape, p->logits, p->prompt);
}

void slu_predictor_run(struct slu_predictor *p, const float *x, uint32_t n, float *score)
{
    uint32_t h = p->shape.n_hidden, out = n_out(&p->shape), taken = slu_predictor_taken(p, n);
    assert(n > 0);
    take_mean(p, x, n);
    memset(p->prompt, 0, out * sizeof *p->prompt);
    memset(p->answer, 0, out * sizeof *p->answer);
    memset(p->hidden_mean, 0, h * sizeof *p->hidden_mean);
    if (h) {
        set_bias(p, p->hidden_base, 0, h);
        add_product(p->hidden_base, &p->parts[SLU_PREDICT_A3], p->mean);
        for (uint32_t i = 0; i < taken; i++) {
            add_token(p, x, (uint32_t)((uint64_t)i * n / taken));
        }
    } else {
        taken = 1;
        set_bias(p, p->logits, 0, out);
        add_product(p->logits, &p->parts[SLU_PREDICT_P], p->mean);
        add_softmax(&p->shape, p->logits, p->prompt);
    }
    for (uint32_t i = 0; i < h; i++) {
        p->hidden_mean[i] /= (float)taken;
    }
    set_bias(p, p->logits, h + out, out);
    add_product(p->logits, &p->parts[SLU_PREDICT_Q], p->hidden_mean);
    add_product(p->logits, &p->parts[SLU_PREDICT_R], p->mean);
    add_softmax(&p->shape, p->logits, p->answer);
    float n_prompt = (float)n, n_all = n_prompt + p->shape.n_answer;
    for (uint32_t i = 0; i < out; i++) {
        p->prompt[i] /= (float)taken;
        score[i] = (n_prompt * p->prompt[i] + p->shape.n_answer * p->answer[i]) / n_all;
    }
}

const float *slu_predictor_prompt(const struct slu_predictor *p)
{
    return p->prompt;
}

const float *slu_predictor_answer(const struct slu_predictor *p)
{
    return p->answer;
}
