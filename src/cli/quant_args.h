/* The options of --quant, which the commands that write packs share. */
#ifndef SLU_CLI_QUANT_ARGS_H
#define SLU_CLI_QUANT_ARGS_H

#include "cli/args.h"
#include "tools/packer.h"

struct slu_cli_quant_args {
    struct slu_arg args[5];
    int experts, resident; /* choices */
    float error, dense_error;
    uint32_t n_threads;
};

/* Returns the table for slu_command_args, pointing into *quant_args. */
struct slu_arg_table slu_cli_quant_args_init(struct slu_cli_quant_args *quant_args);
/* After parsing: SLU_ARGS_OK, or what an option without effect comes to. */
int slu_cli_quant_args_check(const struct slu_cli_quant_args *quant_args,
                             const struct slu_command_args *args);
void slu_cli_quant_args_apply(const struct slu_cli_quant_args *quant_args,
                              struct slu_packer_params *params);
/* What was quantized, in a line or two for a person; nothing if nothing was to be. */
void slu_cli_quant_print(const struct slu_packer_params *params,
                         const struct slu_packer_report *report);

#endif
