#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cli/bench.h"

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* The rates that the phases' bounds are made of. True if memory was measured between tokens. */
static bool phase_probes(const struct slu_bench *bench, struct slu_probe ret_probes[SLU_PHASES])
{
    ret_probes[SLU_PHASE_PREFILL] = bench->probe;
    ret_probes[SLU_PHASE_DECODE] = bench->probe;
    return slu_probe_take_turns(&ret_probes[SLU_PHASE_DECODE], &bench->turns);
}

void slu_bench_print(const struct slu_bench *bench)
{
    char name[128];
    slu_cli_clean(name, sizeof name, base_name(bench->model), strlen(base_name(bench->model)));
    printf("model      %s: %s, %u layers, %u of %u experts used\n", name, bench->info.architecture,
           bench->info.n_layers, bench->info.n_used, bench->info.n_experts);
    if (bench->trace) {
        slu_cli_clean(name, sizeof name, base_name(bench->trace), strlen(base_name(bench->trace)));
        printf("routing    recorded, from %s", name);
        if (bench->has_guess_share) {
            printf("; look-ahead is told %.3g %% of it rightly", 100 * (double)bench->guess_share);
        }
        printf("\n");
    } else {
        printf("routing    the router's own\n");
    }
    if (bench->plan.routing != SLU_ROUTING_EXACT) {
        printf("           %s, a set of %u experts\n", slu_cli_routing_name(bench->plan.routing),
               bench->plan.set_experts);
    }
    if (bench->is_warm) {
        printf("cache      warm: all of this had been computed once before\n");
    }
    printf("engine     %u threads, %s kernels, %s%s, context %u, chunks of up to %u\n",
           bench->plan.n_threads, bench->stats.kernels, bench->stats.io_backend,
           bench->stats.io_direct || strcmp(bench->stats.io_backend, "mmap") == 0 ? ""
                                                                                  : " (buffered)",
           bench->plan.ctx, bench->plan.long_chunk_tokens);
    printf("memory     %s at the peak, of %s; %u slots for %u blocks of up to %s\n",
           slu_cli_size(bench->stats.ledger_peak_bytes).text,
           slu_cli_size(bench->stats.ledger_limit_bytes).text, bench->stats.n_slots,
           bench->plan.n_blocks, slu_cli_size(bench->plan.slot_bytes).text);
    if (strcmp(bench->stats.io_backend, "mmap") == 0) {
        printf("paging     %llu major faults; the device reads ahead %lld KiB\n",
               (unsigned long long)bench->major_faults, (long long)bench->readahead_kib);
    }
    struct slu_probe probes[SLU_PHASES];
    bool has_turns = phase_probes(bench, probes);
    slu_cli_probe_print(stdout, &bench->probe);
    if (has_turns) {
        printf("           RAM %.1f GB/s between tokens, by which decoding is judged\n",
               1e-9 * probes[SLU_PHASE_DECODE].ram_bytes_s);
    }
    slu_cli_phases_print(stdout, &bench->stats, probes);
    printf("first token after %.3f s\n", bench->result.prefill_s);
}

static json_t *threads_json(const struct slu_phase_stats *phase)
{
    json_t *threads = json_array();
    for (uint32_t i = 0; i < phase->n_threads; i++) {
        json_t *thread = json_object();
        slu_json_real(thread, "stall_s", 1e-9 * (double)phase->threads[i].stall_ns);
        slu_json_real(thread, "unpack_s", 1e-9 * (double)phase->threads[i].unpack_ns);
        slu_json_real(thread, "product_s", 1e-9 * (double)phase->threads[i].product_ns);
        json_array_append_new(threads, thread);
    }
    return threads;
}

static double per_token(uint64_t amount, const struct slu_phase_stats *phase)
{
    return phase->n_tokens ? (double)amount / (double)phase->n_tokens : 0;
}

static double token_rate(const struct slu_phase_stats *phase)
{
    return phase->wall_ns ? 1e9 * (double)phase->n_tokens / (double)phase->wall_ns : 0;
}

static double hit_rate(const struct slu_phase_stats *phase)
{
    uint64_t n = phase->hits + phase->misses;
    return n ? (double)phase->hits / (double)n : 0;
}

/* Everything that is known of a phase. */
static json_t *phase_json(const struct slu_phase_stats *phase, const struct slu_bound *bound)
{
    json_t *object = json_object();
    const struct {
        const char *key;
        uint64_t ns;
    } parts[] = {
        {"wall_s", phase->wall_ns},   {"experts_s", phase->experts_ns},
        {"dense_s", phase->dense_ns}, {"attention_s", phase->attention_ns},
        {"head_s", phase->head_ns},   {"embedding_s", phase->embed_ns},
        {"other_s", phase->other_ns},
    };
    slu_json_whole(object, "n_tokens", phase->n_tokens);
    slu_json_whole(object, "n_chunks", phase->n_chunks);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        slu_json_real(object, parts[i].key, 1e-9 * (double)parts[i].ns);
    }
    json_object_set_new(object, "threads", threads_json(phase));
    slu_json_whole(object, "cache_hits", phase->hits);
    slu_json_whole(object, "cache_misses", phase->misses);
    slu_json_whole(object, "guesses", phase->guesses);
    slu_json_whole(object, "guesses_foreseen", phase->foreseen);
    slu_json_whole(object, "flash_bytes", phase->flash_bytes);
    slu_json_whole(object, "unpacked_bytes", phase->unpacked_bytes);
    slu_json_whole(object, "dense_weight_bytes", phase->dense_bytes);
    slu_json_whole(object, "expert_weight_bytes", phase->expert_bytes);
    slu_json_whole(object, "dense_macs", phase->dense_macs);
    slu_json_whole(object, "expert_macs", phase->expert_macs);
    slu_json_real(object, "achieved_flash_gb_s",
                  phase->wall_ns ? (double)phase->flash_bytes / (double)phase->wall_ns : 0);
    slu_json_real(object, "bound_flash_s", bound->flash_s);
    slu_json_real(object, "bound_unpack_s", bound->unpack_s);
    slu_json_real(object, "bound_ram_s", bound->ram_s);
    slu_json_real(object, "bound_arithmetic_s", bound->arithmetic_s);
    return object;
}

/* The figures to compare by; those of decoding without a prefix. */
static void put_phase(json_t *object, const char *prefix, const struct slu_phase_stats *phase,
                      const struct slu_bound *bound)
{
    char key[64];
#define KEY(name) (snprintf(key, sizeof key, "%s%s", prefix, name), key)
    slu_json_real(object, KEY("covered_router_weight"),
                  phase->router_weight > 0 ? phase->covered_weight / phase->router_weight : 1);
    slu_json_real(object, KEY("experts_read_per_token"),
                  phase->n_tokens ? phase->experts_read / (double)phase->n_tokens : 0);
    slu_json_real(object, KEY("flash_bytes_per_token"), per_token(phase->flash_bytes, phase));
    slu_json_real(object, KEY("weight_bytes_per_token"),
                  per_token(phase->dense_bytes + phase->expert_bytes, phase));
    slu_json_real(object, KEY("cache_hit_rate"), hit_rate(phase));
    slu_json_real(object, KEY("bound_tok_s"), bound->token_s > 0 ? 1 / bound->token_s : 0);
    slu_json_text(object, KEY("bound_by"), bound->by, strlen(bound->by));
    slu_json_real(object, KEY("efficiency"), bound->efficiency);
#undef KEY
}

int slu_bench_print_json(const struct slu_bench *bench, struct slu_err *err)
{
    const struct slu_phase_stats *prefill = &bench->stats.phases[SLU_PHASE_PREFILL];
    const struct slu_phase_stats *decode = &bench->stats.phases[SLU_PHASE_DECODE];
    struct slu_probe probes[SLU_PHASES];
    phase_probes(bench, probes);
    const struct slu_probe *probe = &probes[SLU_PHASE_DECODE];
    struct slu_bound prefill_bound, decode_bound;
    slu_bound_of(prefill, &probes[SLU_PHASE_PREFILL], &prefill_bound);
    slu_bound_of(decode, probe, &decode_bound);
    json_t *object = json_object();
    const char *model = base_name(bench->model);
    slu_json_text(object, "model", model, strlen(model));
    slu_json_text(object, "name", bench->info.name, strlen(bench->info.name));
    slu_json_text(object, "architecture", bench->info.architecture,
                  strlen(bench->info.architecture));
    char routing[300] = "router";
    if (bench->trace) {
        snprintf(routing, sizeof routing, "trace %s", base_name(bench->trace));
    }
    slu_json_text(object, "routing", routing, strlen(routing));
    if (bench->trace) {
        slu_json_real(object, "route_guess", round(1e6 * (double)bench->guess_share) / 1e6);
    }
    const char *route = slu_cli_routing_name(bench->plan.routing);
    slu_json_text(object, "route", route, strlen(route));
    slu_json_whole(object, "set_experts", bench->plan.set_experts);
    slu_json_bool(object, "warm", bench->is_warm);
    slu_json_whole(object, "n_prompt", prefill->n_tokens);
    slu_json_whole(object, "n_generated", decode->n_tokens);
    slu_json_real(object, "first_token_s", bench->result.prefill_s);
    slu_json_real(object, "prefill_tok_s", token_rate(prefill));
    slu_json_real(object, "decode_tok_s", token_rate(decode));
    put_phase(object, "", decode, &decode_bound);
    put_phase(object, "prefill_", prefill, &prefill_bound);
    slu_json_real(object, "flash_gb_s", 1e-9 * probe->flash_bytes_s);
    slu_json_real(object, "ram_gb_s", 1e-9 * probe->ram_bytes_s);
    slu_json_real(object, "prefill_ram_gb_s", 1e-9 * probes[SLU_PHASE_PREFILL].ram_bytes_s);
    slu_json_real(object, "int8_gmac_s", 1e-9 * probe->macs_s);
    slu_json_real(object, "unpack_gb_s", 1e-9 * probe->unpack_bytes_s);
    slu_json_whole(object, "flash_depth", probe->flash_depth);
    slu_json_whole(object, "flash_read_bytes", probe->flash_read_bytes);
    slu_json_whole(object, "peak_ledger_bytes", bench->stats.ledger_peak_bytes);
    slu_json_whole(object, "ram_bytes", bench->stats.ledger_limit_bytes);
    slu_json_whole(object, "n_slots", bench->plan.n_slots);
    slu_json_whole(object, "n_slots_now", bench->stats.n_slots);
    slu_json_whole(object, "n_blocks", bench->plan.n_blocks);
    slu_json_whole(object, "token_blocks", bench->plan.token_blocks);
    slu_json_whole(object, "slot_bytes", bench->plan.slot_bytes);
    slu_json_whole(object, "small_slot_bytes", bench->plan.small_slot_bytes);
    slu_json_whole(object, "ctx", bench->plan.ctx);
    slu_json_whole(object, "chunk_tokens", bench->plan.chunk_tokens);
    slu_json_whole(object, "long_chunk_tokens", bench->plan.long_chunk_tokens);
    slu_json_whole(object, "threads", bench->plan.n_threads);
    const char *kv = slu_cli_kv_name(bench->plan.kv);
    slu_json_text(object, "kv", kv, strlen(kv));
    slu_json_text(object, "io", bench->stats.io_backend, strlen(bench->stats.io_backend));
    slu_json_bool(object, "io_direct", bench->stats.io_direct);
    slu_json_text(object, "kernels", bench->stats.kernels, strlen(bench->stats.kernels));
    slu_json_whole(object, "major_faults", bench->major_faults);
    if (bench->readahead_kib >= 0) {
        slu_json_whole(object, "readahead_kib", (uint64_t)bench->readahead_kib);
    }
    json_object_set_new(object, "prefill", phase_json(prefill, &prefill_bound));
    json_object_set_new(object, "decode", phase_json(decode, &decode_bound));
    return slu_json_print(object, err);
}
