#include <criterion/criterion.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "faulty.h"
#include "io/gguf.h"
#include "make.h"

/* Opens a copy on the heap of exactly these bytes, so that a sanitizer sees any read past them. */
static int open_bytes(const uint8_t *bytes, size_t n, struct slu_gguf **ret_gguf,
                      struct slu_err *err)
{
    uint8_t *copy = malloc(n ? n : 1);
    if (n > 0) {
        memcpy(copy, bytes, n);
    }
    struct slu_source *source;
    cr_assert_eq(slu_source_open_memory(copy, n, "bytes.gguf", &source), 0);
    err->text[0] = '\0';
    int rc = slu_gguf_open(source, ret_gguf, err);
    slu_source_destroy(source);
    free(copy);
    return rc;
}

/* Asserts that what has been made is refused with a sentence that has `part` in it; frees it. */
static void refused(struct make *make, int code, const char *part)
{
    struct slu_gguf *gguf;
    struct slu_err err;
    int rc = open_bytes(make->data, make->bytes, &gguf, &err);
    cr_assert_eq(rc, code, "%s: %d %s", part, rc, err.text);
    cr_assert_eq(err.code, code);
    cr_assert_not_null(strstr(err.text, part), "%s: %s", part, err.text);
    cr_assert_not_null(strstr(err.text, "bytes.gguf"), "%s", err.text);
    cr_assert_null(strpbrk(err.text, "\n\r\033"), "%s", err.text);
    make_free(make);
}

/* Pairs of every type come out with their values, and arrays item by item. */
Test(gguf, reads_pairs)
{
    struct make make = {0};
    make_gguf(&make);
    struct slu_gguf *gguf;
    struct slu_err err;
    cr_assert_eq(open_bytes(make.data, make.bytes, &gguf, &err), 0, "%s", err.text);
    static const uint64_t unsigneds[][2] = {{SLU_KV_U8, 0xfe},
                                            {SLU_KV_U16, 0xfffe},
                                            {SLU_KV_U32, 0xfffffffe},
                                            {SLU_KV_U64, 0xfffffffffffffffe}};
    static const int signeds[] = {SLU_KV_I8, SLU_KV_I16, SLU_KV_I32, SLU_KV_I64};
    static const int floats[] = {SLU_KV_F32, SLU_KV_F64};
    char key[32];
    for (int i = 0; i < 4; i++) {
        uint64_t u = 7;
        snprintf(key, sizeof key, "scalar.%d", (int)unsigneds[i][0]);
        cr_assert_eq(slu_kvs_u64(&gguf->kvs, key, &u, &err), 0);
        cr_assert_eq(u, unsigneds[i][1]);
        snprintf(key, sizeof key, "array.%d", (int)unsigneds[i][0]);
        const struct slu_kv *array = slu_kvs_find(&gguf->kvs, key);
        cr_assert_eq(array->n_items, 3);
        cr_assert_eq((uint64_t)slu_kv_item_i64(array, 2), unsigneds[i][1]);

        snprintf(key, sizeof key, "scalar.%d", signeds[i]);
        cr_assert_eq(slu_kvs_find(&gguf->kvs, key)->value.i, -2);
        cr_assert_eq(slu_kvs_u64(&gguf->kvs, key, &u, &err), SLU_EFORMAT);
        cr_assert_eq(u, unsigneds[i][1], "untouched on failure");
        snprintf(key, sizeof key, "array.%d", signeds[i]);
        cr_assert_eq(slu_kv_item_i64(slu_kvs_find(&gguf->kvs, key), 1), -2);
        cr_assert_eq(slu_kv_item_f64(slu_kvs_find(&gguf->kvs, key), 1), -2.0);
    }
    for (int i = 0; i < 2; i++) {
        double f = 0;
        snprintf(key, sizeof key, "scalar.%d", floats[i]);
        cr_assert_eq(slu_kvs_f64(&gguf->kvs, key, &f, &err), 0);
        cr_assert_eq(f, 1.5);
        snprintf(key, sizeof key, "array.%d", floats[i]);
        cr_assert_eq(slu_kv_item_f64(slu_kvs_find(&gguf->kvs, key), 2), 1.5);
    }
    slu_gguf_close(gguf);
    make_free(&make);
}

/* Typed look-ups convert what can be converted and tell absent keys from keys of another type. */
Test(gguf, looks_up_by_type)
{
    struct make make = {0};
    make_gguf(&make);
    struct slu_gguf *gguf;
    struct slu_err err;
    cr_assert_eq(open_bytes(make.data, make.bytes, &gguf, &err), 0, "%s", err.text);
    const struct slu_kvs *kvs = &gguf->kvs;
    uint64_t u = 1;
    double f = 0;
    bool b = false;
    struct slu_str s;
    cr_assert_eq(slu_kvs_f64(kvs, "scalar.5", &f, &err), 0); /* i32 */
    cr_assert_eq(f, -2.0);
    cr_assert_eq(slu_kvs_bool(kvs, "scalar.7", &b, &err), 0);
    cr_assert(b);
    cr_assert_eq(slu_kvs_str(kvs, "general.architecture", &s, &err), 0);
    cr_assert_eq(s.len, 5);
    cr_assert_eq(memcmp(s.at, "olmoe", 5), 0);
    cr_assert_eq(slu_kvs_u64(kvs, "absent", &u, &err), SLU_ENOENT);
    cr_assert_not_null(strstr(err.text, "absent"));
    cr_assert_eq(slu_kvs_f64(kvs, "absent", &f, &err), SLU_ENOENT);
    cr_assert_eq(slu_kvs_bool(kvs, "absent", &b, NULL), SLU_ENOENT);
    cr_assert_eq(slu_kvs_str(kvs, "absent", &s, NULL), SLU_ENOENT);
    cr_assert_eq(slu_kvs_u64(kvs, "scalar.6", &u, &err), SLU_EFORMAT);
    cr_assert_eq(slu_kvs_u64(kvs, "scalar.7", &u, &err), SLU_EFORMAT);
    cr_assert_eq(slu_kvs_f64(kvs, "tokens", &f, &err), SLU_EFORMAT);
    cr_assert_eq(slu_kvs_bool(kvs, "scalar.4", &b, &err), SLU_EFORMAT);
    cr_assert_eq(slu_kvs_str(kvs, "scalar.4", &s, &err), SLU_EFORMAT);
    cr_assert_eq(u, 1);

    const char *const wanted[] = {"one", "", "three"};
    size_t cursor = 0, n = 0;
    while (slu_kv_next_str(slu_kvs_find(kvs, "tokens"), &cursor, &s)) {
        cr_assert_lt(n, 3);
        cr_assert_eq(s.len, strlen(wanted[n]));
        cr_assert_eq(memcmp(s.at, wanted[n], s.len), 0);
        n++;
    }
    cr_assert_eq(n, 3);
    slu_gguf_close(gguf);
    make_free(&make);
}

/* Tensors come out with shape, type, size and place in the file; types of unknown size too. */
Test(gguf, reads_tensors)
{
    struct make make = {0};
    make_gguf(&make);
    struct slu_gguf *gguf;
    struct slu_err err;
    cr_assert_eq(open_bytes(make.data, make.bytes, &gguf, &err), 0, "%s", err.text);
    cr_assert_eq(gguf->n_tensors, 3);
    cr_assert_eq(gguf->data_offset, make.bytes - 256);
    const struct slu_gguf_tensor *b = slu_gguf_find(gguf, "b.weight");
    cr_assert_not_null(b);
    cr_assert_eq(b->type, 2);
    cr_assert_eq(b->n_dims, 2);
    cr_assert_eq(b->dims[0], 64);
    cr_assert_eq(b->dims[1], 2);
    cr_assert_eq(b->dims[2], 1);
    cr_assert_eq(b->bytes, 72);
    cr_assert_eq(b->offset, gguf->data_offset + 128);
    cr_assert_eq(slu_gguf_find(gguf, "c.weight")->bytes, 0);
    cr_assert_eq(slu_gguf_find(gguf, "a.weight")->bytes, 128);
    cr_assert_null(slu_gguf_find(gguf, "a.weigh"));
    cr_assert_null(slu_gguf_find(gguf, "a.weight2"));
    cr_assert_null(slu_gguf_find(gguf, ""));

    /* The pairs as they stand parse by themselves, as packs carry them. */
    struct slu_kvs kvs;
    size_t used = 0;
    cr_assert_eq(
        slu_kvs_parse(gguf->kv_data, gguf->kv_bytes, gguf->kvs.n, &kvs, &used, "kvs", &err), 0);
    cr_assert_eq(used, gguf->kv_bytes);
    cr_assert_eq(kvs.n, gguf->kvs.n);
    slu_kvs_finish(&kvs);
    slu_gguf_close(gguf);
    slu_gguf_close(NULL);
    make_free(&make);
}

/* A header of some megabytes, longer than the first read, is read to its end and no further than
 * four times that. */
Test(gguf, reads_long_headers)
{
    struct make make = {0};
    const uint64_t n_items = 400000;
    make_gguf_preamble(&make, 1, 2);
    make_str(&make, "tokens");
    make_u32(&make, SLU_KV_ARRAY);
    make_u32(&make, SLU_KV_STRING);
    make_u64(&make, n_items);
    for (uint64_t i = 0; i < n_items; i++) {
        make_str(&make, "ab");
    }
    make_kv_u32(&make, "general.alignment", 64);
    make_gguf_tensor(&make, "t", 0, 1, (const uint64_t[]){8u << 20}, 0);
    make_align(&make, 64);
    const size_t data_offset = make.bytes;
    make_bytes(&make, (uint8_t[64]){0}, 64);
    make.data = realloc(make.data, data_offset + (32u << 20));
    memset(make.data + data_offset, 0, 32u << 20);
    make.bytes = data_offset + (32u << 20);

    struct slu_source *source;
    struct faulty faulty;
    struct slu_gguf *gguf;
    struct slu_err err;
    cr_assert_eq(slu_source_open_memory(make.data, make.bytes, "long", &source), 0);
    faulty_init(&faulty, source, -1);
    cr_assert_eq(slu_gguf_open(&faulty.base, &gguf, &err), 0, "%s", err.text);
    cr_assert_eq(gguf->data_offset, data_offset);
    cr_assert_eq(slu_kvs_find(&gguf->kvs, "tokens")->n_items, n_items);
    cr_assert_lt(faulty.n_bytes, 4 * data_offset + 1);
    int n_reads = faulty.n_reads;
    cr_assert_gt(n_reads, 1);
    slu_gguf_close(gguf);
    /* A read that fails ends the opening with the source's own error. */
    for (int i = 0; i < n_reads; i++) {
        faulty_init(&faulty, source, i);
        cr_assert_eq(slu_gguf_open(&faulty.base, &gguf, &err), SLU_EIO);
    }
    slu_source_destroy(source);
    make_free(&make);
}

/* A file cut short at any length is refused with a sentence, never read past. */
Test(gguf, refuses_every_truncation)
{
    struct make make = {0};
    make_gguf(&make);
    /* The last tensor, of unknown size, begins 32 bytes before the end. */
    for (size_t n = 0; n < make.bytes - 32; n++) {
        struct slu_gguf *gguf;
        struct slu_err err;
        cr_assert_eq(open_bytes(make.data, n, &gguf, &err), SLU_EFORMAT, "%zu", n);
        cr_assert_neq(err.text[0], '\0');
    }
    make_free(&make);
}

/* Any single byte may be wrong: the file is read or refused, nothing else. */
Test(gguf, survives_every_byte)
{
    static const uint8_t values[] = {0, 1, 0x7f, 0x80, 0xff};
    struct make make = {0};
    make_gguf(&make);
    size_t n_refused = 0;
    for (size_t i = 0; i < make.bytes - 256; i++) {
        uint8_t kept = make.data[i];
        for (size_t v = 0; v < sizeof values; v++) {
            struct slu_gguf *gguf;
            struct slu_err err;
            make.data[i] = values[v];
            int rc = open_bytes(make.data, make.bytes, &gguf, &err);
            if (rc == 0) {
                slu_gguf_close(gguf);
            }
            n_refused += rc != 0;
        }
        make.data[i] = kept;
    }
    cr_assert_gt(n_refused, 0);
    make_free(&make);
}

/* What isn't little-endian GGUF version 3 is refused by name. */
Test(gguf, refuses_other_files)
{
    struct make make = {0};
    refused(&make, SLU_EFORMAT, "is empty");
    make_bytes(&make, "GGML", 4);
    make_zeros(&make, 20);
    refused(&make, SLU_EFORMAT, "not a GGUF file");
    for (uint32_t version = 0; version < 6; version++) {
        if (version != 3) {
            make_bytes(&make, "GGUF", 4);
            make_u32(&make, version);
            make_zeros(&make, 16);
            refused(&make, SLU_EUNSUP, "version");
        }
    }
    make_bytes(&make, "GGUF", 4);
    make_u32(&make, 3u << 24);
    make_zeros(&make, 16);
    refused(&make, SLU_EUNSUP, "big-endian");
}

/* Counts that the file has no room for are refused before anything is allocated for them. */
Test(gguf, refuses_huge_counts)
{
    static const uint64_t counts[] = {1000, 1u << 20, 1ull << 32, 1ull << 60, UINT64_MAX};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        struct make make = {0};
        make_gguf_preamble(&make, counts[i], 0);
        make_zeros(&make, 1000);
        refused(&make, SLU_EFORMAT, "tensors");
        make_gguf_preamble(&make, 0, counts[i]);
        make_zeros(&make, 1000);
        refused(&make, SLU_EFORMAT, "keys");
        make_gguf_preamble(&make, 0, 1);
        make_str(&make, "k");
        make_u32(&make, SLU_KV_STRING);
        make_u64(&make, counts[i] + (counts[i] < 2000 ? 1000 : 0));
        make_zeros(&make, 1000);
        refused(&make, SLU_EFORMAT, "'k' runs past");
        for (uint32_t type = 0; type < SLU_KV_TYPES; type++) {
            if (type != SLU_KV_ARRAY) {
                make_gguf_preamble(&make, 0, 1);
                make_str(&make, "k");
                make_u32(&make, SLU_KV_ARRAY);
                make_u32(&make, type);
                make_u64(&make, counts[i]);
                make_zeros(&make, 900);
                refused(&make, SLU_EFORMAT, "'k' runs past");
            }
        }
    }
}

/* A string that claims more than there is doesn't make the reader read on for it. */
Test(gguf, reads_no_more_than_helps)
{
    struct make make = {0};
    make_gguf_preamble(&make, 0, 1);
    make_str(&make, "k");
    make_u32(&make, SLU_KV_STRING);
    make_u64(&make, 1ull << 40);
    make.data = realloc(make.data, 16u << 20);
    memset(make.data + make.bytes, 0, (16u << 20) - make.bytes);
    struct slu_source *source;
    struct faulty faulty;
    struct slu_gguf *gguf;
    struct slu_err err;
    cr_assert_eq(slu_source_open_memory(make.data, 16u << 20, "string", &source), 0);
    faulty_init(&faulty, source, -1);
    cr_assert_eq(slu_gguf_open(&faulty.base, &gguf, &err), SLU_EFORMAT);
    cr_assert_leq(faulty.n_bytes, 1u << 20);
    slu_source_destroy(source);
    make_free(&make);
}

/* Pairs that break the format are refused, and what they are called can be printed. */
Test(gguf, refuses_bad_pairs)
{
    struct make make = {0};
    make_gguf_preamble(&make, 0, 2);
    make_kv_u32(&make, "twice", 1);
    make_kv_u32(&make, "twice", 2);
    refused(&make, SLU_EFORMAT, "'twice' stands twice");

    make_gguf_preamble(&make, 0, 1);
    make_kv_u32(&make, "", 1);
    refused(&make, SLU_EFORMAT, "0 bytes long");

    make_gguf_preamble(&make, 0, 1);
    make_u64(&make, 65536);
    make_zeros(&make, 70000);
    refused(&make, SLU_EFORMAT, "65536 bytes long");

    make_gguf_preamble(&make, 0, 1);
    make_str(&make, "k\033[31m\n");
    make_u32(&make, SLU_KV_TYPES);
    make_zeros(&make, 64);
    refused(&make, SLU_EFORMAT, "'k?[31m?'");

    static const uint32_t item_types[] = {SLU_KV_ARRAY, SLU_KV_TYPES, UINT32_MAX};
    for (int i = 0; i < 3; i++) {
        make_gguf_preamble(&make, 0, 1);
        make_str(&make, "k");
        make_u32(&make, SLU_KV_ARRAY);
        make_u32(&make, item_types[i]);
        make_u64(&make, 0);
        refused(&make, SLU_EFORMAT, "nested");
    }

    make_gguf_preamble(&make, 0, 1);
    make_str(&make, "k");
    make_u32(&make, SLU_KV_BOOL);
    make_u8(&make, 2);
    refused(&make, SLU_EFORMAT, "bool");

    make_gguf_preamble(&make, 0, 1);
    make_str(&make, "k");
    make_u32(&make, SLU_KV_ARRAY);
    make_u32(&make, SLU_KV_BOOL);
    make_u64(&make, 2);
    make_u8(&make, 1);
    make_u8(&make, 2);
    refused(&make, SLU_EFORMAT, "bool");
}

/* Alignments that make no sense are refused, sensible ones are obeyed. */
Test(gguf, checks_alignment)
{
    static const uint32_t bad[] = {0, 3, 33, 1u << 21, UINT32_MAX};
    struct make make = {0};
    for (int i = 0; i < 5; i++) {
        make_gguf_preamble(&make, 0, 1);
        make_kv_u32(&make, "general.alignment", bad[i]);
        refused(&make, SLU_EFORMAT, "general.alignment");
    }
    make_gguf_preamble(&make, 0, 1);
    make_kv_str(&make, "general.alignment", "32");
    refused(&make, SLU_EFORMAT, "general.alignment");

    make_gguf_preamble(&make, 1, 1);
    make_kv_u32(&make, "general.alignment", 4096);
    make_gguf_tensor(&make, "t", 0, 1, (const uint64_t[]){1}, 0);
    make_align(&make, 4096);
    make_u32(&make, 0);
    struct slu_gguf *gguf;
    struct slu_err err;
    cr_assert_eq(open_bytes(make.data, make.bytes, &gguf, &err), 0, "%s", err.text);
    cr_assert_eq(gguf->tensors[0].offset, 4096);
    slu_gguf_close(gguf);
    make_free(&make);
}

struct bad_tensor {
    const char *part; /* of the sentence */
    uint32_t type, n_dims;
    uint64_t dims[5];
    uint64_t offset;
};

/* Tensors whose shape, place or name makes no sense are refused. */
Test(gguf, refuses_bad_tensors)
{
    static const struct bad_tensor bad[] = {
        {"0 dimensions", 0, 0, {0}, 0},
        {"5 dimensions", 0, 5, {1, 1, 1, 1, 1}, 0},
        {"is zero", 0, 2, {4, 0}, 0},
        {"too large", 0, 2, {1ull << 32, 1ull << 32}, 0},
        {"too large", 0, 4, {1ull << 16, 1ull << 16, 1ull << 16, 1ull << 16}, 0},
        {"too large", 99, 1, {UINT64_MAX}, 0},
        {"multiple of the 32", 2, 1, {33}, 0},
        {"multiple of the 256", 12, 2, {32, 8}, 0},
        {"multiple of 32", 0, 1, {1}, 4},
        {"after the file", 0, 1, {1000}, 0},
        {"after the file", 0, 1, {1}, 1u << 20},
        {"after the file", 0, 1, {1}, UINT64_MAX - 31},
        {"after the file", 99, 1, {1}, 1u << 20},
        {"after the file", 28, 1, {1ull << 58}, 0},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct make make = {0};
        make_gguf_preamble(&make, 1, 0);
        make_gguf_tensor(&make, "t\007", bad[i].type, bad[i].n_dims, bad[i].dims, bad[i].offset);
        make_align(&make, 32);
        make_zeros(&make, 512);
        refused(&make, SLU_EFORMAT, bad[i].part);
    }
}

/* Tensors that overlap, share a name or have none are refused; those that touch are fine. */
Test(gguf, refuses_tensors_in_each_others_way)
{
    static const uint64_t eight[] = {8}, nine[] = {9};
    struct make make = {0};
    make_gguf_preamble(&make, 2, 0);
    make_gguf_tensor(&make, "a", 0, 1, eight, 32);
    make_gguf_tensor(&make, "b", 0, 1, nine, 0);
    make_align(&make, 32);
    make_zeros(&make, 128);
    refused(&make, SLU_EFORMAT, "overlap");

    make_gguf_preamble(&make, 2, 0);
    make_gguf_tensor(&make, "a", 0, 1, eight, 0);
    make_gguf_tensor(&make, "a", 0, 1, eight, 32);
    make_align(&make, 32);
    make_zeros(&make, 128);
    refused(&make, SLU_EFORMAT, "two tensors have the name 'a'");

    make_gguf_preamble(&make, 1, 0);
    make_gguf_tensor(&make, "", 0, 1, eight, 0);
    make_align(&make, 32);
    make_zeros(&make, 128);
    refused(&make, SLU_EFORMAT, "no name");

    make_gguf_preamble(&make, 3, 0);
    make_gguf_tensor(&make, "a", 0, 1, eight, 32);
    make_gguf_tensor(&make, "b", 0, 1, eight, 0);
    make_gguf_tensor(&make, "c", 99, 1, nine, 32);
    make_align(&make, 32);
    make_zeros(&make, 64);
    struct slu_gguf *gguf;
    struct slu_err err;
    cr_assert_eq(open_bytes(make.data, make.bytes, &gguf, &err), 0, "%s", err.text);
    slu_gguf_close(gguf);
    make_free(&make);
}

/* Type numbers have their names, blocks their sizes, and numbers nobody uses have neither. */
Test(gguf, names_types)
{
    static const struct {
        uint32_t type;
        const char *name;
        uint32_t weights, bytes;
    } known[] = {
        {0, "F32", 1, 4},       {1, "F16", 1, 2},       {2, "Q4_0", 32, 18},
        {3, "Q4_1", 32, 20},    {6, "Q5_0", 32, 22},    {7, "Q5_1", 32, 24},
        {8, "Q8_0", 32, 34},    {12, "Q4_K", 256, 144}, {13, "Q5_K", 256, 176},
        {14, "Q6_K", 256, 210}, {20, "IQ4_NL", 32, 18}, {30, "BF16", 1, 2},
        {39, "MXFP4", 32, 17},  {19, "IQ1_S", 256, 50},
    };
    uint32_t weights = 7, bytes = 7;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        cr_assert_str_eq(slu_ggml_type_name(known[i].type), known[i].name);
        cr_assert(slu_ggml_type_block(known[i].type, &weights, &bytes));
        cr_assert_eq(weights, known[i].weights);
        cr_assert_eq(bytes, known[i].bytes);
    }
    cr_assert_null(slu_ggml_type_name(99));
    cr_assert_null(slu_ggml_type_name(UINT32_MAX));
    cr_assert_not(slu_ggml_type_block(99, &weights, &bytes));
    cr_assert_not(slu_ggml_type_block(4, &weights, &bytes));
}

/* Every GGUF of the data folder opens and finds each of its tensors by name. */
Test(gguf, opens_golden_files)
{
    static const char *const patterns[] = {"golden/models/*.gguf", "vocab/*.gguf"};
    glob_t found = {0};
    for (int i = 0; i < 2; i++) {
        char path[1024];
        const char *data = getenv("SLUICE_DATA");
        snprintf(path, sizeof path, "%s%s/%s", data ? "" : SLU_TEST_SOURCE_ROOT "/",
                 data ? data : SLU_TEST_DATA, patterns[i]);
        glob(path, i ? GLOB_APPEND : 0, NULL, &found);
    }
    if (found.gl_pathc == 0) {
        globfree(&found);
        fprintf(stderr, "gguf::opens_golden_files: skipped, there is no data folder\n");
        cr_skip_test("no data folder");
    }
    for (size_t i = 0; i < found.gl_pathc; i++) {
        struct slu_source *source;
        struct slu_gguf *gguf;
        struct slu_err err;
        struct slu_str arch;
        cr_assert_eq(slu_source_open_file(found.gl_pathv[i], &source, &err), 0, "%s", err.text);
        cr_assert_eq(slu_gguf_open(source, &gguf, &err), 0, "%s", err.text);
        slu_source_destroy(source);
        cr_assert_eq(slu_kvs_str(&gguf->kvs, "general.architecture", &arch, &err), 0);
        cr_assert(gguf->n_tensors > 0 || strstr(found.gl_pathv[i], "/vocab/"));
        for (uint64_t t = 0; t < gguf->n_tensors; t++) {
            const struct slu_gguf_tensor *tensor = &gguf->tensors[t];
            char name[128];
            snprintf(name, sizeof name, "%.*s", (int)tensor->name.len, tensor->name.at);
            cr_assert_eq(slu_gguf_find(gguf, name), tensor);
            cr_assert_gt(tensor->bytes, 0, "%s", name);
        }
        slu_gguf_close(gguf);
    }
    globfree(&found);
}
