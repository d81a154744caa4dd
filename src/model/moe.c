/*
 * The mixture of experts for a chunk of tokens. Each needed block becomes a task with its tokens,
 * computed in whatever order blocks become available, by whichever worker is free; there is no
 * barrier among them. They add up (model/sums.h) in whatever order: so the result is the same bits
 * whatever was resident, and for a token in a chunk as for a token alone.
 */
#include <assert.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/clock.h"
#include "model/lookahead.h"
#include "model/lora_stream.h"
#include "model/ops.h"

struct layer_run {
    struct slu_model *model;
    uint32_t l, from, n; /* tokens from .. n-1 of the chunk's n */
    const struct slu_acts *acts;
    enum slu_glu glu;
    uint32_t first, n_streamed,
        end;                        /* tasks first .. end-1 of this part, the streamed ones first */
    bool is_last;                   /* no later part has streamed ones */
    struct slu_lora_round lora;     /* of adapters that are streamed too */
    _Atomic uint32_t next_resident; /* relaxed: only hands out indices */
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

/* What goes into a block's part of the down matrix, for who wants to see it. */
struct hidden_view {
    const struct slu_model *model;
    uint32_t l, expert;
    enum slu_target down;
};

static void show_hidden(void *arg, const struct slu_block_layout *at, const float *h, size_t stride,
                        float *y, size_t y_stride, uint32_t n)
{
    const struct hidden_view *view = arg;
    const struct slu_model_inputs *inputs = view->model->inputs;
    (void)y, (void)y_stride;
    inputs->see(inputs->arg, view->l, view->down, view->expert, at->lo, at->n, h, stride, NULL, n);
}

/* What goes into the experts' gates; up reads the same. */
static void show_inputs(struct slu_model *m, uint32_t l, uint32_t n_tasks)
{
    const struct slu_scratch *s = &m->scratch;
    uint32_t n_embd = m->weights->config.n_embd;
    for (uint32_t i = 0; i < n_tasks; i++) {
        const struct slu_moe_task *task = &s->tasks[i];
        if (task->b == 0) {
            m->inputs->see(m->inputs->arg, l, first_target(&m->weights->layers[l], task->bank),
                           expert_of(task), 0, n_embd, s->h, n_embd, task->tok, task->n);
        }
    }
}

static void compute(const struct layer_run *run, const struct slu_moe_task *task, const void *data,
                    unsigned thread)
{
    struct slu_model *m = run->model;
    struct slu_scratch *s = &m->scratch;
    size_t n_embd = m->weights->config.n_embd;
    struct slu_lora_block lora;
    bool has_lora =
        m->adapters &&
        slu_lora_block_init(&lora, m->kern, m->adapters, run->l, expert_of(task), (uint32_t)n_embd,
                            first_target(&m->weights->layers[run->l], task->bank));
    struct slu_block_hook hook = slu_lora_block_hook(&lora);
    enum slu_target first_of = first_target(&m->weights->layers[run->l], task->bank);
    struct hidden_view view = {m, run->l, expert_of(task), (enum slu_target)(first_of + 2)};
    if (m->inputs && !has_lora) {
        hook = (struct slu_block_hook){.output = show_hidden, .arg = &view};
    }
    struct slu_block_layout at;
    uint64_t start_ns = slu_now_ns();
    slu_block_layout(&task->bank->shape, task->b, &at);
    float *out = s->out + thread * s->out_stride;
    uint32_t every[SLU_BLOCK_TOKENS];
    for (uint32_t first = 0; first < task->n; first += SLU_BLOCK_TOKENS) {
        uint32_t some = task->n - first < SLU_BLOCK_TOKENS ? task->n - first : SLU_BLOCK_TOKENS;
        for (uint32_t i = 0; !task->tok && i < some; i++) {
            every[i] = run->from + first + i;
        }
        const uint32_t *tok = task->tok ? task->tok + first : every;
        slu_block_mul(m->kern, &task->bank->shape, &at, data, run->glu, run->acts, tok, some,
                      (char *)s->block + thread * s->block_stride, out, n_embd,
                      has_lora || m->inputs ? &hook : NULL);
        slu_sums_add(&s->sums, m->kern, thread, run->n, tok, task->weight + first, out, some);
    }
    struct slu_tally_thread *tally = &m->tally.threads[thread];
    tally->product_ns += slu_now_ns() - start_ns;
    tally->weight_bytes += at.bytes;
    tally->macs += (uint64_t)3 * at.n * n_embd * task->n;
}

/* As slu_stream_next, with the time that it takes booked. */
static int next_block(struct slu_model *m, unsigned thread, struct slu_stream_item *ret_item)
{
    struct slu_tally_thread *tally = &m->tally.threads[thread];
    uint64_t start_ns = slu_now_ns();
    int got = slu_stream_next(m->stream, thread, ret_item);
    uint64_t unpack_ns = got > 0 ? ret_item->unpack_ns : 0;
    tally->unpack_ns += unpack_ns;
    tally->stall_ns += slu_now_ns() - start_ns - unpack_ns;
    return got;
}

/* Reads in flight below which one is added of what `locked` lacks, or where look-ahead is on
 * whatever it costs. */
#define GUESSES_IN_FLIGHT 6u

/* What the next router names is no guess of what will be used where only a set's members are. */
static bool may_look_ahead(const struct slu_model *m)
{
    return !m->residency || m->lookahead == SLU_MODEL_AHEAD_WRONG ||
           slu_residency_reads_beyond(m->residency);
}

/* Names the blocks that the layer after l will want for a chunk of n tokens. So many tokens that
 * they use next to all experts want all of them; for a single token there is the look-ahead. */
static void hint_next(struct slu_model *m, uint32_t l, uint32_t n)
{
    const struct slu_config *c = &m->weights->config;
    struct slu_scratch *s = &m->scratch;
    if (l + 1 == c->n_layers) {
        uint32_t n_late = m->residency ? slu_residency_hints(m->residency, m->stream, 0, NULL, 0,
                                                             s->round, s->n_tasks_max)
                                       : 0;
        slu_stream_hint(m->stream, s->round, n_late, GUESSES_IN_FLIGHT);
        return;
    }
    const struct slu_bank *bank = &m->weights->layers[l + 1].routed;
    uint32_t n_next = n - slu_first_needed(m, l + 1);
    uint32_t n_hints = 0, n_in_flight_max = SLU_HINTS_DEEP;
    bool is_idle_only = false;
    float share = 0;
    if (m->residency && n > 1) {
        float gains[SLU_EXPERTS_MAX];
        uint32_t n_guessed = slu_lookahead_gains(m, l, n, gains);
        n_hints = slu_residency_hints(m->residency, m->stream, l + 1, n_guessed ? gains : NULL,
                                      n_guessed, s->round, s->n_tasks_max);
    } else if (m->residency && (n_hints = slu_residency_hints(m->residency, m->stream, l + 1, NULL,
                                                              0, s->round, s->n_tasks_max)) > 0) {
        n_in_flight_max = GUESSES_IN_FLIGHT;
    } else if ((uint64_t)n_next * c->n_used >= 2 * (uint64_t)c->n_experts) {
        for (uint32_t i = 0; i < bank->n_experts * bank->n_blocks && i < s->n_tasks_max; i++) {
            s->round[n_hints++] = bank->first_extent + i;
        }
    } else if (n == 1 && n_next == 1 && may_look_ahead(m)) {
        uint32_t n_experts = slu_lookahead_guess(m, l, s->chosen, &share);
        is_idle_only = m->lookahead == SLU_MODEL_AHEAD_AUTO;
        n_in_flight_max = GUESSES_IN_FLIGHT;
        for (uint32_t i = 0; i < n_experts * bank->n_blocks && i < s->n_tasks_max; i++) {
            uint32_t expert = s->chosen[i / bank->n_blocks];
            s->round[n_hints++] = bank->first_extent + expert * bank->n_blocks + i % bank->n_blocks;
        }
    }
    if (is_idle_only) {
        slu_stream_hint_idle(m->stream, s->round, n_hints, share);
    } else {
        slu_stream_hint(m->stream, s->round, n_hints, n_in_flight_max);
    }
}

static void work(void *arg, unsigned thread, unsigned n_threads)
{
    struct layer_run *run = arg;
    struct slu_scratch *s = &run->model->scratch;
    (void)n_threads;
    if (run->first == 0 && !slu_sums_shared(run->n)) {
        slu_sums_clear(&s->sums, thread, run->n, run->from, run->n);
    }
    /* Hints are for when this layer has nothing left to read, so not before its last part. Beside
     * the others' work, since the next router may take as long as half a block (gpt-oss-20b: 17 of
     * 50 us): of the scratch, hints take round, chosen and router, which nobody else reads here. */
    if (thread == 0 && run->n_streamed && run->is_last) {
        hint_next(run->model, run->l, run->n);
    }
    for (;;) {
        uint32_t i = atomic_fetch_add_explicit(&run->next_resident, 1, memory_order_relaxed);
        if (i >= run->end) {
            break;
        }
        const struct slu_bank *bank = s->tasks[i].bank;
        const void *data = bank->data
                               ? bank->data + s->tasks[i].b * bank->data_stride
                               : slu_mapped_block(run->model->mapped, thread, s->tasks[i].extent);
        if (data) { /* otherwise the error is kept */
            compute(run, &s->tasks[i], data, thread);
        }
    }
    struct slu_stream_item item;
    while (run->n_streamed && next_block(run->model, thread, &item) > 0) {
        compute(run, &s->tasks[run->first + item.index], item.data, thread);
        slu_stream_done(run->model->stream, &item);
    }
}

/* y = what the blocks add up to, each thread a range of tokens' numbers. */
static void reduce(void *arg, unsigned thread, unsigned n_threads)
{
    const struct layer_run *run = arg;
    struct slu_scratch *s = &run->model->scratch;
    uint32_t n_embd = run->model->weights->config.n_embd, lo, hi;
    size_t start = (size_t)run->from * n_embd;
    slu_pool_share((run->n - run->from) * n_embd, 64, thread, n_threads, &lo, &hi);
    slu_sums_take(&s->sums, run->n, s->y, start + lo, start + hi);
}

/* Before any worker adds to them. */
static void clear_shared(void *arg, uint32_t lo, uint32_t hi)
{
    const struct layer_run *run = arg;
    slu_sums_clear(&run->model->scratch.sums, 0, run->n, run->from + lo, run->from + hi);
}

/* Begins reading what of streamed adapters the part's experts want. */
static int begin_lora(struct layer_run *run, uint32_t end_routed, struct slu_err *err)
{
    struct slu_scratch *s = &run->model->scratch;
    uint32_t n = 0;
    for (uint32_t i = run->first; i < end_routed; i++) {
        uint32_t expert = expert_of(&s->tasks[i]);
        if (n == 0 || s->round[n - 1] != expert) {
            s->round[n++] = expert;
        }
    }
    return slu_lora_round_begin(&run->lora, run->l, s->round, n, err);
}

static int begin_base(struct layer_run *run, struct slu_err *err)
{
    struct slu_scratch *s = &run->model->scratch;
    for (uint32_t i = 0; i < run->n_streamed; i++) {
        s->round[i] = s->tasks[run->first + i].extent;
    }
    return slu_stream_begin(run->model->stream, s->round, run->n_streamed, err);
}

/* Computes tasks first .. end-1, of which those before end_routed are of routed experts. The
 * adapters' reads go out first, then the base's, and while these are on their way those are waited
 * for. Hints come after them. */
static int run_part(struct layer_run *run, uint32_t end_routed, struct slu_err *err)
{
    struct slu_model *m = run->model;
    run->n_streamed = m->stream ? end_routed - run->first : 0;
    int rc = run->lora.n && end_routed > run->first ? begin_lora(run, end_routed, err) : 0;
    if (rc < 0) {
        return rc;
    }
    rc = run->n_streamed ? begin_base(run, err) : 0;
    if (rc < 0) {
        slu_lora_round_end(&run->lora, NULL);
        return rc;
    }
    atomic_store_explicit(&run->next_resident, run->first + run->n_streamed, memory_order_relaxed);
    if (slu_lora_round_fetch(&run->lora, m->pool) == 0) {
        slu_pool_run(m->pool, work, run);
    }
    if (run->n_streamed) {
        rc = slu_stream_end(m->stream, err);
    } else if (m->mapped) {
        rc = slu_mapped_error(m->mapped, err);
    }
    int lora_rc = slu_lora_round_end(&run->lora, rc < 0 ? NULL : err); /* one sentence is enough */
    return rc < 0 ? rc : lora_rc;
}

/* The tasks in parts, of which there is but one unless a streamed adapter holds fewer experts than
 * are wanted; then the sum. */
static int run_tasks(struct layer_run *run, uint32_t n_routed, uint32_t n_tasks,
                     struct slu_err *err)
{
    const struct slu_scratch *s = &run->model->scratch;
    slu_lora_round_init(&run->lora, run->model->adapters, run->l);
    if (slu_sums_shared(run->n)) {
        slu_rows_run(run->model, run->n - run->from, clear_shared, run);
    }
    while (run->end < n_tasks) {
        uint32_t n_experts = 0, last = UINT32_MAX;
        run->first = run->end;
        while (run->end < n_tasks) {
            uint32_t expert = run->end < n_routed ? expert_of(&s->tasks[run->end]) : last;
            n_experts += expert != last;
            if (n_experts > run->lora.experts_max) {
                break;
            }
            last = expert;
            run->end++;
        }
        uint32_t end_routed = run->end < n_routed ? run->end : n_routed;
        run->is_last = run->end >= n_routed;
        int rc = run_part(run, end_routed > run->first ? end_routed : run->first, err);
        if (rc < 0) {
            return rc;
        }
    }
    if (run->n - run->from == 1) {
        reduce(run, 0, 1); /* less than waking the others would take */
    } else {
        slu_pool_run(run->model->pool, reduce, run);
    }
    return 0;
}

/* Sorts the experts that tokens from .. n-1 chose by expert: expert_n[e] becomes the end of e's
 * list of tokens. */
static void list_tokens(struct slu_scratch *s, const struct slu_config *c, uint32_t from,
                        uint32_t n)
{
    memset(s->expert_n, 0, (c->n_experts + 1) * sizeof *s->expert_n);
    for (uint32_t i = from * c->n_used; i < n * c->n_used; i++) {
        if (s->chosen[i] != SLU_ROUTE_NONE) {
            s->expert_n[s->chosen[i] + 1]++;
        }
    }
    for (uint32_t e = 0; e < c->n_experts; e++) {
        s->expert_n[e + 1] += s->expert_n[e];
    }
    /* expert_n[e] is where e's list starts, and moves to its end while it is filled. */
    for (uint32_t i = from * c->n_used; i < n * c->n_used; i++) {
        if (s->chosen[i] == SLU_ROUTE_NONE) {
            continue;
        }
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

/* Weight of a shared or dense network for tokens from .. n-1: one, or a gate's. */
static void weigh_resident(struct slu_model *m, const struct slu_layer *layer, uint32_t from,
                           uint32_t n)
{
    struct slu_scratch *s = &m->scratch;
    uint32_t n_embd = m->weights->config.n_embd;
    for (uint32_t t = from; t < n; t++) {
        s->ones[t] = 1.0f;
        if (layer->shared_gate) {
            float gate = m->kern->dot_f32(s->h + (size_t)t * n_embd, layer->shared_gate, n_embd);
            s->ones[t] = 1.0f / (1.0f + expf(-gate));
        }
    }
}

/* The caller has the last word on the router's choice for token t of the chunk. */
static void ask_caller(struct slu_model *m, uint32_t l, uint32_t t)
{
    const struct slu_config *c = &m->weights->config;
    struct slu_scratch *s = &m->scratch;
    uint32_t *chosen = s->chosen + (size_t)t * c->n_used, before[SLU_TOP_K_MAX];
    float *weight = s->chosen_weight + (size_t)t * c->n_used;
    memcpy(before, chosen, c->n_used * sizeof *before);
    m->route(m->route_arg, l, m->position + t, c->n_used, chosen, weight);
    for (uint32_t i = 0; i < c->n_used; i++) {
        assert(chosen[i] < c->n_experts);
    }
    if (m->residency && memcmp(before, chosen, c->n_used * sizeof *before) != 0) {
        slu_route_impose(s->router + (size_t)t * c->n_experts, c->n_experts, chosen, weight,
                         c->n_used);
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
        if (m->route) {
            ask_caller(m, l, t);
        }
        if (m->observe) {
            m->observe(m->observe_arg, l, m->position + t, c->n_used,
                       s->chosen + (size_t)t * c->n_used, s->chosen_weight + (size_t)t * c->n_used);
        }
    }
    if (m->residency) {
        slu_residency_route(m->residency, m->stream,
                            &(struct slu_residency_chunk){.layer = l,
                                                          .n = n,
                                                          .position = m->position,
                                                          .token = m->n_tokens + 1,
                                                          .logits = s->router,
                                                          .chosen = s->chosen,
                                                          .weight = s->chosen_weight});
    }
    for (uint32_t t = 0; t < n && m->stream && !m->residency; t++) {
        slu_stream_observe(m->stream, &(struct slu_policy_choice){
                                          .token = m->n_tokens + t + 1,
                                          .layer = l,
                                          .n = c->n_used,
                                          .experts = s->chosen + (size_t)t * c->n_used,
                                          .weights = s->chosen_weight + (size_t)t * c->n_used});
    }
    if (n == 1) {
        slu_lookahead_score(m, l, s->chosen);
    }
    slu_tally_cross(&m->tally, SLU_PART_DENSE);
}

int slu_moe(struct slu_model *m, uint32_t l, uint32_t n, struct slu_err *err)
{
    const struct slu_config *c = &m->weights->config;
    const struct slu_layer *layer = &m->weights->layers[l];
    struct slu_scratch *s = &m->scratch;
    struct slu_acts acts;
    slu_acts_fill(m, &acts, n, c->n_embd, s->h, s->h_acts);
    struct layer_run run = {.model = m,
                            .l = l,
                            .from = slu_first_needed(m, l),
                            .n = n,
                            .acts = &acts,
                            .glu = c->arch == SLU_ARCH_GPT_OSS ? SLU_GLU_OAI : SLU_GLU_SILU};
    uint32_t n_routed = 0;
    if (layer->routed.n_experts) {
        route_all(m, l, &acts, n);
        list_tokens(s, c, run.from, n);
        n_routed = list_routed(m, &layer->routed);
    }
    uint32_t n_tasks = n_routed;
    if (layer->resident.n_experts) {
        weigh_resident(m, layer, run.from, n);
        for (uint32_t b = 0; b < layer->resident.n_blocks && n > run.from; b++) {
            s->tasks[n_tasks++] = (struct slu_moe_task){.bank = &layer->resident,
                                                        .extent = layer->resident.first_extent + b,
                                                        .b = b,
                                                        .n = n - run.from,
                                                        .weight = s->ones + run.from};
        }
    }
    if (m->inputs) {
        show_inputs(m, l, n_tasks);
    }
    return run_tasks(&run, n_routed, n_tasks, err);
}
