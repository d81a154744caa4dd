/* Prompts longer than a chunk, in memory that slots make room in. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "fixture.h"
#include "session.h"

enum { CTX = 2048, N_PROMPT = 1400, N_MORE = 100, N_ANSWER = 20 };

static const enum slu_arch archs[] = {SLU_ARCH_GPT_OSS, SLU_ARCH_QWEN2MOE, SLU_ARCH_DEEPSEEK2};

struct long_prompt {
    struct fixture f;
    int32_t ids[N_PROMPT + N_MORE];
    int32_t want[N_ANSWER]; /* after the first N_PROMPT, by a model that is all resident */
    struct slu_engine_params params;
    struct slu_plan plan;
};

static void begin(struct long_prompt *p, enum slu_arch arch)
{
    const struct slu_synth_params model = {.arch = arch,
                                           .n_layers = 4,
                                           .n_ff = 1536,
                                           .n_experts = 64,
                                           .n_used = 4,
                                           .n_ctx = CTX,
                                           .window = 100};
    fixture_open(&p->f);
    fixture_synth(&p->f, &model, SLU_CODEC_RAW, 24 << 10);
    for (int32_t i = 0; i < N_PROMPT + N_MORE; i++) {
        p->ids[i] = (i * 37 + i / 7) % 250;
    }
    p->params = (struct slu_engine_params){.ram_bytes = 1ull << 30, .ctx = CTX, .n_threads = 2};
    struct slu_engine *engine = fixture_engine(p->f.slu, &p->params);
    p->plan = *slu_engine_plan(engine);
    cr_assert_eq(p->plan.n_slots, p->plan.n_blocks);
    cr_assert_eq(p->plan.long_chunk_tokens, p->plan.chunk_tokens, "nothing would be gained");
    fixture_greedy(engine, p->ids, N_PROMPT, p->want, N_ANSWER);
    slu_engine_close(engine);
    uint64_t resident_bytes = p->plan.total_bytes;
    /* With less memory there are fewer slots and shorter chunks; and room for another session. */
    p->params.adapter_bytes = 4 << 20;
    uint32_t parts = arch == SLU_ARCH_GPT_OSS ? 2 : 1; /* and more, for windows */
    for (uint32_t n = p->plan.n_blocks;
         p->plan.long_chunk_tokens <= parts * p->plan.chunk_tokens;) {
        cr_assert_gt(n, p->plan.n_blocks / 4, "no long chunks with any budget");
        n -= p->plan.n_blocks / 20;
        p->params.ram_bytes = resident_bytes - (p->plan.n_blocks - n) * p->plan.slot_bytes;
        cr_assert_eq(slu_plan(p->f.slu, &p->params, &p->plan, NULL), 0);
    }
    cr_assert(p->plan.n_slots < p->plan.n_blocks && p->plan.total_bytes <= p->params.ram_bytes);
}

static uint32_t slots_of(const struct slu_engine *engine)
{
    struct slu_engine_stats stats;
    slu_engine_stats(engine, &stats);
    return stats.n_slots;
}

static struct slu_session *session_of(struct slu_engine *engine)
{
    struct slu_session *session = NULL;
    cr_assert_eq(slu_session_create(engine, NULL, &session, NULL), 0);
    return session;
}

static void answer(struct long_prompt *p, struct slu_session *session)
{
    size_t n;
    const struct slu_generate_params go = {.n_max = N_ANSWER, .ignore_end = true};
    cr_assert_eq(slu_session_replace(session, p->ids, N_PROMPT, NULL), 0);
    cr_assert_eq(slu_session_generate(session, &go, NULL, NULL), 0);
    cr_expect(!memcmp(slu_session_ids(session, &n) + N_PROMPT, p->want, sizeof p->want));
}

/* The same answer, with each block read once for a chunk, and the slots are back afterwards. */
Test(long_prompt, reads_blocks_once)
{
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        struct long_prompt p;
        begin(&p, archs[i]);
        struct slu_engine *engine = fixture_engine(p.f.slu, &p.params);
        struct slu_session *session = session_of(engine);
        answer(&p, session);
        struct slu_engine_stats stats;
        slu_engine_stats(engine, &stats);
        uint32_t chunks = (N_PROMPT + p.plan.long_chunk_tokens - 1) / p.plan.long_chunk_tokens;
        const struct slu_phase_stats *prefill = &stats.phases[SLU_PHASE_PREFILL];
        cr_expect_eq(prefill->n_chunks, chunks);
        cr_expect_geq(stats.n_slots, p.plan.n_slots);
        slu_session_destroy(session);
        slu_engine_close(engine);
        fixture_close(&p.f);
    }
}

/* A second session's short and long prompts in turns with the first one's, whose unused context has
 * lent, and a long one's logits stay as they are with the scratch elsewhere. */
Test(long_prompt, sessions_in_turns)
{
    struct long_prompt p;
    begin(&p, SLU_ARCH_GPT_OSS);
    struct slu_engine *engine = fixture_engine(p.f.slu, &p.params);
    struct slu_session *one = session_of(engine), *two = session_of(engine);
    cr_assert_eq(slu_session_tokens(two, p.ids, 40, NULL), 0);
    cr_assert_eq(slu_session_eval(two, NULL, NULL, NULL), 0);
    cr_assert_gt(slots_of(engine), p.plan.n_slots, "the context has lent");
    answer(&p, one);
    cr_assert_eq(slu_session_replace(two, p.ids, 40 + p.plan.long_chunk_tokens, NULL), 0);
    cr_assert_eq(slu_session_eval(two, NULL, NULL, NULL), 0);
    cr_expect_lt(slots_of(engine), p.plan.n_slots, "the chunk's scratch is in slots");
    slu_session_destroy(two);
    answer(&p, one);
    cr_expect_geq(slots_of(engine), p.plan.n_slots);
    slu_session_destroy(one);
    slu_engine_close(engine);
    fixture_close(&p.f);
}

struct talk {
    struct long_prompt *p;
    struct slu_session *session;
};

static void *go_on(void *arg)
{
    struct talk *talk = arg;
    answer(talk->p, talk->session);
    return NULL;
}

static void *leave(void *arg)
{
    struct talk *talk = arg;
    slu_session_destroy(talk->session);
    return NULL;
}

/* A session whose context has lent ends while another's long prompt, which takes that back, is
 * about to be computed, whichever comes first. */
Test(long_prompt, lender_leaves_meanwhile)
{
    struct long_prompt p;
    begin(&p, SLU_ARCH_QWEN2MOE);
    struct slu_engine *engine = fixture_engine(p.f.slu, &p.params);
    for (int is_first = 0; is_first < 2; is_first++) {
        struct talk lender = {&p, session_of(engine)}, other = {&p, session_of(engine)};
        cr_assert_eq(slu_session_tokens(lender.session, p.ids, 40, NULL), 0);
        cr_assert_eq(slu_session_eval(lender.session, NULL, NULL, NULL), 0);
        cr_assert(slu_model_has_lent(&engine->model, &lender.session->kv));
        pthread_t threads[2];
        pthread_mutex_lock(&engine->compute);
        pthread_create(&threads[is_first], NULL, go_on, &other);
        usleep(20000);
        pthread_create(&threads[!is_first], NULL, leave, &lender);
        usleep(20000);
        pthread_mutex_unlock(&engine->compute);
        pthread_join(threads[0], NULL);
        pthread_join(threads[1], NULL);
        answer(&p, other.session);
        slu_session_destroy(other.session);
    }
    slu_engine_close(engine);
    fixture_close(&p.f);
}

/* Whether reading a block fails. */
static void inject_faults(struct slu_engine *engine, uint32_t n)
{
    for (uint32_t b = engine->weights.first_block; b < engine->weights.end_block; b++) {
        slu_stream_inject_fault(engine->model.stream, b, n);
    }
}

/* A long chunk that fails may have overwritten what windows look back at: with them all is
 * computed again, without them what was computed stays; the answer is the same. */
Test(long_prompt, goes_on_after_a_failure)
{
    for (size_t i = 0; i < 2; i++) {
        struct long_prompt p;
        begin(&p, archs[i]);
        struct slu_engine *engine = fixture_engine(p.f.slu, &p.params);
        struct slu_session *session = session_of(engine);
        cr_assert_eq(slu_session_tokens(session, p.ids, N_MORE, NULL), 0);
        cr_assert_eq(slu_session_eval(session, NULL, NULL, NULL), 0);
        cr_assert_eq(slu_session_tokens(session, p.ids + N_MORE, N_PROMPT - N_MORE, NULL), 0);
        inject_faults(engine, 1);
        cr_assert_eq(slu_session_eval(session, NULL, NULL, NULL), SLU_EIO);
        cr_expect_eq(session->kv.n, archs[i] == SLU_ARCH_GPT_OSS ? 0 : N_MORE);
        inject_faults(engine, 0);
        answer(&p, session);
        slu_session_destroy(session);
        slu_engine_close(engine);
        fixture_close(&p.f);
    }
}
