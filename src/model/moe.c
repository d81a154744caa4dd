/*
 * The mixture of experts for a chunk of tokens. Each needed block becomes a task: its tokens, and
 * rows of `partials` for their results. Tasks stand in one fixed order, experts ascending and
 * blocks ascending within, shared or dense networks last; they are computed in whatever order
 * blocks become available, by whichever worker is free, and added up in the fixed one, so the sum
 * is the same bits whatever was resident, and for a token in a chunk as for a token alone.
 *
 * Where the results of all tasks don't fit `partials`, they are computed and added up in batches.
 */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "model/lora_stream.h"
#include "model/ops.h"

struct batch {
    struct slu_model *model;
    uint32_t l;
    const struct slu_acts *acts;
    enum slu_glu glu;
    uint32_t first, n_streamed, end; /* tasks first .. end-1, the streamed ones first */
    struct slu_lora_round lora;      /* of adapters that are streamed too */
    _Atomic uint32_t next_resident;  /* relaxed: only hands out indices */
};

/* Which targets of an adapter a task's bank answers to: the first of gate, up, down. */
static enum slu_target first_target(const struct slu_layer *layer, const struct slu_bank *bank)
{
    if (bank == &layer->routed) {
        return SLU_TARGET_EXPERT_GATE;
    }
    return layer->routed.n_experts ? SLU_TARGET_SHARED_GATE : SLU_TARGET_FFN_GATE;
}

static uint32_t expert_of(const struct slu_moe_task *task)
{
    return (task->extent - task->bank->first_extent) / task->bank->n_blocks;
}

static void compute(const struct batch *batch, const struct slu_moe_task *task, const void *data,
                    unsigned thread)
{
    struct slu_model *m = batch->model;
    struct slu_scratch *s = &m->scratch;
    uint32_t n_embd = m->weights->config.n_embd;
    struct slu_lora_block lora;
    bool has_lora =
        m->adapters &&
        slu_lora_block_init(&lora, m->kern, m->adapters, batch->l, expert_of(task), n_embd,
                            first_target(&m->weights->layers[batch->l], task->bank));
    struct slu_block_hook hook = slu_lora_block_hook(&lora);
    struct slu_block_layout at;
    slu_block_layout(&task->bank->shape, task->b, &at);
    slu_block_mul(m->kern, &task->bank->shape, &at, data, batch->glu, batch->acts, task->tok,
                  task->n, (char *)s->block + thread * s->block_stride,
                  s->partials + (size_t)task->row * n_embd, n_embd, has_lora ? &hook : NULL);
}

static void work(void *arg, unsigned thread, unsigned n_threads)
{
    struct batch *batch = arg;
    const struct slu_moe_task *tasks = batch->model->scratch.tasks;
    (void)n_threads;
    for (;;) {
        uint32_t i = atomic_fetch_add_explicit(&batch->next_resident, 1, memory_order_relaxed);
        if (i >= batch->end) {
            break;
        }
        const struct slu_bank *bank = tasks[i].bank;
        compute(batch, &tasks[i], bank->data + tasks[i].b * bank->data_stride, thread);
    }
    struct slu_stream_item item;
    while (batch->n_streamed && slu_stream_next(batch->model->stream, thread, &item) > 0) {
        compute(batch, &tasks[batch->first + item.index], item.data, thread);
        slu_stream_done(batch->model->stream, &item);
    }
}

/* Adds a batch's results to y, each thread a range of columns. */
static void reduce(void *arg, unsigned thread, unsigned n_threads)
{
    struct batch *batch = arg;
    struct slu_scratch *s = &batch->model->scratch;
    uint32_t n_embd = batch->model->weights->config.n_embd, lo, hi;
    slu_pool_share(n_embd, 16, thread, n_threads, &lo, &hi);
    for (uint32_t i = batch->first; i < batch->end && lo < hi; i++) {
        const struct slu_moe_task *task = &s->tasks[i];
        for (uint32_t j = 0; j < task->n; j++) {
            size_t t = task->tok ? task->tok[j] : j;
            batch->model->kern->axpy_f32(s->y + t * n_embd + lo, task->weight[j],
                                         s->partials + (size_t)(task->row + j) * n_embd + lo,
                                         hi - lo);
        }
    }
}

/* Begins reading what of the adapters the streamed tasks want. */
static int begin_lora(struct batch *batch, struct slu_err *err)
{
    struct slu_scratch *s = &batch->model->scratch;
    uint32_t n = 0;
    for (uint32_t i = 0; i < batch->n_streamed; i++) {
        uint32_t expert = expert_of(&s->tasks[batch->first + i]);
        if (n == 0 || s->round[n - 1] != expert) {
            s->round[n++] = expert;
        }
    }
    return slu_lora_round_begin(&batch->lora, batch->l, s->round, n, err);
}

static int begin_base(struct batch *batch, struct slu_err *err)
{
    struct slu_scratch *s = &batch->model->scratch;
    for (uint32_t i = 0; i < batch->n_streamed; i++) {
        s->round[i] = s->tasks[batch->first + i].extent;
    }
    return slu_stream_begin(batch->model->stream, s->round, batch->n_streamed, err);
}

/* The adapters' reads go out first, then the base's, and while these are on their way those are
 * waited for. */
static int run_batch(struct batch *batch, struct slu_err *err)
{
    struct slu_model *m = batch->model;
    bool is_streamed = batch->n_streamed > 0, has_lora = is_streamed && batch->lora.n > 0;
    int rc = has_lora ? begin_lora(batch, err) : 0;
    if (rc < 0) {
        return rc;
    }
    rc = is_streamed ? begin_base(batch, err) : 0;
    if (rc < 0) {
        slu_lora_round_end(&batch->lora, NULL);
        return rc;
    }
    atomic_store_explicit(&batch->next_resident, batch->first + batch->n_streamed,
                          memory_order_relaxed);
    if (slu_lora_round_fetch(&batch->lora, m->pool) == 0) {
        slu_pool_run(m->pool, work, batch);
    }
    struct slu_err *lora_err = err;
    rc = is_streamed ? slu_stream_end(m->stream, err) : 0;
    if (rc < 0) {
        lora_err = NULL; /* one sentence is enough */
    }
    int lora_rc = slu_lora_round_end(&batch->lora, lora_err);
    rc = rc < 0 ? rc : lora_rc;
    if (rc == 0) {
        slu_pool_run(m->pool, reduce, batch);
    }
    return rc;
}

/* Sorts the chosen experts' tokens by expert: expert_n[e] becomes the end of e's list. */
static void list_tokens(struct slu_scratch *s, const struct slu_config *c, uint32_t n)
{
    memset(s->expert_n, 0, (c->n_experts + 1) * sizeof *s->expert_n);
    for (uint32_t i = 0; i < n * c->n_used; i++) {
        s->expert_n[s->chosen[i] + 1]++;
    }
    for (uint32_t e = 0; e < c->n_experts; e++) {
        s->expert_n[e + 1] += s->expert_n[e];
    }
    /* expert_n[e] is where e's list starts, and moves to its end while it is filled. */
    for (uint32_t i = 0; i < n * c->n_used; i++) {
        uint32_t at = s->expert_n[s->chosen[i]]++;
        s->expert_tok[at] = i / c->n_used;
        s->expert_weight[at] = s->chosen_weight[i];
    }
}

static uint32_t list_routed(struct slu_model *m, const struct slu_bank *bank)
{
    struct slu_scratch *s = &m->scratch;
    uint32_t n_tasks = 0, start = 0;
    for (uint32_t e = 0; e < bank->n_experts; e++) {
        uint32_t end = s->expert_n[e];
        for (uint32_t b = 0; b < bank->n_blocks && end > start; b++) {
            s->tasks[n_tasks++] = (struct slu_moe_task){
                .bank = bank,
                .extent = bank->first_extent + e * bank->n_blocks + b,
                .b = b,
                .n = end - start,
                .tok = s->expert_tok + start,
                .weight = s->expert_weight + start,
            };
        }
        start = end;
    }
    return n_tasks;
}

/* Weight of a shared or dense network for each token: one, or a gate's. */
static void weigh_resident(struct slu_model *m, const struct slu_layer *layer, uint32_t n)
{
    struct slu_scratch *s = &m->scratch;
    uint32_t n_embd = m->weights->config.n_embd;
    for (uint32_t t = 0; t < n; t++) {
        s->ones[t] = 1.0f;
        if (layer->shared_gate) {
            float gate = m->kern->dot_f32(s->h + (size_t)t * n_embd, layer->shared_gate, n_embd);
            s->ones[t] = 1.0f / (1.0f + expf(-gate));
        }
    }
}

static void route_all(struct slu_model *m, uint32_t l, const struct slu_acts *acts, uint32_t n)
{
    const struct slu_config *c = &m->weights->config;
    const struct slu_layer *layer = &m->weights->layers[l];
    struct slu_scratch *s = &m->scratch;
    struct slu_linear router = {s->router, c->n_experts, &layer->router, layer->router_bias,
                                SLU_TARGET_ROUTER};
    slu_linear_run(m, l, &router, 1, acts);
    for (uint32_t t = 0; t < n; t++) {
        slu_route(c, layer, s->router + (size_t)t * c->n_experts, s->chosen + (size_t)t * c->n_used,
                  s->chosen_weight + (size_t)t * c->n_used);
    }
    list_tokens(s, c, n);
}

int slu_moe(struct slu_model *m, uint32_t l, uint32_t n, struct slu_err *err)
{
    const struct slu_config *c = &m->weights->config;
    const struct slu_layer *layer = &m->weights->layers[l];
    struct slu_scratch *s = &m->scratch;
    struct slu_acts acts;
    slu_acts_fill(m->kern, &acts, n, c->n_embd, s->h, s->h_acts);
    memset(s->y, 0, (size_t)n * c->n_embd * sizeof *s->y);

    uint32_t n_routed = 0;
    if (layer->routed.n_experts) {
        route_all(m, l, &acts, n);
        n_routed = list_routed(m, &layer->routed);
    }
    uint32_t n_tasks = n_routed;
    if (layer->resident.n_experts) {
        weigh_resident(m, layer, n);
        for (uint32_t b = 0; b < layer->resident.n_blocks; b++) {
            s->tasks[n_tasks++] = (struct slu_moe_task){.bank = &layer->resident,
                                                        .extent = layer->resident.first_extent + b,
                                                        .b = b,
                                                        .n = n,
                                                        .weight = s->ones};
        }
    }

    struct batch batch = {.model = m,
                          .l = l,
                          .acts = &acts,
                          .glu = c->arch == SLU_ARCH_GPT_OSS ? SLU_GLU_OAI : SLU_GLU_SILU};
    slu_lora_round_init(&batch.lora, m->adapters, l);
    while (batch.end < n_tasks) {
        uint32_t rows = 0, n_experts = 0, last = UINT32_MAX;
        batch.first = batch.end;
        while (batch.end < n_tasks && rows + s->tasks[batch.end].n <= s->n_partials) {
            uint32_t expert = batch.end < n_routed ? expert_of(&s->tasks[batch.end]) : last;
            n_experts += expert != last;
            if (n_experts > batch.lora.experts_max) {
                break;
            }
            last = expert;
            s->tasks[batch.end].row = rows;
            rows += s->tasks[batch.end++].n;
        }
        uint32_t streamed_end = batch.end < n_routed ? batch.end : n_routed;
        batch.n_streamed = streamed_end > batch.first ? streamed_end - batch.first : 0;
        int rc = run_batch(&batch, err);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}
