/* The .sla file and opening it: what is written comes back, and nothing else is believed. */
#include <criterion/criterion.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "make.h"
#include "../io/faulty.h"

/* A base of 3 layers: q 64 to 32 in two heads, experts' gate 64 to 48 of 4. */
static void shape_of(void *arg, enum slu_target target, uint32_t layer,
                     struct slu_target_shape *ret_shape)
{
    (void)arg, (void)layer;
    *ret_shape = (struct slu_target_shape){0};
    if (target == SLU_TARGET_Q) {
        *ret_shape = (struct slu_target_shape){64, 32, 1, 2};
    } else if (target == SLU_TARGET_EXPERT_GATE) {
        *ret_shape = (struct slu_target_shape){64, 48, 4, 0};
    } else if (target == SLU_TARGET_HEAD) {
        *ret_shape = (struct slu_target_shape){64, 500000, 1, 0};
    }
}

static const struct slu_base base = {
    .arch = "olmoe", .fingerprint = 77, .n_layers = 3, .shape = shape_of};

static const struct slu_sla_record small[] = {
    {.target = SLU_TARGET_Q, .layer = 0, .rank = 2, .n = 1, .in = 64, .out = 32, .scale = 1.5f},
    {.target = SLU_TARGET_Q,
     .layer = 1,
     .rank = 3,
     .n = 1,
     .in = 64,
     .out = 32,
     .fmt_a = SLU_FMT_F16,
     .fmt_b = SLU_FMT_BF16,
     .scale = -1},
    {.target = SLU_TARGET_EXPERT_GATE,
     .layer = 1,
     .rank = 1,
     .n = 4,
     .in = 64,
     .out = 48,
     .scale = 1},
};

/* Byte i of every pair's raw bytes, and of a layer's blocks; small enough to be a finite number in
 * each format. */
static uint8_t raw_byte(size_t i)
{
    return (uint8_t)(i * 37 % 61);
}

static void write_file(const char *path, const struct slu_sla_record *records, size_t n,
                       const struct slu_adapter_info *info)
{
    struct slu_sla_writer *writer;
    struct slu_err err = {0};
    cr_assert_eq(slu_sla_writer_create(path, &writer, &err), 0, "%s", err.text);
    for (size_t i = 0; i < n; i++) {
        struct slu_mat_layout a, b;
        bool is_expert = slu_sla_is_expert(records[i].target); /* one target, the last of them */
        int rc = is_expert ? slu_sla_writer_experts(writer, &records[i], 1, &err)
                           : slu_sla_writer_pair(writer, &records[i], &err);
        cr_assert_eq(rc, 0, "%s", err.text);
        cr_assert(slu_sla_layouts(&records[i], &a, &b));
        size_t bytes = records[i].n * (a.bytes + b.bytes);
        uint8_t *raw = malloc(bytes);
        for (size_t k = 0; k < bytes; k++) {
            raw[k] = raw_byte(k);
        }
        cr_assert_eq(slu_sla_writer_append(writer, raw, bytes / 3, &err), 0);
        cr_assert_eq(slu_sla_writer_append(writer, raw + bytes / 3, bytes - bytes / 3, &err), 0);
        free(raw);
    }
    cr_assert_eq(slu_sla_writer_finish(writer, info, &err), 0, "%s", err.text);
    slu_sla_writer_destroy(writer);
}

static const struct slu_adapter_info info = {
    .name = "n", .description = "what it\ndoes", .arch = "olmoe", .base_fingerprint = 77};

/* Opens bytes; the ledger must be as before unless it succeeds, and is empty when closed. */
static int open_bytes(const uint8_t *data, size_t bytes, struct slu_err *err)
{
    struct slu_source *source;
    struct slu_adapter_info got;
    struct slu_adapter *adapter = NULL;
    *err = (struct slu_err){0};
    struct slu_ledger *ledger = slu_ledger_create(64 << 20);
    cr_assert_eq(slu_source_open_memory(data, bytes, "bytes", &source), 0);
    int rc = slu_adapter_open(source, &base, ledger, &adapter, err);
    if (rc == 0) {
        cr_assert_eq(slu_adapter_inspect(source, &got, err), 0);
        cr_assert_eq(slu_ledger_used(ledger), got.memory_bytes);
        slu_adapter_close(adapter);
    } else {
        cr_assert(err->code == rc && err->text[0] && !strchr(err->text, '\n'), "%d", rc);
    }
    cr_assert_eq(slu_ledger_used(ledger), 0);
    slu_source_destroy(source);
    slu_ledger_destroy(ledger);
    return rc;
}

/* What was written is found again: texts, pairs, numbers, and each byte is charged. */
Test(adapter_sla, round_trip)
{
    struct lab lab;
    lab_open(&lab);
    const char *path = lab_path(&lab, "a.sla");
    write_file(path, small, 3, &info);
    struct slu_ledger *ledger = slu_ledger_create(0);
    struct slu_adapter *adapter = lab_load(path, &base, ledger);
    const struct slu_adapter_info *got = &adapter->info;
    cr_assert_str_eq(got->name, "n");
    cr_assert_str_eq(got->description, "what it does");
    cr_assert(got->n_loras == 3 && got->n_layers == 2 && got->rank_min == 1 && got->rank_max == 3);
    cr_assert_eq(got->targets, 1u << SLU_TARGET_Q | 1u << SLU_TARGET_EXPERT_GATE);
    cr_assert_eq(slu_ledger_used(ledger), got->memory_bytes);
    for (uint32_t i = 0; i < 3; i++) {
        const struct slu_lora *pair =
            slu_adapter_find(adapter, small[i].layer, (enum slu_target)small[i].target);
        cr_assert_eq(pair, &adapter->loras[i]);
        cr_assert(pair->scale == small[i].scale && pair->rank == small[i].rank);
        cr_assert(pair->a.rows == small[i].rank && pair->b.cols == small[i].rank);
        size_t bytes = pair->a.at.bytes + pair->b.at.bytes;
        for (uint32_t e = 0; e < pair->n; e++) {
            struct slu_lora one = lab_pair(adapter, pair, e);
            cr_assert_eq((uintptr_t)one.a.data % 64, 0);
            for (size_t k = 0; k < bytes; k++) {
                cr_assert_eq(one.a.data[k], raw_byte(e * bytes + k));
            }
        }
    }
    cr_assert_null(slu_adapter_find(adapter, 2, SLU_TARGET_Q));
    slu_adapter_close(adapter);
    slu_ledger_destroy(ledger);
    lab_close(&lab);
}

/* Pairs of many frames, read by several threads, come back whole. */
Test(adapter_sla, large)
{
    const struct slu_sla_record records[] = {
        {.target = SLU_TARGET_Q, .layer = 0, .rank = 700, .n = 1, .in = 64, .out = 32, .scale = 1},
        {.target = SLU_TARGET_HEAD, .rank = 5, .n = 1, .in = 64, .out = 500000, .scale = 1},
        {.target = SLU_TARGET_Q, .layer = 2, .rank = 700, .n = 1, .in = 64, .out = 32, .scale = 1},
    };
    struct lab lab;
    lab_open(&lab);
    const char *path = lab_path(&lab, "a.sla");
    write_file(path, records, 3, &(struct slu_adapter_info){.name = "large"});
    struct slu_ledger *ledger = slu_ledger_create(0);
    struct slu_adapter *adapter = lab_load(path, &base, ledger);
    for (uint32_t i = 0; i < 3; i++) {
        const struct slu_lora *pair = &adapter->loras[i];
        size_t bytes = pair->a.at.bytes + pair->b.at.bytes, n_wrong = 0;
        for (size_t k = 0; k < bytes; k++) {
            n_wrong += pair->a.data[k] != raw_byte(k);
        }
        cr_assert_eq(n_wrong, 0);
    }
    uint64_t memory_bytes = adapter->info.memory_bytes;
    slu_adapter_close(adapter);
    slu_ledger_destroy(ledger);

    /* One thread's staging is enough, and a byte less than that is not. */
    ledger = slu_ledger_create(memory_bytes + slu_adapter_staging_bytes());
    slu_adapter_close(lab_load(path, &base, ledger));
    slu_ledger_destroy(ledger);
    ledger = slu_ledger_create(memory_bytes + slu_adapter_staging_bytes() - 1);
    struct slu_err err;
    int rc = lab_try(path, &base, ledger, &adapter, &err);
    lab_expect_refusal(rc, &err, SLU_EBUDGET, "don't fit");
    slu_ledger_destroy(ledger);
    ledger = slu_ledger_create(memory_bytes - 1);
    rc = lab_try(path, &base, ledger, &adapter, &err);
    lab_expect_refusal(rc, &err, SLU_EBUDGET, "adapters don't fit");
    slu_ledger_destroy(ledger);
    lab_close(&lab);
}

/* A file with any bit turned over, or cut anywhere, or longer, is refused. */
Test(adapter_sla, damaged)
{
    struct lab lab;
    lab_open(&lab);
    size_t bytes;
    struct slu_err err;
    write_file(lab_path(&lab, "a.sla"), small, 3, &info);
    uint8_t *data = lab_read(lab_path(&lab, "a.sla"), &bytes);
    cr_assert_eq(open_bytes(data, bytes, &err), 0, "%s", err.text);
    for (size_t i = 0; i < bytes; i++) {
        data[i] ^= (uint8_t)(1u << i % 8);
        cr_assert_lt(open_bytes(data, bytes, &err), 0, "bit %zu of byte %zu", i % 8, i);
        data[i] ^= (uint8_t)(1u << i % 8);
    }
    for (size_t n = 0; n < bytes; n += 1 + n % 7) {
        cr_assert_lt(open_bytes(data, n, &err), 0, "cut to %zu", n);
    }
    data[bytes] = 0;
    lab_expect_refusal(open_bytes(data, bytes + 1, &err), &err, SLU_EFORMAT, "has grown");
    free(data);
    lab_close(&lab);
}

/* The file's parts, for changes with the checksums put right again. */
struct parts {
    struct slu_sla_header header;
    struct slu_sla_meta meta;
    struct slu_sla_record records[3];
    struct slu_extent extents[2 + 4]; /* frames, blocks */
};

static void take_apart(const uint8_t *data, struct parts *parts)
{
    memcpy(&parts->header, data, sizeof parts->header);
    const uint8_t *index = data + parts->header.index.offset;
    memcpy(&parts->meta, data + parts->header.meta.offset, sizeof parts->meta);
    memcpy(parts->records, index, sizeof parts->records);
    memcpy(parts->extents, index + sizeof parts->records, sizeof parts->extents);
}

static void put_together(uint8_t *data, const struct parts *parts)
{
    struct slu_sla_header header = parts->header;
    uint8_t *index = data + header.index.offset;
    memcpy(data + header.meta.offset, &parts->meta, sizeof parts->meta);
    memcpy(index, parts->records, sizeof parts->records);
    memcpy(index + sizeof parts->records, parts->extents, sizeof parts->extents);
    header.meta.checksum = slu_checksum(&parts->meta, sizeof parts->meta);
    header.index.checksum = slu_checksum(index, sizeof parts->records + sizeof parts->extents);
    header.checksum = slu_checksum(&header, offsetof(struct slu_sla_header, checksum));
    memcpy(data, &header, sizeof header);
}

#define CASES                                                                                      \
    X(SLU_EUNSUP, "version 3", p.header.version = 3)                                               \
    X(SLU_EUNSUP, "version 1", p.header.version = 1)                                               \
    X(SLU_EFORMAT, "its header is damaged", p.header.reserved = 1)                                 \
    X(SLU_EFORMAT, "claims 0 pairs", p.header.n_loras = 0)                                         \
    X(SLU_EFORMAT, "which can't be", p.header.n_loras = 1u << 30)                                  \
    X(SLU_EFORMAT, "which can't be", p.header.n_extents = SLU_SLA_EXTENTS_MAX + 1)                 \
    X(SLU_EFORMAT, "which can't be", p.header.n_blocks = UINT32_MAX)                               \
    X(SLU_EFORMAT, "places metadata or index wrongly", p.header.n_extents++)                       \
    X(SLU_EFORMAT, "places metadata or index wrongly", p.header.n_blocks++)                        \
    X(SLU_EFORMAT, "has 1 frames where its shape needs",                                           \
      (p.header.n_extents = 1, p.header.n_blocks = 5))                                             \
    X(SLU_EFORMAT, "which its blocks are not", (p.header.n_extents = 6, p.header.n_blocks = 0))    \
    X(SLU_EFORMAT, "which its blocks are not", (p.header.n_extents = 3, p.header.n_blocks = 3))    \
    X(SLU_EFORMAT, "places metadata or index wrongly", p.header.meta.reserved = 1)                 \
    X(SLU_EFORMAT, "isn't allowed", memset(p.meta.name, 'x', sizeof p.meta.name))                  \
    X(SLU_EFORMAT, "isn't allowed", p.meta.name[40] = 'x')                                         \
    X(SLU_EFORMAT, "isn't allowed", p.meta.description[0] = '\033')                                \
    X(SLU_EFORMAT, "isn't allowed", strcpy(p.meta.name, "\xc2\x9b"))                               \
    X(SLU_EFORMAT, "isn't allowed", strcpy(p.meta.name, "\xed\xa0\x80"))                           \
    X(SLU_EFORMAT, "isn't allowed", strcpy(p.meta.name, "\xe0\x80\xa0"))                           \
    X(SLU_EFORMAT, "isn't allowed", strcpy(p.meta.name, "\xf4\x90\x80\x80"))                       \
    X(SLU_EFORMAT, "isn't allowed", strcpy(p.meta.arch, "\xff"))                                   \
    X(SLU_EFORMAT, "isn't allowed", strcpy(p.meta.description, "\xc3"))                            \
    X(SLU_EFORMAT, "isn't allowed", p.meta.flags = 2)                                              \
    X(SLU_EFORMAT, "no model has", p.records[0].target = SLU_TARGETS)                              \
    X(SLU_EFORMAT, "no model has", p.records[2].layer = 512)                                       \
    X(SLU_EFORMAT, "twice or out of order", p.records[1].layer = 0)                                \
    X(SLU_EFORMAT, "up to 1 of 4096", p.records[0].n = 2)                                          \
    X(SLU_EFORMAT, "up to 1024 of 4096", p.records[2].n = 0)                                       \
    X(SLU_EFORMAT, "rank 4097", p.records[0].rank = 4097)                                          \
    X(SLU_EFORMAT, "number format", p.records[0].rank = 0)                                         \
    X(SLU_EFORMAT, "number format", p.records[0].fmt_a = SLU_FMT_Q8_0)                             \
    X(SLU_EFORMAT, "number format", p.records[0].in = 1u << 25)                                    \
    X(SLU_EFORMAT, "scale of attn_q of layer 1 isn't finite", p.records[1].scale = NAN)            \
    X(SLU_EFORMAT, "frames where its shape needs", p.records[0].n_extents = 2)                     \
    X(SLU_EFORMAT, "place or size", p.records[0].in = 128)                                         \
    X(SLU_EFORMAT, "place or size", p.extents[1].offset--)                                         \
    X(SLU_EFORMAT, "place or size", p.extents[1].offset = UINT64_MAX - 4)                          \
    X(SLU_EFORMAT, "place or size", p.extents[0].stored_bytes = UINT32_MAX)                        \
    X(SLU_EFORMAT, "frame 1 of the index", p.extents[1].stored_bytes = 1u << 16)                   \
    X(SLU_EFORMAT, "frame 0 of the index", p.extents[0].codec = 2)                                 \
    X(SLU_EFORMAT, "expert block 0 of the index", p.extents[2].offset++)                           \
    X(SLU_EFORMAT, "expert block 1 of the index", p.extents[3].offset -= 4096)                     \
    X(SLU_EFORMAT, "expert block 1 of the index", p.extents[3].raw_bytes -= 64)                    \
    X(SLU_EFORMAT, "expert block 3 of the index", p.extents[5].stored_bytes = 0)                   \
    X(SLU_EFORMAT, "expert block 3 of the index", p.extents[5].codec = 7)                          \
    X(SLU_EFORMAT, "expert block 0 of the index", p.records[2].rank = 2)                           \
    X(SLU_EFORMAT, "which its blocks are not", p.records[2].n = 5)                                 \
    X(SLU_EFORMAT, "where its pairs need 3", p.records[2].n = 3)                                   \
    X(SLU_EFORMAT, "experts are in blocks of their own", p.records[2].n_extents = 1)               \
    X(SLU_EFORMAT, "has more than the",                                                            \
      (p.records[2].in = p.records[2].out = 1u << 14, p.records[2].rank = 1024))                   \
    X(SLU_EFORMAT, "account for all",                                                              \
      (memmove(p.extents + 3, p.extents + 2, 3 * sizeof *p.extents), p.header.n_blocks = 3,        \
       p.header.n_extents = 3, p.records[2].n = 3))                                                \
    X(SLU_EFORMAT, "expert 2 of layer 1", p.extents[4].checksum++)                                 \
    X(SLU_EFORMAT, "attn_q of layer 0", p.extents[0].checksum++)                                   \
    X(SLU_EUNSUP, "is an adapter for llama", strcpy(p.meta.arch, "llama"))                         \
    X(SLU_EUNSUP, "fingerprint 000000000000004e", p.meta.base_fingerprint++)                       \
    X(SLU_EFORMAT, "but the model has 3 layers", p.records[2].layer = 3)                           \
    X(SLU_EFORMAT, "which the model doesn't have", p.records[1].target = SLU_TARGET_K)             \
    X(SLU_EFORMAT, "the model's has 64 and 32", (p.records[0].in = 32, p.records[0].out = 64))

/* Fields that make no sense, or don't fit the base, are refused though every checksum is right. */
Test(adapter_sla, hostile)
{
    struct lab lab;
    lab_open(&lab);
    size_t bytes;
    struct slu_err err;
    write_file(lab_path(&lab, "a.sla"), small, 3, &info);
    uint8_t *good = lab_read(lab_path(&lab, "a.sla"), &bytes);
    uint8_t *data = malloc(bytes);
#define X(code, words, change)                                                                     \
    {                                                                                              \
        struct parts p;                                                                            \
        memcpy(data, good, bytes);                                                                 \
        take_apart(data, &p);                                                                      \
        (void)(change);                                                                            \
        put_together(data, &p);                                                                    \
        lab_expect_refusal(open_bytes(data, bytes, &err), &err, code, words);                      \
    }
    CASES
#undef X
    struct parts unchanged;
    take_apart(good, &unchanged);
    put_together(good, &unchanged);
    cr_assert_eq(open_bytes(good, bytes, &err), 0, "%s", err.text);
    free(data);
    free(good);
    lab_close(&lab);
}

/* Texts of any bytes are written as characters that the reader takes. */
Test(adapter_sla, texts)
{
    static const struct {
        const char *given, *kept;
    } cases[] = {
        {"Gr\xc3\xbc\xc3\x9f"
         "e \xf0\x9f\x8c\x8a",
         "Gr\xc3\xbc\xc3\x9f"
         "e \xf0\x9f\x8c\x8a"},
        {"Gr\xfc\xdf"
         "e",
         "Gr??e"},
        {"a\xc2\x9b"
         "31m\033\n",
         "a??31m  "},
        {"cut \xf0\x9f\x8c", "cut "},
        {"012345678901234567890123456789012345678901234567890123456789ab\xe2\x82\xac",
         "012345678901234567890123456789012345678901234567890123456789ab"},
    };
    struct lab lab;
    lab_open(&lab);
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct slu_adapter_info given = info, got;
        struct slu_err err = {0};
        memset(given.name, 0, sizeof given.name);
        memcpy(given.name, cases[i].given, strnlen(cases[i].given, sizeof given.name - 1));
        write_file(lab_path(&lab, "a.sla"), small, 3, &given);
        int rc = slu_adapter_inspect_file(lab_path(&lab, "a.sla"), &got, &err);
        cr_assert_eq(rc, 0, "case %u: %s", i, err.text);
        cr_assert_str_eq(got.name, cases[i].kept);
    }
    lab_close(&lab);
}

/* Infinities and NaNs anywhere in A or B, of the last expert too, in each number format, are
 * refused. */
Test(adapter_sla, not_finite)
{
    static const struct {
        enum slu_fmt_id fmt;
        uint32_t bits;
    } cases[] = {{SLU_FMT_F32, 0x7f800000}, {SLU_FMT_F32, 0xffc00001}, {SLU_FMT_F16, 0x7c00},
                 {SLU_FMT_F16, 0xfe00},     {SLU_FMT_BF16, 0xff80},    {SLU_FMT_BF16, 0x7fc0}};
    struct lab lab;
    lab_open(&lab);
    const char *path = lab_path(&lab, "a.sla");
    for (unsigned i = 0; i < 4 * sizeof cases / sizeof *cases; i++) {
        enum slu_fmt_id fmt = cases[i / 4].fmt;
        bool is_expert = i / 2 % 2;
        struct slu_sla_record record = small[is_expert ? 2 : 0];
        record.fmt_a = record.fmt_b = fmt;
        struct slu_sla_writer *writer;
        struct slu_mat_layout a, b;
        struct slu_err err = {0};
        cr_assert(slu_sla_layouts(&record, &a, &b));
        size_t item = fmt == SLU_FMT_F32 ? 4 : 2;
        size_t bytes = record.n * (a.bytes + b.bytes), end = i % 2 ? bytes : bytes - b.bytes;
        uint8_t *raw = calloc(bytes, 1);
        memcpy(raw + end - item, &cases[i / 4].bits, item);
        cr_assert_eq(slu_sla_writer_create(path, &writer, &err), 0, "%s", err.text);
        int rc = is_expert ? slu_sla_writer_experts(writer, &record, 1, &err)
                           : slu_sla_writer_pair(writer, &record, &err);
        cr_assert_eq(rc, 0, "%s", err.text);
        cr_assert_eq(slu_sla_writer_append(writer, raw, bytes, &err), 0);
        cr_assert_eq(slu_sla_writer_finish(writer, &info, &err), 0, "%s", err.text);
        slu_sla_writer_destroy(writer);
        free(raw);
        size_t n;
        uint8_t *data = lab_read(path, &n);
        lab_expect_refusal(open_bytes(data, n, &err), &err, SLU_EFORMAT, "infinities or NaNs");
        free(data);
    }
    lab_close(&lab);
}

/* A read that fails, whichever it is, is an error and leaves nothing behind. */
Test(adapter_sla, read_faults)
{
    struct lab lab;
    struct slu_source *inner;
    struct slu_err err;
    lab_open(&lab);
    write_file(lab_path(&lab, "a.sla"), small, 3, &info);
    cr_assert_eq(slu_source_open_file(lab_path(&lab, "a.sla"), &inner, &err), 0);
    struct faulty faulty;
    int n_failed = 0;
    for (int at = 0;; at++) {
        struct slu_ledger *ledger = slu_ledger_create(0);
        struct slu_adapter *adapter = NULL;
        faulty_init(&faulty, inner, at);
        int rc = slu_adapter_open(&faulty.base, &base, ledger, &adapter, &err);
        slu_adapter_close(adapter);
        cr_assert_eq(slu_ledger_used(ledger), 0);
        slu_ledger_destroy(ledger);
        if (rc == 0) {
            break;
        }
        cr_assert_eq(rc, SLU_EIO);
        n_failed++;
    }
    cr_assert_geq(n_failed, 4); /* header, metadata, index, frames */
    slu_source_destroy(inner);
    lab_close(&lab);
}

/* The writer refuses what no reader would take, and leaves nothing behind. */
Test(adapter_sla, writer_refuses)
{
    struct lab lab;
    struct slu_sla_writer *writer;
    struct slu_err err = {0};
    lab_open(&lab);
    cr_assert_eq(slu_sla_writer_create(lab_path(&lab, "a.sla"), &writer, &err), 0);
    struct slu_sla_record record = small[0];
    record.rank = 4097;
    lab_expect_refusal(slu_sla_writer_pair(writer, &record, &err), &err, SLU_EUNSUP,
                       "of rank 4097");
    record = small[0];
    record.layer = 512;
    lab_expect_refusal(slu_sla_writer_pair(writer, &record, &err), &err, SLU_EUNSUP, "below 512");
    record = small[0];
    record.out = 0;
    lab_expect_refusal(slu_sla_writer_pair(writer, &record, &err), &err, SLU_EUNSUP, "no shape");
    lab_expect_refusal(slu_sla_writer_finish(writer, &info, &err), &err, SLU_EFORMAT, "no pair");
    struct slu_sla_record experts[2] = {small[2], small[2]};
    experts[1].target = SLU_TARGET_EXPERT_DOWN;
    experts[1].n = 5;
    lab_expect_refusal(slu_sla_writer_experts(writer, experts, 2, &err), &err, SLU_EUNSUP,
                       "ffn_gate_exps has pairs for 4 experts, but ffn_down_exps for 5");
    slu_sla_writer_destroy(writer);
    cr_assert_eq(slu_sla_writer_create(lab_path(&lab, "a.sla"), &writer, &err), 0);
    experts[0].in = experts[0].out = 1 << 14;
    experts[0].rank = 1024;
    lab_expect_refusal(slu_sla_writer_experts(writer, experts, 1, &err), &err, SLU_EUNSUP,
                       "up to 67108864 are supported");
    slu_sla_writer_destroy(writer);
    cr_assert_eq(remove(lab_path(&lab, "a.sla")), -1);
    cr_assert_eq(rmdir(lab.dir), 0);
    cr_assert_lt(slu_sla_writer_create(lab_path(&lab, "a.sla"), &writer, &err), 0);
}
