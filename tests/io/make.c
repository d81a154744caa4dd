#include "make.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/pack_writer.h"

void make_free(struct make *make)
{
    free(make->data);
    *make = (struct make){0};
}

void make_bytes(struct make *make, const void *bytes, size_t n)
{
    if (make->bytes + n > make->room) {
        make->room = (make->bytes + n) * 2;
        make->data = realloc(make->data, make->room);
        cr_assert_not_null(make->data);
    }
    if (n > 0) {
        memcpy(make->data + make->bytes, bytes, n);
    }
    make->bytes += n;
}

void make_zeros(struct make *make, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        make_u8(make, 0);
    }
}

void make_align(struct make *make, size_t align)
{
    while (make->bytes % align != 0) {
        make_u8(make, 0);
    }
}

void make_u8(struct make *make, uint8_t value)
{
    make_bytes(make, &value, sizeof value);
}

void make_u32(struct make *make, uint32_t value)
{
    make_bytes(make, &value, sizeof value);
}

void make_u64(struct make *make, uint64_t value)
{
    make_bytes(make, &value, sizeof value);
}

void make_f32(struct make *make, float value)
{
    make_bytes(make, &value, sizeof value);
}

void make_str(struct make *make, const char *text)
{
    make_u64(make, strlen(text));
    make_bytes(make, text, strlen(text));
}

static void make_key(struct make *make, const char *key, uint32_t type)
{
    make_str(make, key);
    make_u32(make, type);
}

void make_kv_u32(struct make *make, const char *key, uint32_t value)
{
    make_key(make, key, SLU_KV_U32);
    make_u32(make, value);
}

void make_kv_str(struct make *make, const char *key, const char *value)
{
    make_key(make, key, SLU_KV_STRING);
    make_str(make, value);
}

uint64_t make_kv_all(struct make *make)
{
    static const uint8_t widths[SLU_KV_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    uint64_t n = 0;
    make_kv_str(make, "general.architecture", "olmoe");
    n++;
    for (uint32_t type = 0; type < SLU_KV_TYPES; type++) {
        char key[32];
        if (type == SLU_KV_STRING || type == SLU_KV_ARRAY) {
            continue;
        }
        /* -2, or 254 of the type's width where it is unsigned; floats 1.5; bools true. */
        uint64_t value = type == SLU_KV_BOOL ? 1 : (uint64_t)-2;
        double wide = 1.5;
        float narrow = 1.5f;
        const void *at = type == SLU_KV_F32   ? (const void *)&narrow
                         : type == SLU_KV_F64 ? (const void *)&wide
                                              : (const void *)&value;
        snprintf(key, sizeof key, "scalar.%u", type);
        make_key(make, key, type);
        make_bytes(make, at, widths[type]);
        snprintf(key, sizeof key, "array.%u", type);
        make_key(make, key, SLU_KV_ARRAY);
        make_u32(make, type);
        make_u64(make, 3);
        for (int i = 0; i < 3; i++) {
            make_bytes(make, at, widths[type]);
        }
        n += 2;
    }
    make_key(make, "tokens", SLU_KV_ARRAY);
    make_u32(make, SLU_KV_STRING);
    make_u64(make, 3);
    make_str(make, "one");
    make_str(make, "");
    make_str(make, "three");
    return n + 1;
}

void make_gguf_preamble(struct make *make, uint64_t n_tensors, uint64_t n_kvs)
{
    make_bytes(make, "GGUF", 4);
    make_u32(make, 3);
    make_u64(make, n_tensors);
    make_u64(make, n_kvs);
}

void make_gguf_tensor(struct make *make, const char *name, uint32_t type, uint32_t n_dims,
                      const uint64_t *dims, uint64_t offset)
{
    make_str(make, name);
    make_u32(make, n_dims);
    for (uint32_t d = 0; d < n_dims; d++) {
        make_u64(make, dims[d]);
    }
    make_u32(make, type);
    make_u64(make, offset);
}

void make_gguf(struct make *make)
{
    struct make kvs = {0};
    uint64_t n_kvs = make_kv_all(&kvs);
    make_gguf_preamble(make, 3, n_kvs);
    make_bytes(make, kvs.data, kvs.bytes);
    make_free(&kvs);
    make_gguf_tensor(make, "a.weight", 0, 2, (const uint64_t[]){8, 4}, 0);    /* 128 bytes */
    make_gguf_tensor(make, "b.weight", 2, 2, (const uint64_t[]){64, 2}, 128); /* 72 bytes */
    make_gguf_tensor(make, "c.weight", 99, 1, (const uint64_t[]){5}, 224);
    make_align(make, 32);
    make_zeros(make, 256);
}

static char temp_directory[64];

static void remove_temp(void)
{
    char path[400];
    DIR *directory = opendir(temp_directory);
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        snprintf(path, sizeof path, "%s/%s", temp_directory, entry->d_name);
        unlink(path);
    }
    if (directory) {
        closedir(directory);
    }
    rmdir(temp_directory);
}

const char *make_temp_path(const char *name)
{
    static char path[128];
    if (!temp_directory[0]) {
        snprintf(temp_directory, sizeof temp_directory, "/tmp/slu-test-XXXXXX");
        cr_assert_not_null(mkdtemp(temp_directory));
        atexit(remove_temp);
    }
    snprintf(path, sizeof path, "%s/%s", temp_directory, name);
    return path;
}

size_t make_temp_count(void)
{
    size_t n = 0;
    DIR *directory = opendir(temp_directory);
    cr_assert_not_null(directory);
    for (struct dirent *entry; (entry = readdir(directory));) {
        n += entry->d_name[0] != '.';
    }
    closedir(directory);
    return n;
}

void make_read_file(struct make *make, const char *path)
{
    uint8_t piece[4096];
    FILE *file = fopen(path, "rb");
    cr_assert_not_null(file, "%s", path);
    for (size_t n; (n = fread(piece, 1, sizeof piece, file)) > 0;) {
        make_bytes(make, piece, n);
    }
    fclose(file);
}

void make_write_file(const char *path, const void *bytes, size_t n)
{
    FILE *file = fopen(path, "wb");
    cr_assert_not_null(file, "%s", path);
    cr_assert_eq(fwrite(bytes, 1, n, file), n);
    cr_assert_eq(fclose(file), 0);
}

void make_fill(uint8_t *out, size_t n, uint32_t seed)
{
    uint32_t state = seed * 2654435761u + 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        /* The sum of two dice: peaked, as codes of weights are. */
        out[i] = (uint8_t)((state >> 28) + (state >> 24 & 15));
    }
}

void make_pack_file(const char *path, enum slu_codec_id codec, int is_large)
{
    struct slu_pack_writer *writer;
    struct slu_err err;
    cr_assert_eq(slu_pack_writer_create(path, codec, &writer, &err), 0, "%s", err.text);

    size_t matrix_bytes = is_large ? SLU_PACK_PIECE_BYTES + 64 : 2048;
    uint8_t *raw = malloc(matrix_bytes);
    cr_assert_not_null(raw);
    struct slu_pack_tensor matrix = {.name = "output.weight", .rows = 8, .cols = 64, .n = 1};
    make_fill(raw, matrix_bytes, 1);
    for (size_t done = 0; done < matrix_bytes; matrix.n_extents++) {
        size_t n = matrix_bytes - done;
        n = n < SLU_PACK_PIECE_BYTES ? n : SLU_PACK_PIECE_BYTES;
        cr_assert_eq(slu_pack_writer_extent(writer, raw + done, n, &err), matrix.n_extents);
        done += n;
    }
    free(raw);
    cr_assert_eq(slu_pack_writer_tensor(writer, &matrix, &err), 0);

    struct slu_pack_tensor rows = {.name = "token_embd.weight",
                                   .kind = SLU_PACK_ROWS,
                                   .rows = 5,
                                   .cols = 16,
                                   .n = 1,
                                   .row_stride = 128,
                                   .first_extent = matrix.n_extents,
                                   .n_extents = 1};
    uint8_t row[128];
    cr_assert_eq(slu_pack_writer_rows_begin(writer, &err), matrix.n_extents);
    for (uint32_t r = 0; r < rows.rows; r++) {
        make_fill(row, sizeof row, 100 + r);
        cr_assert_eq(slu_pack_writer_rows_append(writer, row, 50, &err), 0);
        cr_assert_eq(slu_pack_writer_rows_append(writer, row + 50, sizeof row - 50, &err), 0);
    }
    cr_assert_eq(slu_pack_writer_rows_end(writer, &err), 0);
    cr_assert_eq(slu_pack_writer_tensor(writer, &rows, &err), 0);

    struct slu_pack_bank bank = {.layer = 3,
                                 .n_experts = 2,
                                 .n_embd = 64,
                                 .n_ff = 60,
                                 .neurons_a_block = 32,
                                 .n_blocks = 2,
                                 .first_extent = matrix.n_extents + 1};
    uint8_t block[3000];
    for (uint32_t b = 0; b < bank.n_experts * bank.n_blocks; b++) {
        make_fill(block, sizeof block, 200 + b);
        cr_assert_eq(slu_pack_writer_extent(writer, block, sizeof block, &err),
                     bank.first_extent + b);
    }
    cr_assert_eq(slu_pack_writer_bank(writer, &bank, &err), 0);

    struct make kvs = {0};
    uint64_t n_kvs = make_kv_all(&kvs);
    int rc = slu_pack_writer_finish(writer, kvs.data, kvs.bytes, n_kvs, &err);
    cr_assert_eq(rc, 0, "%s", err.text);
    make_free(&kvs);
    slu_pack_writer_destroy(writer);
}
