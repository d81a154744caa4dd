#include "tools/calibrate_input.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "io/codec.h"

#define LINE_BYTES_MAX (16u << 20)
#define BLOCK_BYTES    (1u << 20)

struct file {
    const char *path;
    FILE *file;
    uint64_t bytes;
};

struct slu_calibrate_input {
    struct file prompts, text;
    uint64_t n_lines, done_bytes, checksum;
    char *line;
    size_t line_bytes_max;
    json_t *object; /* of the line that was read last */
    char *piece;
    size_t piece_bytes, n_piece; /* what is there of the text that hasn't been given out */
    size_t n_given;
};

static int failed(const struct file *file, struct slu_err *err)
{
    int rc = errno == ENOENT ? SLU_ENOENT : SLU_EIO;
    return slu_err_set(err, rc, "%s: cannot be read: %s", file->path, strerror(errno));
}

/* A file that can be read twice, and ends: a pipe can't, and a device needn't. */
static int open_file(struct file *file, struct slu_err *err)
{
    struct stat st;
    if (stat(file->path, &st) != 0) {
        return failed(file, err);
    }
    if (!S_ISREG(st.st_mode)) {
        return slu_err_set(err, SLU_EINVAL, "%s: is %s, not a regular file", file->path,
                           S_ISDIR(st.st_mode) ? "a directory" : "a device or pipe");
    }
    file->file = fopen(file->path, "rbe");
    return file->file ? 0 : failed(file, err);
}

/* Bytes of the longest line of what was read until now, of which `last` follow its last end. */
static uint64_t longest_line(const char *block, size_t n, uint64_t longest, uint64_t *last)
{
    for (const char *at = block, *end = block + n; at < end;) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        *last += (uint64_t)((newline ? newline + 1 : end) - at);
        longest = *last > longest ? *last : longest;
        *last = newline ? 0 : *last;
        at = newline ? newline + 1 : end;
    }
    return longest;
}

/* Once through, for size and checksum, and so that no line will take more memory than it may. */
static int examine(struct slu_calibrate_input *in, struct file *file, bool has_lines,
                   struct slu_err *err)
{
    int rc = open_file(file, err);
    char *block = malloc(BLOCK_BYTES);
    uint64_t longest = 0, last = 0;
    size_t n;
    if (rc == 0 && !block) {
        rc = slu_err_set(err, SLU_ENOMEM, "%s: no memory to read it", file->path);
    }
    while (rc == 0 && (n = fread(block, 1, BLOCK_BYTES, file->file)) > 0) {
        in->checksum = in->checksum * 0x9e3779b97f4a7c15u + slu_checksum(block, n);
        file->bytes += n;
        longest = longest_line(block, n, longest, &last);
        if (has_lines && longest > LINE_BYTES_MAX) {
            rc = slu_err_set(err, SLU_EFORMAT, "%s: has a line of more than %u MiB", file->path,
                             LINE_BYTES_MAX >> 20);
        }
    }
    if (rc == 0 && (ferror(file->file) || fseek(file->file, 0, SEEK_SET) != 0)) {
        rc = failed(file, err);
    }
    free(block);
    return rc;
}

int slu_calibrate_input_open(const char *prompts, const char *text, size_t piece_bytes,
                             struct slu_calibrate_input **ret_input, struct slu_err *err)
{
    struct slu_calibrate_input *in = calloc(1, sizeof *in);
    if (!in) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for texts");
    }
    in->prompts.path = prompts;
    in->text.path = text;
    in->piece_bytes = piece_bytes;
    in->piece = malloc(piece_bytes + 1);
    int rc = in->piece ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory for texts");
    rc = rc < 0 || !prompts ? rc : examine(in, &in->prompts, true, err);
    /* The same file is another input as text than as prompts. */
    in->checksum = (in->checksum ^ in->prompts.bytes) * 0x9e3779b97f4a7c15u;
    rc = rc < 0 || !text ? rc : examine(in, &in->text, false, err);
    if (rc < 0) {
        slu_calibrate_input_close(in);
        return rc;
    }
    *ret_input = in;
    return 0;
}

void slu_calibrate_input_close(struct slu_calibrate_input *in)
{
    if (!in) {
        return;
    }
    if (in->prompts.file) {
        fclose(in->prompts.file);
    }
    if (in->text.file) {
        fclose(in->text.file);
    }
    json_decref(in->object);
    free(in->line);
    free(in->piece);
    free(in);
}

static int refuse(const struct slu_calibrate_input *in, const char *what, struct slu_err *err)
{
    return slu_err_set(err, SLU_EFORMAT, "%s: line %" PRIu64 ": %s", in->prompts.path, in->n_lines,
                       what);
}

static int parse_line(struct slu_calibrate_input *in, size_t bytes, struct slu_calibrate_item *item,
                      struct slu_err *err)
{
    json_error_t why;
    json_decref(in->object);
    in->object = json_loadb(in->line, bytes, JSON_DECODE_ANY | JSON_ALLOW_NUL, &why);
    const json_t *prompt =
        json_is_object(in->object) ? json_object_get(in->object, "prompt") : in->object;
    const json_t *answer = json_object_get(in->object, "answer");
    if (!json_is_string(prompt) || (answer && !json_is_string(answer))) {
        return refuse(in,
                      in->object ? "neither a JSON string nor an object with the texts "
                                   "\"prompt\" and perhaps \"answer\""
                                 : why.text,
                      err);
    }
    *item = (struct slu_calibrate_item){
        .is_chat = true,
        .prompt = json_string_value(prompt),
        .prompt_bytes = json_string_length(prompt),
        .answer = answer ? json_string_value(answer) : NULL,
        .answer_bytes = answer ? json_string_length(answer) : 0,
    };
    return 1;
}

/* The next line that isn't empty; 0 at the end. */
static int next_prompt(struct slu_calibrate_input *in, struct slu_calibrate_item *item,
                       struct slu_err *err)
{
    ssize_t n;
    while (in->prompts.file &&
           (n = getline(&in->line, &in->line_bytes_max, in->prompts.file)) > 0) {
        in->n_lines++;
        in->done_bytes += (uint64_t)n;
        if (strspn(in->line, " \t\r\n") < (size_t)n) {
            return parse_line(in, (size_t)n, item, err);
        }
    }
    if (in->prompts.file && ferror(in->prompts.file)) {
        return failed(&in->prompts, err);
    }
    return 0;
}

/* Without a UTF-8 sequence that is cut off at the end. What isn't UTF-8 is left as it is. */
static size_t whole_characters(const char *text, size_t n)
{
    size_t back = 1;
    while (back < 4 && back < n && ((unsigned char)text[n - back] & 0xc0) == 0x80) {
        back++;
    }
    unsigned char first = n > 0 ? (unsigned char)text[n - back] : 0;
    size_t wanted = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : first >= 0xc0 ? 2 : 1;
    return wanted > back && n > back ? n - back : n;
}

/* Where to cut: behind white space in the last quarter, or not within a UTF-8 sequence. */
static size_t cut(const char *text, size_t n, size_t least)
{
    for (size_t at = n; at > least; at--) {
        if (text[at - 1] == ' ' || text[at - 1] == '\n') {
            return at;
        }
    }
    return whole_characters(text, n);
}

static int next_piece(struct slu_calibrate_input *in, struct slu_calibrate_item *item,
                      struct slu_err *err)
{
    if (!in->text.file) {
        return 0;
    }
    memmove(in->piece, in->piece + in->n_given, in->n_piece - in->n_given);
    in->n_piece -= in->n_given;
    in->n_given = 0;
    size_t room = in->piece_bytes - in->n_piece;
    size_t n = fread(in->piece + in->n_piece, 1, room, in->text.file);
    if (ferror(in->text.file)) {
        return failed(&in->text, err);
    }
    in->n_piece += n;
    in->done_bytes += n;
    in->piece[in->n_piece] = '\0';
    if (in->n_piece == 0) {
        return 0;
    }
    bool is_last = n < room;
    in->n_given = is_last ? in->n_piece : cut(in->piece, in->n_piece, in->piece_bytes * 3 / 4);
    size_t half = cut(in->piece, in->n_given / 2, in->n_given / 4);
    *item = (struct slu_calibrate_item){
        .prompt = in->piece,
        .prompt_bytes = half,
        .answer = in->piece + half,
        .answer_bytes = in->n_given - half,
    };
    return 1;
}

int slu_calibrate_input_next(struct slu_calibrate_input *in, struct slu_calibrate_item *ret_item,
                             struct slu_err *err)
{
    int rc = next_prompt(in, ret_item, err);
    return rc != 0 ? rc : next_piece(in, ret_item, err);
}

uint64_t slu_calibrate_input_done(const struct slu_calibrate_input *in)
{
    return in->done_bytes;
}

uint64_t slu_calibrate_input_bytes(const struct slu_calibrate_input *in)
{
    return in->prompts.bytes + in->text.bytes;
}

uint64_t slu_calibrate_input_checksum(const struct slu_calibrate_input *in)
{
    return in->checksum;
}
