/* What is measured: the tally of each phase, replaced routing, bounds, and reading through a
 * mapping. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "fixture.h"
#include "session.h"

static const struct slu_synth_params small = {.arch = SLU_ARCH_GPT_OSS, .n_experts = 16};

static uint64_t parts_ns(const struct slu_phase_stats *phase)
{
    return phase->embed_ns + phase->dense_ns + phase->attention_ns + phase->experts_ns +
           phase->head_ns + phase->other_ns;
}

/* Prefill and decoding are told apart, the parts of each add up to its time, and weights are
 * counted once for a chunk. */
Test(measure, phases)
{
    struct fixture f;
    fixture_open(&f);
    struct slu_synth_params params = {.arch = SLU_ARCH_QWEN2MOE, .n_layers = 2};
    fixture_synth(&f, &params, SLU_CODEC_ZSTD, 0);
    struct slu_engine *engine =
        fixture_engine(f.slu, &(struct slu_engine_params){.n_threads = 2, .minimum_cache = true});
    const int32_t prompt[] = {1, 2, 3, 4, 5};
    int32_t ids[4];
    fixture_greedy(engine, prompt, 5, ids, 4);
    struct slu_engine_stats stats;
    slu_engine_stats(engine, &stats);
    const struct slu_phase_stats *prefill = &stats.phases[SLU_PHASE_PREFILL];
    const struct slu_phase_stats *decode = &stats.phases[SLU_PHASE_DECODE];
    cr_assert_eq(prefill->n_tokens, 5);
    cr_assert_eq(decode->n_tokens, 3); /* the first of the four came out of the prefill */
    cr_assert_eq(decode->n_chunks, 3);
    cr_assert_eq(prefill->flash_bytes + decode->flash_bytes, stats.flash_bytes);
    cr_assert_eq(prefill->hits + decode->hits, stats.hits);
    cr_assert_eq(prefill->misses + decode->misses, stats.misses);
    cr_assert_eq(decode->hits + decode->misses, 3 * slu_engine_plan(engine)->token_blocks);
    cr_assert_eq(decode->n_threads, 2);
    for (int i = 0; i < SLU_PHASES; i++) {
        const struct slu_phase_stats *phase = &stats.phases[i];
        cr_assert_eq(parts_ns(phase), phase->wall_ns);
        uint64_t spent = 0;
        for (int t = 0; t < 2; t++) {
            spent += phase->threads[t].stall_ns + phase->threads[t].unpack_ns +
                     phase->threads[t].product_ns;
        }
        cr_assert(spent > 0 && spent <= 2 * phase->experts_ns);
    }
    /* Two layers of 64 x 64 for q, 32 x 64 each for k and v, 64 x 64 back, 8 x 64 routers, and the
     * head of 384 x 64; of experts, two routed of 3 x 64 x 96 and a shared one twice as wide. */
    uint64_t token_macs = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 8 * 64) + 384 * 64;
    cr_assert_eq(decode->dense_macs, 3 * token_macs);
    cr_assert_eq(decode->expert_macs, 3 * 2 * (2 * 3 * 64 * 96 + 3 * 64 * 192));
    /* Of the prompt the last layer's are needed for its last token alone. */
    cr_assert_eq(prefill->expert_macs, (5 + 1) * (2 * 3 * 64 * 96 + 3 * 64 * 192));
    /* Routed weights are Q4_0, shared ones Q8_0. */
    cr_assert(decode->expert_bytes > decode->expert_macs / 2 &&
              decode->expert_bytes < decode->expert_macs);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* The two experts after the layer's number, wherever the router would go. */
static void route(void *arg, uint32_t layer, uint32_t position, uint32_t n_used, uint32_t *chosen,
                  float *weight)
{
    uint32_t *n_calls = arg;
    cr_assert(n_used == 2 && chosen[0] < 16 && chosen[1] < 16);
    chosen[0] = layer + 1;
    chosen[1] = layer + 2;
    weight[0] = weight[1] = 0.5f;
    n_calls[position]++;
}

/* With the router replaced, exactly the experts asked for are read, once each; with it back, the
 * model computes what it did before. */
Test(measure, replaced_routing)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_RAW, 0);
    struct slu_engine *engine = fixture_engine(f.slu, &(struct slu_engine_params){.n_threads = 2});
    struct slu_engine_info info;
    slu_engine_info(engine, &info);
    cr_assert_eq(info.n_experts, 16);
    cr_assert_eq(info.n_used, 2);
    cr_assert_eq(info.n_layers, 3);
    cr_assert_str_eq(info.name, "random");
    cr_assert_str_eq(info.architecture, "gpt-oss");
    const int32_t prompt[] = {1, 2, 3, 4};
    int32_t before[3], ids[3];
    uint32_t n_calls[8] = {0};
    slu_engine_set_route(engine, route, n_calls);
    fixture_greedy(engine, prompt, 4, ids, 3);
    struct slu_engine_stats stats;
    slu_engine_stats(engine, &stats);
    uint32_t token_blocks = slu_engine_plan(engine)->token_blocks;
    cr_assert_eq(stats.misses, token_blocks);
    cr_assert_eq(stats.hits, 2 * token_blocks);
    for (uint32_t p = 0; p < 6; p++) {
        cr_assert_eq(n_calls[p], info.n_layers, "position %u", p);
    }
    slu_engine_set_route(engine, NULL, NULL);
    fixture_greedy(engine, prompt, 4, before, 3);
    cr_assert_eq(n_calls[0], info.n_layers);
    slu_engine_close(engine);
    engine = fixture_engine(f.slu, &(struct slu_engine_params){.n_threads = 2});
    fixture_greedy(engine, prompt, 4, ids, 3);
    cr_assert_arr_eq(ids, before, sizeof ids);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Rates of the machine are measured, and the bound of a phase is its slowest need by them. */
Test(measure, bound)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_ZSTD, 0);
    struct slu_probe probe;
    struct slu_err err = {0};
    const struct slu_engine_params params = {.n_threads = 2, .ram_bytes = 64 << 20};
    cr_assert_eq(slu_probe_run(f.slu, &params, &probe, &err), 0, "%s", err.text);
    cr_assert(probe.flash_bytes_s > 0 && probe.ram_bytes_s > 0 && probe.unpack_bytes_s > 0);
    cr_assert(probe.macs_s >= 0 && probe.flash_depth > 0 && probe.flash_read_bytes > 0);
    cr_assert_eq(slu_probe_run("/nowhere.slu", &params, &probe, &err), SLU_ENOENT);

    probe = (struct slu_probe){
        .flash_bytes_s = 1000, .ram_bytes_s = 10000, .macs_s = 100000, .unpack_bytes_s = 2000};
    struct slu_phase_stats phase = {.n_tokens = 2,
                                    .wall_ns = 8000000000,
                                    .flash_bytes = 4000,
                                    .unpacked_bytes = 2000,
                                    .dense_bytes = 5000,
                                    .expert_bytes = 5000,
                                    .dense_macs = 10000,
                                    .expert_macs = 10000};
    struct slu_bound bound;
    slu_bound_of(&phase, &probe, &bound);
    cr_assert_str_eq(bound.by, "flash");
    cr_assert_float_eq(bound.token_s, 2, 1e-9);
    cr_assert_float_eq(bound.unpack_s, 0.5, 1e-9);
    cr_assert_float_eq(bound.ram_s, 0.5, 1e-9);
    cr_assert_float_eq(bound.arithmetic_s, 0.1, 1e-9);
    cr_assert_float_eq(bound.efficiency, 0.5, 1e-9);
    phase.flash_bytes = 0;
    phase.expert_bytes = 15000;
    slu_bound_of(&phase, &probe, &bound);
    cr_assert_str_eq(bound.by, "ram");
    cr_assert_float_eq(bound.token_s, 1, 1e-9);
    slu_bound_of(&(struct slu_phase_stats){0}, &probe, &bound);
    cr_assert_str_eq(bound.by, "nothing");
    cr_assert_float_eq(bound.token_s, 0, 1e-9);
    fixture_close(&f);
}

/* What turns have measured counts once each way of reading has taken long enough, the best of them;
 * and an engine with few dense weights takes no turns. */
Test(measure, turns)
{
    struct slu_probe probe = {.ram_bytes_s = 7};
    struct slu_probe_turns turns = {.n = 1};
    cr_assert_not(slu_probe_take_turns(&probe, &turns));
    for (unsigned i = 0; i < SLU_PROBE_STREAMS; i++) {
        turns.ram_ns[i] = 40000000;
        turns.ram_bytes[i] = 4000000 * (i == 1 ? 3 : 2);
    }
    turns.ram_ns[2] = 19000000;
    cr_assert_not(slu_probe_take_turns(&probe, &turns));
    cr_assert_float_eq(probe.ram_bytes_s, 7, 1e-9);
    turns.ram_ns[2] = 40000000;
    cr_assert(slu_probe_take_turns(&probe, &turns));
    cr_assert_float_eq(probe.ram_bytes_s, 3e8, 1);

    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &small, SLU_CODEC_RAW, 0);
    struct slu_engine *engine = fixture_engine(f.slu, &(struct slu_engine_params){.n_threads = 2});
    turns = (struct slu_probe_turns){0};
    slu_probe_turn(engine, &turns);
    cr_assert_eq(turns.n, 0);
    slu_engine_close(engine);
    fixture_close(&f);
}

/* Through a mapping of the pack, raw or compressed, the same is computed as with a cache; and a
 * corrupt block is told there too. */
Test(measure, mapped)
{
    struct fixture f;
    fixture_open(&f);
    const int32_t prompt[] = {1, 2, 3, 4};
    for (int codec = 0; codec < (int)SLU_CODECS; codec++) {
        int32_t streamed[4], mapped[4];
        fixture_synth(&f, &small, (enum slu_codec_id)codec, 0);
        struct slu_engine *engine =
            fixture_engine(f.slu, &(struct slu_engine_params){.n_threads = 2});
        fixture_greedy(engine, prompt, 4, streamed, 4);
        slu_engine_close(engine);
        engine = fixture_engine(f.slu,
                                &(struct slu_engine_params){.n_threads = 2, .io = SLU_USE_IO_MMAP});
        cr_assert_eq(slu_engine_plan(engine)->n_slots, 0);
        fixture_greedy(engine, prompt, 4, mapped, 4);
        cr_assert_arr_eq(streamed, mapped, sizeof mapped);
        struct slu_engine_stats stats;
        slu_engine_stats(engine, &stats);
        cr_assert_str_eq(stats.io_backend, "mmap");
        if (codec == SLU_CODEC_ZSTD) {
            const struct slu_extent *extents = engine->pack->extents;
            int fd = open(f.slu, O_RDWR);
            for (uint32_t i = engine->weights.first_block; i < engine->weights.end_block; i++) {
                cr_assert_eq(pwrite(fd, "????", 4, (off_t)extents[i].offset + 8), 4);
            }
            close(fd);
            struct slu_session *session;
            struct slu_err err = {0};
            cr_assert_eq(slu_session_create(engine, NULL, &session, &err), 0);
            cr_assert_eq(slu_session_tokens(session, prompt, 4, &err), 0);
            cr_assert_eq(slu_session_eval(session, NULL, NULL, &err), SLU_EFORMAT);
            cr_assert_not_null(strstr(err.text, "block"), "%s", err.text);
            slu_session_destroy(session);
        }
        slu_engine_close(engine);
    }
    fixture_close(&f);
}
