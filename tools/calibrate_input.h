/*
 * The texts that calibration runs, one after the other: prompts from a JSON-lines file, then pieces
 * of a plain text. Files are read as they are needed.
 *
 * Thread safety: one thread.
 */
#ifndef SLU_TOOLS_CALIBRATE_INPUT_H
#define SLU_TOOLS_CALIBRATE_INPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct slu_calibrate_input;

struct slu_calibrate_item {
    bool is_chat;       /* a user's message; else text that is read as it stands */
    const char *prompt; /* valid until the next call */
    size_t prompt_bytes;
    const char *answer; /* NULL: the model is to answer; of plain text the second half */
    size_t answer_bytes;
};

/* Either may be NULL, not both. A line of prompts is a JSON string or an object with "prompt" and
 * perhaps "answer", of 16 MiB at most. piece_bytes: of plain text. SLU_ENOENT, SLU_EIO,
 * SLU_EINVAL where a file isn't a regular one, SLU_EFORMAT where a line is too long, SLU_ENOMEM. */
int slu_calibrate_input_open(const char *prompts, const char *text, size_t piece_bytes,
                             struct slu_calibrate_input **ret_input, struct slu_err *err);
void slu_calibrate_input_close(struct slu_calibrate_input *input); /* NULL is fine */

/* 1 with the next item; 0 at the end; SLU_EFORMAT with the line, SLU_EIO, SLU_ENOMEM. */
int slu_calibrate_input_next(struct slu_calibrate_input *input, struct slu_calibrate_item *ret_item,
                             struct slu_err *err);

/* Bytes read, and in all; and a checksum of the files' contents. */
uint64_t slu_calibrate_input_done(const struct slu_calibrate_input *input);
uint64_t slu_calibrate_input_bytes(const struct slu_calibrate_input *input);
uint64_t slu_calibrate_input_checksum(const struct slu_calibrate_input *input);

#endif
