/*
 * A progress bar with an estimate of the time left, on stderr and only if that is a terminal.
 *
 * Thread safety: one thread at a time.
 */
#ifndef SLU_CLI_PROGRESS_H
#define SLU_CLI_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

struct slu_progress {
    const char *what;
    bool is_shown; /* stderr is a terminal */
    double start_s, drawn_s;
};

/* what: "packing"; kept, not copied. */
void slu_progress_begin(struct slu_progress *progress, const char *what);
/* Draws at most ten times a second. */
void slu_progress_update(struct slu_progress *progress, uint64_t done_bytes, uint64_t total_bytes);
/* Takes the bar away. */
void slu_progress_end(struct slu_progress *progress);

/* "1:05", "2:03:04": a duration for a person. */
struct slu_progress_time {
    char text[24];
};
struct slu_progress_time slu_progress_time(double seconds);

#endif
