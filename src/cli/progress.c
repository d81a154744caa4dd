#include "cli/progress.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/clock.h"
#include "cli/cli.h"

struct slu_progress_time slu_progress_time(double seconds)
{
    struct slu_progress_time time;
    unsigned s = seconds < 0 ? 0 : seconds > 3e6 ? 3000000 : (unsigned)(seconds + 0.5);
    if (s >= 3600) {
        snprintf(time.text, sizeof time.text, "%u:%02u:%02u", s / 3600, s / 60 % 60, s % 60);
    } else {
        snprintf(time.text, sizeof time.text, "%u:%02u", s / 60, s % 60);
    }
    return time;
}

void slu_progress_begin(struct slu_progress *progress, const char *what)
{
    *progress = (struct slu_progress){
        .what = what,
        .is_shown = isatty(STDERR_FILENO),
        .start_s = slu_now_s(),
    };
}

static unsigned terminal_columns(void)
{
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) < 0 || size.ws_col == 0) {
        return 80;
    }
    return size.ws_col;
}

void slu_progress_update(struct slu_progress *progress, uint64_t done_bytes, uint64_t total_bytes)
{
    double now = slu_now_s();
    if (!progress->is_shown || total_bytes == 0 || now - progress->drawn_s < 0.1) {
        return;
    }
    progress->drawn_s = now;
    double part = done_bytes >= total_bytes ? 1 : (double)done_bytes / (double)total_bytes;
    double passed = now - progress->start_s;
    /* The first second's speed says little about the rest. */
    char left[40] = "";
    if (passed > 1 && part > 0.001) {
        snprintf(left, sizeof left, ", %s left",
                 slu_progress_time(passed * (1 - part) / part).text);
    }
    char numbers[128];
    snprintf(numbers, sizeof numbers, " %3.0f %% of %s%s", 100 * part,
             slu_cli_size(total_bytes).text, left);

    unsigned columns = terminal_columns();
    size_t taken = strlen(progress->what) + strlen(numbers) + 4;
    unsigned width = columns > taken + 4 ? columns - (unsigned)taken : 0;
    width = width > 50 ? 50 : width;
    unsigned full = (unsigned)(part * width);
    fprintf(stderr, "\r%s ", progress->what);
    if (width > 0) {
        fputc('[', stderr);
        for (unsigned i = 0; i < width; i++) {
            fputc(i < full ? '#' : '.', stderr);
        }
        fputc(']', stderr);
    }
    fprintf(stderr, "%s\033[K", numbers);
    fflush(stderr);
}

void slu_progress_end(struct slu_progress *progress)
{
    if (progress->is_shown && progress->drawn_s > 0) {
        fputs("\r\033[K", stderr);
        fflush(stderr);
    }
    progress->is_shown = false;
}
