#include "tools/predict_train.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "kern/kern.h"

/* Prompts whose gradients make one step. */
#define BATCH 8u
#define RATE  2e-3f
/* What a section may take: numbers of 8 bits. */
#define SECTION_BYTES (384u << 10)
/* Products a prompt may cost while it is run: some 5 ms of one core. */
#define PRODUCTS_MAX 12000000u

struct net {
    struct slu_predict_shape shape;
    size_t n; /* parameters */
    size_t at[SLU_PREDICT_PARTS];
    float *w, *grad, *m, *v;
};

struct trainer {
    const struct slu_predict_data *data;
    const struct slu_predict_train_params *params;
    const struct slu_kern *kern;
    struct net net;
    uint32_t out;
    uint64_t random;
    uint32_t n_steps, step;
    uint32_t *order, n_order;
    /* Of one prompt. */
    float *x;                                  /* n_tokens_max x d, normalized */
    float *mean, *base, *hidden, *hidden_mean; /* d, h, n_tokens_max x h, h */
    float *d_base, *d_hidden, *d_mean;         /* h */
    float *logits, *target;                    /* out */
    uint8_t *is_routed;                        /* n_layers */
};

static uint64_t next_random(struct trainer *t)
{
    /* G. Marsaglia, "Xorshift RNGs", 2003. */
    t->random ^= t->random << 13;
    t->random ^= t->random >> 7;
    t->random ^= t->random << 17;
    return t->random;
}

static float uniform(struct trainer *t)
{
    return (float)(next_random(t) >> 40) / (float)(1 << 23) - 1.0f;
}

static struct slu_predict_shape choose_shape(const struct slu_predict_data *data,
                                             const struct slu_predict_train_params *params)
{
    const struct slu_trace_shape *trace = slu_trace_reader_shape(data->reader);
    struct slu_predict_shape shape = {.n_embd = data->n_embd,
                                      .n_layers = trace->n_layers,
                                      .n_experts = trace->n_experts,
                                      .has_direct = params->is_linear,
                                      .n_tokens_max = 1024};
    uint64_t out = (uint64_t)shape.n_layers * shape.n_experts, d = shape.n_embd;
    if (params->is_linear) {
        return shape;
    }
    shape.has_direct = d * out <= SECTION_BYTES / 4;
    uint64_t left = SECTION_BYTES - (shape.has_direct ? d * out : 0);
    uint64_t fits = left / (4 * d + 2 * out);
    shape.n_hidden = params->n_hidden ? params->n_hidden : fits > 96 ? 96 : (uint32_t)fits;
    shape.n_hidden = shape.n_hidden < 8 ? 8 : shape.n_hidden;
    shape.n_hidden =
        shape.n_hidden > SLU_PREDICT_HIDDEN_MAX ? SLU_PREDICT_HIDDEN_MAX : shape.n_hidden;
    /* An exponential costs as much as some twenty products. */
    uint64_t cost = (3 * d + out) * shape.n_hidden + 20 * out;
    uint64_t n_tokens = PRODUCTS_MAX / cost;
    shape.n_tokens_max = n_tokens < 16 ? 16 : n_tokens > 1024 ? 1024 : (uint32_t)n_tokens;
    return shape;
}

static int net_init(struct trainer *t, struct slu_err *err)
{
    struct net *net = &t->net;
    for (int i = 0; i < SLU_PREDICT_PARTS; i++) {
        uint32_t rows, cols;
        slu_predict_part_shape(&net->shape, (enum slu_predict_part)i, &rows, &cols);
        net->at[i] = net->n;
        net->n += (size_t)rows * cols;
    }
    net->w = calloc(4 * net->n, sizeof *net->w);
    if (!net->w) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for a predictor of %zu weights", net->n);
    }
    net->grad = net->w + net->n;
    net->m = net->w + 2 * net->n;
    net->v = net->w + 3 * net->n;
    /* Inputs of a hidden unit: three tokens and the mean. Outputs begin at 0. */
    float range = sqrtf(1.0f / (float)net->shape.n_embd);
    for (size_t i = 0; i < net->at[SLU_PREDICT_P] && net->shape.n_hidden; i++) {
        net->w[i] = range * uniform(t);
    }
    return 0;
}

static int trainer_init(struct trainer *t, struct slu_err *err)
{
    const struct slu_trace_shape *trace = slu_trace_reader_shape(t->data->reader);
    size_t d = t->net.shape.n_embd, h = t->net.shape.n_hidden, n = t->data->n_tokens_max;
    t->out = t->net.shape.n_layers * t->net.shape.n_experts;
    t->x = malloc(n * d * sizeof *t->x);
    t->mean = calloc(d + 5 * h + n * h + 2 * (size_t)t->out, sizeof *t->mean);
    t->is_routed = calloc(t->net.shape.n_layers, 1);
    t->order = malloc((t->data->n_prompts + 1) * sizeof *t->order);
    if (!t->x || !t->mean || !t->is_routed || !t->order) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory to train a predictor");
    }
    t->base = t->mean + d;
    t->hidden_mean = t->base + h;
    t->d_base = t->hidden_mean + h;
    t->d_hidden = t->d_base + h;
    t->d_mean = t->d_hidden + h;
    t->hidden = t->d_mean + h;
    t->logits = t->hidden + n * h;
    t->target = t->logits + t->out;
    for (uint32_t i = 0; i < trace->n_routed; i++) {
        t->is_routed[trace->layers[i]] = 1;
    }
    return net_init(t, err);
}

static void trainer_finish(struct trainer *t)
{
    free(t->net.w);
    free(t->x);
    free(t->mean);
    free(t->is_routed);
    free(t->order);
}

/* y[cols] += x[rows] W of a part. */
static void add_product(struct trainer *t, float *y, enum slu_predict_part part, const float *x)
{
    uint32_t rows, cols;
    slu_predict_part_shape(&t->net.shape, part, &rows, &cols);
    const float *w = t->net.w + t->net.at[part];
    for (uint32_t r = 0; r < rows; r++, w += cols) {
        if (x[r] != 0) {
            t->kern->axpy_f32(y, x[r], w, cols);
        }
    }
}

/* The part's gradient from that of what it added to; and d_x[rows] += W d_y unless it is NULL. */
static void add_gradient(struct trainer *t, enum slu_predict_part part, const float *x,
                         const float *d_y, float *d_x)
{
    uint32_t rows, cols;
    slu_predict_part_shape(&t->net.shape, part, &rows, &cols);
    const float *w = t->net.w + t->net.at[part];
    float *grad = t->net.grad + t->net.at[part];
    for (uint32_t r = 0; r < rows; r++, w += cols, grad += cols) {
        if (x[r] != 0) {
            t->kern->axpy_f32(grad, x[r], d_y, cols);
        }
        if (d_x) {
            d_x[r] += t->kern->dot_f32(w, d_y, cols);
        }
    }
}

/* logits become (softmax - target) * factor, layer by layer; layers without a router get 0. */
static void softmax_gradient(struct trainer *t, float factor)
{
    uint32_t n = t->net.shape.n_experts;
    for (uint32_t l = 0; l < t->net.shape.n_layers; l++) {
        float *z = t->logits + (size_t)l * n, *target = t->target + (size_t)l * n;
        float high = z[0], sum = 0, wanted = 0;
        for (uint32_t e = 1; e < n; e++) {
            high = z[e] > high ? z[e] : high;
        }
        for (uint32_t e = 0; e < n; e++) {
            z[e] = expf(z[e] - high);
            sum += z[e];
            wanted += target[e];
        }
        float scale = t->is_routed[l] && wanted > 0 ? factor : 0;
        for (uint32_t e = 0; e < n; e++) {
            z[e] = scale > 0 ? scale * (z[e] / sum - target[e] / wanted) : 0;
        }
    }
}

/* target += what tokens lo .. hi-1 were routed to, each layer of each token with weight 1. */
static void add_targets(struct trainer *t, const struct slu_trace_prompt *prompt, uint32_t lo,
                        uint32_t hi)
{
    const struct slu_trace_shape *trace = slu_trace_reader_shape(t->data->reader);
    uint32_t k = trace->n_used;
    memset(t->target, 0, t->out * sizeof *t->target);
    for (size_t i = (size_t)lo * trace->n_routed; i < (size_t)hi * trace->n_routed; i++) {
        float *at = t->target + (size_t)trace->layers[i % trace->n_routed] * trace->n_experts;
        float sum = 0;
        for (uint32_t j = 0; j < k; j++) {
            sum += prompt->weights[i * k + j];
        }
        for (uint32_t j = 0; j < k && sum > 0; j++) {
            at[prompt->experts[i * k + j]] += prompt->weights[i * k + j] / sum;
        }
    }
}

static void set_bias(struct trainer *t, float *y, uint32_t from, uint32_t n)
{
    memcpy(y, t->net.w + t->net.at[SLU_PREDICT_BIAS] + from, n * sizeof *y);
}

static void add_bias_gradient(struct trainer *t, const float *d_y, uint32_t from, uint32_t n)
{
    t->kern->axpy_f32(t->net.grad + t->net.at[SLU_PREDICT_BIAS] + from, 1.0f, d_y, n);
}

static void forward_hidden(struct trainer *t, uint32_t n)
{
    uint32_t d = t->net.shape.n_embd, h = t->net.shape.n_hidden;
    set_bias(t, t->base, 0, h);
    add_product(t, t->base, SLU_PREDICT_A3, t->mean);
    memset(t->hidden_mean, 0, h * sizeof *t->hidden_mean);
    for (uint32_t i = 0; i < n; i++) {
        float *u = t->hidden + (size_t)i * h;
        memcpy(u, t->base, h * sizeof *u);
        for (uint32_t back = 0; back < SLU_PREDICT_BEFORE && back <= i; back++) {
            add_product(t, u, (enum slu_predict_part)(SLU_PREDICT_A0 + back),
                        t->x + (size_t)(i - back) * d);
        }
        for (uint32_t j = 0; j < h; j++) {
            u[j] = u[j] > 0 ? u[j] : 0;
            t->hidden_mean[j] += u[j] / (float)n;
        }
    }
}

/* One token's guess and what follows from its error. d_mean: the answer's, for each token alike. */
static void backward_token(struct trainer *t, const struct slu_trace_prompt *prompt, uint32_t i,
                           float factor)
{
    uint32_t d = t->net.shape.n_embd, h = t->net.shape.n_hidden;
    const float *u = t->hidden + (size_t)i * h;
    set_bias(t, t->logits, h, t->out);
    add_product(t, t->logits, SLU_PREDICT_P, u);
    add_targets(t, prompt, i, i + 1);
    softmax_gradient(t, factor);
    add_bias_gradient(t, t->logits, h, t->out);
    memcpy(t->d_hidden, t->d_mean, h * sizeof *t->d_hidden);
    add_gradient(t, SLU_PREDICT_P, u, t->logits, t->d_hidden);
    for (uint32_t j = 0; j < h; j++) {
        t->d_hidden[j] = u[j] > 0 ? t->d_hidden[j] : 0;
        t->d_base[j] += t->d_hidden[j];
    }
    for (uint32_t back = 0; back < SLU_PREDICT_BEFORE && back <= i; back++) {
        add_gradient(t, (enum slu_predict_part)(SLU_PREDICT_A0 + back),
                     t->x + (size_t)(i - back) * d, t->d_hidden, NULL);
    }
}

/* The answer's guess from means alone; leaves what the hidden units get of it in d_mean. */
static void train_answer(struct trainer *t, const struct slu_trace_prompt *prompt, float factor)
{
    uint32_t h = t->net.shape.n_hidden;
    memset(t->d_mean, 0, h * sizeof *t->d_mean);
    if (prompt->n_prompt == prompt->n_tokens) {
        return;
    }
    set_bias(t, t->logits, h + t->out, t->out);
    add_product(t, t->logits, SLU_PREDICT_Q, t->hidden_mean);
    add_product(t, t->logits, SLU_PREDICT_R, t->mean);
    add_targets(t, prompt, prompt->n_prompt, prompt->n_tokens);
    softmax_gradient(t, factor);
    add_bias_gradient(t, t->logits, h + t->out, t->out);
    add_gradient(t, SLU_PREDICT_Q, t->hidden_mean, t->logits, t->d_mean);
    add_gradient(t, SLU_PREDICT_R, t->mean, t->logits, NULL);
    for (uint32_t j = 0; j < h; j++) {
        t->d_mean[j] /= (float)prompt->n_prompt;
    }
}

/* x and mean of the prompt's tokens. */
static int load(struct trainer *t, const struct slu_trace_prompt *prompt, struct slu_err *err)
{
    uint32_t d = t->net.shape.n_embd, n = prompt->n_prompt;
    int rc = t->data->embed(t->data->arg, prompt->ids, n, t->x, err);
    memset(t->mean, 0, d * sizeof *t->mean);
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        float *x = t->x + (size_t)i * d;
        float sum = t->kern->dot_f32(x, x, d);
        float scale = sum > 0 && isfinite(sum) ? 1.0f / sqrtf(sum / (float)d) : 0;
        for (uint32_t j = 0; j < d; j++) {
            x[j] = scale > 0 ? x[j] * scale : 0;
        }
        t->kern->axpy_f32(t->mean, 1.0f / (float)n, x, d);
    }
    return rc;
}

static int train_prompt(struct trainer *t, uint32_t index, struct slu_err *err)
{
    struct slu_trace_prompt prompt;
    uint32_t h = t->net.shape.n_hidden;
    slu_trace_reader_seek(t->data->reader, t->data->offsets[index]);
    int rc = slu_trace_reader_next(t->data->reader, &prompt, err);
    if (rc <= 0 || prompt.n_prompt == 0) {
        return rc;
    }
    rc = load(t, &prompt, err);
    if (rc < 0) {
        return rc;
    }
    uint32_t n = prompt.n_prompt;
    if (h) {
        forward_hidden(t, n);
    }
    train_answer(t, &prompt, 1.0f / BATCH);
    if (h == 0) {
        set_bias(t, t->logits, 0, t->out);
        add_product(t, t->logits, SLU_PREDICT_P, t->mean);
        add_targets(t, &prompt, 0, n);
        softmax_gradient(t, 1.0f / BATCH);
        add_bias_gradient(t, t->logits, 0, t->out);
        add_gradient(t, SLU_PREDICT_P, t->mean, t->logits, NULL);
        return 0;
    }
    memset(t->d_base, 0, h * sizeof *t->d_base);
    for (uint32_t i = 0; i < n; i++) {
        backward_token(t, &prompt, i, 1.0f / (float)(BATCH * n));
    }
    add_bias_gradient(t, t->d_base, 0, h);
    add_gradient(t, SLU_PREDICT_A3, t->mean, t->d_base, NULL);
    return 0;
}

/* D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015; the rate falls to 0. */
static void adam_step(struct trainer *t)
{
    struct net *net = &t->net;
    t->step++;
    float rate = RATE * (1.0f - (float)t->step / (float)(t->n_steps + 1));
    rate *= sqrtf(1.0f - powf(0.999f, (float)t->step)) / (1.0f - powf(0.9f, (float)t->step));
    for (size_t i = 0; i < net->n; i++) {
        float g = net->grad[i];
        net->m[i] += 0.1f * (g - net->m[i]);
        net->v[i] += 0.001f * (g * g - net->v[i]);
        net->w[i] -= rate * net->m[i] / (sqrtf(net->v[i]) + 1e-8f);
        net->grad[i] = 0;
    }
}

static int train(struct trainer *t, struct slu_err *err)
{
    const struct slu_predict_train_params *params = t->params;
    for (uint32_t i = 0; i < t->data->n_prompts; i++) {
        if (params->use_held_out || !slu_predict_is_held_out(i)) {
            t->order[t->n_order++] = i;
        }
    }
    if (t->n_order == 0) {
        return slu_err_set(err, SLU_EINVAL, "there is no prompt to train a predictor with");
    }
    /* Few prompts are gone over more often, so that there are some 800 steps. */
    uint32_t steps_a_round = (t->n_order + BATCH - 1) / BATCH;
    uint32_t n_epochs = params->n_epochs ? params->n_epochs : 800 / steps_a_round;
    n_epochs = n_epochs < 5 ? 5 : n_epochs > 40 && !params->n_epochs ? 40 : n_epochs;
    t->n_steps = n_epochs * steps_a_round;
    for (uint32_t epoch = 0; epoch < n_epochs; epoch++) {
        for (uint32_t i = t->n_order; i > 1; i--) {
            uint32_t j = (uint32_t)(next_random(t) % i), swap = t->order[i - 1];
            t->order[i - 1] = t->order[j];
            t->order[j] = swap;
        }
        for (uint32_t i = 0; i < t->n_order; i++) {
            if (params->cancel && atomic_load_explicit(params->cancel, memory_order_relaxed)) {
                return slu_err_set(err, SLU_ECANCEL, "cancelled");
            }
            int rc = train_prompt(t, t->order[i], err);
            if (rc < 0) {
                return rc;
            }
            if ((i + 1) % BATCH == 0 || i + 1 == t->n_order) {
                adam_step(t);
            }
            if (params->progress) {
                params->progress(params->arg, (uint64_t)epoch * t->n_order + i + 1,
                                 (uint64_t)n_epochs * t->n_order);
            }
        }
    }
    return 0;
}

/* The tokens that an answer has. */
static int count_answers(struct trainer *t, struct slu_err *err)
{
    struct slu_trace_prompt prompt;
    double n_answer = 0;
    for (uint32_t i = 0; i < t->data->n_prompts; i++) {
        slu_trace_reader_seek(t->data->reader, t->data->offsets[i]);
        int rc = slu_trace_reader_next(t->data->reader, &prompt, err);
        if (rc <= 0) {
            return rc;
        }
        n_answer += prompt.n_tokens - prompt.n_prompt;
    }
    t->net.shape.n_answer = t->data->n_prompts ? (float)(n_answer / t->data->n_prompts) : 0;
    return 0;
}

int slu_predict_train(const struct slu_predict_data *data,
                      const struct slu_predict_train_params *params, void **ret_section,
                      size_t *ret_bytes, struct slu_err *err)
{
    struct trainer t = {.data = data,
                        .params = params,
                        .kern = slu_kern_get(slu_cpu_flags()),
                        .net.shape = choose_shape(data, params),
                        .random = params->seed * 2 + 0x9e3779b97f4a7c15u};
    t.random = t.random ? t.random : 1;
    int rc = trainer_init(&t, err);
    rc = rc < 0 ? rc : count_answers(&t, err);
    rc = rc < 0 ? rc : train(&t, err);
    if (rc == 0) {
        size_t bytes = slu_predict_store(&t.net.shape, t.net.w, NULL, 0);
        void *section = malloc(bytes);
        if (section) {
            *ret_bytes = slu_predict_store(&t.net.shape, t.net.w, section, bytes);
            *ret_section = section;
        } else {
            rc = slu_err_set(err, SLU_ENOMEM, "out of memory for a predictor");
        }
    }
    trainer_finish(&t);
    return rc;
}
