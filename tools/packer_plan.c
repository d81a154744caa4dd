/* Which tensor of the input goes where in the pack. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/packer_parts.h"

#define BLOCK_BYTES_DEFAULT (1u << 20)

static const char *input_name(const struct slu_packer_input *input)
{
    return input->parts[0].source->name;
}

static int no_memory(const struct slu_packer_input *input, struct slu_err *err)
{
    return slu_err_set(err, SLU_ENOMEM, "%s: out of memory for the plan of the pack",
                       input_name(input));
}

/* ---- dense tensors ------------------------------------------------------------------------ */

/* MLA comes in two forms twice over, which the list of tensors can only call optional. */
static int check_mla(const struct slu_packer_input *input, uint32_t layer, struct slu_err *err)
{
    static const struct {
        const char *whole;
        const char *split[3];
    } forms[] = {
        {"attn_q", {"attn_q_a", "attn_q_a_norm", "attn_q_b"}},
        {"attn_kv_b", {"attn_k_b", "attn_v_b"}},
    };
    for (size_t f = 0; f < sizeof forms / sizeof *forms; f++) {
        char name[SLU_PACK_NAME_BYTES];
        snprintf(name, sizeof name, "blk.%u.%s.weight", layer, forms[f].whole);
        if (slu_packer_input_has(input, name)) {
            continue;
        }
        for (unsigned i = 0; i < 3 && forms[f].split[i]; i++) {
            snprintf(name, sizeof name, "blk.%u.%s.weight", layer, forms[f].split[i]);
            if (!slu_packer_input_has(input, name)) {
                return slu_err_set(err, SLU_ENOENT,
                                   "%s: tensor '%s' is missing, and so is 'blk.%u.%s.weight', "
                                   "which could stand in for it",
                                   input_name(input), name, layer, forms[f].whole);
            }
        }
    }
    return 0;
}

static int plan_dense(struct slu_packer_input *input, struct slu_packer_plan *plan,
                      struct slu_err *err)
{
    size_t n_specs = slu_config_tensors(&plan->config, NULL, 0);
    struct slu_tensor_spec *specs = calloc(n_specs, sizeof *specs);
    plan->dense = calloc(n_specs, sizeof *plan->dense);
    int code = specs && plan->dense ? 0 : no_memory(input, err);
    if (code == 0) {
        slu_config_tensors(&plan->config, specs, n_specs);
    }
    bool is_tied = !slu_packer_input_has(input, "output.weight");
    for (size_t i = 0; i < n_specs && code == 0; i++) {
        const struct slu_tensor_spec *spec = &specs[i];
        if (spec->is_optional && !slu_packer_input_has(input, spec->name)) {
            continue;
        }
        struct slu_packer_dense *dense = &plan->dense[plan->n_dense++];
        bool is_embd = strcmp(spec->name, "token_embd.weight") == 0;
        dense->kind = is_embd && !is_tied ? SLU_PACK_ROWS : SLU_PACK_MATRIX;
        snprintf(dense->name, sizeof dense->name, "%s", spec->name);
        code = spec->is_vector ? slu_packer_claim_f32(input, dense->name, spec->rows, spec->cols,
                                                      &dense->ref, err)
                               : slu_packer_claim(input, dense->name, spec->rows, spec->cols,
                                                  spec->n, &dense->ref, err);
    }
    for (uint32_t l = 0; plan->config.is_mla && l < plan->config.n_layers && code == 0; l++) {
        code = check_mla(input, l, err);
    }
    free(specs);
    return code;
}

/* ---- banks -------------------------------------------------------------------------------- */

static int claim_one(struct slu_packer_input *input, const char *name, uint32_t rows, uint32_t cols,
                     uint32_t n, struct slu_packer_experts *experts, struct slu_err *err)
{
    experts->refs = calloc(1, sizeof *experts->refs);
    if (!experts->refs) {
        return no_memory(input, err);
    }
    experts->n_refs = 1;
    return slu_packer_claim(input, name, rows, cols, n, &experts->refs[0], err);
}

/* Old files: blk.N.ffn_gate.E.weight, a tensor for each expert. */
static int claim_each(struct slu_packer_input *input, const char *what, uint32_t layer,
                      uint32_t rows, uint32_t cols, uint32_t n, struct slu_packer_experts *experts,
                      struct slu_err *err)
{
    experts->refs = calloc(n, sizeof *experts->refs);
    if (!experts->refs) {
        return no_memory(input, err);
    }
    experts->n_refs = n;
    for (uint32_t e = 0; e < n; e++) {
        char name[SLU_PACK_NAME_BYTES];
        snprintf(name, sizeof name, "blk.%u.%s.%u.weight", layer, what, e);
        int code = slu_packer_claim(input, name, rows, cols, 1, &experts->refs[e], err);
        if (code < 0) {
            return code;
        }
        if (experts->refs[e].fmt != experts->refs[0].fmt) {
            return slu_err_set(
                err, SLU_EUNSUP, "%s: tensor '%s' is %s, but the first expert of its layer is %s",
                input_name(input), name, experts->refs[e].fmt->name, experts->refs[0].fmt->name);
        }
    }
    return 0;
}

static int claim_matrices(struct slu_packer_input *input, const char *what, const char *suffix,
                          const struct slu_packer_bank *bank, uint32_t rows, uint32_t cols,
                          struct slu_packer_experts *experts, struct slu_err *err)
{
    char name[SLU_PACK_NAME_BYTES];
    snprintf(name, sizeof name, "blk.%u.%s%s.weight", bank->layer, what, suffix);
    bool is_routed = bank->kind == SLU_BANK_ROUTED;
    if (is_routed && !slu_packer_input_has(input, name)) {
        char first[SLU_PACK_NAME_BYTES];
        snprintf(first, sizeof first, "blk.%u.%s.0.weight", bank->layer, what);
        if (slu_packer_input_has(input, first)) {
            return claim_each(input, what, bank->layer, rows, cols, bank->n_experts, experts, err);
        }
    }
    return claim_one(input, name, rows, cols, bank->n_experts, experts, err);
}

static int claim_bias(struct slu_packer_input *input, const char *what,
                      const struct slu_packer_bank *bank, uint32_t cols,
                      struct slu_packer_ref *ret_ref, struct slu_err *err)
{
    char name[SLU_PACK_NAME_BYTES];
    snprintf(name, sizeof name, "blk.%u.%s_exps.bias", bank->layer, what);
    return slu_packer_claim_f32(input, name, bank->n_experts, cols, ret_ref, err);
}

static int plan_bank(struct slu_packer_input *input, struct slu_packer_plan *plan, uint32_t layer,
                     enum slu_bank_kind kind, uint32_t n_ff, uint32_t block_bytes,
                     struct slu_err *err)
{
    static const char *const suffixes[] = {
        [SLU_BANK_ROUTED] = "_exps",
        [SLU_BANK_SHARED] = "_shexp",
        [SLU_BANK_DENSE] = "",
    };
    const struct slu_config *config = &plan->config;
    struct slu_packer_bank *bank = &plan->banks[plan->n_banks++];
    bool is_routed = kind == SLU_BANK_ROUTED;
    uint32_t n_embd = config->n_embd;
    bank->layer = layer;
    bank->kind = kind;
    bank->n_experts = is_routed ? config->n_experts : 1;
    const char *suffix = suffixes[kind];
    int code;
    if ((code = claim_matrices(input, "ffn_gate", suffix, bank, n_ff, n_embd, &bank->gate, err)) <
            0 ||
        (code = claim_matrices(input, "ffn_up", suffix, bank, n_ff, n_embd, &bank->up, err)) < 0 ||
        (code = claim_matrices(input, "ffn_down", suffix, bank, n_embd, n_ff, &bank->down, err)) <
            0) {
        return code;
    }
    bank->shape = (struct slu_bank_shape){
        .n_embd = n_embd,
        .n_ff = n_ff,
        .gate = bank->gate.refs[0].fmt,
        .up = bank->up.refs[0].fmt,
        .down = bank->down.refs[0].fmt,
        .has_bias = is_routed && config->has_expert_bias,
    };
    if (bank->shape.has_bias &&
        ((code = claim_bias(input, "ffn_gate", bank, n_ff, &bank->gate_bias, err)) < 0 ||
         (code = claim_bias(input, "ffn_up", bank, n_ff, &bank->up_bias, err)) < 0 ||
         (code = claim_bias(input, "ffn_down", bank, n_embd, &bank->down_bias, err)) < 0)) {
        return code;
    }
    if (!slu_bank_split(&bank->shape, block_bytes)) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: experts of layer %u, with %u neurons over a width of %u in %s, %s "
                           "and %s, cannot be split into blocks",
                           input_name(input), layer, n_ff, n_embd, bank->shape.gate->name,
                           bank->shape.up->name, bank->shape.down->name);
    }
    return 0;
}

static int plan_banks(struct slu_packer_input *input, struct slu_packer_plan *plan,
                      uint32_t block_bytes, struct slu_err *err)
{
    const struct slu_config *config = &plan->config;
    plan->banks = calloc(2 * (size_t)config->n_layers, sizeof *plan->banks);
    if (!plan->banks) {
        return no_memory(input, err);
    }
    int code = 0;
    for (uint32_t l = 0; l < config->n_layers && code == 0; l++) {
        if (l < config->n_dense_layers) {
            code = plan_bank(input, plan, l, SLU_BANK_DENSE, config->n_ff_dense, block_bytes, err);
            continue;
        }
        code = plan_bank(input, plan, l, SLU_BANK_ROUTED, config->n_ff_expert, block_bytes, err);
        if (code == 0 && config->n_ff_shared > 0) {
            code =
                plan_bank(input, plan, l, SLU_BANK_SHARED, config->n_ff_shared, block_bytes, err);
        }
    }
    return code;
}

int slu_packer_plan_make(struct slu_packer_input *input, uint32_t block_bytes,
                         struct slu_packer_plan *ret_plan, struct slu_err *err)
{
    struct slu_packer_plan plan = {0};
    int code = slu_config_read(&input->parts[0].gguf->kvs, &plan.config, err);
    if (code < 0) {
        slu_err_prefix(err, "%s", input_name(input));
        return code;
    }
    if ((code = slu_packer_check_known(input, err)) < 0 ||
        (code = plan_dense(input, &plan, err)) < 0 ||
        (code = plan_banks(input, &plan, block_bytes ? block_bytes : BLOCK_BYTES_DEFAULT, err)) <
            0 ||
        (code = slu_packer_check_claimed(input, plan.config.arch, err)) < 0) {
        slu_packer_plan_finish(&plan);
        return code;
    }
    *ret_plan = plan;
    return 0;
}

void slu_packer_plan_finish(struct slu_packer_plan *plan)
{
    for (size_t i = 0; i < plan->n_banks; i++) {
        free(plan->banks[i].gate.refs);
        free(plan->banks[i].up.refs);
        free(plan->banks[i].down.refs);
    }
    free(plan->banks);
    free(plan->dense);
    *plan = (struct slu_packer_plan){0};
}
