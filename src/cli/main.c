#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/pool.h"
#include "cli/cli.h"

struct command {
    const char *name;
    const char *summary;
    int (*run)(int argc, char **argv);
    bool computes; /* with a model */
};

static const struct command commands[] = {
    {"pack", "turn a GGUF into a pack, the form that sluice runs from", slu_cmd_pack},
    {"run", "answer a prompt", slu_cmd_run, true},
    {"eval", "compute logits, greedy continuations, perplexity", slu_cmd_eval, true},
    {"tokenize", "turn text into token ids and back", slu_cmd_tokenize},
    {"inspect", "say what a pack or a GGUF holds", slu_cmd_inspect},
    {"plan", "say how much memory a model would take, and for what", slu_cmd_plan},
    {"bench", "measure speed beside what the machine allows", slu_cmd_bench, true},
    {"calibrate", "learn from text which experts a prompt will want", slu_cmd_calibrate, true},
    {"adapter", "import LoRA adapters, and say what they hold", slu_cmd_adapter},
    {"synth", "make a model of random weights, for measurements", slu_cmd_synth},
};
#define N_COMMANDS (sizeof commands / sizeof *commands)

static const char about[] =
    "Usage: sluice COMMAND ...\n"
    "\n"
    "Runs mixture-of-experts language models that are larger than memory: what every token needs\n"
    "stays in RAM, the experts are streamed from flash as they are asked for.\n"
    "\n"
    "Commands:\n";

static const char first_steps[] = "\n"
                                  "`sluice COMMAND --help` explains each. First steps:\n"
                                  "\n"
                                  "  sluice pack model.gguf -o model.slu\n"
                                  "  sluice plan model.slu --ram 4G\n"
                                  "  sluice run model.slu --ram 4G -p \"Why is the sky blue?\"\n";

static void print_help(void)
{
    fputs(about, stdout);
    for (size_t i = 0; i < N_COMMANDS; i++) {
        printf("  %-10s %s\n", commands[i].name, commands[i].summary);
    }
    fputs(first_steps, stdout);
}

static const struct command *find_command(const char *name)
{
    for (size_t i = 0; i < N_COMMANDS; i++) {
        if (strcmp(commands[i].name, name) == 0) {
            return &commands[i];
        }
    }
    return NULL;
}

/* The main thread computes like the pool's. Its stack grows up to the limit of the moment. */
static bool make_room_on_stack(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_STACK, &limit) != 0 || limit.rlim_cur >= SLU_STACK_BYTES) {
        return true;
    }
    limit.rlim_cur = SLU_STACK_BYTES;
    if (limit.rlim_max >= SLU_STACK_BYTES && setrlimit(RLIMIT_STACK, &limit) == 0) {
        return true;
    }
    slu_cli_error("a stack of %zu KiB is needed, and the hard limit (`ulimit -H -s`) is %llu KiB",
                  SLU_STACK_BYTES >> 10, (unsigned long long)limit.rlim_max >> 10);
    return false;
}

static int dispatch(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        print_help();
        return SLU_EXIT_DONE;
    }
    if (strcmp(name, "--version") == 0) {
        puts("sluice " SLU_VERSION);
        return SLU_EXIT_DONE;
    }
    if (strcmp(name, "help") == 0) {
        const struct command *command = argc > 2 ? find_command(argv[2]) : NULL;
        if (command) {
            char help[] = "--help";
            return command->run(1, (char *[]){help, NULL});
        }
        print_help();
        return SLU_EXIT_DONE;
    }
    const struct command *command = find_command(name);
    if (!command) {
        if (argc < 2) {
            slu_cli_error("a command is missing; see `sluice --help`");
        } else {
            slu_cli_error("unknown %s '%s'; see `sluice --help`",
                          name[0] == '-' ? "option" : "command", name);
        }
        return SLU_EXIT_USAGE;
    }
    if (command->computes && !make_room_on_stack()) {
        return SLU_EXIT_FAILED;
    }
    return command->run(argc - 2, argv + 2);
}

/* The first file that is opened would else become what is missing of standard input, output and
 * error, and be read or written as such. What stands in for them can't be used either. */
static void fill_streams(void)
{
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && errno == EBADF) {
            (void)!open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
        }
    }
}

int main(int argc, char **argv)
{
    fill_streams();
    signal(SIGXFSZ, SIG_IGN); /* a file that grows too large is an error like a full disk */
    int status = dispatch(argc, argv);
    /* Whether stdout took everything shows only now. */
    errno = 0;
    if (fflush(stdout) != 0 || ferror(stdout)) {
        return slu_cli_output_failed();
    }
    return status;
}
