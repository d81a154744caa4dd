/* Packs whose tables are in order, but that hold another model than their metadata say. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "fixture.h"
#include "model/weights.h"

/* The table in memory is changed, as a file with valid checksums would have it. */
static struct slu_pack_tensor *tensor_of(struct slu_pack *pack, const char *name)
{
    for (uint32_t i = 0; i < pack->header.n_tensors; i++) {
        if (!strcmp(pack->tensors[i].name, name)) {
            return &pack->tensors[i];
        }
    }
    cr_assert_fail("no tensor %s", name);
    return NULL;
}

static void expect_refused(const struct slu_pack *pack, const char *word)
{
    struct slu_weights weights;
    struct slu_err err = {0};
    cr_assert_eq(slu_weights_describe(pack, &weights, &err), SLU_EFORMAT);
    cr_expect_not_null(strstr(err.text, word), "%s", err.text);
}

/* With compressed queries every layer needs its norm, not the first alone. */
Test(weights, refuses_a_layer_without_query_norm)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &(struct slu_synth_params){.arch = SLU_ARCH_DEEPSEEK2}, SLU_CODEC_RAW, 0);
    for (unsigned layer = 0; layer < 3; layer++) {
        struct slu_pack *pack = NULL;
        cr_assert_eq(slu_pack_open_file(f.slu, &pack, NULL), 0);
        char name[64];
        snprintf(name, sizeof name, "blk.%u.attn_q_a_norm.weight", layer);
        strcpy(tensor_of(pack, name)->name, "another");
        expect_refused(pack, "attn_q_a_norm");
        slu_pack_close(pack);
    }
    fixture_close(&f);
}

/* Rows of the embedding are read into slots made for their stride: only the true one is taken. */
Test(weights, refuses_a_wrong_row_stride)
{
    struct fixture f;
    fixture_open(&f);
    fixture_synth(&f, &(struct slu_synth_params){.arch = SLU_ARCH_QWEN3MOE, .n_vocab = 384},
                  SLU_CODEC_RAW, 0);
    struct slu_pack *pack = NULL;
    cr_assert_eq(slu_pack_open_file(f.slu, &pack, NULL), 0);
    struct slu_pack_tensor *embedding = tensor_of(pack, "token_embd.weight");
    cr_assert_eq(embedding->kind, SLU_PACK_ROWS);
    uint32_t stride = embedding->row_stride;
    uint32_t wrong[] = {0, stride - 64, stride + 32, stride + 64, UINT32_MAX - 63};
    pack->header.file_bytes = UINT64_MAX; /* as large as any of these may need */
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        embedding->row_stride = wrong[i];
        expect_refused(pack, "token_embd.weight");
    }
    slu_pack_close(pack);
    fixture_close(&f);
}
