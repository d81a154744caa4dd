/* Where files are put: what is replaced and what isn't, and what is gone on with. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/place.h"
#include "scratch.h"

static struct slu_err err;

/* A new file is made beside the old one, with the rights of any new file. */
Test(place, makes_a_file_beside)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "out");
    scratch_write(path, "old", 3);
    umask(027);
    char *temp;
    int fd = slu_place_open(path, &temp, &err);
    cr_assert_geq(fd, 0, "%s", err.text);
    struct stat st;
    cr_assert_eq(fstat(fd, &st), 0);
    cr_assert_eq(st.st_mode & 0777, 0640);
    cr_assert_eq(write(fd, "new", 3), 3);
    close(fd);
    cr_assert_eq(strncmp(temp, path, strlen(path)), 0);
    cr_assert_eq(scratch_count(&scratch), 2);
    size_t bytes;
    uint8_t *old = scratch_read(path, &bytes);
    cr_assert(bytes == 3 && memcmp(old, "old", 3) == 0);
    free(old);
    unlink(temp);
    free(temp);
    scratch_finish(&scratch);
}

/* A probe leaves nothing; folders that aren't there, and what is no file, are told. */
Test(place, probes)
{
    struct scratch scratch;
    scratch_init(&scratch);
    cr_assert_eq(slu_place_probe(scratch_path(&scratch, "out"), &err), 0, "%s", err.text);
    cr_assert_eq(scratch_count(&scratch), 0);
    cr_assert_eq(slu_place_probe(scratch_path(&scratch, "none/out"), &err), SLU_EIO);
    cr_assert(strstr(err.text, "none/out: cannot be written: No such file"), "%s", err.text);
    cr_assert_eq(slu_place_probe(scratch.folder, &err), SLU_EIO);
    cr_assert(strstr(err.text, "cannot be written: Is a directory"), "%s", err.text);
    const char *pipe = scratch_path(&scratch, "pipe");
    cr_assert_eq(mkfifo(pipe, 0666), 0);
    cr_assert_eq(slu_place_probe(pipe, &err), SLU_EIO);
    cr_assert(strstr(err.text, "is there and not a file"), "%s", err.text);
    cr_assert_eq(scratch_count(&scratch), 1);
    scratch_finish(&scratch);
}

/* Nothing, an empty file and one's own are gone on with; others' files, links and pipes are not
 * touched. */
Test(place, knows_what_was_left)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char magic[] = "MAGICNUM";
    const char *path = scratch_path(&scratch, "out.part");
    cr_assert_eq(slu_place_check_left(path, magic, &err), 0);
    scratch_write(path, "", 0);
    cr_assert_eq(slu_place_check_left(path, magic, &err), 0);
    scratch_write(path, "MAGICNUM and more", 17);
    cr_assert_eq(slu_place_check_left(path, magic, &err), 0);
    scratch_write(path, "MAGICNU", 7);
    cr_assert_eq(slu_place_check_left(path, magic, &err), SLU_EIO);
    scratch_write(path, "precious text", 13);
    cr_assert_eq(slu_place_check_left(path, magic, &err), SLU_EIO);
    cr_assert(strstr(err.text, "out.part: is in the way"), "%s", err.text);

    const char *link = scratch_path(&scratch, "link.part");
    cr_assert_eq(symlink("out.part", link), 0);
    cr_assert_eq(slu_place_check_left(link, magic, &err), SLU_EIO);
    const char *pipe = scratch_path(&scratch, "pipe.part");
    cr_assert_eq(mkfifo(pipe, 0666), 0);
    cr_assert_eq(slu_place_check_left(pipe, magic, &err), SLU_EIO);
    scratch_finish(&scratch);
}
