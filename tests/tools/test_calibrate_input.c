#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "scratch.h"
#include "tools/calibrate_input.h"

#define PIECE 64u

static int opened(const char *prompts, const char *text, struct slu_calibrate_input **ret_input,
                  struct slu_err *err)
{
    *err = (struct slu_err){0};
    return slu_calibrate_input_open(prompts, text, PIECE, ret_input, err);
}

/* Reads text in pieces, which must add up to it; returns how many there were. */
static size_t n_pieces(const char *path, const char *text, size_t n)
{
    struct slu_calibrate_input *input;
    struct slu_calibrate_item item;
    struct slu_err err;
    size_t at = 0, n_items = 0;
    scratch_write(path, text, n);
    cr_assert_eq(opened(NULL, path, &input, &err), 0, "%s", err.text);
    for (int rc; (rc = slu_calibrate_input_next(input, &item, &err)) != 0; n_items++) {
        cr_assert_eq(rc, 1, "%s", err.text);
        size_t bytes = item.prompt_bytes + item.answer_bytes;
        cr_assert(bytes > 0 && bytes <= PIECE && at + bytes <= n);
        cr_assert_eq(memcmp(item.prompt, text + at, item.prompt_bytes), 0);
        cr_assert_eq(memcmp(item.answer, text + at + item.prompt_bytes, item.answer_bytes), 0);
        at += bytes;
    }
    cr_assert_eq(at, n);
    cr_assert_eq(slu_calibrate_input_done(input), slu_calibrate_input_bytes(input));
    slu_calibrate_input_close(input);
    return n_items;
}

/* Pieces add up to the text and are of a fair size, of text, of long words, and of bytes that are
 * nothing but the inner ones of UTF-8 sequences. */
Test(calibrate_input, pieces_are_of_a_fair_size)
{
    enum { N = 10000 };
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "text");
    char *text = malloc(N);
    memset(text, 'a', N);
    size_t n_items = n_pieces(path, text, N);
    cr_assert_leq(n_items, N / (PIECE / 2));
    memset(text, 0x80, N);
    n_items = n_pieces(path, text, N);
    cr_assert_leq(n_items, N / (PIECE / 2));
    for (int i = 0; i < N; i++) {
        text[i] = "\xf0\x9f\x90\xa2 "[i % 5];
    }
    n_items = n_pieces(path, text, N);
    cr_assert_leq(n_items, N / (PIECE / 2));
    free(text);
    scratch_finish(&scratch);
}

/* A sequence of UTF-8 isn't cut. */
Test(calibrate_input, cuts_between_characters)
{
    enum { N = 3000 };
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "text");
    char text[N];
    for (int i = 0; i < N; i++) {
        text[i] = "\xe2\x82\xac"[i % 3];
    }
    scratch_write(path, text, N);
    struct slu_calibrate_input *input;
    struct slu_calibrate_item item;
    struct slu_err err;
    cr_assert_eq(opened(NULL, path, &input, &err), 0, "%s", err.text);
    while (slu_calibrate_input_next(input, &item, &err) > 0) {
        cr_assert_eq(item.prompt_bytes % 3, 0);
        cr_assert_eq(item.answer_bytes % 3, 0);
    }
    slu_calibrate_input_close(input);
    scratch_finish(&scratch);
}

/* What can't be read twice is refused at once, however long it would be. */
Test(calibrate_input, wants_regular_files)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *fifo = scratch_path(&scratch, "fifo");
    cr_assert_eq(mkfifo(fifo, 0600), 0);
    const char *const others[] = {"/dev/zero", "/", fifo};
    struct slu_calibrate_input *input;
    struct slu_err err;
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(opened(others[i], NULL, &input, &err), SLU_EINVAL, "%s", err.text);
        cr_assert_eq(opened(NULL, others[i], &input, &err), SLU_EINVAL, "%s", err.text);
        cr_assert_not_null(strstr(err.text, others[i]), "%s", err.text);
    }
    unlink(fifo);
    cr_assert_eq(opened(fifo, NULL, &input, &err), SLU_ENOENT, "%s", err.text);
    scratch_finish(&scratch);
}

/* A line that would take more memory than a prompt may is refused before it is read. */
Test(calibrate_input, refuses_a_line_without_end)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "prompts");
    scratch_write(path, "\"a\"\n", 4);
    cr_assert_eq(truncate(path, (off_t)64 << 20), 0); /* zeros */
    struct slu_calibrate_input *input;
    struct slu_err err;
    cr_assert_eq(opened(path, NULL, &input, &err), SLU_EFORMAT, "%s", err.text);
    cr_assert_not_null(strstr(err.text, "line"), "%s", err.text);
    cr_assert_eq(opened(NULL, path, &input, &err), 0, "%s", err.text);
    slu_calibrate_input_close(input);
    scratch_finish(&scratch);
}
