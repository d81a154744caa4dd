#include <criterion/criterion.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/pack_writer.h"
#include "make.h"

static struct slu_pack_writer *writer;
static struct slu_err err;

static void create(const char *path, enum slu_codec_id codec)
{
    int rc = slu_pack_writer_create(path, codec, &writer, &err);
    cr_assert_eq(rc, 0, "%s", err.text);
}

/* One tensor of one extent, so that finish has something to finish. */
static void add_tensor(const char *name)
{
    uint8_t raw[256];
    make_fill(raw, sizeof raw, 1);
    struct slu_pack_tensor tensor = {.rows = 1, .cols = 64, .n = 1, .n_extents = 1};
    strcpy(tensor.name, name);
    int64_t number = slu_pack_writer_extent(writer, raw, sizeof raw, &err);
    cr_assert_geq(number, 0, "%s", err.text);
    tensor.first_extent = (uint32_t)number;
    cr_assert_eq(slu_pack_writer_tensor(writer, &tensor, &err), 0);
}

static int finish(void)
{
    struct make kvs = {0};
    make_kv_u32(&kvs, "key", 1);
    int rc = slu_pack_writer_finish(writer, kvs.data, kvs.bytes, 1, &err);
    make_free(&kvs);
    return rc;
}

/* A writer given up before it is finished leaves no file, under no name. */
Test(pack_writer, abandoned_leaves_nothing)
{
    const char *path = make_temp_path("pack.slu");
    create(path, SLU_CODEC_ZSTD);
    add_tensor("a");
    cr_assert_eq(make_temp_count(), 1, "the temporary file is there");
    cr_assert_neq(access(path, F_OK), 0, "under another name");
    slu_pack_writer_destroy(writer);
    cr_assert_eq(make_temp_count(), 0);
    slu_pack_writer_destroy(NULL);
}

/* An older pack stands untouched until the new one is whole, and is then replaced. */
Test(pack_writer, replaces_at_once)
{
    const char *path = make_temp_path("pack.slu");
    make_write_file(path, "old", 3);
    create(path, SLU_CODEC_RAW);
    add_tensor("a");
    slu_pack_writer_destroy(writer);
    struct make old = {0};
    make_read_file(&old, path);
    cr_assert_eq(old.bytes, 3);
    make_free(&old);

    create(path, SLU_CODEC_RAW);
    add_tensor("a");
    cr_assert_eq(finish(), 0, "%s", err.text);
    slu_pack_writer_destroy(writer);
    cr_assert_eq(make_temp_count(), 1);
    struct slu_pack *pack;
    cr_assert_eq(slu_pack_open_file(path, &pack, &err), 0, "%s", err.text);
    slu_pack_close(pack);
}

/* When the file may not grow (as on a full disk) there is a sentence, the temporary file goes, the
 * final name is as it was, and later calls are refused. */
Test(pack_writer, full_disk)
{
    const char *path = make_temp_path("pack.slu");
    make_write_file(path, "old", 3);
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {1u << 20, 1u << 20};
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    create(path, SLU_CODEC_RAW);
    const size_t bytes = 512u << 10;
    uint8_t *raw = calloc(bytes, 1);
    int64_t rc = 0;
    for (int i = 0; i < 8 && rc >= 0; i++) {
        rc = slu_pack_writer_extent(writer, raw, bytes, &err);
    }
    cr_assert_eq(rc, SLU_EIO);
    cr_assert_not_null(strstr(err.text, path), "%s", err.text);
    cr_assert_not_null(strstr(err.text, "writing failed"), "%s", err.text);
    cr_assert_eq(make_temp_count(), 1);
    cr_assert_eq(slu_pack_writer_extent(writer, raw, bytes, &err), SLU_EIO);
    cr_assert_eq(slu_pack_writer_rows_begin(writer, &err), SLU_EIO);
    cr_assert_eq(slu_pack_writer_tensor(writer, &(struct slu_pack_tensor){0}, &err), SLU_EIO);
    cr_assert_eq(slu_pack_writer_bank(writer, &(struct slu_pack_bank){0}, &err), SLU_EIO);
    cr_assert_eq(finish(), SLU_EIO);
    slu_pack_writer_destroy(writer);
    free(raw);
    struct make old = {0};
    make_read_file(&old, path);
    cr_assert_eq(old.bytes, 3);
    make_free(&old);
}

/* Places that cannot be written to are refused at the start, with the name. */
Test(pack_writer, refuses_bad_places)
{
    struct slu_pack_writer *none;
    const char *path = make_temp_path("absent/pack.slu");
    cr_assert_eq(slu_pack_writer_create(path, SLU_CODEC_RAW, &none, &err), SLU_EIO);
    cr_assert_not_null(strstr(err.text, path), "%s", err.text);
    cr_assert_eq(slu_pack_writer_create(make_temp_path(""), SLU_CODEC_RAW, &none, &err), SLU_EIO);
    cr_assert_eq(slu_pack_writer_create(make_temp_path("p"), SLU_CODECS, &none, &err), SLU_EINVAL);
    cr_assert_eq(make_temp_count(), 0);
}

/* Compression is used only where it pays by 1/32, and not at all when raw is asked for. */
Test(pack_writer, stores_raw_where_nothing_is_saved)
{
    const size_t bytes = 100000;
    uint8_t *noise = malloc(bytes), *codes = malloc(bytes);
    uint64_t state = 1;
    for (size_t i = 0; i < bytes; i++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        noise[i] = (uint8_t)(state >> 56);
    }
    make_fill(codes, bytes, 1);
    create(make_temp_path("pack.slu"), SLU_CODEC_ZSTD);
    struct slu_pack_tensor tensor = {.name = "t", .rows = 1, .cols = 64, .n = 1, .n_extents = 1};
    cr_assert_eq(slu_pack_writer_extent(writer, noise, bytes, &err), 0);
    cr_assert_eq(slu_pack_writer_stored_bytes(writer), bytes);
    cr_assert_eq(slu_pack_writer_tensor(writer, &tensor, &err), 0);
    cr_assert_eq(slu_pack_writer_extent(writer, codes, bytes, &err), 1);
    cr_assert_lt(slu_pack_writer_stored_bytes(writer), 2 * bytes - bytes / 32);
    cr_assert_eq(slu_pack_writer_raw_bytes(writer), 2 * bytes);
    tensor.name[0] = 'u';
    tensor.first_extent = 1;
    cr_assert_eq(slu_pack_writer_tensor(writer, &tensor, &err), 0);
    cr_assert_eq(finish(), 0, "%s", err.text);
    slu_pack_writer_destroy(writer);
    struct slu_pack *pack;
    cr_assert_eq(slu_pack_open_file(make_temp_path("pack.slu"), &pack, &err), 0);
    cr_assert_eq(pack->extents[0].codec, SLU_CODEC_RAW);
    cr_assert_eq(pack->extents[1].codec, SLU_CODEC_ZSTD);
    slu_pack_close(pack);
    free(noise);
    free(codes);
}

/* Records that the reader would refuse keep the pack from getting its name. */
Test(pack_writer, refuses_what_would_not_read_back)
{
    const char *path = make_temp_path("pack.slu");
    for (int i = 0; i < 4; i++) {
        create(path, SLU_CODEC_RAW);
        struct slu_pack_bank bank = {
            .n_experts = 2, .n_embd = 8, .n_ff = 8, .n_blocks = 1, .neurons_a_block = 8};
        if (i != 2) {
            add_tensor("a");
        }
        if (i == 0) {
            add_tensor("a"); /* twice */
        } else if (i == 1) {
            cr_assert_eq(slu_pack_writer_bank(writer, &bank, &err), 0); /* of no extents */
        } else if (i == 3) {
            cr_assert_eq(slu_pack_writer_extent(writer, "x", 1, &err), 1); /* of no tensor */
        }
        cr_assert_lt(finish(), 0, "%d", i);
        cr_assert_neq(err.text[0], '\0');
        slu_pack_writer_destroy(writer);
        cr_assert_eq(make_temp_count(), 0);
    }
    create(path, SLU_CODEC_RAW);
    add_tensor("a");
    cr_assert_eq(slu_pack_writer_finish(writer, "key", 3, 1, &err), SLU_EFORMAT);
    slu_pack_writer_destroy(writer);
    cr_assert_eq(make_temp_count(), 0);
}

/* The same content gives the same bytes, and every gap between extents is zero. */
Test(pack_writer, is_reproducible)
{
    struct make one = {0}, two = {0};
    make_pack_file(make_temp_path("one.slu"), SLU_CODEC_ZSTD, 1);
    make_pack_file(make_temp_path("two.slu"), SLU_CODEC_ZSTD, 1);
    make_read_file(&one, make_temp_path("one.slu"));
    make_read_file(&two, make_temp_path("two.slu"));
    cr_assert_eq(one.bytes, two.bytes);
    cr_assert_eq(memcmp(one.data, two.data, one.bytes), 0);
    cr_assert_eq(one.bytes % SLU_PACK_ALIGN, 0);
    struct slu_pack *pack;
    cr_assert_eq(slu_pack_open_file(make_temp_path("one.slu"), &pack, &err), 0);
    for (uint32_t i = 0; i < pack->header.n_extents; i++) {
        const struct slu_extent *extent = &pack->extents[i];
        uint64_t at = extent->offset + extent->stored_bytes;
        while (extent->stored_bytes > 0 && at % SLU_PACK_ALIGN != 0) {
            cr_assert_eq(one.data[at++], 0);
        }
    }
    slu_pack_close(pack);
    make_free(&one);
    make_free(&two);
}

/* A pack of more than two write windows (pages pushed out and dropped meanwhile) reads back. */
Test(pack_writer, pushes_windows_out)
{
    const size_t bytes = 3u << 20;
    const uint32_t n = 24;
    uint8_t *raw = malloc(bytes), *out = malloc(bytes);
    const char *path = make_temp_path("pack.slu");
    create(path, SLU_CODEC_RAW);
    struct slu_pack_bank bank = {
        .n_experts = n, .n_embd = 8, .n_ff = 8, .n_blocks = 1, .neurons_a_block = 8};
    for (uint32_t i = 0; i < n; i++) {
        make_fill(raw, bytes, i);
        cr_assert_eq(slu_pack_writer_extent(writer, raw, bytes, &err), i);
    }
    cr_assert_eq(slu_pack_writer_bank(writer, &bank, &err), 0);
    cr_assert_eq(finish(), 0, "%s", err.text);
    slu_pack_writer_destroy(writer);
    struct slu_pack *pack;
    struct slu_decoder *decoder;
    cr_assert_eq(slu_pack_open_file(path, &pack, &err), 0);
    cr_assert_eq(slu_decoder_create(&decoder, &err), 0);
    for (uint32_t i = 0; i < n; i++) {
        cr_assert_eq(slu_pack_read_extent(pack, decoder, i, NULL, out, &err), 0);
        make_fill(raw, bytes, i);
        cr_assert_eq(memcmp(raw, out, bytes), 0);
    }
    slu_decoder_destroy(decoder);
    slu_pack_close(pack);
    free(raw);
    free(out);
}
