#include "cli/quant_args.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/pool.h"

static const char *const types[] = {"keep", "q3e", "q4e", "q5e", "q6e", NULL};

struct slu_arg_table slu_cli_quant_args_init(struct slu_cli_quant_args *quant_args)
{
    const struct slu_arg args[] = {
        {
            .name = "--quant",
            .value = "TYPE",
            .type = SLU_ARG_CHOICE,
            .choices = types,
            .target = &quant_args->experts,
            .help = "quantize routed experts that come in F32, F16, BF16 or Q8_0\n"
                    "to q3e, q4e, q5e or q6e, which are made for compression;\n"
                    "keep, the default, leaves all weights as they are",
        },
        {
            .name = "--quant-error",
            .value = "E",
            .type = SLU_ARG_FLOAT,
            .min = 0.001,
            .max = 1,
            .target = &quant_args->error,
            .help = "the relative error to aim at (default: 0.17, 0.082, 0.05 and\n"
                    "0.027 for q3e to q6e); a larger one makes a smaller pack",
        },
        {
            .name = "--dense-quant",
            .value = "TYPE",
            .type = SLU_ARG_CHOICE,
            .choices = types,
            .target = &quant_args->resident,
            .help = "the same for the matrices that every token needs; norms,\n"
                    "routers, biases and rows of embeddings stay as they are",
        },
        {
            .name = "--dense-error",
            .value = "E",
            .type = SLU_ARG_FLOAT,
            .min = 0.001,
            .max = 1,
            .target = &quant_args->dense_error,
            .help = "the error to aim at with --dense-quant (default: as above)",
        },
        {
            .name = "--threads",
            .value = "N",
            .type = SLU_ARG_U32,
            .min = 1,
            .max = SLU_POOL_THREADS_MAX,
            .target = &quant_args->n_threads,
            .help = "to quantize with (default: one for each CPU)",
        },
    };
    _Static_assert(sizeof args == sizeof quant_args->args, "one for each");
    memcpy(quant_args->args, args, sizeof args);
    return (struct slu_arg_table){
        .title = "Quantizing", .args = quant_args->args, .n = sizeof args / sizeof *args};
}

int slu_cli_quant_args_check(const struct slu_cli_quant_args *quant_args,
                             const struct slu_command_args *args)
{
    if (quant_args->error > 0 && !quant_args->experts) {
        return slu_args_mistake(args, "--quant-error says how to quantize, but --quant is missing");
    }
    if (quant_args->dense_error > 0 && !quant_args->resident) {
        return slu_args_mistake(args,
                                "--dense-error says how to quantize, but --dense-quant is missing");
    }
    if (quant_args->n_threads && !quant_args->experts && !quant_args->resident) {
        return slu_args_mistake(args,
                                "--threads quantize, but --quant and --dense-quant are missing");
    }
    return SLU_ARGS_OK;
}

static struct slu_packer_quant quant_of(int choice, float error)
{
    return (struct slu_packer_quant){.bits = choice ? 2 + (unsigned)choice : 0, .error = error};
}

void slu_cli_quant_args_apply(const struct slu_cli_quant_args *quant_args,
                              struct slu_packer_params *params)
{
    params->experts = quant_of(quant_args->experts, quant_args->error);
    params->resident = quant_of(quant_args->resident, quant_args->dense_error);
    params->n_threads = quant_args->n_threads;
}

void slu_cli_quant_print(const struct slu_packer_params *params,
                         const struct slu_packer_report *report)
{
    if (!params->experts.bits && !params->resident.bits) {
        return;
    }
    if (!report->quant_weights) {
        printf("nothing was quantized: no matrix that was to be is of F32, F16, BF16 or Q8_0 with "
               "a multiple of 32 columns\n");
        return;
    }
    printf("quantized %llu weights, at a relative error of %.4f",
           (unsigned long long)report->quant_weights, report->quant_error);
    if (params->importance && report->n_important == 0) {
        printf("; none of the matrices had importance: is %s of another model?",
               params->importance);
    } else if (params->importance) {
        printf("; %u of %u matrices had importance", report->n_important,
               report->n_important + report->n_unimportant);
    }
    printf("\n");
    if (report->quant_missed) {
        printf(
            "%.0f %% of them have a larger error than was to be: that takes codes of more bits\n",
            fmax(1, 100 * (double)report->quant_missed / (double)report->quant_weights));
    }
}
