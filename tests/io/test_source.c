#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/source.h"
#include "make.h"

/* A file of several megabytes reads back whole, in parts and across the sizes at which the page
 * cache is dropped. */
Test(source, reads_file)
{
    const size_t bytes = (9u << 20) + 123;
    uint8_t *wanted = malloc(bytes), *got = malloc(bytes);
    make_fill(wanted, bytes, 7);
    const char *path = make_temp_path("file");
    make_write_file(path, wanted, bytes);
    struct slu_source *source;
    struct slu_err err;
    cr_assert_eq(slu_source_open_file(path, &source, &err), 0);
    cr_assert_eq(source->size_bytes, bytes);
    cr_assert_str_eq(source->name, path);
    cr_assert_eq(source->read_at(source, 0, got, bytes, &err), 0);
    cr_assert_eq(memcmp(wanted, got, bytes), 0);
    static const size_t parts[][2] = {{0, 0}, {1, 1}, {4095, 2}, {77777, 2u << 20}};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        cr_assert_eq(source->read_at(source, parts[i][0], got, parts[i][1], &err), 0);
        cr_assert_eq(memcmp(wanted + parts[i][0], got, parts[i][1]), 0);
    }
    slu_source_destroy(source);
    free(wanted);
    free(got);
}

/* Ranges past the end are refused by both kinds of source, even where offset + bytes wraps. */
Test(source, refuses_past_end)
{
    uint8_t bytes[10] = {0}, got[16];
    const char *path = make_temp_path("file");
    make_write_file(path, bytes, sizeof bytes);
    struct slu_source *sources[2];
    struct slu_err err;
    cr_assert_eq(slu_source_open_file(path, &sources[0], &err), 0);
    cr_assert_eq(slu_source_open_memory(bytes, sizeof bytes, "bytes", &sources[1]), 0);
    for (int i = 0; i < 2; i++) {
        struct slu_source *source = sources[i];
        cr_assert_eq(source->read_at(source, 0, got, 10, &err), 0);
        cr_assert_eq(source->read_at(source, 10, got, 0, &err), 0);
        cr_assert_eq(source->read_at(source, 0, got, 11, &err), SLU_EIO);
        cr_assert_not_null(strstr(err.text, source->name));
        cr_assert_eq(source->read_at(source, 11, got, 0, NULL), SLU_EIO);
        cr_assert_eq(source->read_at(source, UINT64_MAX, got, 2, NULL), SLU_EIO);
        cr_assert_eq(source->read_at(source, 2, got, SIZE_MAX, NULL), SLU_EIO);
        slu_source_destroy(source);
    }
    slu_source_destroy(NULL);
}

/* A file that shrinks after it was opened gives an error, not stale or missing bytes. */
Test(source, notices_shrinking)
{
    uint8_t bytes[100] = {0};
    const char *path = make_temp_path("file");
    make_write_file(path, bytes, sizeof bytes);
    struct slu_source *source;
    struct slu_err err;
    cr_assert_eq(slu_source_open_file(path, &source, &err), 0);
    cr_assert_eq(truncate(path, 50), 0);
    cr_assert_eq(source->read_at(source, 0, bytes, 50, &err), 0);
    cr_assert_eq(source->read_at(source, 0, bytes, 100, &err), SLU_EIO);
    cr_assert_not_null(strstr(err.text, "byte 50"), "%s", err.text);
    slu_source_destroy(source);
}

/* Absent files, directories and pipes are refused, each with its reason and without waiting. */
Test(source, refuses_what_is_no_file)
{
    struct slu_source *source;
    struct slu_err err;
    cr_assert_eq(slu_source_open_file(make_temp_path("absent"), &source, &err), SLU_ENOENT);
    cr_assert_not_null(strstr(err.text, "absent"));
    cr_assert_eq(slu_source_open_file(make_temp_path(""), &source, &err), SLU_EIO);
    cr_assert_not_null(strstr(err.text, "directory"));
    cr_assert_eq(mkfifo(make_temp_path("pipe"), 0600), 0);
    cr_assert_eq(slu_source_open_file(make_temp_path("pipe"), &source, &err), SLU_EIO);
}
