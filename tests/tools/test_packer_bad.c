/* Packing what can't be packed: one sentence that names the file and the place, and nothing left
 * behind. */
#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "compare.h"
#include "rewrite.h"
#include "scratch.h"
#include "io/pack.h"
#include "tools/packer.h"
#include "tools/synth.h"

/* A small model, and the names used with it. */
struct fixture {
    struct scratch scratch;
    char good[128], bad[128], out[128];
};

static void begin(struct fixture *f, const struct slu_synth_params *params)
{
    struct slu_err err = {0};
    scratch_init(&f->scratch);
    snprintf(f->good, sizeof f->good, "%s", scratch_path(&f->scratch, "good.gguf"));
    snprintf(f->bad, sizeof f->bad, "%s", scratch_path(&f->scratch, "bad.gguf"));
    snprintf(f->out, sizeof f->out, "%s", scratch_path(&f->scratch, "out.slu"));
    cr_assert_eq(slu_synth_write(f->good, params, &err), 0, "%s", err.text);
}

static int pack(const char *in, const char *out, struct slu_err *err)
{
    *err = (struct slu_err){0};
    return slu_packer_run(&(struct slu_packer_params){.in = in, .out = out}, NULL, err);
}

/* The sentence names the file and has `words`; no file was added to the folder. */
static void refused(struct fixture *f, const char *in, const char *file, int code,
                    const char *words)
{
    size_t n_files = scratch_count(&f->scratch);
    struct slu_err err;
    int got = pack(in, f->out, &err);
    cr_assert_eq(got, code, "%d: %s", got, err.text);
    cr_assert_eq(err.code, code);
    cr_assert(strstr(err.text, file), "'%s' lacks '%s'", err.text, file);
    cr_assert(strstr(err.text, words), "'%s' lacks '%s'", err.text, words);
    cr_assert_null(strchr(err.text, '\n'));
    cr_assert_eq(scratch_count(&f->scratch), n_files);
}

/* Tensors missing, of another type or shape, or unknown are refused by name. */
Test(packer_bad, tensors)
{
    static const struct {
        struct rewrite change;
        int code;
        const char *words;
    } cases[] = {
        {{.drop = "token_embd.weight"}, SLU_ENOENT, "'token_embd.weight' is missing"},
        {{.drop = "output_norm.weight"}, SLU_ENOENT, "'output_norm.weight' is missing"},
        {{.drop = "blk.1.attn_q.weight"}, SLU_ENOENT, "'blk.1.attn_q.weight' is missing"},
        {{.drop = "blk.2.attn_sinks.weight"}, SLU_ENOENT, "'blk.2.attn_sinks.weight' is missing"},
        {{.drop = "blk.0.ffn_up_exps.weight"}, SLU_ENOENT, "'blk.0.ffn_up_exps.weight' is missing"},
        {{.drop = "blk.0.ffn_down_exps.bias"}, SLU_ENOENT, "'blk.0.ffn_down_exps.bias' is missing"},
        {{.retype = "blk.0.attn_q.weight", .type = 16}, SLU_EUNSUP, "'blk.0.attn_q.weight'"},
        {{.retype = "blk.0.attn_q.weight", .type = 24}, SLU_EUNSUP, "type I8"},
        {{.retype = "blk.2.ffn_gate_exps.weight", .type = 10}, SLU_EUNSUP, "type Q2_K"},
        {{.retype = "blk.1.attn_norm.weight", .type = 8}, SLU_EUNSUP, "'blk.1.attn_norm.weight'"},
        {{.transpose = "blk.1.attn_k.weight"}, SLU_EFORMAT, "'blk.1.attn_k.weight'"},
        {{.transpose = "blk.1.ffn_up_exps.weight"}, SLU_EFORMAT, "[512, 256, 8]"},
        {{.transpose = "blk.1.attn_norm.weight"}, SLU_EFORMAT, "'blk.1.attn_norm.weight'"},
        {{.add = "blk.0.attn_qkv.weight"}, SLU_EUNSUP, "'blk.0.attn_qkv.weight'"},
        {{.add = "rope_freqs.weight"}, SLU_EUNSUP, "'rope_freqs.weight'"},
        {{.add = "rope_factors_long.weight"}, SLU_EUNSUP, "'rope_factors_long.weight'"},
        {{.rename = "blk.0.ffn_gate_exps.weight", .to = "blk.0.ffn_gate_up_exps.weight"},
         SLU_EUNSUP,
         "fused"},
        {{.rename = "output.weight", .to = "\033[31moutput.weight"}, SLU_EUNSUP, "output.weight"},
    };
    struct fixture f;
    begin(&f, &(struct slu_synth_params){
                  .arch = SLU_ARCH_GPT_OSS, .n_embd = 256, .n_ff = 512, .dense_type = "F16"});
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rewrite_gguf(f.good, f.bad, &cases[i].change);
        refused(&f, f.bad, f.bad, cases[i].code, cases[i].words);
    }
    scratch_finish(&f.scratch);
}

/* Of MLA's tensors with two forms, one form must be there whole. */
Test(packer_bad, mla_forms)
{
    static const char *const dropped[] = {"blk.1.attn_k_b.weight", "blk.1.attn_v_b.weight",
                                          "blk.0.attn_q_b.weight", "blk.2.attn_q_a_norm.weight"};
    struct fixture f;
    begin(&f, &(struct slu_synth_params){.arch = SLU_ARCH_DEEPSEEK2, .has_split_kv_b = true});
    for (size_t i = 0; i < sizeof dropped / sizeof *dropped; i++) {
        rewrite_gguf(f.good, f.bad, &(struct rewrite){.drop = dropped[i]});
        refused(&f, f.bad, f.bad, SLU_ENOENT, dropped[i]);
    }
    scratch_finish(&f.scratch);
}

/* Old files with a tensor for each expert: one missing, or of another type than the rest. */
Test(packer_bad, expert_tensors)
{
    struct fixture f;
    begin(&f, &(struct slu_synth_params){.arch = SLU_ARCH_LLAMA, .has_expert_tensors = true});
    rewrite_gguf(f.good, f.bad, &(struct rewrite){.drop = "blk.1.ffn_up.5.weight"});
    refused(&f, f.bad, f.bad, SLU_ENOENT, "'blk.1.ffn_up.5.weight' is missing");
    rewrite_gguf(f.good, f.bad, &(struct rewrite){.retype = "blk.1.ffn_up.5.weight", .type = 8});
    refused(&f, f.bad, f.bad, SLU_EUNSUP, "'blk.1.ffn_up.5.weight' is Q8_0");
    scratch_finish(&f.scratch);
}

/* A key that says how the pack was made can't come from the model. */
Test(packer_bad, keys_of_packs)
{
    static const char key[] = "general.name", own[] = "sluice..name";
    struct fixture f;
    begin(&f, &(struct slu_synth_params){.arch = SLU_ARCH_QWEN3MOE});
    size_t bytes, at = 0;
    uint8_t *data = scratch_read(f.good, &bytes);
    while (at + sizeof key <= bytes && memcmp(data + at, key, sizeof key - 1)) {
        at++;
    }
    cr_assert_lt(at + sizeof key, bytes);
    memcpy(data + at, own, sizeof own - 1);
    scratch_write(f.bad, data, bytes);
    free(data);
    refused(&f, f.bad, f.bad, SLU_EFORMAT, "'sluice.'");
    scratch_finish(&f.scratch);
}

/* Bytes changed in the header: each is refused, naming the file. */
Test(packer_bad, header_bytes)
{
    static const struct {
        size_t offset;
        uint8_t value;
        int code;
        const char *words;
    } cases[] = {
        {0, 'X', SLU_EFORMAT, "GGUF"},
        {4, 2, SLU_EUNSUP, "version 2"},
        {4, 4, SLU_EUNSUP, "version 4"},
        {15, 0x7f, SLU_EFORMAT, "tensors"},
        {23, 0x7f, SLU_EFORMAT, ""},
        {31, 0x7f, SLU_EFORMAT, ""},
        {24 + 8, 'x', SLU_EFORMAT, "general.architecture"},
    };
    struct fixture f;
    begin(&f, &(struct slu_synth_params){.arch = SLU_ARCH_QWEN3MOE});
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t bytes;
        uint8_t *data = scratch_read(f.good, &bytes);
        data[cases[i].offset] = cases[i].value;
        scratch_write(f.bad, data, bytes);
        free(data);
        refused(&f, f.bad, f.bad, cases[i].code, cases[i].words);
    }
    scratch_finish(&f.scratch);
}

/* A file cut anywhere is refused, naming the file, and leaves nothing. */
Test(packer_bad, truncated)
{
    struct fixture f;
    begin(&f, &(struct slu_synth_params){.n_layers = 1, .n_experts = 2});
    size_t bytes;
    uint8_t *data = scratch_read(f.good, &bytes);
    for (size_t n = 0; n < bytes; n += n < 200 ? 7 : 1009) {
        scratch_write(f.bad, data, n);
        refused(&f, f.bad, f.bad, SLU_EFORMAT, "");
    }
    scratch_write(f.bad, data, bytes - 32);
    refused(&f, f.bad, f.bad, SLU_EFORMAT, "");
    free(data);
    scratch_finish(&f.scratch);
}

/* Any byte of the header overwritten: packed or refused, but never a crash or a file left over. */
Test(packer_bad, noise, .timeout = 300)
{
    struct fixture f;
    begin(&f, &(struct slu_synth_params){
                  .arch = SLU_ARCH_DEEPSEEK2, .n_layers = 2, .n_experts = 2, .n_vocab = 330});
    size_t bytes;
    uint8_t *data = scratch_read(f.good, &bytes);
    uint64_t state = 1;
    unsigned n_refused = 0;
    for (unsigned i = 0; i < 600; i++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        size_t at = (size_t)(state >> 33) % 11000;
        uint8_t was = data[at];
        data[at] = i % 3 == 0 ? 0xff : i % 3 == 1 ? 0 : (uint8_t)(state >> 20);
        scratch_write(f.bad, data, bytes);
        data[at] = was;
        struct slu_err err;
        int code = pack(f.bad, f.out, &err);
        if (code < 0) {
            cr_assert(strstr(err.text, f.bad), "%s", err.text);
            cr_assert_eq(scratch_count(&f.scratch), 2);
            n_refused++;
        } else {
            unlink(f.out);
        }
    }
    cr_assert_gt(n_refused, 100);
    free(data);
    scratch_finish(&f.scratch);
}

/* ---- split sets --------------------------------------------------------------------------- */

static void write_split(struct fixture *f, uint32_t n_parts, const struct rewrite *odd)
{
    for (uint32_t i = 0; i < n_parts; i++) {
        char name[64];
        struct rewrite change = odd && odd->part == i ? *odd : (struct rewrite){0};
        change.part = i;
        change.n_parts = n_parts;
        change.no_tensor_count = i > 0;
        snprintf(name, sizeof name, "set-%05u-of-%05u.gguf", i + 1, n_parts);
        rewrite_gguf(f->good, scratch_path(&f->scratch, name), &change);
    }
}

/* A set of files packs as one model would, from whichever part is named. */
Test(packer_bad, split_good)
{
    struct fixture f;
    begin(&f, &(struct slu_synth_params){.arch = SLU_ARCH_QWEN2MOE});
    write_split(&f, 3, NULL);
    char paths[3][128];
    const char *parts[3];
    for (unsigned i = 0; i < 3; i++) {
        char name[64];
        snprintf(name, sizeof name, "set-%05u-of-00003.gguf", i + 1);
        snprintf(paths[i], sizeof paths[i], "%s", scratch_path(&f.scratch, name));
        parts[i] = paths[i];
    }
    struct slu_err err;
    cr_assert_eq(pack(parts[0], f.out, &err), 0, "%s", err.text);
    compare_pack(f.out, parts, 3);
    cr_assert_eq(pack(parts[2], f.out, &err), 0, "%s", err.text);
    compare_pack(f.out, parts, 3);
    scratch_finish(&f.scratch);
}

/* Sets with a part missing, misnamed, of another set, or with tensors too many or too few. */
Test(packer_bad, split_bad)
{
    struct fixture f;
    begin(&f, &(struct slu_synth_params){.arch = SLU_ARCH_QWEN2MOE});
    const char *first = scratch_path(&f.scratch, "set-00001-of-00003.gguf");
    const char *second = scratch_path(&f.scratch, "set-00002-of-00003.gguf");

    write_split(&f, 3, NULL);
    unlink(second);
    refused(&f, first, second, SLU_ENOENT, "is missing");
    scratch_write(second, "GGUF", 4);
    refused(&f, first, second, SLU_EFORMAT, "");
    write_split(&f, 3, NULL);
    cr_assert_eq(rename(first, f.bad), 0);
    refused(&f, f.bad, f.bad, SLU_EINVAL, "-00001-of-00003.gguf");

    write_split(&f, 3, &(struct rewrite){.part = 1, .split_no_off = 1});
    refused(&f, first, second, SLU_EFORMAT, "part 2 of 3");
    write_split(&f, 3, &(struct rewrite){.part = 0, .tensor_count_off = 2});
    refused(&f, first, first, SLU_EFORMAT, "tensors");
    write_split(&f, 3, &(struct rewrite){.part = 1, .add = "token_embd.weight"});
    unlink(first);
    rewrite_gguf(f.good, first, &(struct rewrite){.n_parts = 3, .no_tensor_count = true});
    refused(&f, first, second, SLU_EFORMAT, "'token_embd.weight' is also in");
    scratch_finish(&f.scratch);
}

/* ---- files ------------------------------------------------------------------------------- */

/* No input, no folder for the output, the output a folder or the input itself. */
Test(packer_bad, paths)
{
    struct fixture f;
    struct slu_err err;
    begin(&f, &(struct slu_synth_params){0});
    refused(&f, f.bad, f.bad, SLU_ENOENT, "");
    cr_assert_eq(pack(f.good, scratch_path(&f.scratch, "none/out.slu"), &err), SLU_EIO);
    cr_assert(strstr(err.text, "none/out.slu"), "%s", err.text);
    cr_assert_eq(pack(f.good, f.good, &err), SLU_EINVAL);
    cr_assert(strstr(err.text, "the model itself"), "%s", err.text);
    const char *folder = scratch_path(&f.scratch, "folder");
    cr_assert_eq(mkdir(folder, 0700), 0);
    cr_assert_eq(pack(f.good, folder, &err), SLU_EINVAL);
    cr_assert_eq(rmdir(folder), 0);
    cr_assert_eq(scratch_count(&f.scratch), 1);
    scratch_finish(&f.scratch);
}

static void cancel_half_way(void *arg, uint64_t done_bytes, uint64_t total_bytes)
{
    if (done_bytes > total_bytes / 2) {
        atomic_store((atomic_bool *)arg, true);
    }
}

/* Cancelled half-way: the error says so, an older pack of that name stays, and nothing else. */
Test(packer_bad, cancelled)
{
    struct fixture f;
    begin(&f, &(struct slu_synth_params){0});
    scratch_write(f.out, "older", 5);
    atomic_bool cancel = false;
    struct slu_packer_params params = {
        .in = f.good,
        .out = f.out,
        .progress = cancel_half_way,
        .arg = &cancel,
        .cancel = &cancel,
    };
    struct slu_err err;
    cr_assert_eq(slu_packer_run(&params, NULL, &err), SLU_ECANCEL);
    cr_assert_eq(scratch_count(&f.scratch), 2);
    size_t bytes;
    uint8_t *data = scratch_read(f.out, &bytes);
    cr_assert_eq(bytes, 5);
    cr_assert_arr_eq(data, "older", 5);
    free(data);
    scratch_finish(&f.scratch);
}

static void die_half_way(void *arg, uint64_t done_bytes, uint64_t total_bytes)
{
    (void)arg;
    if (done_bytes > total_bytes / 2) {
        raise(SIGKILL);
    }
}

/* Killed half-way: nothing stands under the final name. */
Test(packer_bad, killed)
{
    struct fixture f;
    begin(&f, &(struct slu_synth_params){0});
    pid_t child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) {
        struct slu_packer_params params = {.in = f.good, .out = f.out, .progress = die_half_way};
        slu_packer_run(&params, NULL, NULL);
        _exit(0);
    }
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFSIGNALED(status));
    cr_assert_eq(access(f.out, F_OK), -1);
    struct slu_err err;
    cr_assert_eq(pack(f.good, f.out, &err), 0, "%s", err.text);
    const char *good = f.good;
    compare_pack(f.out, &good, 1);
    scratch_finish(&f.scratch);
}
