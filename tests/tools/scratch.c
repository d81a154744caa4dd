#include "scratch.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

void scratch_init(struct scratch *scratch)
{
    snprintf(scratch->folder, sizeof scratch->folder, "/tmp/slu-test-XXXXXX");
    cr_assert(mkdtemp(scratch->folder));
}

void scratch_finish(struct scratch *scratch)
{
    DIR *folder = opendir(scratch->folder);
    cr_assert(folder);
    for (struct dirent *entry; (entry = readdir(folder));) {
        unlinkat(dirfd(folder), entry->d_name, 0);
    }
    closedir(folder);
    cr_assert_eq(rmdir(scratch->folder), 0);
}

const char *scratch_path(const struct scratch *scratch, const char *name)
{
    static char paths[8][256];
    static unsigned turn;
    char *path = paths[turn++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", scratch->folder, name);
    return path;
}

size_t scratch_count(const struct scratch *scratch)
{
    size_t n = 0;
    DIR *folder = opendir(scratch->folder);
    cr_assert(folder);
    for (struct dirent *entry; (entry = readdir(folder));) {
        n += entry->d_name[0] != '.';
    }
    closedir(folder);
    return n;
}

uint8_t *scratch_read(const char *path, size_t *ret_bytes)
{
    FILE *file = fopen(path, "rb");
    cr_assert(file, "%s", path);
    cr_assert_eq(fseek(file, 0, SEEK_END), 0);
    long bytes = ftell(file);
    cr_assert_geq(bytes, 0);
    rewind(file);
    uint8_t *data = malloc((size_t)bytes + 1);
    cr_assert(data);
    cr_assert_eq(fread(data, 1, (size_t)bytes, file), (size_t)bytes);
    fclose(file);
    *ret_bytes = (size_t)bytes;
    return data;
}

void scratch_write(const char *path, const void *data, size_t bytes)
{
    FILE *file = fopen(path, "wb");
    cr_assert(file, "%s", path);
    cr_assert_eq(fwrite(data, 1, bytes, file), bytes);
    cr_assert_eq(fclose(file), 0);
}
