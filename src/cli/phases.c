/* Where the time of prefill and of decoding went, and what bounds them, in lines for a person. */
#include <stdio.h>

#include "cli/cli.h"

static const char *const names[SLU_PHASES] = {
    [SLU_PHASE_PREFILL] = "prefill", [SLU_PHASE_DECODE] = "decode"};

/* Milliseconds a token that threads spent, their mean. */
struct thread_means {
    double stall, unpack, product;
};

static struct thread_means means_of(const struct slu_phase_stats *phase, double per)
{
    struct thread_means means = {0};
    for (uint32_t i = 0; i < phase->n_threads; i++) {
        means.stall += per * (double)phase->threads[i].stall_ns / phase->n_threads;
        means.unpack += per * (double)phase->threads[i].unpack_ns / phase->n_threads;
        means.product += per * (double)phase->threads[i].product_ns / phase->n_threads;
    }
    return means;
}

static void print_parts(FILE *out, const struct slu_phase_stats *phase)
{
    double per = 1e-6 / (double)phase->n_tokens, experts = per * (double)phase->experts_ns;
    struct thread_means t = means_of(phase, per);
    fprintf(out,
            "           %.2f ms a token: experts %.2f (stall %.2f, unpack %.2f, product %.2f, ",
            per * (double)phase->wall_ns, experts, t.stall, t.unpack, t.product);
    fprintf(out, "idle %.2f),\n           dense %.2f, attention %.2f, head %.2f, embedding %.2f, ",
            experts - t.stall - t.unpack - t.product, per * (double)phase->dense_ns,
            per * (double)phase->attention_ns, per * (double)phase->head_ns,
            per * (double)phase->embed_ns);
    fprintf(out, "other %.2f\n", per * (double)phase->other_ns);
}

static void print_reads(FILE *out, const struct slu_phase_stats *phase)
{
    double wall_s = 1e-9 * (double)phase->wall_ns;
    uint64_t n_blocks = phase->hits + phase->misses;
    fprintf(out, "           %s a token from flash, at %.2f GB/s; %.1f %% of blocks in the cache;",
            slu_cli_size(phase->flash_bytes / phase->n_tokens).text,
            wall_s > 0 ? 1e-9 * (double)phase->flash_bytes / wall_s : 0,
            n_blocks ? 100 * (double)phase->hits / (double)n_blocks : 0);
    if (phase->guesses) {
        fprintf(out, "\n           %.1f blocks a token read ahead, %.0f %% of them rightly;",
                (double)phase->guesses / (double)phase->n_tokens,
                100 * (double)phase->foreseen / (double)phase->guesses);
    }
    if (phase->covered_weight < phase->router_weight) {
        fprintf(out,
                "\n           %.1f %% of the router's weight covered, %.1f experts read a token;",
                100 * phase->covered_weight / phase->router_weight,
                phase->experts_read / (double)phase->n_tokens);
    }
    fprintf(out, " %s of weights\n",
            slu_cli_size((phase->dense_bytes + phase->expert_bytes) / phase->n_tokens).text);
}

static void print_bound(FILE *out, const struct slu_phase_stats *phase,
                        const struct slu_probe *probe)
{
    struct slu_bound bound;
    slu_bound_of(phase, probe, &bound);
    fprintf(
        out,
        "           bound by %s: %.2f ms, %.0f %% of the time it took (flash %.2f, unpack %.2f, "
        "RAM %.2f, arithmetic %.2f)\n",
        bound.by, 1e3 * bound.token_s, 100 * bound.efficiency, 1e3 * bound.flash_s,
        1e3 * bound.unpack_s, 1e3 * bound.ram_s, 1e3 * bound.arithmetic_s);
}

void slu_cli_phases_print(FILE *out, const struct slu_engine_stats *stats,
                          const struct slu_probe probes[SLU_PHASES])
{
    for (int i = 0; i < SLU_PHASES; i++) {
        const struct slu_phase_stats *phase = &stats->phases[i];
        if (phase->n_tokens == 0 || phase->wall_ns == 0) {
            continue;
        }
        fprintf(out, "%-10s %llu tokens, %.2f tokens/s\n", names[i],
                (unsigned long long)phase->n_tokens,
                1e9 * (double)phase->n_tokens / (double)phase->wall_ns);
        print_parts(out, phase);
        print_reads(out, phase);
        if (probes) {
            print_bound(out, phase, &probes[i]);
        }
    }
}

void slu_cli_probe_print(FILE *out, const struct slu_probe *probe)
{
    fprintf(out, "machine    flash %.2f GB/s (%u reads of %s in flight), RAM %.1f GB/s",
            1e-9 * probe->flash_bytes_s, probe->flash_depth,
            slu_cli_size(probe->flash_read_bytes).text, 1e-9 * probe->ram_bytes_s);
    if (probe->macs_s > 0) {
        fprintf(out, ", %.0f G multiply-adds/s", 1e-9 * probe->macs_s);
    }
    if (probe->unpack_bytes_s > 0) {
        fprintf(out, ", unpacking %.2f GB/s", 1e-9 * probe->unpack_bytes_s);
    }
    fputc('\n', out);
}

void slu_cli_phases_probe(const char *model, const struct slu_engine_params *params,
                          const struct slu_engine_stats *stats)
{
    struct slu_probe probe = {0};
    bool has_probe = slu_probe_run(model, params, &probe, NULL) == 0;
    if (has_probe) {
        slu_cli_probe_print(stderr, &probe);
    }
    const struct slu_probe probes[SLU_PHASES] = {probe, probe};
    slu_cli_phases_print(stderr, stats, has_probe ? probes : NULL);
}
