/* Packing models that are good: every weight must come through bit for bit. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "compare.h"
#include "scratch.h"
#include "io/pack.h"
#include "tools/packer.h"
#include "tools/synth.h"

static struct slu_packer_report pack(const char *in, const char *out, enum slu_codec_id codec,
                                     uint32_t block_bytes)
{
    struct slu_packer_params params = {
        .in = in,
        .out = out,
        .codec = codec,
        .block_bytes = block_bytes,
    };
    struct slu_packer_report report;
    struct slu_err err = {0};
    cr_assert_eq(slu_packer_run(&params, &report, &err), 0, "%s: %s", in, err.text);
    return report;
}

/* Generates, packs and compares. */
static void check(const struct slu_synth_params *params, enum slu_codec_id codec,
                  uint32_t block_bytes)
{
    struct scratch scratch;
    struct slu_err err = {0};
    scratch_init(&scratch);
    const char *gguf = scratch_path(&scratch, "model.gguf");
    const char *slu = scratch_path(&scratch, "model.slu");
    cr_assert_eq(slu_synth_write(gguf, params, &err), 0, "%s", err.text);
    struct slu_packer_report report = pack(gguf, slu, codec, block_bytes);
    compare_pack(slu, &gguf, 1);
    cr_assert_eq(scratch_count(&scratch), 2);
    size_t bytes;
    free(scratch_read(slu, &bytes));
    cr_assert_eq(report.out_bytes, bytes);
    cr_assert_gt(report.n_blocks, 0);
    cr_assert_leq(report.expert_stored_bytes, report.expert_raw_bytes);
    if (codec == SLU_CODEC_RAW) {
        cr_assert_eq(report.n_blocks_compressed, 0);
    }
    scratch_finish(&scratch);
}

/* Each architecture packs whole, raw and compressed, with its variants of tensors. */
Test(packer, architectures)
{
    static const struct slu_synth_params models[] = {
        {.arch = SLU_ARCH_GPT_OSS, .expert_type = "MXFP4"},
        {.arch = SLU_ARCH_QWEN3MOE},
        {.arch = SLU_ARCH_OLMOE},
        {.arch = SLU_ARCH_LLAMA},
        {.arch = SLU_ARCH_LLAMA, .has_expert_tensors = true},
        {.arch = SLU_ARCH_QWEN2MOE},
        {.arch = SLU_ARCH_GRANITEMOE, .is_tied = true},
        {.arch = SLU_ARCH_DEEPSEEK2},
        {.arch = SLU_ARCH_DEEPSEEK2, .is_lite = true, .has_split_kv_b = true},
    };
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        struct slu_synth_params params = models[i];
        params.seed = i;
        check(&params, SLU_CODEC_RAW, 0);
        check(&params, SLU_CODEC_ZSTD, 8192);
    }
}

/* Each weight type packs, in experts and elsewhere, in one block and in several. */
Test(packer, types)
{
    static const char *const types[] = {"F32",  "F16",  "BF16", "Q8_0", "Q4_0",   "Q4_1", "Q5_0",
                                        "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        struct slu_synth_params params = {
            .arch = SLU_ARCH_GPT_OSS,
            .n_layers = 1,
            .n_embd = 256,
            .n_ff = 512,
            .n_experts = 3,
            .expert_type = types[i],
            .dense_type = types[i],
            .seed = i,
        };
        check(&params, SLU_CODEC_RAW, 64 << 10);
        params.down_type = types[(i + 5) % (sizeof types / sizeof *types)];
        check(&params, SLU_CODEC_ZSTD, 0);
    }
}

/* Norms and biases of 16 bits become the same numbers in F32. */
Test(packer, half_vectors)
{
    struct slu_synth_params params = {.arch = SLU_ARCH_GPT_OSS, .vector_type = "F16"};
    check(&params, SLU_CODEC_RAW, 0);
    params.vector_type = "BF16";
    check(&params, SLU_CODEC_ZSTD, 0);
}

/* Matrices larger than a piece are cut where planes and rows are not. */
Test(packer, matrices_in_pieces)
{
    struct slu_synth_params params = {
        .arch = SLU_ARCH_QWEN3MOE,
        .n_layers = 1,
        .n_embd = 608,
        .n_ff = 32,
        .n_vocab = 20011,
        .is_tied = true,
        .dense_type = "Q5_1",
    };
    check(&params, SLU_CODEC_ZSTD, 0);
}

/* The same model and the same options give the same pack. */
Test(packer, deterministic)
{
    struct scratch scratch;
    struct slu_err err;
    scratch_init(&scratch);
    const char *gguf = scratch_path(&scratch, "model.gguf");
    const char *a = scratch_path(&scratch, "a.slu"), *b = scratch_path(&scratch, "b.slu");
    cr_assert_eq(slu_synth_write(gguf, &(struct slu_synth_params){.seed = 5}, &err), 0);
    pack(gguf, a, SLU_CODEC_ZSTD, 0);
    pack(gguf, b, SLU_CODEC_ZSTD, 0);
    size_t a_bytes, b_bytes;
    uint8_t *a_data = scratch_read(a, &a_bytes), *b_data = scratch_read(b, &b_bytes);
    cr_assert_eq(a_bytes, b_bytes);
    cr_assert_arr_eq(a_data, b_data, a_bytes);
    free(a_data);
    free(b_data);
    scratch_finish(&scratch);
}

struct progress {
    uint64_t last, total;
    unsigned n;
};

static void note_progress(void *arg, uint64_t done_bytes, uint64_t total_bytes)
{
    struct progress *progress = arg;
    cr_assert_geq(done_bytes, progress->last);
    cr_assert_leq(done_bytes, total_bytes);
    progress->last = done_bytes;
    progress->total = total_bytes;
    progress->n++;
}

/* Progress only grows, and ends at the whole. */
Test(packer, progress)
{
    struct scratch scratch;
    struct slu_err err;
    scratch_init(&scratch);
    const char *gguf = scratch_path(&scratch, "model.gguf");
    cr_assert_eq(slu_synth_write(gguf, &(struct slu_synth_params){.arch = SLU_ARCH_GPT_OSS}, &err),
                 0);
    struct progress progress = {0};
    struct slu_packer_params params = {
        .in = gguf,
        .out = scratch_path(&scratch, "model.slu"),
        .progress = note_progress,
        .arg = &progress,
    };
    cr_assert_eq(slu_packer_run(&params, NULL, &err), 0, "%s", err.text);
    cr_assert_gt(progress.n, 10);
    cr_assert_eq(progress.last, progress.total);
    scratch_finish(&scratch);
}

/* Every golden model packs whole. */
Test(packer, golden, .timeout = 600)
{
    char folder[512];
    const char *data = getenv("SLUICE_DATA");
    if (data) {
        snprintf(folder, sizeof folder, "%s/golden/models", data);
    } else {
        snprintf(folder, sizeof folder, "%s/%s/golden/models", SLU_TEST_SOURCE_ROOT, SLU_TEST_DATA);
    }
    DIR *models = opendir(folder);
    if (!models) {
        fprintf(stderr, "skipped: no golden models in %s\n", folder);
        cr_skip_test("no golden models");
    }
    struct scratch scratch;
    scratch_init(&scratch);
    unsigned n = 0;
    for (struct dirent *entry; (entry = readdir(models));) {
        char path[1024];
        if (!strstr(entry->d_name, ".gguf")) {
            continue;
        }
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        const char *in = path, *out = scratch_path(&scratch, "model.slu");
        pack(path, out, n % 2 ? SLU_CODEC_RAW : SLU_CODEC_ZSTD, n % 3 ? 16 << 10 : 0);
        compare_pack(out, &in, 1);
        n++;
    }
    closedir(models);
    cr_assert_gt(n, 0);
    scratch_finish(&scratch);
}
