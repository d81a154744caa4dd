#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "io/codec.h"
#include "scratch.h"
#include "tools/route_trace.h"
#include "tools/trace_parts.h"

#define TOKENS 3u
#define ROUTED 2u
#define USED   2u

/* Three layers, of which the second has no router. */
static struct slu_trace_shape shape(uint32_t n_experts)
{
    return (struct slu_trace_shape){.fingerprint = 7,
                                    .input = 9,
                                    .n_layers = 3,
                                    .n_experts = n_experts,
                                    .n_used = USED,
                                    .n_vocab = 100,
                                    .n_routed = ROUTED,
                                    .layers = {0, 2}};
}

static const int32_t ids[TOKENS] = {5, 99, 0};
static const uint16_t experts[TOKENS * ROUTED * USED] = {1, 0, 2, 3, 3, 1, 0, 2, 1, 2, 3, 0};
static const float weights[TOKENS * ROUTED * USED] = {.5f, .5f, .75f, .25f, 1, 0,
                                                      .9f, .1f, 2,    1,    0, 0};

static const struct slu_trace_prompt prompt = {TOKENS, 2, ids, experts, weights};

static void write_trace(const char *path, uint32_t n_experts, uint32_t n_prompts)
{
    struct slu_trace_writer *writer;
    struct slu_trace_shape s = shape(n_experts);
    struct slu_err err = {0};
    cr_assert_eq(slu_trace_writer_create(path, &s, NULL, &writer, &err), 0, "%s", err.text);
    for (uint32_t i = 0; i < n_prompts; i++) {
        cr_assert_eq(slu_trace_writer_append(writer, &prompt, &err), 0, "%s", err.text);
    }
    cr_assert_eq(slu_trace_writer_finish(writer, &err), 0, "%s", err.text);
    slu_trace_writer_destroy(writer, true);
}

/* Reads all; the number of prompts, or the error. */
static int read_bytes(const void *data, size_t bytes, struct slu_err *err)
{
    struct slu_source *source;
    struct slu_trace_reader *reader;
    struct slu_trace_prompt got;
    int n = 0;
    cr_assert_eq(slu_source_open_memory(data, bytes, "bytes.slt", &source), 0);
    int rc = slu_trace_reader_create(source, &reader, err);
    if (rc == 0) {
        while ((rc = slu_trace_reader_next(reader, &got, err)) > 0) {
            n++;
        }
        slu_trace_reader_destroy(reader);
    }
    slu_source_destroy(source);
    return rc < 0 ? rc : n;
}

/* Ids, experts and weights come back, with experts of one and of two bytes. */
Test(trace_file, round_trip)
{
    for (uint32_t n_experts = 4; n_experts <= 300; n_experts += 296) {
        struct scratch scratch;
        scratch_init(&scratch);
        const char *path = scratch_path(&scratch, "a.slt");
        write_trace(path, n_experts, 2);
        cr_assert_eq(scratch_count(&scratch), 1);
        struct slu_source *source;
        struct slu_trace_reader *reader;
        struct slu_trace_prompt got;
        struct slu_err err;
        cr_assert_eq(slu_source_open_file(path, &source, &err), 0);
        cr_assert_eq(slu_trace_reader_create(source, &reader, &err), 0, "%s", err.text);
        cr_assert_eq(slu_trace_reader_shape(reader)->fingerprint, 7);
        cr_assert_eq(slu_trace_reader_shape(reader)->layers[1], 2);
        for (int i = 0; i < 2; i++) {
            cr_assert_eq(slu_trace_reader_next(reader, &got, &err), 1, "%s", err.text);
            cr_assert(got.n_tokens == TOKENS && got.n_prompt == 2);
            cr_assert_arr_eq(got.ids, ids, sizeof ids);
            cr_assert_arr_eq(got.experts, experts, sizeof experts);
            for (size_t j = 0; j < sizeof weights / sizeof *weights; j++) {
                cr_assert_float_eq(got.weights[j], weights[j], .013, "weight %zu", j);
            }
        }
        cr_assert_eq(slu_trace_reader_next(reader, &got, &err), 0);
        slu_trace_reader_destroy(reader);
        slu_source_destroy(source);
        scratch_finish(&scratch);
    }
}

/* The cache's replay reads this form like the text one. */
Test(trace_file, replays)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "a.slt");
    write_trace(path, 4, 2);
    struct slu_route_trace trace;
    struct slu_err err;
    cr_assert_eq(slu_route_trace_open(path, &trace, &err), 0, "%s", err.text);
    cr_assert(trace.n_layers == 3 && trace.n_routed_layers == 2 && trace.n_tokens == 6);
    cr_assert(trace.n_decoded_tokens == 2 && trace.n_visits == 12 && trace.n_choices == 24);
    cr_assert(trace.visits[5].layer == 2 && trace.visits[5].is_decoding);
    cr_assert(trace.experts[12] == 1 && trace.experts[2] == 2);
    slu_route_trace_finish(&trace);
    scratch_finish(&scratch);
}

/* A run that was killed within a prompt is gone on with behind its last whole one; with another
 * input it is begun anew. */
Test(trace_file, resumes)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "a.slt");
    write_trace(path, 4, 3);
    size_t bytes;
    uint8_t *data = scratch_read(path, &bytes);
    struct slu_trace_shape s = shape(4);
    struct slu_trace_writer *writer;
    struct slu_err err;
    for (int other = 0; other < 2; other++) {
        uint32_t n_done = UINT32_MAX;
        scratch_write(scratch_path(&scratch, "b.slt.part"), data, bytes - 5);
        s.input += (uint64_t)other;
        cr_assert_eq(
            slu_trace_writer_create(scratch_path(&scratch, "b.slt"), &s, &n_done, &writer, &err), 0,
            "%s", err.text);
        cr_assert_eq(n_done, other ? 0 : 2);
        cr_assert_eq(slu_trace_writer_append(writer, &prompt, &err), 0);
        cr_assert_eq(slu_trace_writer_finish(writer, &err), 0, "%s", err.text);
        slu_trace_writer_destroy(writer, true);
        size_t got_bytes;
        uint8_t *got = scratch_read(scratch_path(&scratch, "b.slt"), &got_bytes);
        cr_assert_eq(read_bytes(got, got_bytes, &err), other ? 1 : 3, "%s", err.text);
        cr_assert(other || (got_bytes == bytes && memcmp(got, data, bytes) == 0));
        free(got);
    }
    free(data);
    scratch_finish(&scratch);
}

/* Every byte put wrong is noticed, and so is every length. */
Test(trace_file, damage_is_refused)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "a.slt");
    write_trace(path, 4, 2);
    size_t bytes;
    uint8_t *data = scratch_read(path, &bytes);
    struct slu_err err;
    for (size_t i = 0; i < bytes; i++) {
        data[i] ^= 0x10;
        cr_assert_lt(read_bytes(data, bytes, &err), 0, "byte %zu", i);
        cr_assert_not_null(strstr(err.text, "bytes.slt"), "%s", err.text);
        data[i] ^= 0x10;
    }
    size_t header = slu_trace_header_bytes(ROUTED);
    size_t record =
        sizeof(struct slu_trace_record) +
        slu_trace_payload_bytes(
            &(struct slu_trace_shape){.n_experts = 4, .n_used = USED, .n_routed = ROUTED}, TOKENS);
    for (size_t n = 0; n < bytes; n++) {
        int rc = read_bytes(data, n, &err);
        bool is_whole = n >= header && (n - header) % record == 0;
        cr_assert(is_whole ? rc >= 0 : rc < 0, "%zu bytes give %d", n, rc);
    }
    free(data);
    scratch_finish(&scratch);
}

/* Sealed headers and prompts that say what can't be. */
Test(trace_file, sealed_nonsense_is_refused)
{
    struct scratch scratch;
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "a.slt");
    write_trace(path, 4, 1);
    size_t bytes, head = slu_trace_header_bytes(ROUTED);
    uint8_t *data = scratch_read(path, &bytes), *copy = malloc(bytes);
    for (int which = 0; which < 12; which++) {
        struct slu_trace_header *h = (struct slu_trace_header *)copy;
        struct slu_trace_record *r = (struct slu_trace_record *)(copy + head);
        uint8_t *payload = copy + head + sizeof *r;
        memcpy(copy, data, bytes);
        switch (which) {
        case 0:
            h->n_experts = 1;
            break; /* fewer than are used */
        case 1:
            h->n_layers = UINT32_MAX;
            break;
        case 2:
            h->n_routed = 4000;
            break; /* a list beyond the file */
        case 3:
            h->version = 2;
            break;
        case 4:
            h->n_used = 65000;
            break;
        case 5:
            memset(h + 1, 0xff, 4);
            break; /* a layer that isn't there */
        case 6:
            r->n_tokens = SLU_TRACE_TOKENS_MAX;
            break;
        case 7:
            r->n_prompt = TOKENS + 1;
            break;
        case 8:
            r->n_tokens = 0;
            break;
        case 9:
            memset(payload, 0xff, 4);
            break; /* an id below 0 */
        case 10:
            payload[4 * TOKENS + 2] = 4;
            break; /* an expert that isn't there */
        default:
            payload[4 * TOKENS + 3] = payload[4 * TOKENS + 2];
            break; /* one twice */
        }
        uint64_t sum = slu_checksum(copy, head - 8);
        memcpy(copy + head - 8, &sum, 8);
        r->checksum = slu_trace_record_checksum(r, payload, bytes - head - sizeof *r);
        struct slu_err err = {0};
        int rc = read_bytes(copy, bytes, &err);
        cr_assert_eq(rc, which == 3 ? SLU_EUNSUP : SLU_EFORMAT, "case %d gives %d", which, rc);
    }
    free(copy);
    free(data);
    scratch_finish(&scratch);
}
