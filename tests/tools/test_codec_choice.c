/* Which blocks an automatic codec compresses. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/pack.h"
#include "scratch.h"
#include "tools/codec_choice.h"
#include "tools/inspect.h"
#include "tools/packer.h"
#include "tools/synth.h"

/* Two cores that decode 1.2 GB/s and multiply 6 GB/s each, blocks that shrink to 86 %. */
static struct slu_codec_costs costs_at(double mbps)
{
    return (struct slu_codec_costs){.flash_bytes_s = 1e6 * mbps,
                                    .unpack_bytes_s = 1.2e9,
                                    .multiply_bytes_s = 6e9,
                                    .ratio = 0.86,
                                    .cores = 2,
                                    .layer_bytes = 96 << 20};
}

/* Slow flash takes all blocks compressed, faster flash ever fewer, and the fastest none. */
Test(codec_choice, falls_with_flash)
{
    cr_assert_eq(slu_codec_choose(&(struct slu_codec_costs){.cores = 1, .layer_bytes = 1}).share,
                 0);
    struct slu_codec_costs slow = costs_at(100), mid = costs_at(400), fast = costs_at(1400);
    cr_assert_eq(slu_codec_choose(&slow).share, 1);
    cr_assert_eq(slu_codec_choose(&slow).reason, SLU_CODEC_FLASH);
    cr_assert_eq(slu_codec_choose(&mid).share, 1);
    struct slu_codec_choice some = slu_codec_choose(&fast);
    cr_assert(some.share > 0 && some.share < 1, "%g", some.share);
    cr_assert_eq(some.reason, SLU_CODEC_BALANCE);
    double last = 1;
    for (double mbps = 50; mbps < 20000; mbps *= 1.1) {
        struct slu_codec_costs costs = costs_at(mbps);
        double share = slu_codec_choose(&costs).share;
        cr_assert_leq(share, last, "%g at %g MB/s", share, mbps);
        last = share;
    }
    cr_assert_eq(last, 0);
}

/* At any rate the choice is by its own account no slower than raw and than all compressed, and no
 * more than 3 % slower than any share in between; where it mixes, that gains more than 3 %. */
Test(codec_choice, is_the_best)
{
    static const double unpacks[] = {0.3e9, 1.2e9, 5e9};
    unsigned n_mixed = 0;
    for (double mbps = 100; mbps < 4000; mbps *= 1.2) {
        for (size_t u = 0; u < sizeof unpacks / sizeof *unpacks; u++) {
            struct slu_codec_costs costs = costs_at(mbps);
            costs.unpack_bytes_s = unpacks[u];
            struct slu_codec_choice choice = slu_codec_choose(&costs);
            double end = fmin(choice.raw_s, choice.zstd_s);
            cr_assert_leq(choice.chosen_s, end);
            for (double x = 0; x <= 1; x += 1.0 / 64) {
                double unpack = x / costs.unpack_bytes_s;
                double flash = (1 - 0.14 * x) / costs.flash_bytes_s;
                double cpu = (unpack + 1 / costs.multiply_bytes_s) / 2;
                double time = pow(pow(flash, 3) + pow(cpu, 3), 1.0 / 3) + unpack / 2 / 24;
                cr_assert_leq(0.97 * choice.chosen_s, time, "%g MB/s, x = %g", mbps, x);
                if (fabs(x - choice.share) < 1e-9) {
                    cr_assert_float_eq(choice.chosen_s, time, 1e-6 * time);
                }
            }
            if (choice.share > 0 && choice.share < 1) {
                cr_assert_eq(choice.reason, SLU_CODEC_BALANCE);
                cr_assert_lt(choice.chosen_s, 0.97 * end);
                n_mixed++;
            }
        }
    }
    cr_assert_gt(n_mixed, 0);
}

/* What was measured: with flash of 2000 MB/s all raw was the fastest of raw, all compressed and 96
 * % compressed, with 800 all compressed. */
Test(codec_choice, as_measured)
{
    struct slu_codec_costs costs = {.flash_bytes_s = 2e9,
                                    .unpack_bytes_s = 1.311e9,
                                    .multiply_bytes_s = 7.659e9,
                                    .ratio = 0.854,
                                    .cores = 2,
                                    .layer_bytes = 96 << 20};
    cr_assert_eq(slu_codec_choose(&costs).share, 0);
    costs.flash_bytes_s = 8e8;
    cr_assert_eq(slu_codec_choose(&costs).share, 1);
}

/* More cores allow for more compressed blocks; blocks that don't shrink are left raw. */
Test(codec_choice, cores_and_gain)
{
    struct slu_codec_costs two = costs_at(1400), eight = two, none = costs_at(10);
    eight.cores = 8;
    cr_assert_gt(slu_codec_choose(&eight).share, slu_codec_choose(&two).share);
    none.ratio = 1;
    cr_assert_eq(slu_codec_choose(&none).share, 0);
    cr_assert_eq(slu_codec_choose(&none).reason, SLU_CODEC_NO_GAIN);
}

/* A share of blocks is spread evenly: over any stretch of a layer, and over experts across layers.
 */
Test(codec_choice, spreads)
{
    enum { LAYERS = 40, BLOCKS = 64 };
    static const double shares[] = {0.03, 0.25, 0.5, 0.77, 0.999};
    for (size_t s = 0; s < sizeof shares / sizeof *shares; s++) {
        unsigned by_block[BLOCKS] = {0};
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            unsigned n = 0;
            for (uint64_t i = 0; i < BLOCKS; i++) {
                bool is_taken = slu_codec_takes(shares[s], layer, i);
                n += is_taken;
                by_block[i] += is_taken;
                cr_assert_lt(fabs(n - shares[s] * (double)(i + 1)), 1.000001);
            }
        }
        for (int i = 0; i < BLOCKS; i++) {
            cr_assert_lt(fabs(by_block[i] - shares[s] * LAYERS), 3, "block %d: %u", i, by_block[i]);
        }
    }
    for (uint64_t i = 0; i < 100; i++) {
        cr_assert(slu_codec_takes(1, (uint32_t)i, i) && !slu_codec_takes(0, (uint32_t)i, i));
    }
}

static void pack(const char *in, const char *out, struct slu_packer_params params,
                 struct slu_packer_report *ret_report)
{
    struct slu_err err = {0};
    params.in = in;
    params.out = out;
    params.block_bytes = 4 << 10;
    cr_assert_eq(slu_packer_run(&params, ret_report, &err), 0, "%s", err.text);
}

/* Extents but for where they lie. */
static void check_same_extents(const char *a_path, const char *b_path)
{
    struct slu_pack *a, *b;
    struct slu_err err = {0};
    cr_assert_eq(slu_pack_open_file(a_path, &a, &err), 0, "%s", err.text);
    cr_assert_eq(slu_pack_open_file(b_path, &b, &err), 0, "%s", err.text);
    cr_assert_eq(a->header.n_extents, b->header.n_extents);
    for (uint32_t i = 0; i < a->header.n_extents; i++) {
        cr_assert_eq(a->extents[i].codec, b->extents[i].codec);
        cr_assert_eq(a->extents[i].checksum, b->extents[i].checksum);
    }
    slu_pack_close(a);
    slu_pack_close(b);
}

/* For next to no flash a pack is the compressed one, for more than any flash gives the raw one, but
 * for the keys that say so; kept formats and quantized ones alike. */
Test(codec_choice, ends_are_zstd_and_raw)
{
    static const struct slu_packer_quant quants[] = {{0}, {.bits = 4}};
    struct scratch scratch;
    struct slu_err err = {0};
    scratch_init(&scratch);
    const char *gguf = scratch_path(&scratch, "m.gguf"), *plain = scratch_path(&scratch, "p.slu"),
               *made = scratch_path(&scratch, "a.slu");
    struct slu_synth_params synth = {.arch = SLU_ARCH_QWEN3MOE,
                                     .n_layers = 2,
                                     .n_experts = 4,
                                     .n_embd = 32,
                                     .n_ff = 64,
                                     .n_heads = 2,
                                     .n_heads_kv = 1,
                                     .head_dim = 32,
                                     .expert_type = "F16"};
    cr_assert_eq(slu_synth_write(gguf, &synth, &err), 0, "%s", err.text);
    for (size_t q = 0; q < 2; q++) {
        for (int is_fast = 0; is_fast < 2; is_fast++) {
            struct slu_packer_params params = {.experts = quants[q],
                                               .codec = is_fast ? SLU_CODEC_RAW : SLU_CODEC_ZSTD};
            struct slu_packer_report report, plain_report;
            pack(gguf, plain, params, &plain_report);
            params.automatic = (struct slu_packer_auto){
                .is_on = true, .flash_bytes_s = is_fast ? 1e13 : 1e4, .cores = 2};
            pack(gguf, made, params, &report);
            check_same_extents(plain, made);
            cr_assert_eq(report.codec.choice.share, is_fast ? 0 : 1);
            cr_assert_eq(report.n_blocks_compressed, plain_report.n_blocks_compressed);
            cr_assert_eq(report.n_blocks_compressed > 0, !is_fast);
            cr_assert_not(report.codec.is_flash_measured);
            struct slu_inspect inspect;
            cr_assert_eq(slu_inspect_file(made, &inspect, &err), 0, "%s", err.text);
            cr_assert(inspect.codec.is_auto);
            cr_assert_eq(inspect.codec.share, report.codec.choice.share);
            cr_assert_eq(inspect.codec.cores, 2);
            cr_assert_float_eq(inspect.codec.flash_mbps, is_fast ? 1e7 : 1e-2, 1);
            cr_assert_str_eq(inspect.codec.reason,
                             slu_codec_reason_text(report.codec.choice.reason));
            slu_inspect_finish(&inspect);
            cr_assert_eq(slu_inspect_file(plain, &inspect, &err), 0, "%s", err.text);
            cr_assert_not(inspect.codec.is_auto);
            slu_inspect_finish(&inspect);
        }
    }
    scratch_finish(&scratch);
}

/* With neither rate nor cores given, both are found, and nothing but the pack is left behind. */
Test(codec_choice, measures)
{
    struct scratch scratch;
    struct slu_err err = {0};
    struct slu_packer_report report;
    scratch_init(&scratch);
    const char *gguf = scratch_path(&scratch, "m.gguf"), *slu = scratch_path(&scratch, "m.slu");
    cr_assert_eq(slu_synth_write(gguf, &(struct slu_synth_params){.seed = 4}, &err), 0, "%s",
                 err.text);
    pack(gguf, slu, (struct slu_packer_params){.automatic = {.is_on = true}}, &report);
    cr_assert(report.codec.is_flash_measured);
    cr_assert_gt(report.codec.costs.flash_bytes_s, 0);
    cr_assert_gt(report.codec.costs.multiply_bytes_s, 0);
    cr_assert_geq(report.codec.costs.cores, 1);
    cr_assert_eq(scratch_count(&scratch), 2);
    scratch_finish(&scratch);
}
