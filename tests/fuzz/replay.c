/*
 * Runs every file of a corpus through a fuzz target, whole and cut short at a few lengths: what
 * the fuzzer once found must stay found by an ordinary build of the tests.
 *
 *     replay_NAME FOLDER
 *
 * Exit status 77 tells meson that there was nothing to replay.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv) __attribute__((weak));

#define CUTS 16

/* The whole input is a heap block of exactly its size, so that the sanitizer sees each byte read
 * past its end. */
static void run_copy(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);
    if (!copy) {
        fprintf(stderr, "out of memory for an input of %zu bytes\n", size);
        exit(1);
    }
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static uint8_t *read_file(const char *path, size_t *ret_size)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0) {
        perror(path);
        exit(1);
    }
    long size = ftell(file);
    rewind(file);
    uint8_t *data = malloc(size > 0 ? (size_t)size : 1);
    if (size < 0 || !data || fread(data, 1, (size_t)size, file) != (size_t)size) {
        perror(path);
        exit(1);
    }
    fclose(file);
    *ret_size = (size_t)size;
    return data;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
        return 2;
    }
    DIR *folder = opendir(argv[1]);
    if (!folder) {
        fprintf(stderr, "no corpus at %s\n", argv[1]);
        return 77;
    }
    if (LLVMFuzzerInitialize) {
        LLVMFuzzerInitialize(&argc, &argv);
    }
    unsigned n_files = 0;
    run_copy((const uint8_t *)"", 0);
    for (struct dirent *entry; (entry = readdir(folder));) {
        if (entry->d_name[0] == '.') {
            continue;
        }
        char path[4096];
        if (snprintf(path, sizeof path, "%s/%s", argv[1], entry->d_name) >= (int)sizeof path) {
            fprintf(stderr, "the name of %s is too long\n", entry->d_name);
            return 1;
        }
        size_t size;
        uint8_t *data = read_file(path, &size);
        printf("%s, %zu bytes\n", entry->d_name, size);
        fflush(stdout); /* so that the last line before a crash names the input */
        for (size_t cut = 0; cut <= CUTS; cut++) {
            run_copy(data, size / CUTS * cut + (cut == CUTS ? size % CUTS : 0));
        }
        free(data);
        n_files++;
    }
    closedir(folder);
    printf("%u inputs replayed\n", n_files);
    return n_files ? 0 : 77;
}
