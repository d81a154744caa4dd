#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/codec.h"
#include "tools/importance.h"

static const float q[4] = {1, 2, 0, 4}, down0[3] = {5, 6, 7}, down2[3] = {8, 9, 10};

static const struct slu_importance_entry entries[] = {
    {"blk.0.attn_q.weight", SLU_IMPORTANCE_NO_EXPERT, 4, q},
    {"blk.0.ffn_down_exps.weight", 2, 3, down2},
    {"blk.0.ffn_down_exps.weight", 0, 3, down0},
};

static void temp_path(char path[64])
{
    snprintf(path, 64, "importance-%ld.tmp", (long)getpid());
}

/* What is written is read back, found by name and expert, and by nothing else. */
Test(importance, round_trip)
{
    char path[64];
    temp_path(path);
    struct slu_err err = {0};
    cr_assert_eq(slu_importance_write(path, entries, 3, &err), 0, "%s", err.text);
    struct slu_importance *imp;
    cr_assert_eq(slu_importance_read(path, &imp, &err), 0, "%s", err.text);
    unlink(path);
    cr_assert_eq(slu_importance_entries(imp), 3);
    for (int i = 0; i < 3; i++) {
        const float *got =
            slu_importance_find(imp, entries[i].name, entries[i].expert, entries[i].n_cols);
        cr_assert_not_null(got);
        cr_assert_eq(memcmp(got, entries[i].moments, entries[i].n_cols * sizeof *got), 0);
    }
    cr_assert_null(slu_importance_find(imp, "blk.0.ffn_down_exps.weight", 1, 3));
    cr_assert_null(slu_importance_find(imp, "blk.0.ffn_down_exps.weight", 0, 4));
    cr_assert_null(slu_importance_find(imp, "blk.0.attn_k.weight", SLU_IMPORTANCE_NO_EXPERT, 4));
    slu_importance_destroy(imp);
}

/* Moments and names that the format cannot hold, and entries that come twice, are refused. */
Test(importance, refuses_to_write)
{
    char path[64];
    temp_path(path);
    const float bad[3] = {1, NAN, 1}, negative[1] = {-1};
    const struct slu_importance_entry wrong[] = {
        {"a", 0, 3, bad}, {"a", 0, 1, negative}, {"", 0, 1, q}, {"a b", 0, 1, q}, {"a", 0, 0, q},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        cr_assert_eq(slu_importance_write(path, &wrong[i], 1, NULL), SLU_EINVAL, "%zu", i);
    }
    const struct slu_importance_entry twice[2] = {entries[0], entries[0]};
    cr_assert_eq(slu_importance_write(path, twice, 2, NULL), SLU_EINVAL);
    cr_assert_neq(access(path, F_OK), 0);
}

static uint8_t *file_bytes(size_t *ret_n)
{
    char path[64];
    temp_path(path);
    cr_assert_eq(slu_importance_write(path, entries, 3, NULL), 0);
    FILE *file = fopen(path, "rb");
    uint8_t *data = malloc(4096);
    *ret_n = fread(data, 1, 4096, file);
    fclose(file);
    unlink(path);
    return data;
}

/* A copy of exactly n bytes, so that a sanitizer sees any read past them. */
static int parse_copy(const uint8_t *data, size_t n)
{
    uint8_t *copy = malloc(n ? n : 1);
    memcpy(copy, data, n);
    struct slu_importance *imp = NULL;
    int rc = slu_importance_parse("a file", copy, n, &imp, NULL);
    slu_importance_destroy(imp);
    free(copy);
    return rc;
}

/* Every truncation and every changed byte is noticed. */
Test(importance, notices_damage)
{
    size_t n;
    uint8_t *data = file_bytes(&n);
    cr_assert_eq(parse_copy(data, n), 0);
    for (size_t i = 0; i < n; i++) {
        cr_assert_lt(parse_copy(data, i), 0, "cut to %zu", i);
        data[i] ^= 0x55;
        cr_assert_lt(parse_copy(data, n), 0, "byte %zu", i);
        data[i] ^= 0x55;
    }
    free(data);
}

/* A name's bytes behind its first zero are zero too: otherwise one name could come twice. */
Test(importance, refuses_names_with_a_tail)
{
    size_t n;
    uint8_t *data = file_bytes(&n);
    for (size_t at = 24 + 20; at < 24 + 64; at++) { /* "blk.0.attn_q.weight" has 19 */
        data[at] = 'x';
        uint64_t checksum = slu_checksum(data, n - 8);
        memcpy(data + n - 8, &checksum, sizeof checksum);
        cr_assert_eq(parse_copy(data, n), SLU_EFORMAT, "byte %zu", at);
        data[at] = 0;
    }
    free(data);
}

/* Files of no size and of a size beyond all memory are refused by their first bytes. */
Test(importance, takes_no_memory_for_what_it_is_not)
{
    char path[64];
    size_t n;
    temp_path(path);
    uint8_t *data = file_bytes(&n);
    struct slu_importance *imp;
    for (int i = 0; i < 4; i++) {
        uint64_t bytes = i == 0 ? 0 : i == 1 ? 3 : (uint64_t)1 << 40;
        FILE *file = fopen(path, "wb");
        if (i == 3) { /* the head is one that claims all of it */
            memcpy(data + 16, &bytes, sizeof bytes);
            fwrite(data, 1, 24, file);
        }
        fclose(file);
        cr_assert_eq(truncate(path, (off_t)bytes), 0); /* holes */
        struct slu_err err = {0};
        int rc = slu_importance_read(path, &imp, &err);
        cr_assert_eq(rc, i == 3 ? SLU_EUNSUP : SLU_EFORMAT, "%d: %s", i, err.text);
    }
    unlink(path);
    free(data);
}

/* Numbers that lie under a checksum that doesn't are refused or harmless, whatever they are. */
Test(importance, survives_lies)
{
    size_t n;
    uint8_t *data = file_bytes(&n);
    for (size_t i = 8; i + 4 <= n - 8; i += 4) {
        uint32_t was;
        memcpy(&was, data + i, sizeof was);
        static const uint32_t lies[] = {0, 1, 5, 0x7fffffff, 0x80000000, 0xffffffff};
        for (size_t k = 0; k < sizeof lies / sizeof *lies; k++) {
            memcpy(data + i, &lies[k], sizeof lies[k]);
            uint64_t checksum = slu_checksum(data, n - 8);
            memcpy(data + n - 8, &checksum, sizeof checksum);
            int rc = parse_copy(data, n);
            cr_assert(rc == 0 || rc == SLU_EFORMAT || rc == SLU_EUNSUP);
            cr_assert(rc < 0 || i >= 24 || lies[k] == was, "the head at %zu", i);
        }
        memcpy(data + i, &was, sizeof was);
    }
    free(data);
}
