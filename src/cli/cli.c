#include "cli/cli.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define READ_BYTES_MAX ((size_t)1 << 30)

/* A signal handler can reach nothing but static storage. */
static atomic_bool interrupted;
static volatile sig_atomic_t signal_number;
static struct slu_session *_Atomic cancelled_session;

/* How many bytes of UTF-8 a character takes that a terminal obeys instead of showing it: C0 and C1
 * controls, and those that turn the direction of text. 0: it is none. */
static size_t control_bytes(const unsigned char *text, size_t len)
{
    static const char *const turns[] = {
        "\xd8\x9c",     "\xe2\x80\x8e", "\xe2\x80\x8f", "\xe2\x80\xaa",
        "\xe2\x80\xab", "\xe2\x80\xac", "\xe2\x80\xad", "\xe2\x80\xae",
        "\xe2\x81\xa6", "\xe2\x81\xa7", "\xe2\x81\xa8", "\xe2\x81\xa9",
    };
    if (text[0] < 0x20 || text[0] == 0x7f) {
        return 1;
    }
    if (len >= 2 && text[0] == 0xc2 && text[1] < 0xa0) {
        return 2;
    }
    for (size_t i = 0; i < sizeof turns / sizeof *turns; i++) {
        size_t n = strlen(turns[i]);
        if (n <= len && memcmp(text, turns[i], n) == 0) {
            return n;
        }
    }
    return 0;
}

void slu_cli_clean(char *out, size_t out_bytes, const char *text, size_t len)
{
    size_t n = len < out_bytes - 1 ? len : out_bytes - 1;
    for (size_t i = 0; i < n;) {
        size_t n_control = control_bytes((const unsigned char *)text + i, n - i);
        memset(out + i, '?', n_control);
        i += n_control;
        if (n_control == 0) {
            out[i] = text[i];
            i++;
        }
    }
    out[n] = '\0';
}

void slu_cli_error(const char *format, ...)
{
    char text[1024], clean[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    slu_cli_clean(clean, sizeof clean, text, strlen(text));
    fflush(stdout);
    fprintf(stderr, "sluice: %s\n", clean);
}

int slu_cli_fail(const struct slu_err *err)
{
    if (err->code == SLU_ECANCEL && atomic_load(&interrupted)) {
        slu_cli_error("interrupted");
    } else {
        slu_cli_error("%s", err->text[0] ? err->text : slu_strerror(err->code));
    }
    return slu_cli_exit_status(SLU_EXIT_FAILED);
}

int slu_cli_args_status(int parsed)
{
    return parsed == SLU_ARGS_USAGE ? SLU_EXIT_USAGE : SLU_EXIT_DONE;
}

static void on_signal(int number)
{
    signal_number = number;
    atomic_store(&interrupted, true);
    struct slu_session *session = atomic_load(&cancelled_session);
    if (session) {
        slu_session_cancel(session);
    }
}

void slu_cli_catch_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESETHAND};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

const atomic_bool *slu_cli_interrupted(void)
{
    return &interrupted;
}

void slu_cli_cancel_session(struct slu_session *session)
{
    atomic_store(&cancelled_session, session);
    /* A signal that came just before would else be missed. */
    if (session && atomic_load(&interrupted)) {
        slu_session_cancel(session);
    }
}

int slu_cli_exit_status(int status)
{
    return atomic_load(&interrupted) ? 128 + signal_number : status;
}

int slu_cli_output_failed(void)
{
    static int status; /* of the first failure, which alone is told */
    if (status == 0 && errno == EPIPE) {
        status = 128 + SIGPIPE;
    } else if (status == 0) {
        slu_cli_error("cannot write to standard output%s%s", errno ? ": " : "",
                      errno ? strerror(errno) : "");
        status = slu_cli_exit_status(SLU_EXIT_FAILED);
    }
    return status;
}

bool slu_cli_is_same_file(const char *a, const char *b)
{
    struct stat stat_a, stat_b;
    return stat(a, &stat_a) == 0 && stat(b, &stat_b) == 0 && stat_a.st_dev == stat_b.st_dev &&
           stat_a.st_ino == stat_b.st_ino;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* The folder that a path's last name is in. */
static bool stat_folder(const char *path, struct stat *ret_stat)
{
    size_t len = (size_t)(base_name(path) - path);
    char *folder = len ? strndup(path, len) : strdup(".");
    bool is_there = folder && stat(folder, ret_stat) == 0;
    free(folder);
    return is_there;
}

bool slu_cli_is_same_path(const char *a, const char *b)
{
    struct stat stat_a, stat_b;
    if (!a || !b) {
        return false;
    }
    return slu_cli_is_same_file(a, b) ||
           (strcmp(base_name(a), base_name(b)) == 0 && stat_folder(a, &stat_a) &&
            stat_folder(b, &stat_b) && stat_a.st_dev == stat_b.st_dev &&
            stat_a.st_ino == stat_b.st_ino);
}

const char *slu_cli_find_clash(const char *const *outputs, size_t n_outputs,
                               const char *const *inputs, size_t n_inputs)
{
    for (size_t i = 0; i < n_outputs; i++) {
        for (size_t j = 0; j < n_inputs; j++) {
            if (slu_cli_is_same_path(outputs[i], inputs[j])) {
                return outputs[i];
            }
        }
        for (size_t j = 0; j < i; j++) {
            if (slu_cli_is_same_path(outputs[i], outputs[j])) {
                return outputs[i];
            }
        }
    }
    return NULL;
}

int slu_cli_read_file(const char *path, char **ret_text, size_t *ret_len, struct slu_err *err)
{
    bool is_stdin = strcmp(path, "-") == 0;
    const char *name = is_stdin ? "standard input" : path;
    FILE *file = is_stdin ? stdin : fopen(path, "rb");
    if (!file) {
        return slu_err_set(err, errno == ENOENT ? SLU_ENOENT : SLU_EIO, "%s: %s", name,
                           strerror(errno));
    }
    int rc = 0;
    size_t len = 0, capacity = 1 << 16;
    char *text = malloc(capacity);
    while (text) {
        len += fread(text + len, 1, capacity - len, file);
        if (len < capacity) {
            break;
        }
        if (capacity >= READ_BYTES_MAX) {
            rc = slu_err_set(err, SLU_ERANGE, "%s: more than 1 GiB of text", name);
            goto out;
        }
        capacity *= 2;
        char *more = realloc(text, capacity);
        if (!more) {
            free(text);
        }
        text = more;
    }
    if (!text) {
        rc = slu_err_set(err, SLU_ENOMEM, "%s: no memory for its text", name);
    } else if (ferror(file)) {
        rc = slu_err_set(err, SLU_EIO, "%s: %s", name, strerror(errno));
    }
out:
    if (!is_stdin) {
        fclose(file);
    }
    if (rc < 0) {
        free(text);
        return rc;
    }
    *ret_text = text;
    *ret_len = len;
    return 0;
}

struct slu_cli_size slu_cli_size(uint64_t bytes)
{
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB"};
    struct slu_cli_size size;
    if (bytes < 1024) {
        snprintf(size.text, sizeof size.text, "%u B", (unsigned)bytes);
        return size;
    }
    int unit = 0;
    double value = (double)bytes / 1024;
    for (; value >= 1023.95 && unit < 3; unit++) {
        value /= 1024;
    }
    snprintf(size.text, sizeof size.text, value < 100 ? "%.2f %s" : "%.1f %s", value, units[unit]);
    return size;
}
