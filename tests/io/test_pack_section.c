#include <criterion/criterion.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "io/pack_section.h"
#include "make.h"

static const char *made_pack(void)
{
    const char *path = make_temp_path("section.slu");
    make_pack_file(path, SLU_CODEC_ZSTD, 0);
    return path;
}

static struct slu_pack *opened(const char *path)
{
    struct slu_pack *pack;
    struct slu_err err = {0};
    cr_assert_eq(slu_pack_open_file(path, &pack, &err), 0, "%s", err.text);
    return pack;
}

static void put(const char *path, const void *data, size_t bytes)
{
    struct slu_err err = {0};
    cr_assert_eq(slu_pack_section_write(path, SLU_SECTION_PREDICTOR, data, bytes, &err), 0, "%s",
                 err.text);
}

static void expect_section(const char *path, const void *data, size_t bytes)
{
    struct slu_pack *pack = opened(path);
    cr_assert_eq(pack->section_err.code, 0, "%s", pack->section_err.text);
    cr_assert_eq(pack->section_bytes, bytes);
    cr_assert_arr_eq(pack->section, data, bytes);
    slu_pack_close(pack);
}

/* What was put in is read; the fingerprint and the model's bytes stay; without it the file is what
 * it was, to the byte. */
Test(pack_section, round_trip)
{
    const char *path = made_pack();
    struct make before = {0}, with = {0}, after = {0};
    uint8_t data[9000];
    make_read_file(&before, path);
    struct slu_pack *pack = opened(path);
    uint64_t fingerprint = pack->fingerprint;
    cr_assert_null(pack->section);
    slu_pack_close(pack);
    make_fill(data, sizeof data, 1);
    put(path, data, sizeof data);
    expect_section(path, data, sizeof data);
    pack = opened(path);
    cr_assert_eq(pack->fingerprint, fingerprint);
    slu_pack_close(pack);
    make_read_file(&with, path);
    cr_assert_eq(with.bytes, before.bytes + 3 * SLU_PACK_ALIGN);
    cr_assert_arr_eq(with.data + SLU_PACK_ALIGN, before.data + SLU_PACK_ALIGN,
                     before.bytes - SLU_PACK_ALIGN);
    struct slu_err err;
    cr_assert_eq(slu_pack_section_remove(path, &err), 0, "%s", err.text);
    make_read_file(&after, path);
    cr_assert_eq(after.bytes, before.bytes);
    cr_assert_arr_eq(after.data, before.data, before.bytes);
    make_free(&before);
    make_free(&with);
    make_free(&after);
}

/* The small pack as one of version 3: its matrix is of a format over 12 (io/ doesn't ask whether
 * the shape suits it), and index and header are sealed anew. */
static const char *made_pack_of_formats(void)
{
    const char *path = make_temp_path("formats.slu");
    make_pack_file(path, SLU_CODEC_RAW, 0);
    struct make file = {0};
    make_read_file(&file, path);
    struct slu_pack_header header;
    memcpy(&header, file.data, sizeof header);
    cr_assert_eq(header.index.codec, SLU_CODEC_RAW);
    uint8_t *index = file.data + header.index.offset;
    uint32_t fmt = 14 + 256 * 3; /* q4e with room for escapes */
    memcpy(index + offsetof(struct slu_pack_tensor, fmt), &fmt, sizeof fmt);
    header.index.checksum = slu_checksum(index, header.index.stored_bytes);
    header.version = SLU_PACK_VERSION_FORMATS;
    header.checksum = slu_checksum(&header, offsetof(struct slu_pack_header, checksum));
    memcpy(file.data, &header, sizeof header);
    make_write_file(path, file.data, file.bytes);
    make_free(&file);
    return path;
}

/* The pack at path is of version 3 and this fingerprint, and its model's bytes are these. */
static void expect_formats(const char *path, const struct make *before, uint64_t fingerprint)
{
    struct make now = {0};
    struct slu_pack *pack = opened(path);
    cr_assert_eq(pack->header.version, SLU_PACK_VERSION_FORMATS);
    cr_assert_eq(pack->fingerprint, fingerprint);
    cr_assert_eq(pack->header.file_bytes, before->bytes);
    slu_pack_close(pack);
    make_read_file(&now, path);
    cr_assert_geq(now.bytes, before->bytes);
    cr_assert_arr_eq(now.data, before->data, sizeof(struct slu_pack_header));
    cr_assert_arr_eq(now.data + SLU_PACK_ALIGN, before->data + SLU_PACK_ALIGN,
                     before->bytes - SLU_PACK_ALIGN);
    make_free(&now);
}

/* A pack of version 3 keeps its number, header and fingerprint while a section is put in, replaced
 * and taken away, and is then what it was, to the byte. */
Test(pack_section, of_formats_over_12)
{
    const char *path = made_pack_of_formats();
    struct make before = {0}, after = {0};
    struct slu_err err = {0};
    uint8_t data[9000];
    make_read_file(&before, path);
    struct slu_pack *pack = opened(path);
    uint64_t fingerprint = pack->fingerprint;
    cr_assert_eq(pack->header.version, SLU_PACK_VERSION_FORMATS);
    cr_assert_null(pack->section);
    cr_assert_eq(pack->section_err.code, 0);
    slu_pack_close(pack);
    for (uint32_t i = 1; i <= 3; i++) {
        size_t bytes = sizeof data / i;
        make_fill(data, bytes, i);
        put(path, data, bytes);
        expect_section(path, data, bytes);
        expect_formats(path, &before, fingerprint);
    }
    for (int twice = 0; twice < 2; twice++) { /* there is nothing to take away the second time */
        cr_assert_eq(slu_pack_section_remove(path, &err), 0, "%s", err.text);
        make_read_file(&after, path);
        cr_assert_eq(after.bytes, before.bytes);
        cr_assert_arr_eq(after.data, before.data, before.bytes);
        make_free(&after);
    }
    make_free(&before);
}

/* The checksum of a pack of version 3 is that of its own number: relabelled as one of version 1 or
 * 2, which lack its formats, it is refused. */
Test(pack_section, formats_are_not_relabelled)
{
    const char *path = made_pack_of_formats();
    struct make file = {0};
    make_read_file(&file, path);
    for (uint32_t version = 0; version <= 4; version++) {
        if (version == SLU_PACK_VERSION_FORMATS) {
            continue;
        }
        struct slu_pack *pack;
        struct slu_err err = {0};
        memcpy(file.data + offsetof(struct slu_pack_header, version), &version, sizeof version);
        make_write_file(path, file.data, file.bytes);
        int rc = slu_pack_open_file(path, &pack, &err);
        cr_assert_eq(rc, version > 3 ? SLU_EUNSUP : SLU_EFORMAT, "%u: %s", version, err.text);
    }
    make_free(&file);
}

/* Replacing again and again neither grows the file without end nor loses anything. */
Test(pack_section, is_replaced_in_bounded_room)
{
    const char *path = made_pack();
    struct make file = {0};
    uint8_t data[3 * SLU_PACK_ALIGN];
    make_read_file(&file, path);
    size_t model = file.bytes;
    make_free(&file);
    for (uint32_t i = 0; i < 12; i++) {
        size_t bytes = 1 + (i * 5000) % sizeof data;
        make_fill(data, bytes, i);
        put(path, data, bytes);
        expect_section(path, data, bytes);
        file = (struct make){0};
        make_read_file(&file, path);
        cr_assert_leq(file.bytes, model + 7 * SLU_PACK_ALIGN);
        make_free(&file);
    }
}

/* A writer that is killed after any of its steps leaves the old section or the new one, or none if
 * there was none, and always a model; and the next writer succeeds. */
Test(pack_section, survives_a_kill_at_any_step)
{
    uint8_t old[5000], fresh[7000];
    make_fill(old, sizeof old, 1);
    make_fill(fresh, sizeof fresh, 2);
    for (int had = 0; had < 2; had++) {
        bool was_new = false;
        for (unsigned n_steps = 0; n_steps < 10; n_steps++) {
            const char *path = made_pack();
            struct slu_err err = {0};
            if (had) {
                put(path, old, sizeof old);
            }
            cr_assert_eq(slu_pack_section_write_steps(path, SLU_SECTION_PREDICTOR, fresh,
                                                      sizeof fresh, n_steps, &err),
                         0);
            struct slu_pack *pack = opened(path);
            cr_assert_eq(pack->section_err.code, 0, "%s", pack->section_err.text);
            bool is_new = pack->section_bytes == sizeof fresh;
            cr_assert(is_new || pack->section_bytes == (had ? sizeof old : 0));
            cr_assert(is_new || !was_new);
            cr_assert_arr_eq(is_new ? fresh : old, pack->section ? pack->section : old,
                             pack->section_bytes);
            was_new = is_new;
            slu_pack_close(pack);
            put(path, fresh, sizeof fresh);
            expect_section(path, fresh, sizeof fresh);
        }
        cr_assert(was_new);
    }
}

/* Any byte of record or section put wrong, or one beside the record, which is zero: a sentence, no
 * section, and a model all the same. */
Test(pack_section, damage_is_told)
{
    const char *path = made_pack();
    struct make file = {0};
    uint8_t data[300];
    make_fill(data, sizeof data, 3);
    put(path, data, sizeof data);
    make_read_file(&file, path);
    size_t section = file.bytes - SLU_PACK_ALIGN, n_record = sizeof(struct slu_pack_section);
    const size_t beside[] = {sizeof(struct slu_pack_header), SLU_PACK_SECTION_AT - 1,
                             SLU_PACK_SECTION_AT + n_record, SLU_PACK_ALIGN - 1};
    for (size_t i = 0; i < sizeof data + n_record + sizeof beside / sizeof *beside; i++) {
        size_t at = i < sizeof data              ? section + i
                    : i < sizeof data + n_record ? SLU_PACK_SECTION_AT + i - sizeof data
                                                 : beside[i - sizeof data - n_record];
        file.data[at] ^= 0x20;
        make_write_file(path, file.data, file.bytes);
        struct slu_pack *pack = opened(path);
        cr_assert_null(pack->section);
        cr_assert_lt(pack->section_err.code, 0);
        cr_assert_not_null(strstr(pack->section_err.text, "section"), "%s", pack->section_err.text);
        slu_pack_close(pack);
        file.data[at] ^= 0x20;
    }
    make_free(&file);
}

/* Records that are sealed but say what can't be. */
Test(pack_section, sealed_nonsense_is_told)
{
    const char *path = made_pack();
    struct make file = {0};
    uint8_t data[300] = {1};
    put(path, data, sizeof data);
    make_read_file(&file, path);
    for (int which = 0; which < 9; which++) {
        struct slu_pack_section record;
        memcpy(&record, file.data + SLU_PACK_SECTION_AT, sizeof record);
        struct slu_pack_section good = record;
        struct slu_extent *extent = &record.extent;
        switch (which) {
        case 0:
            extent->offset = 0;
            break;
        case 1:
            extent->offset -= SLU_PACK_ALIGN;
            break;
        case 2:
            extent->offset = UINT64_MAX & ~4095ull;
            break;
        case 3:
            extent->offset += 1;
            break;
        case 4:
            extent->stored_bytes = extent->raw_bytes = UINT32_MAX;
            break;
        case 5:
            extent->stored_bytes = extent->raw_bytes = 0;
            break;
        case 6:
            extent->codec = SLU_CODEC_ZSTD;
            break;
        case 7:
            record.kind = 77;
            break;
        default:
            record.fingerprint ^= 1;
            break;
        }
        record.checksum = slu_checksum(&record, offsetof(struct slu_pack_section, checksum));
        memcpy(file.data + SLU_PACK_SECTION_AT, &record, sizeof record);
        make_write_file(path, file.data, file.bytes);
        struct slu_pack *pack = opened(path);
        cr_assert_null(pack->section, "case %d", which);
        cr_assert_lt(pack->section_err.code, 0, "case %d", which);
        slu_pack_close(pack);
        memcpy(file.data + SLU_PACK_SECTION_AT, &good, sizeof good);
    }
    make_free(&file);
}

/* No bytes and too many are refused, and the pack stays as it is. */
Test(pack_section, refuses_sizes)
{
    const char *path = made_pack();
    struct slu_err err;
    uint8_t byte = 0;
    cr_assert_eq(slu_pack_section_write(path, SLU_SECTION_PREDICTOR, &byte, 0, &err), SLU_EINVAL);
    cr_assert_eq(slu_pack_section_write(path, SLU_SECTION_PREDICTOR, &byte,
                                        SLU_PACK_SECTION_BYTES_MAX + 1, &err),
                 SLU_EINVAL);
    struct slu_pack *pack = opened(path);
    cr_assert_eq(pack->header.version, SLU_PACK_VERSION);
    slu_pack_close(pack);
}
